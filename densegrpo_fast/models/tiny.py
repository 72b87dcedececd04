"""Tiny random pipelines of every family's classes, for `--dry-run` and tests: real code paths without real weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    AutoencoderKLQwenImage,
    AutoencoderKLWan,
    AutoencoderTiny,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PNDMScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImagePipeline,
    ZImageTransformer2DModel,
)
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from densegrpo_fast.embedded import architecture
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.families import FAMILIES

_SIZE = 64
"""Side of the pictures in pixels."""


def tiny_model(
    pipeline_class: str = "StableDiffusion3Pipeline",
    seed: int = 0,
    *,
    network: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
    frames: int = 1,
) -> DiffusersModel:
    """A model of a family with random weights and pictures of 64 pixels.

    Args:
        pipeline_class: of the family.
        seed: of the weights; the global generator is left as it was.
        network, scheduler: entries of their configurations, in place of the tiny pipeline's.
        frames: of a video; 1 = a picture.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipeline, preview = _PIPELINES[pipeline_class]()
        part = FAMILIES[pipeline_class].network_part
        for name, changes in ((part, network), ("scheduler", scheduler)):
            if changes:
                old = getattr(pipeline, name)
                kept = {key: value for key, value in old.config.items() if not key.startswith("_")}
                setattr(pipeline, name, type(old).from_config(kept | dict(changes)))
    for module in (*pipeline.components.values(), preview):
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    return DiffusersModel(pipeline, preview, max_sequence_length=8, height=_SIZE, width=_SIZE, frames=frames)


def tiny_sd3(seed: int = 0) -> DiffusersModel:
    """SD3.5's form at toy size: 16 latent channels, query-key norm, dual attention, an 8x autoencoder, 64 pixels."""
    return tiny_model(seed=seed)


def _sd3() -> tuple[StableDiffusion3Pipeline, AutoencoderTiny]:
    tokenizer = _clip_tokenizer()
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
    vae, preview = _vae(16, scaling_factor=1.5305, shift_factor=0.0609), _preview(16)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer,
        vae=vae,
        scheduler=architecture.build_scheduler(),
        text_encoder=architecture.build_text_encoder(tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=architecture.build_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return pipeline, preview


def _flux() -> tuple[FluxPipeline, AutoencoderTiny]:
    tokenizer = _clip_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    pipeline = FluxPipeline(
        transformer=transformer,
        vae=_vae(4, scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        text_encoder=_clip(tokenizer, 32),
        tokenizer=tokenizer,
        text_encoder_2=_t5(32),
        tokenizer_2=_t5_tokenizer(),
    )
    return pipeline, _preview(4)


def _stable_diffusion() -> tuple[StableDiffusionPipeline, AutoencoderTiny]:
    tokenizer = _clip_tokenizer()
    pipeline = StableDiffusionPipeline(
        unet=_unet(cross_attention_dim=32),
        vae=_vae(4, scaling_factor=0.18215),
        scheduler=PNDMScheduler.from_config(
            {**_LATENT_DIFFUSION, "skip_prk_steps": True, "set_alpha_to_one": False, "clip_sample": False}
        ),
        text_encoder=_clip(tokenizer, 32),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipeline, _preview(4)


def _stable_diffusion_xl() -> tuple[StableDiffusionXLPipeline, AutoencoderTiny]:
    tokenizer = _clip_tokenizer()
    unet = _unet(
        cross_attention_dim=32 + 64,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 64,
    )
    pipeline = StableDiffusionXLPipeline(
        unet=unet,
        vae=_vae(4, scaling_factor=0.13025),
        scheduler=EulerDiscreteScheduler(**_LATENT_DIFFUSION),
        text_encoder=_clip(tokenizer, 32),
        tokenizer=tokenizer,
        text_encoder_2=architecture.build_text_encoder(tokenizer),
        tokenizer_2=tokenizer,
    )
    return pipeline, _preview(4)


def _qwen_image() -> tuple[QwenImagePipeline, AutoencoderTiny]:
    tokenizer = _qwen_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32}
    pipeline = QwenImagePipeline(
        transformer=QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
        ),
        vae=AutoencoderKLQwenImage(**_VIDEO_VAE),
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
        ),
        text_encoder=Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision)),
        tokenizer=tokenizer,
    )
    return pipeline, _preview(4)


