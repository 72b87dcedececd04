"""Weights of the steps' policy losses.

A log-probability's gradient with respect to the velocity grows as B / C: on SD3's ten-step grid it is 26 times larger
at the last trained step than at the first, so without weights the late steps, which only touch up details, decide the
update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from densegrpo_fast.flow.dynamics import C

StepWeight = Literal["none", "noise_aware"]


def step_weights(table: Tensor, steps: Sequence[int], kind: StepWeight) -> Tensor:
    """Weight of every step's policy loss.

    Args:
        table: [T, 6] step coefficients (`flow.dynamics`).
        steps: the trained steps.
        kind: "none" = 1; "noise_aware" = the step's injected standard deviation C, divided by its mean over the trained
            steps (TempFlow-GRPO, arXiv 2508.04324), which leaves a gradient in proportion to B z.

    Returns:
        [T] float32; steps that are not trained are weighted by the same rule.

    Raises:
        ValueError: unknown kind, or no trained step injects noise.
    """
    if kind == "none":
        return torch.ones(len(table), device=table.device)
    if kind != "noise_aware":
        raise ValueError(f"step_weights: kind must be none or noise_aware, got {kind!r}")
    if not steps:
        raise ValueError("step_weights: noise_aware needs at least one trained step")
    return table[:, C] / table[list(steps), C].mean()
