"""Qwen-Image (arXiv 2508.02324): true guidance that keeps the conditional velocity's norm, text of any length."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.models.base import Velocity
from densegrpo_fast.models.family import JOINT_ATTENTION, Family, Prompts, dynamic_shift, linear_sigmas, unpack

_NATIVE = 1024


class QwenImage(Family):
    """`QwenImagePipeline`.

    Latents are tokens [N, 64], each a patch of 2x2 latents. `guidance_scale` is the pipeline's `true_cfg_scale`. Texts
    of a batch are filled up to the longest; where all have one length, the network is given no mask.
    """

    pipeline_class = "QwenImagePipeline"
    parts = {
        "transformer": "QwenImageTransformer2DModel",
        "vae": "AutoencoderKLQwenImage",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "Qwen2Tokenizer",
    }
    negative_prompt = " "
    lora_targets = (*JOINT_ATTENTION, "img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")

    def __init__(self, pipeline: Any, **options: Any):
        super().__init__(pipeline, **options)
        if self.config["guidance_embeds"] or self.config["use_additional_t_cond"] or self.config["use_layer3d_rope"]:
            raise ValueError("transformer: guidance_embeds, use_additional_t_cond and use_layer3d_rope must be false")
        # in patches of 2x2 latents
        self.rows, self.columns = self.height // self.unit(), self.width // self.unit()
        self.latent_shape = (self.rows * self.columns, int(self.config["in_channels"]))

    @property
    def vae_scale(self) -> int:
        return int(2 ** len(self.vae["temperal_downsample"]))

    def native_size(self) -> int:
        return _NATIVE

    def unit(self) -> int:
        return 2 * self.vae_scale

    def encode(self, pipeline: Any, prompts: list[str], device: torch.device) -> Prompts:
        embeds, mask = pipeline.encode_prompt(prompts, device=device, max_sequence_length=self.max_sequence_length)
        whole = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return {"embeds": embeds, "mask": whole if mask is None else mask}

    def batched(self, encoded: Prompts) -> Prompts:
        return {"embeds": encoded["embeds"]} if bool(encoded["mask"].all()) else encoded

    def example(self, rows: int, text_tokens: int) -> Prompts:
        return {"embeds": torch.empty(rows, text_tokens, self.config["joint_attention_dim"])}

    def call_options(self, guidance_scale: float) -> dict[str, Any]:
        options: dict[str, Any] = {"max_sequence_length": self.max_sequence_length}
        guided = {"true_cfg_scale": guidance_scale, "negative_prompt": self.negative_prompt}
        return options | (guided if guidance_scale != 1.0 else {})

    def inputs(self, latents: Tensor, sigma: Tensor, prompts: Prompts, guidance_scale: float) -> dict[str, Any]:
        return {
            "hidden_states": latents,
            "encoder_hidden_states": prompts["embeds"],
            "encoder_hidden_states_mask": prompts.get("mask"),
            "timestep": sigma,
            "img_shapes": [[(1, self.rows, self.columns)]] * len(latents),
        }

    def guide(self, cond: Tensor, uncond: Tensor, guidance_scale: float) -> Velocity:
        return Velocity(cond, uncond, guidance_scale, keeps_norm=True)

    def grid_options(self, num_steps: int) -> dict[str, Any]:
        return {"sigmas": linear_sigmas(num_steps), "mu": dynamic_shift(self.scheduler, self.latent_shape[0])}

    def grid(self, latents: Tensor) -> Tensor:
        return unpack(latents, 2 * self.rows, 2 * self.columns)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        mean, std = (
            torch.tensor(self.vae[name], device=latents.device).view(1, -1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        # a video of one frame
        frames = latents.unsqueeze(2) * std + mean
        return torch.as_tensor(vae.decode(frames.to(vae.dtype)).sample[:, :, 0])
