"""Weights of the steps' policy losses.

A log-probability's gradient with respect to the velocity grows as B / C: on SD3's ten-step grid it is 26 times larger
at the last trained step than at the first, so without weights the late steps, which only touch up details, decide the
update.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from densegrpo_fast.flow.dynamics import LOG_PROB_SCALE, B, C

StepWeight = Literal["none", "noise_aware", "flash", "proportionate"]


def step_weights(table: Tensor, steps: Sequence[int], kind: StepWeight, *, sigmas: Tensor | None = None) -> Tensor:
    """Weight of every step's policy loss.

    All kinds but "none" are divided by their mean over the trained steps, and 0 if none of these has noise. With
    gain = 2 * LOG_PROB_SCALE * |B| * C, the size of a log-probability's gradient per unit of noise (|B| / C for every
    family but cps):

    * "none" = 1;
    * "noise_aware" = C, the step's injected standard deviation (TempFlow-GRPO, arXiv 2508.04324), which leaves a
      gradient in proportion to B z;
    * "flash" = 1 / gain (temporal gradient rectification of Flash-GRPO, arXiv 2605.15980, as two reimplementations
      have it), which leaves a gradient in proportion to z; a noise-free step has weight 0;
    * "proportionate" = |dt| / gain, which leaves |dt| z (proportionate credit of PCPO, arXiv 2509.25774, from a note on
      it; its log-hinge objective is not part of this).

    Args:
        table: [T, 6] step coefficients (`flow.dynamics`).
        steps: the trained steps.
        kind: see above.
        sigmas: [T+1] the grid of the table; "proportionate" needs it.

    Returns:
        [T] float32; steps that are not trained are weighted by the same rule.

    Raises:
        ValueError: unknown kind, no trained steps, or no grid where one is needed.
    """
    if kind not in get_args(StepWeight):
        raise ValueError(f"step_weights: kind must be one of {', '.join(get_args(StepWeight))}, got {kind!r}")
    if kind == "none":
        return torch.ones(len(table), device=table.device)
    if not steps:
        raise ValueError(f"step_weights: {kind} needs at least one trained step")
    if kind == "noise_aware":
        raw = table[:, C]
    else:
        gain = 2 * table[:, LOG_PROB_SCALE] * table[:, B].abs() * table[:, C]
        raw = torch.where(gain > 0, 1 / gain, 0.0)
        if kind == "proportionate":
            if sigmas is None or len(sigmas) != len(table) + 1:
                raise ValueError(f"step_weights: proportionate needs the {len(table) + 1} sigmas of the table's grid")
            raw = raw * sigmas.diff().abs()
    mean = raw[list(steps)].mean()
    return raw / mean.where(mean > 0, 1.0)
