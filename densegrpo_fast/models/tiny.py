"""A tiny random pipeline of SD3.5's classes, for `--dry-run` and tests: real code paths without real weights."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, SD3Transformer2DModel, StableDiffusion3Pipeline

from densegrpo_fast.embedded import architecture
from densegrpo_fast.models.sd3 import SD3


def tiny_sd3(seed: int = 0) -> SD3:
    """SD3.5's form at toy size: 16 latent channels, query-key norm, dual attention, an 8x autoencoder, 64 pixels."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = architecture.build_tokenizer(["a photo of a cat on the moon"])
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=128,
            caption_projection_dim=32,
            pooled_projection_dim=128,
            pos_embed_max_size=8,
            qk_norm="rms_norm",
            dual_attention_layers=(0,),
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            latent_channels=16,
            norm_num_groups=4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        )
        preview = AutoencoderTiny(
            latent_channels=16, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=architecture.build_scheduler(),
            vae=vae,
            text_encoder=architecture.build_text_encoder(tokenizer),
            tokenizer=tokenizer,
            text_encoder_2=architecture.build_text_encoder(tokenizer),
            tokenizer_2=tokenizer,
            text_encoder_3=None,
            tokenizer_3=None,
        )
    for module in (transformer, vae, preview, pipeline.text_encoder, pipeline.text_encoder_2):
        module.requires_grad_(False).eval()
    return SD3(pipeline, preview, max_sequence_length=8)
