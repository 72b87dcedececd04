"""Wan 2.1 text-to-video (arXiv 2503.20314): latents with a time axis, and pictures that are frames of a video."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.models.family import Family, Prompts

_NATIVE = 480


class Wan(Family):
    """`WanPipeline` of one transformer: Wan 2.1 text-to-video, 1.3B and 14B.

    Latents are [16, 1 + (F - 1) / 4, H/8, W/8] of F frames. The multistep scheduler that the models come with is
    replaced by Euler's with its `flow_shift`, as in published recipes: `sampler` and `sampler_options` say so.
    """

    pipeline_class = "WanPipeline"
    parts = {
        "transformer": "WanTransformer3DModel",
        "vae": "AutoencoderKLWan",
        "scheduler": ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"),
        "text_encoder": "UMT5EncoderModel",
        "tokenizer": ("T5TokenizerFast", "T5Tokenizer"),
    }
    unused = ("transformer_2",)
    lora_targets = tuple(
        f"{attention}.{name}" for attention in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0")
    )
    video = True

    def __init__(self, pipeline: Any, **options: Any):
        super().__init__(pipeline, **options)
        config = getattr(pipeline, "config", {})
        if config.get("boundary_ratio") is not None or config.get("expand_timesteps"):
            raise ValueError("model_index.json: boundary_ratio and expand_timesteps belong to Wan 2.2, not supported")
        if self.config["image_dim"] is not None:
            raise ValueError("transformer: image_dim must be null; models that begin from a picture are not supported")
        every = int(self.vae["scale_factor_temporal"])
        if (self.frames - 1) % every:
            raise UsageError(f"model.frames: expected 1 more than a multiple of {every}, got {self.frames}")
        if type(self.scheduler).__name__ == "UniPCMultistepScheduler":
            self.scheduler, self.sampler_options = _euler(self.scheduler.config)
            self.sampler = type(self.scheduler).__name__
        self.latent_shape = (
            int(self.config["in_channels"]),
            1 + (self.frames - 1) // every,
            self.height // self.vae_scale,
            self.width // self.vae_scale,
        )

    @property
    def vae_scale(self) -> int:
        return int(self.vae["scale_factor_spatial"])

    def native_size(self) -> int:
        return _NATIVE

    def unit(self) -> int:
        return self.vae_scale * int(self.config["patch_size"][1])

    def is_guided(self, guidance_scale: float) -> bool:
        return guidance_scale > 1.0

    def encode(self, pipeline: Any, prompts: list[str], device: torch.device) -> Prompts:
        embeds, _ = pipeline.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length, device=device
        )
        return {"embeds": embeds}

    def example(self, rows: int, text_tokens: int) -> Prompts:
        return {"embeds": torch.empty(rows, text_tokens, self.config["text_dim"])}

    def call_options(self, guidance_scale: float) -> dict[str, Any]:
        return super().call_options(guidance_scale) | {"num_frames": self.frames}

    def inputs(self, latents: Tensor, sigma: Tensor, prompts: Prompts, guidance_scale: float) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "timestep": sigma * self.scheduler.config["num_train_timesteps"],
            "encoder_hidden_states": prompts["embeds"],
        }

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(self.vae[name], device=latents.device).view(1, -1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        video = torch.as_tensor(vae.decode((latents * std + mean).to(vae.dtype)).sample)
        return video[:, :, 0] if self.frames == 1 else video


def _euler(config: Any) -> tuple[Any, dict[str, Any]]:
    """Euler's scheduler in the place of a multistep one, and what of its configuration says so.

    Raises:
        ValueError: the multistep scheduler is none of a flow.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    if not config.get("use_flow_sigmas") or config.get("prediction_type") != "flow_prediction":
        raise ValueError("scheduler: expected use_flow_sigmas true and prediction_type flow_prediction")
    options = {"shift": float(config["flow_shift"])}
    return FlowMatchEulerDiscreteScheduler.from_config(config, **options), options
