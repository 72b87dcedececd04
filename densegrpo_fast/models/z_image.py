"""Z-Image (arXiv 2511.22699): one stream of picture and text, whose network takes lists of pictures and texts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.models.base import Velocity
from densegrpo_fast.models.family import Family, Prompts, dynamic_shift

_NATIVE = 1024


class ZImage(Family):
    """`ZImagePipeline`: Z-Image, and Z-Image-Turbo, which was distilled to need no guidance.

    `guidance_scale` s means v + s (v - v_negative), as there; but up to 1 it means none, which is 0 there. Texts of one
    length are given as they are; others are cut to their lengths, for which the host waits at every forward.
    """

    pipeline_class = "ZImagePipeline"
    parts = {
        "transformer": "ZImageTransformer2DModel",
        "vae": "AutoencoderKL",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "text_encoder": "Qwen3Model",
        "tokenizer": "Qwen2Tokenizer",
    }
    lora_targets = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0")

    def __init__(self, pipeline: Any, **options: Any):
        super().__init__(pipeline, **options)
        if self.config["siglip_feat_dim"] is not None:
            raise ValueError(
                "transformer: siglip_feat_dim must be null; the models that edit pictures are not supported"
            )
        self.latent_shape = (self.config["in_channels"], self.height // self.vae_scale, self.width // self.vae_scale)

    def native_size(self) -> int:
        return _NATIVE

    def unit(self) -> int:
        return 2 * self.vae_scale

    def is_guided(self, guidance_scale: float) -> bool:
        return guidance_scale > 1.0

    def encode(self, pipeline: Any, prompts: list[str], device: torch.device) -> Prompts:
        # the pipeline writes into its list
        texts, _ = pipeline.encode_prompt(
            list(prompts),
            device=device,
            do_classifier_free_guidance=False,
            max_sequence_length=self.max_sequence_length,
        )
        longest = max(len(text) for text in texts)
        masks = [torch.arange(longest, device=text.device) < len(text) for text in texts]
        filled = [torch.cat([text, text.new_zeros(longest - len(text), text.shape[1])]) for text in texts]
        return {"embeds": torch.stack(filled), "mask": torch.stack(masks)}

    def batched(self, encoded: Prompts) -> Prompts:
        return {"embeds": encoded["embeds"]} if bool(encoded["mask"].all()) else encoded

    def example(self, rows: int, text_tokens: int) -> Prompts:
        return {"embeds": torch.empty(rows, text_tokens, self.config["cap_feat_dim"])}

    def call_options(self, guidance_scale: float) -> dict[str, Any]:
        return super().call_options(guidance_scale if self.is_guided(guidance_scale) else 0.0)

    def inputs(self, latents: Tensor, sigma: Tensor, prompts: Prompts, guidance_scale: float) -> dict[str, Any]:
        texts = list(prompts["embeds"].unbind())
        if "mask" in prompts:
            lengths = prompts["mask"].sum(1).tolist()
            texts = [text[:length] for text, length in zip(texts, lengths, strict=True)]
        return {"x": list(latents.unsqueeze(2).unbind()), "t": 1 - sigma, "cap_feats": texts}

    def velocity(self, output: Any, latents: Tensor, sigma: Tensor) -> Tensor:
        return -torch.stack(list(output)).squeeze(2).float()

    def guide(self, cond: Tensor, uncond: Tensor, guidance_scale: float) -> Velocity:
        return Velocity(cond, uncond, guidance_scale + 1)

    def grid_options(self, num_steps: int) -> dict[str, Any]:
        _, height, width = self.latent_shape
        mu = dynamic_shift(self.scheduler, (height // 2) * (width // 2))
        return {"sigmas": torch.linspace(1.0, 1 / num_steps, num_steps).tolist(), "mu": mu}
