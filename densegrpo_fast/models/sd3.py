"""Stable Diffusion 3 and 3.5, Medium and Large (arXiv 2403.03206). The embedded model is such a pipeline too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.models.family import Family, Prompts, dynamic_shift


class StableDiffusion3(Family):
    """`StableDiffusion3Pipeline`, with or without its T5 encoder.

    `max_sequence_length` is the length of the T5 block; 0 leaves it out (only for pipelines without T5).
    """

    pipeline_class = "StableDiffusion3Pipeline"
    parts = {
        "transformer": "SD3Transformer2DModel",
        "vae": "AutoencoderKL",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "CLIPTextModelWithProjection",
        "text_encoder_2": "CLIPTextModelWithProjection",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "CLIPTokenizer",
    }
    optional = {"text_encoder_3": "T5EncoderModel", "tokenizer_3": "T5TokenizerFast"}

    def __init__(self, pipeline: Any, **options: Any):
        super().__init__(pipeline, **options)
        most = self.unit() * int(self.config["pos_embed_max_size"])
        for name, size in (("height", self.height), ("width", self.width)):
            if size > most:
                raise UsageError(f"model.{name}: expected at most {most} for this model, got {size}")
        self.latent_shape = (self.config["in_channels"], self.height // self.vae_scale, self.width // self.vae_scale)

    def unit(self) -> int:
        return self.vae_scale * int(self.config["patch_size"])

    def encode(self, pipeline: Any, prompts: list[str], device: torch.device) -> Prompts:
        embeds, _, pooled, _ = pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
            device=device,
        )
        return {"embeds": embeds, "pooled": pooled}

    def example(self, rows: int, text_tokens: int) -> Prompts:
        return {
            "embeds": torch.empty(rows, text_tokens, self.config["joint_attention_dim"]),
            "pooled": torch.empty(rows, self.config["pooled_projection_dim"]),
        }

    def inputs(self, latents: Tensor, sigma: Tensor, prompts: Prompts, guidance_scale: float) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "encoder_hidden_states": prompts["embeds"],
            "pooled_projections": prompts["pooled"],
            "timestep": float(self.scheduler.config["num_train_timesteps"]) * sigma,
        }

    def grid_options(self, num_steps: int) -> dict[str, Any]:
        if not self.scheduler.config.get("use_dynamic_shifting"):
            return {}
        _, height, width = self.latent_shape
        patch = self.config["patch_size"]
        return {"mu": dynamic_shift(self.scheduler, (height // patch) * (width // patch))}
