"""The models that iterations are timed on: a pipeline, or the shape of one with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from densegrpo_fast.config import Config
from densegrpo_fast.embedded import architecture, scenes
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.flops import CLIP_H
from densegrpo_fast.models.loading import resolve_dtype
from densegrpo_fast.models.lora import add_lora
from densegrpo_fast.models.published import MODELS
from densegrpo_fast.training.models import build_model

EMBEDDED_RANDOM, SD35_RANDOM = "embedded_random", "sd35_medium_random"

_SENTENCES = 600
_CLIP_TOKENS, _T5_TOKENS = 77, 128
_CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_CLIP_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}


def model_options(name: str) -> dict[str, Any]:
    """Options of the configuration that a model needs on top of `embedded_paper`, by dotted key."""
    if name != SD35_RANDOM:
        return {"model.path": name}
    # Flow-GRPO's text length, resolution and adapter, and a reward of PickScore's size
    return {
        "model.path": name,
        "model.dtype": "auto",
        "model.max_sequence_length": _T5_TOKENS,
        "model.height": 512,
        "model.width": 512,
        "lora.rank": 32,
        "lora.alpha": 64,
        "reward.terms": f"{{{Path(__file__).resolve()}:ClipH: 1.0}}",
    }


def load(config: Config, device: torch.device) -> DiffusersModel:
    """The model that a configuration's `model.path` names, with its adapter and the full decoder that it asks for.

    Raises:
        UserError: it cannot be loaded.
    """
    options, lora = config.model, config.lora
    if options.path not in (EMBEDDED_RANDOM, SD35_RANDOM):
        model = build_model(config, device)
        assert isinstance(model, DiffusersModel)
        return model
    if options.path == EMBEDDED_RANDOM:
        model = random_embedded(device)
    else:
        model = random_sd35(
            device,
            resolve_dtype(options.dtype, device),
            MODELS["sd35_medium"].network_config,
            max_sequence_length=options.max_sequence_length,
            height=options.height,
            width=options.width,
        )
    add_lora(model.network, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=lora.init_seed)
    return with_decoder(model, config)


def with_decoder(model: DiffusersModel, config: Config) -> DiffusersModel:
    """The model, if it decodes as a configuration asks; else the same with a copy of its full decoder that does."""
    dtype, vae = resolve_dtype(config.model.vae_dtype, model.device), model.pipeline.vae
    how = "tiled" if vae.use_tiling else "sliced" if vae.use_slicing else "whole"
    if (vae.dtype, how) == (dtype, config.model.vae_decode):
        return model
    other = model.decoding_in(dtype)
    other.decode_by(config.model.vae_decode)
    return other


def random_embedded(device: torch.device) -> DiffusersModel:
    """The embedded pipeline untrained: its cost, without its weights."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        pipeline = architecture.build_pipeline(scenes.prompts(held_out=False, count=_SENTENCES))
        preview = architecture.build_preview_decoder()
    # the latents of an untrained autoencoder have no scale of their own
    pipeline.vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
    _freeze(pipeline, preview)
    return DiffusersModel(
        pipeline.to(device), preview.to(device, memory_format=torch.channels_last), max_sequence_length=0
    )


def random_sd35(
    device: torch.device,
    dtype: torch.dtype,
    transformer: dict[str, Any],
    *,
    max_sequence_length: int,
    height: int,
    width: int,
) -> DiffusersModel:
    """Stable Diffusion 3.5's pipeline with random weights: its cost, not its pictures.

    The two CLIP encoders have their real shapes. T5 is left out on both sides, so its block of the text is zeros.

    Args:
        device, dtype: of transformer and text encoders; the autoencoders are float32.
        transformer: configuration of the `SD3Transformer2DModel`.
        max_sequence_length: length of the T5 block.
        height, width: image size in pixels.
    """
    from diffusers import AutoencoderKL, AutoencoderTiny, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    tokenizer = architecture.build_tokenizer(scenes.prompts(held_out=False, count=_SENTENCES))
    tokenizer.model_max_length = _CLIP_TOKENS
    with torch.random.fork_rng(), device:
        torch.manual_seed(0)
        encoders = [
            CLIPTextModelWithProjection(
                CLIPTextConfig(
                    vocab_size=len(tokenizer),
                    projection_dim=shape["hidden_size"],
                    max_position_embeddings=_CLIP_TOKENS,
                    bos_token_id=tokenizer.bos_token_id,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                    **shape,
                )
            ).to(dtype)
            for shape in (_CLIP_L, _CLIP_G)
        ]
        network = SD3Transformer2DModel(**transformer).to(dtype)
        # SD3.5's own scale of the latents
        vae = AutoencoderKL(**MODELS["sd35_medium"].vae_config, scaling_factor=1.5305, shift_factor=0.0609)
        preview = AutoencoderTiny(latent_channels=16)
    pipeline = StableDiffusion3Pipeline(
        transformer=network,
        scheduler=architecture.build_scheduler(),
        vae=vae,
        text_encoder=encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    _freeze(pipeline, preview)
    return DiffusersModel(
        pipeline,
        preview.to(memory_format=torch.channels_last),
        max_sequence_length=max_sequence_length,
        height=height,
        width=width,
    )


def _freeze(pipeline: Any, preview: Any) -> None:
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2, preview)
    for module in parts:
        module.requires_grad_(False).eval()


class ClipH:
    """A reward of PickScore's size: CLIP ViT-H/14 with random weights in bfloat16, on the device of the pictures."""

    def __init__(self) -> None:
        self.tower: Any = None

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """One score per picture [N, 3, H, W]."""
        if self.tower is None:
            from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

            with images.device:
                self.tower = CLIPVisionModelWithProjection(CLIPVisionConfig(**CLIP_H)).to(torch.bfloat16).eval()
        size = CLIP_H["image_size"]
        small = functional.interpolate(images, size=(size, size), mode="bicubic", antialias=True)
        return self.tower(pixel_values=small.to(torch.bfloat16)).image_embeds.float().mean(1)
