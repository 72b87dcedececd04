"""CLIPScore: how well a picture matches its prompt, by the similarity of their CLIP features.

The score of a picture x and a prompt c is exp(logit_scale) * cos(text(c), image(x)) / 30, the scale that Flow-GRPO
(arXiv 2505.05470) trains with; with the published models exp(logit_scale) is 100, so a score of 1 is a cosine of 0.3.
Hessel et al. (arXiv 2104.08718) report 2.5 * max(cos, 0): negative similarities are not cut off here, so that they can
still be told apart.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.rewards.clip import Clip

DIVISOR = 30.0
"""Flow-GRPO's scale."""


class ClipScore:
    """The CLIPScore reward.

    Args:
        model: hub id or local directory of the CLIP model, with safetensors weights.
        processor: hub id or local directory of its tokenizer; None = the model's.
        device: where to score; None = the current GPU, or the CPU.
        dtype: of the network; None = float16 on a GPU, float32 on the CPU.
        chunk: pictures, or new prompts, per forward pass.

    Raises:
        OSError: model or tokenizer cannot be loaded; the message says which and how to name a local directory.
        ValueError: chunk is below 1, or dtype is not a floating-point type.
    """

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        processor: str | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | str | None = None,
        chunk: int = 32,
    ):
        self.clip = Clip("clipscore", model, processor or model, device=device, dtype=dtype, chunk=chunk)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Tensor:
        """Score pictures.

        Args:
            images: [N, 3, H, W] float in [0, 1], any size and device.
            prompts: N sentences; what is beyond the model's 77 tokens is ignored.
            metadata: not used.

        Returns:
            [N] float32 on the model's device, about 0.5 to 1.2 for real pictures.
        """
        return self.clip.logits(images, list(prompts)) / DIVISOR
