"""PickScore: how much people would prefer a picture for its prompt, as learned from the Pick-a-Pic votes.

A CLIP-H fine-tuned on pairwise choices (arXiv 2305.01569); the score of a picture x and a prompt c is
exp(logit_scale) * cos(text(c), image(x)). It is divided by 26, as Flow-GRPO (arXiv 2505.05470) does for training, which
brings it near 1; published tables quote the undivided number, around 20 to 24.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.rewards.clip import Clip

DIVISOR = 26.0
"""Flow-GRPO's scale."""


class PickScore:
    """The PickScore reward.

    Args:
        model: hub id or local directory of the CLIP model, with safetensors weights.
        processor: hub id or local directory of its tokenizer.
        device: where to score; None = the current GPU, or the CPU.
        dtype: of the network; None = float16 on a GPU, float32 on the CPU. Features are normalised and multiplied in
            float32 in either case.
        chunk: pictures, or new prompts, per forward pass.

    Raises:
        OSError: model or tokenizer cannot be loaded; the message says which and how to name a local directory.
        ValueError: chunk is below 1, or dtype is not a floating-point type.
    """

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        chunk: int = 32,
    ):
        self.clip = Clip("pickscore", model, processor, device=device, dtype=dtype, chunk=chunk)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        """Score pictures.

        Args:
            images: [N, 3, H, W] float in [0, 1], any size and device.
            prompts: N sentences; what is beyond the model's 77 tokens is ignored.
            metadata: not used.

        Returns:
            [N] float32 on the model's device, about 0.7 to 0.95 for real pictures.
        """
        return self.clip.logits(images, list(prompts)) / DIVISOR
