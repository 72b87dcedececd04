"""What a policy loss is computed from: pairs of a sample and a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Pairs:
    """B samples at one step.

    Attributes:
        step: its index.
        log_prob: [B] float32, of the policy being trained; **mean** over latent dims, natural log. Carries gradient.
        old_log_prob: [B] float32, of the policy that sampled.
        advantages: [B] float32.
        weight: [B] float32, of each pair's policy loss.
        velocity: [B, ...] float, of the policy being trained; carries gradient.
        old_velocity: same shape, of the policy that sampled.
        kl: [B] float, divergence from the reference policy; carries gradient. None without a KL term.
        kl_coef: weight of its mean.
    """

    step: int
    log_prob: Tensor
    old_log_prob: Tensor
    advantages: Tensor
    weight: Tensor
    velocity: Tensor
    old_velocity: Tensor
    kl: Tensor | None = None
    kl_coef: float = 0.0

    @property
    def step_index(self) -> Tensor:
        """[B] int64, each pair's step."""
        return torch.full((len(self.velocity),), self.step, device=self.velocity.device)


Loss: TypeAlias = Callable[[Pairs], tuple[Tensor, dict[str, Tensor]]]
"""From pairs to a loss, 0-d, and its metrics, detached 0-d tensors."""
