"""FLUX.1, dev and schnell: packed latents, a schedule that depends on the size, guidance as an input of the network."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.models.family import JOINT_ATTENTION, Family, Prompts, dynamic_shift, linear_sigmas, unpack

_NATIVE = 1024


class Flux(Family):
    """`FluxPipeline`.

    dev is guided within the network: `guidance_scale` is a number that it was distilled with, not a second forward.
    schnell takes no guidance at all. Latents are tokens [N, 64], each a patch of 2x2 latents.
    """

    pipeline_class = "FluxPipeline"
    parts = {
        "transformer": "FluxTransformer2DModel",
        "vae": "AutoencoderKL",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "CLIPTextModel",
        "text_encoder_2": "T5EncoderModel",
        "tokenizer": "CLIPTokenizer",
        "tokenizer_2": "T5TokenizerFast",
    }
    guided = False
    lora_targets = (*JOINT_ATTENTION, "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")

    def __init__(self, pipeline: Any, **options: Any):
        super().__init__(pipeline, **options)
        # in patches of 2x2 latents
        self.rows, self.columns = self.height // self.unit(), self.width // self.unit()
        self.latent_shape = (self.rows * self.columns, int(self.config["in_channels"]))

    def native_size(self) -> int:
        return _NATIVE

    def unit(self) -> int:
        return 2 * self.vae_scale

    def encode(self, pipeline: Any, prompts: list[str], device: torch.device) -> Prompts:
        embeds, pooled, _ = pipeline.encode_prompt(
            prompt=prompts, prompt_2=None, device=device, max_sequence_length=self.max_sequence_length
        )
        return {"embeds": embeds, "pooled": pooled}

    def example(self, rows: int, text_tokens: int) -> Prompts:
        return {
            "embeds": torch.empty(rows, text_tokens, self.config["joint_attention_dim"]),
            "pooled": torch.empty(rows, self.config["pooled_projection_dim"]),
        }

    def inputs(self, latents: Tensor, sigma: Tensor, prompts: Prompts, guidance_scale: float) -> dict[str, Any]:
        places = torch.zeros(self.rows, self.columns, 3, device=latents.device, dtype=latents.dtype)
        places[..., 1] += torch.arange(self.rows, device=latents.device)[:, None]
        places[..., 2] += torch.arange(self.columns, device=latents.device)
        return {
            "hidden_states": latents,
            "encoder_hidden_states": prompts["embeds"],
            "pooled_projections": prompts["pooled"],
            "timestep": sigma,
            "guidance": torch.full_like(sigma, guidance_scale) if self.config["guidance_embeds"] else None,
            "img_ids": places.flatten(0, 1),
            "txt_ids": torch.zeros(prompts["embeds"].shape[1], 3, device=latents.device, dtype=latents.dtype),
        }

    def grid_options(self, num_steps: int) -> dict[str, Any]:
        return {"sigmas": linear_sigmas(num_steps), "mu": dynamic_shift(self.scheduler, self.latent_shape[0])}

    def grid(self, latents: Tensor) -> Tensor:
        return unpack(latents, 2 * self.rows, 2 * self.columns)
