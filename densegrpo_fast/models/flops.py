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
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from densegrpo_fast.models import published
from densegrpo_fast.models.base import network_class
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.families import FAMILIES
from densegrpo_fast.models.family import JOINT_ATTENTION, Family
from densegrpo_fast.models.feature_cache import FeatureCache

ATTENTION_TARGETS = JOINT_ATTENTION

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
        backward: one backward to the adapter alone, or to all weights if they are trained; the forward is not in it.
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
        network: builds the network.
        inputs: makes the network's keyword arguments, given the network and a number of rows.
        latent_shape: of one sample, as the decoders see it, (C, H, W) or (C, F, H, W).
        full_decoder: builds the autoencoder.
        preview_decoder: builds the preview decoder, or None.
        decode: pictures by the full decoder of latents [B, *latent_shape].
        guided: whether guidance takes a second forward.
    """

    title: str
    network: Callable[[], Any]
    inputs: Callable[[Any, int], dict[str, Any]]
    latent_shape: tuple[int, ...]
    full_decoder: Callable[[], Any]
    preview_decoder: Callable[[], Any] | None
    decode: Callable[[Any, Tensor], Tensor]
    guided: bool = True


def embedded() -> Architecture:
    """The embedded model at its own 64 pixels."""
    from densegrpo_fast.embedded import architecture as parts

    return architecture(
        "StableDiffusion3Pipeline",
        "embedded model",
        network=parts.build_transformer,
        full_decoder=parts.build_vae,
        preview_decoder=parts.build_preview_decoder,
        pixels=parts.LATENT_SIZE * 4,
        text_tokens=parts.MAX_TOKENS,
    )


def sd35_medium(pixels: int = 512, text_tokens: int = 205) -> Architecture:
    """Stable Diffusion 3.5 Medium; 205 text tokens are CLIP's 77 and Flow-GRPO's 128 of T5."""
    return known("sd35_medium", pixels, text_tokens)


def flux(pixels: int = 512, text_tokens: int = 256) -> Architecture:
    """FLUX.1-dev, whose transformer sees 2x2 patches of the latents as tokens of 64 values."""
    return known("flux", pixels, text_tokens)


def known(name: str, pixels: int = 0, text_tokens: int = 0, frames: int = 1) -> Architecture:
    """A model of `published.MODELS`, at its usual size and text length or others."""
    import diffusers

    model = published.MODELS[name]
    network, vae = getattr(diffusers, model.network), getattr(diffusers, model.vae)
    channels = model.preview_channels
    return architecture(
        model.pipeline,
        model.title,
        network=lambda: network(**model.network_config),
        full_decoder=lambda: vae(**model.vae_config),
        preview_decoder=None if channels is None else lambda: diffusers.AutoencoderTiny(latent_channels=channels),
        pixels=pixels or model.pixels,
        text_tokens=text_tokens or model.text_tokens,
        frames=frames,
    )


def architecture(
    pipeline: str,
    title: str,
    *,
    network: Callable[[], Any],
    full_decoder: Callable[[], Any],
    preview_decoder: Callable[[], Any] | None,
    pixels: int,
    text_tokens: int,
    frames: int = 1,
) -> Architecture:
    """The architecture of a model that is known by its configurations.

    Args:
        pipeline: class of its pipeline, one of a known family.
        title: its name.
        network, full_decoder, preview_decoder: as in `Architecture`.
        pixels: side of its pictures.
        text_tokens: of a prompt.
        frames: of a video; 1 = a picture.
    """
    with torch.device("meta"):
        parts = SimpleNamespace(vae=full_decoder(), scheduler=SimpleNamespace(config={"num_train_timesteps": 1000}))
        setattr(parts, FAMILIES[pipeline].network_part, network())
        family = FAMILIES[pipeline](parts, height=pixels, width=pixels, frames=frames)
    return _architecture(
        family,
        f"{title}, {f'{frames} frames of ' if frames > 1 else ''}{pixels} px, {text_tokens} text tokens",
        lambda rows: family.example(rows, text_tokens),
        network,
        full_decoder,
        preview_decoder,
    )


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {
    "embedded": embedded,
    **{name: partial(known, name) for name in ("sd35_medium", "flux")},
}
"""The models whose plans are compared by cost."""


def architecture_of(model: DiffusersModel) -> Architecture:
    """The architecture of a loaded model, at its image size and text length."""
    network, vae, preview = model.network, model.pipeline.vae, model.preview_decoder
    encoded = model.encode([model.family.negative_prompt]).prompts
    shapes = {name: (tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in encoded.items()}
    size = "x".join(str(side) for side in model.latent_shape)
    tokens = max(shape[0] for shape, _ in shapes.values() if len(shape) > 1)
    return _architecture(
        model.family,
        f"{network_class(network).__name__}, latents {size}, {tokens} text tokens",
        lambda rows: {name: torch.empty(rows, *shape, dtype=dtype) for name, (shape, dtype) in shapes.items()},
        lambda: _like(network),
        lambda: _like(vae),
        None if preview is None else lambda: _like(preview),
    )


def _architecture(
    family: Family,
    title: str,
    prompts: Callable[[int], dict[str, Tensor]],
    network: Callable[[], Any],
    full_decoder: Callable[[], Any],
    preview_decoder: Callable[[], Any] | None,
) -> Architecture:
    def inputs(network: Any, rows: int) -> dict[str, Any]:
        dtype = network.dtype
        own = {name: t.to(dtype) if t.is_floating_point() else t for name, t in prompts(rows).items()}
        return family.inputs(torch.empty(rows, *family.latent_shape, dtype=dtype), torch.empty(rows), own, 2.0)

    grid = family.grid(torch.empty(1, *family.latent_shape, device="meta"))
    return Architecture(
        title,
        network,
        inputs,
        tuple(grid.shape[1:]),
        full_decoder,
        preview_decoder,
        family.decode,
        family.guided,
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
        lora_rank: of the adapter; 0 = there is none, and all weights are trained.
        lora_targets: suffixes of the names of the adapted projections.
        reward: operations of the reward model for one image, e.g. `clip_h_image()`.
    """
    from densegrpo_fast.models.lora_linear import lora_config

    with torch.device("meta"):
        network = architecture.network().requires_grad_(False)
        inputs = architecture.inputs(network, 1)
        with torch.no_grad():
            reference = counted(lambda: network(**inputs))
        if lora_rank:
            network.add_adapter(lora_config(r=lora_rank, lora_alpha=lora_rank, target_modules=list(lora_targets)))
        else:
            network.requires_grad_(True)
        outputs: list[Tensor] = []
        forward = counted(lambda: outputs.append(first_output(network, inputs)))
        backward = counted(lambda: outputs[0].sum().backward())
        latents = torch.empty(1, *architecture.latent_shape)
        full, preview = architecture.full_decoder(), architecture.preview_decoder
        with torch.no_grad():
            full_decode = counted(lambda: architecture.decode(full, latents))
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
        inputs = architecture.inputs(network, 1)
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


def first_output(network: Any, inputs: dict[str, Any]) -> Tensor:
    """The network's first output, stacked where it is a list of one tensor for each row."""
    output = network(**inputs, return_dict=False)[0]
    return torch.stack(output) if isinstance(output, list) else output


def _like(module: Any) -> Any:
    """A new module of the same class and configuration, less the entries that its class derived itself."""
    kind = network_class(module)
    accepted = inspect.signature(kind).parameters
    return kind(**{key: value for key, value in module.config.items() if key in accepted})
