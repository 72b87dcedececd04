"""Configurations of published models, for what operations and memory are counted on: no weights, nothing to download.

The numbers are those of the models' repositories on the Hugging Face hub, less what is a default of diffusers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_LARGE_VAE = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
"""The autoencoder that SD3, SD3.5, FLUX.1 and Z-Image share."""

_KL_F8 = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
"""The autoencoder of SD 1.x, 2.x and XL."""


@dataclass(frozen=True)
class PublishedModel:
    """A model known by its configuration.

    Attributes:
        title: its name.
        hub: its repository on the hub.
        pipeline: class of its pipeline in diffusers.
        network, network_config: class and configuration of what evaluates the velocity.
        vae, vae_config: of the autoencoder.
        preview_channels: latent channels of the `AutoencoderTiny` that serves it; None = there is none.
        pixels: side of its usual pictures in training.
        text_tokens: of a prompt there.
    """

    title: str
    hub: str
    pipeline: str
    network: str
    network_config: Mapping[str, Any]
    vae: str
    vae_config: Mapping[str, Any]
    preview_channels: int | None
    pixels: int
    text_tokens: int


MODELS = {
    "sd35_medium": PublishedModel(
        "SD3.5-Medium",
        "stabilityai/stable-diffusion-3.5-medium",
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {
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
        },
        "AutoencoderKL",
        _LARGE_VAE,
        16,
        512,
        205,
    ),
    "sd35_large": PublishedModel(
        "SD3.5-Large",
        "stabilityai/stable-diffusion-3.5-large",
        "StableDiffusion3Pipeline",
        "SD3Transformer2DModel",
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 38,
            "attention_head_dim": 64,
            "num_attention_heads": 38,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 2432,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        "AutoencoderKL",
        _LARGE_VAE,
        16,
        512,
        205,
    ),
    "sd15": PublishedModel(
        "SD 1.5",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "StableDiffusionPipeline",
        "UNet2DConditionModel",
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        "AutoencoderKL",
        _KL_F8,
        4,
        512,
        77,
    ),
    "sdxl": PublishedModel(
        "SDXL",
        "stabilityai/stable-diffusion-xl-base-1.0",
        "StableDiffusionXLPipeline",
        "UNet2DConditionModel",
        {
            "sample_size": 128,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "block_out_channels": (320, 640, 1280),
            "cross_attention_dim": 2048,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        "AutoencoderKL",
        _KL_F8,
        4,
        1024,
        77,
    ),
    "qwen_image": PublishedModel(
        "Qwen-Image",
        "Qwen/Qwen-Image",
        "QwenImagePipeline",
        "QwenImageTransformer2DModel",
        {"num_layers": 60, "attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 3584},
        "AutoencoderKLQwenImage",
        {"base_dim": 96, "z_dim": 16},
        None,
        512,
        64,
    ),
    "z_image": PublishedModel(
        "Z-Image",
        "Tongyi-MAI/Z-Image",
        "ZImagePipeline",
        "ZImageTransformer2DModel",
        {"dim": 3840, "n_layers": 30, "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "cap_feat_dim": 2560},
        "AutoencoderKL",
        _LARGE_VAE,
        16,
        512,
        64,
    ),
    "wan21_1b": PublishedModel(
        "Wan2.1-T2V-1.3B",
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
        "WanPipeline",
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        "AutoencoderKLWan",
        {},
        None,
        256,
        512,
    ),
    "flux2_klein": PublishedModel(
        "FLUX.2-klein-base-4B",
        "black-forest-labs/FLUX.2-klein-base-4B",
        "Flux2KleinPipeline",
        "Flux2Transformer2DModel",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        "AutoencoderKLFlux2",
        {},
        None,
        512,
        512,
    ),
    "flux": PublishedModel(
        "FLUX.1-dev",
        "black-forest-labs/FLUX.1-dev",
        "FluxPipeline",
        "FluxTransformer2DModel",
        {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
        "AutoencoderKL",
        _LARGE_VAE,
        16,
        512,
        256,
    ),
}