def _z_image() -> tuple[ZImagePipeline, AutoencoderTiny]:
    tokenizer = _qwen_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    text = _qwen3(tokenizer, 32, layers=2)
    pipeline = ZImagePipeline(
        transformer=ZImageTransformer2DModel(
            in_channels=4,
            dim=32,
            n_layers=1,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=32,
            axes_dims=(4, 6, 6),
            axes_lens=(256, 32, 32),
        ),
        vae=_vae(4, scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        text_encoder=Qwen3Model(text),
        tokenizer=tokenizer,
    )
    return pipeline, _preview(4)


def _flux2_klein() -> tuple[Flux2KleinPipeline, AutoencoderTiny]:
    tokenizer = _qwen_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    width = 16
    # the pipeline reads the states after 9, 18 and 27 layers
    text = _qwen3(tokenizer, width, layers=27)
    vae = AutoencoderKLFlux2(block_out_channels=(8, 8, 8, 8), layers_per_block=1, latent_channels=4, norm_num_groups=4)
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * width,
        guidance_embeds=False,
        axes_dims_rope=(4, 4, 4, 4),
    )
    for modulation in (transformer.double_stream_modulation_img, transformer.single_stream_modulation):
        # gates of a random network are nearly closed, which an adapter would hardly open
        modulation.linear.weight.data.mul_(4)
    pipeline = Flux2KleinPipeline(
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0),
        text_encoder=Qwen3ForCausalLM(text),
        tokenizer=tokenizer,
    )
    return pipeline, _preview(4)


def _wan() -> tuple[WanPipeline, None]:
    tokenizer = _t5_tokenizer()
    text = UMT5Config(vocab_size=32, d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2)
    pipeline = WanPipeline(
        transformer=WanTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            text_dim=32,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_max_seq_len=32,
        ),
        vae=AutoencoderKLWan(**_VIDEO_VAE),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=UMT5EncoderModel(text),
        tokenizer=tokenizer,
    )
    return pipeline, None


_LATENT_DIFFUSION: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}
"""The noise schedule that SD 1.x, 2.x and XL share."""


_VIDEO_VAE: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": [-0.7, 0.1, 0.4, 0.0],
    "latents_std": [2.8, 1.4, 2.3, 1.2],
}
"""The autoencoder of Wan, and of Qwen-Image, which is made of it."""


def _unet(**settings: Any) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(16, 32),
        layers_per_block=1,
        attention_head_dim=2,
        norm_num_groups=8,
        **settings,
    )


def _vae(channels: int, **settings: Any) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **settings,
    )


def _preview(channels: int) -> AutoencoderTiny:
    return AutoencoderTiny(
        latent_channels=channels, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4
    )


def _clip_tokenizer() -> Any:
    return architecture.build_tokenizer(["a photo of a cat on the moon"])


def _clip(tokenizer: Any, width: int) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=architecture.MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def _qwen_tokenizer() -> Qwen2Tokenizer:
    pieces = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>"]
    return Qwen2Tokenizer(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[])


def _qwen3(tokenizer: Qwen2Tokenizer, width: int, *, layers: int) -> Qwen3Config:
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=width // 2,
        max_window_layers=layers,
        pad_token_id=tokenizer.pad_token_id,
    )


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(vocab_size=32, d_model=width, d_kv=16, d_ff=2 * width, num_layers=1, num_heads=2, is_gated_act=True)
    )


def _t5_tokenizer() -> T5Tokenizer:
    letters = [(letter, -5.0) for letter in "\u2581abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=[("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters], extra_ids=0)


_PIPELINES: dict[str, Callable[[], tuple[Any, AutoencoderTiny | None]]] = {
    "StableDiffusion3Pipeline": _sd3,
    "FluxPipeline": _flux,
    "StableDiffusionPipeline": _stable_diffusion,
    "StableDiffusionXLPipeline": _stable_diffusion_xl,
    "QwenImagePipeline": _qwen_image,
    "ZImagePipeline": _z_image,
    "Flux2KleinPipeline": _flux2_klein,
    "WanPipeline": _wan,
}
