"""Floating-point operations of a model, counted on its real configuration without its weights.

Every part is built on the meta device, where a forward or backward only propagates shapes, and torch's
`FlopCounterMode` adds up the matrix products, convolutions and attention; a multiply-add is two operations. Elementwise
work, which costs bandwidth rather than arithmetic, is not in these numbers.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from densegrpo_fast.models.feature_cache import FeatureCache
from densegrpo_fast.models.sd3 import SD3

ATTENTION_TARGETS = (
    "attn.to_q",
    "attn.to_k",
    "attn.to_v",
    "attn.to_out.0",
    "attn.add_q_proj",
    "attn.add_k_proj",
    "attn.add_v_proj",
    "attn.to_add_out",
)
"""The attention projections of joint-attention transformers, which Flow-GRPO adapts."""

SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}
"""Configuration of Stable Diffusion 3.5 Medium's transformer."""

FLUX1_DEV = {
    "patch_size": 1,
    "in_channels": 64,
    "num_layers": 19,
    "num_single_layers": 38,
    "attention_head_dim": 128,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 768,
    "guidance_embeds": True,
}
"""Configuration of FLUX.1-dev's transformer; its guidance is an input, not a second forward."""

LARGE_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""Configuration of the autoencoder that SD3, SD3.5 and FLUX.1 share."""

CLIP_H = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 1024,
}
"""Image tower of CLIP ViT-H/14, which PickScore and HPS score with."""


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations of one row through each part of a model.

    Attributes:
        forward: one network forward with the adapter, not merged.
        reference_forward: one network forward without the adapter.
        backward: one backward to the adapter alone; the forward is not in it.
        full_decode: one image through the pipeline's autoencoder.
        preview_decode: one image through the preview decoder; NaN without one.
        reward: one image through the reward model.
    """

    forward: float
    reference_forward: float
    backward: float
    full_decode: float
    preview_decode: float
    reward: float


@dataclass(frozen=True)
class Architecture:
    """How to build the parts of a model; the builders are called under the meta device.

    Attributes:
        title: name, image size and text length, for people.
        network: builds the transformer.
        inputs: makes the transformer's keyword arguments for one row from its configuration.
        latent_shape: of one sample, as the decoders see it, (C, H, W).
        full_decoder: builds the autoencoder.
        preview_decoder: builds the preview decoder, or None.
        guided: whether guidance takes a second forward.
    """

    title: str
    network: Callable[[], Any]
    inputs: Callable[[Any], dict[str, Tensor]]
    latent_shape: tuple[int, int, int]
    full_decoder: Callable[[], Any]
    preview_decoder: Callable[[], Any] | None
    guided: bool = True


def embedded() -> Architecture:
    """The embedded model at its own 64 pixels."""
    from densegrpo_fast.embedded import architecture as parts

    size, tokens = parts.LATENT_SIZE, parts.MAX_TOKENS
    shape = (parts.LATENT_CHANNELS, size, size)
    return Architecture(
        f"embedded model, 64 px, {tokens} text tokens",
        parts.build_transformer,
        lambda config: _sd3_inputs(shape, tokens, config),
        shape,
        parts.build_vae,
        parts.build_preview_decoder,
    )


