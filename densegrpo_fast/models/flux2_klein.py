"""FLUX.2-klein: tokens whose statistics the autoencoder keeps, and true guidance in the base models."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.models.family import JOINT_ATTENTION, Family, Prompts, linear_sigmas

logger = logging.getLogger(__name__)

_NATIVE = 1024


class Flux2Klein(Family):
    """`Flux2KleinPipeline`: the base models, and those distilled to four steps, which take no guidance.

    Latents are [128, H/16, W/16], each a patch of 2x2 latents of the autoencoder, scaled by its running statistics.
    All texts are filled up to `max_sequence_length` tokens, as there.
    """

    pipeline_class = "Flux2KleinPipeline"
    parts = {
        "transformer": "Flux2Transformer2DModel",
        "vae": "AutoencoderKLFlux2",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen3ForCausalLM",
        "tokenizer": ("Qwen2TokenizerFast", "Qwen2Tokenizer"),
    }
    lora_targets = (*JOINT_ATTENTION, "attn.to_qkv_mlp_proj")

    def __init__(self, pipeline: Any, **options: Any):
        super().__init__(pipeline, **options)
        if self.config["guidance_embeds"]:
            raise ValueError("transformer: guidance_embeds must be false; FLUX.2-dev is not supported")
        self.distilled = bool(getattr(pipeline, "config", {}).get("is_distilled"))
        if self.distilled:
            logger.warning(
                "this FLUX.2-klein is distilled to few steps: it takes no guidance, and training it by rewards easily "
                "collapses; the base model is made for training"
            )
        unit = self.unit()
        self.latent_shape = (int(self.config["in_channels"]), self.height // unit, self.width // unit)

    def native_size(self) -> int:
        return _NATIVE

    def unit(self) -> int:
        return 2 * self.vae_scale

    def is_guided(self, guidance_scale: float) -> bool:
        return guidance_scale > 1.0 and not self.distilled

    def encode(self, pipeline: Any, prompts: list[str], device: torch.device) -> Prompts:
        embeds, _ = pipeline.encode_prompt(prompts, device=device, max_sequence_length=self.max_sequence_length)
        return {"embeds": embeds}

    def example(self, rows: int, text_tokens: int) -> Prompts:
        return {"embeds": torch.empty(rows, text_tokens, self.config["joint_attention_dim"])}

    def inputs(self, latents: Tensor, sigma: Tensor, prompts: Prompts, guidance_scale: float) -> dict[str, Any]:
        _, rows, columns = self.latent_shape
        length = prompts["embeds"].shape[1]
        # time, row, column, place in the text
        places = torch.zeros(rows, columns, 4, device=latents.device)
        places[..., 1] += torch.arange(rows, device=latents.device)[:, None]
        places[..., 2] += torch.arange(columns, device=latents.device)
        words = torch.zeros(length, 4, device=latents.device)
        words[:, 3] += torch.arange(length, device=latents.device)
        return {
            "hidden_states": latents.flatten(2).transpose(1, 2),
            "encoder_hidden_states": prompts["embeds"],
            "timestep": sigma,
            "guidance": None,
            "img_ids": places.flatten(0, 1),
            "txt_ids": words,
        }

    def velocity(self, output: Any, latents: Tensor, sigma: Tensor) -> Tensor:
        tokens = torch.as_tensor(output).float()
        return tokens.transpose(1, 2).reshape(len(tokens), *self.latent_shape)

    def grid_options(self, num_steps: int) -> dict[str, Any]:
        from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

        _, rows, columns = self.latent_shape
        return {"sigmas": linear_sigmas(num_steps), "mu": compute_empirical_mu(rows * columns, num_steps)}

    def grid(self, latents: Tensor) -> Tensor:
        batch, channels, rows, columns = latents.shape
        split = latents.view(batch, channels // 4, 2, 2, rows, columns).permute(0, 1, 4, 2, 5, 3)
        return split.reshape(batch, channels // 4, 2 * rows, 2 * columns)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        statistics = (vae.bn.running_mean, (vae.bn.running_var + self.vae["batch_norm_eps"]).sqrt())
        # of each of the 2x2 places of a patch
        mean, std = (
            values.to(latents).view(-1, 2, 2).repeat(1, latents.shape[2] // 2, latents.shape[3] // 2)
            for values in statistics
        )
        return torch.as_tensor(vae.decode((latents * std + mean).to(vae.dtype)).sample)
