"""Fitting a preview decoder to what the full decoder makes of the policy's own latents."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.common.progress import PhaseProgress
from densegrpo_fast.embedded.pixel_loss import pixel_loss
from densegrpo_fast.models.base import Decoder, FlowModel
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.training.agreement import spearman

_LR = 3e-3
_WARMUP = 50


@dataclass(frozen=True)
class Pictures:
    """Clean latents of whole groups, and what the full decoder makes of them; on the CPU.

    Attributes:
        latents: [N, C, H, W] float32, group after group.
        images: [N, 3, height, width] float16 in [0, 1].
        prompts, metadata: of each row, N.
    """

    latents: Tensor
    images: Tensor
    prompts: list[str]
    metadata: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.latents)


@torch.no_grad()
def decoded(model: FlowModel, latents: Tensor, decoder: Decoder, chunk: int) -> Tensor:
    """Images [N, 3, height, width] float16 on the CPU of latents [N, ...] on any device, `chunk` rows at a time."""
    return torch.cat([model.decode(part.to(model.device), decoder).half().cpu() for part in latents.split(chunk)])


def train_preview(model: DiffusersModel, pictures: Pictures, steps: int, batch: int, seed: int) -> None:
    """Fit the model's preview decoder in place, by `pixel_loss`.

    Args:
        model: with a preview decoder, which is left frozen and in evaluation mode.
        pictures: what to learn.
        steps: optimiser steps (AdamW, a short warm-up, then cosine to 0).
        batch: pictures in each.
        seed: of their choice.
    """
    preview: Any = model.preview_decoder
    parameters = [p.requires_grad_() for p in preview.decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LR, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    preview.train()
    with PhaseProgress("fitting the preview decoder", steps, "steps") as progress:
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = _LR * min(1.0, (step + 1) / _WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
            index = torch.randint(len(pictures), (batch,), generator=generator)
            made = preview.decode(pictures.latents[index].to(model.device)).sample / 2 + 0.5
            loss = pixel_loss(made, pictures.images[index].to(model.device).float())
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            progress()
    preview.requires_grad_(False).eval()


@dataclass(frozen=True)
class PreviewAgreement:
    """How near previews come to the full decoder's pictures.

    Attributes:
        pixel_error: mean absolute difference, in [0, 1].
        spearman_rewards: rank correlation of both decoders' rewards, the mean over groups in which rewards differ.
    """

    pixel_error: float
    spearman_rewards: float


def agreement(
    model: FlowModel, pictures: Pictures, reward: RewardMixture, group_size: int, chunk: int
) -> PreviewAgreement:
    """Compare the decoders on pictures of whole groups.

    Raises:
        RewardError: the reward failed.
    """
    previews = decoded(model, pictures.latents, "preview", chunk)
    rewards = [
        reward(images.float(), pictures.prompts, pictures.metadata).values.view(-1, group_size)
        for images in (pictures.images, previews)
    ]
    return PreviewAgreement(
        (previews.float() - pictures.images.float()).abs().mean().item(),
        spearman(*rewards).nanmean().item(),
    )