def sd35_medium(pixels: int = 512, text_tokens: int = 205) -> Architecture:
    """Stable Diffusion 3.5 Medium; 205 text tokens are CLIP's 77 and Flow-GRPO's 128 of T5."""
    from diffusers import AutoencoderKL, AutoencoderTiny, SD3Transformer2DModel

    shape = (16, pixels // 8, pixels // 8)
    return Architecture(
        f"SD3.5-Medium, {pixels} px, {text_tokens} text tokens",
        lambda: SD3Transformer2DModel(**SD35_MEDIUM),
        lambda config: _sd3_inputs(shape, text_tokens, config),
        shape,
        lambda: AutoencoderKL(**LARGE_VAE),
        lambda: AutoencoderTiny(latent_channels=16),
    )


def flux(pixels: int = 512, text_tokens: int = 256) -> Architecture:
    """FLUX.1-dev, whose transformer sees 2x2 patches of the latents as tokens of 64 values."""
    from diffusers import AutoencoderKL, AutoencoderTiny, FluxTransformer2DModel

    tokens = (pixels // 16) ** 2
    return Architecture(
        f"FLUX.1-dev, {pixels} px, {text_tokens} text tokens",
        lambda: FluxTransformer2DModel(**FLUX1_DEV),
        lambda config: {
            "hidden_states": torch.empty(1, tokens, config["in_channels"]),
            "encoder_hidden_states": torch.empty(1, text_tokens, config["joint_attention_dim"]),
            "pooled_projections": torch.empty(1, config["pooled_projection_dim"]),
            "timestep": torch.empty(1),
            "guidance": torch.empty(1),
            "img_ids": torch.empty(tokens, 3),
            "txt_ids": torch.empty(text_tokens, 3),
        },
        (16, pixels // 8, pixels // 8),
        lambda: AutoencoderKL(**LARGE_VAE),
        lambda: AutoencoderTiny(latent_channels=16),
        guided=False,
    )


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "embedded": embedded,
    "sd35_medium": sd35_medium,
    "flux": flux,
}
"""The models whose cost is known by name."""


def architecture_of(model: SD3) -> Architecture:
    """The architecture of a loaded model, at its image size and text length."""
    network, vae, preview = model.transformer, model.pipeline.vae, model.preview_decoder
    channels, height, width = model.latent_shape
    tokens = model.encode([""]).embeds.shape[1]
    return Architecture(
        f"{type(network).__name__}, latents {channels}x{height}x{width}, {tokens} text tokens",
        lambda: _like(network),
        lambda config: _sd3_inputs((channels, height, width), tokens, config),
        (channels, height, width),
        lambda: _like(vae),
        None if preview is None else lambda: _like(preview),
    )


def count(
    architecture: Architecture,
    *,
    lora_rank: int = 32,
    lora_targets: tuple[str, ...] = ATTENTION_TARGETS,
    reward: float = 0.0,
) -> ModelFlops:
    """Count an architecture's operations; seconds, and no memory to speak of.

    Args:
        architecture: what to count.
        lora_rank: of the adapter.
        lora_targets: suffixes of the names of the adapted projections.
        reward: operations of the reward model for one image, e.g. `clip_h_image()`.
    """
    from densegrpo_fast.models.lora_linear import lora_config

    with torch.device("meta"):
        network = architecture.network().requires_grad_(False)
        inputs = architecture.inputs(network.config)
        with torch.no_grad():
            reference = counted(lambda: network(**inputs))
        network.add_adapter(lora_config(r=lora_rank, lora_alpha=lora_rank, target_modules=list(lora_targets)))
        outputs: list[Tensor] = []
        forward = counted(lambda: outputs.append(network(**inputs, return_dict=False)[0]))
        backward = counted(lambda: outputs[0].sum().backward())
        latents = torch.empty(1, *architecture.latent_shape)
        full, preview = architecture.full_decoder(), architecture.preview_decoder
        with torch.no_grad():
            full_decode = counted(lambda: full.decode(latents))
            preview_decode = math.nan
            if preview is not None:
                small = preview()
                preview_decode = counted(lambda: small.decode(latents))
    return ModelFlops(forward, reference, backward, full_decode, preview_decode, reward)


def cached_forward(
    architecture: Architecture,
    *,
    lora_rank: int = 32,
    lora_targets: tuple[str, ...] = ATTENTION_TARGETS,
) -> float:
    """Operations of one network forward that reuses a rollout's text features; counted like `count`'s `forward`.

    Args:
        architecture, lora_targets: as for `count`.
        lora_rank: of the adapter; 0 = merged into the weights, or none.

    Raises:
        ValueError: the architecture's text features cannot be kept.
    """
    from densegrpo_fast.models.lora_linear import lora_config

    with torch.device("meta"), torch.no_grad():
        network = architecture.network().requires_grad_(False)
        inputs = architecture.inputs(network.config)
        if lora_rank:
            network.add_adapter(lora_config(r=lora_rank, lora_alpha=lora_rank, target_modules=list(lora_targets)))
        cache, row = FeatureCache(network, nodes=(1,), rows=1), slice(0, 1)
        with cache.record(1, row):
            network(**inputs)
        with cache.reuse(1, row):
            return counted(lambda: network(**inputs))


def clip_h_image() -> float:
    """Operations of one 224-pixel image through CLIP ViT-H/14, as PickScore scores it."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.device("meta"), torch.no_grad():
        tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP_H))
        pixels = torch.empty(1, 3, CLIP_H["image_size"], CLIP_H["image_size"])
        return counted(lambda: tower(pixel_values=pixels))


def counted(call: Callable[[], object]) -> float:
    """Floating-point operations of one call."""
    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def _like(module: Any) -> Any:
    """A new module of the same class and configuration, less the entries that its class derived itself."""
    accepted = inspect.signature(type(module)).parameters
    return type(module)(**{key: value for key, value in module.config.items() if key in accepted})


def _sd3_inputs(latent_shape: tuple[int, int, int], text_tokens: int, config: Any) -> dict[str, Tensor]:
    return {
        "hidden_states": torch.empty(1, *latent_shape),
        "encoder_hidden_states": torch.empty(1, text_tokens, config["joint_attention_dim"]),
        "pooled_projections": torch.empty(1, config["pooled_projection_dim"]),
        "timestep": torch.empty(1),
    }
