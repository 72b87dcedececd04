"""Weights of the steps' policy losses.

A log-probability's gradient with respect to the velocity grows as B / C: on SD3's ten-step grid it is 26 times larger
at the last trained step than at the first, so without weights the late steps, which only touch up details, decide the
update. With gain = 2 * LOG_PROB_SCALE * |B| * C, the size of a log-probability's gradient per unit of noise z (|B| / C
for every family but cps), each function here gives every step's weight [T] up to a factor, which `step_weights` sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.common.errors import PluginError
from densegrpo_fast.common.plugins import fenced, select_options
from densegrpo_fast.flow.dynamics import LOG_PROB_SCALE, B, C, StepCoefficients
from densegrpo_fast.objective.registry import STEP_WEIGHTS


def none(coefficients: StepCoefficients) -> Tensor:
    """1."""
    return torch.ones_like(coefficients.table[:, C])


def noise_aware(coefficients: StepCoefficients) -> Tensor:
    """C, the step's injected standard deviation (TempFlow-GRPO, arXiv 2508.04324): leaves a gradient as B z."""
    return coefficients.table[:, C]


def flash(coefficients: StepCoefficients) -> Tensor:
    """1 / gain, which leaves a gradient as z; 0 for a noise-free step.

    Temporal gradient rectification of Flash-GRPO (arXiv 2605.15980), as in the authors' script.
    """
    table = coefficients.table
    gain = 2 * table[:, LOG_PROB_SCALE] * table[:, B].abs() * table[:, C]
    return torch.where(gain > 0, 1 / gain, 0.0)


def proportionate(coefficients: StepCoefficients) -> Tensor:
    """|dt| / gain, which leaves a gradient as |dt| z; 0 for a noise-free step.

    Proportionate credit of PCPO (arXiv 2509.25774), from a note on it; its log-hinge objective is not part of this.
    """
    return flash(coefficients) * coefficients.sigmas.diff().abs()


def step_weights(
    coefficients: StepCoefficients, steps: Sequence[int], kind: str, options: Mapping[str, Any] | None = None
) -> Tensor:
    """Weight of every step's policy loss, over its mean on the trained steps.

    Args:
        coefficients: of the sampler, with noise in all of `steps`.
        steps: the trained steps; where iterations differ in them, those of all iterations, or a lone step's weight is
            always 1.
        kind: name of a weighting (`objective.registry`).
        options: values by name, at least those that it takes.

    Returns:
        [T] float32; steps that are not trained are weighted by the same rule. 0 if no trained step has a weight.

    Raises:
        ValueError: there is no such weighting, it lacks an option, or there are no trained steps.
        PluginError: it raised, or returned something else than T finite numbers of at least 0.
    """
    if not steps:
        raise ValueError("step_weights: needs at least one trained step")
    weighting, count = STEP_WEIGHTS.find(kind), coefficients.num_steps
    chosen = select_options(f"step weight {kind}", weighting.options, options or {})
    with fenced(f"objective.step_weight: {kind}"):
        raw = weighting.function()(coefficients, **chosen)
    expected = f"objective.step_weight: {kind} must return a tensor of {count} finite weights of at least 0"
    if not isinstance(raw, Tensor) or raw.is_complex():
        raise PluginError(f"{expected}, got {type(raw).__name__ if not isinstance(raw, Tensor) else raw.dtype}")
    if list(raw.shape) != [count]:
        raise PluginError(f"{expected}, got shape {list(raw.shape)}")
    raw = raw.detach().to(coefficients.table)
    if not raw.isfinite().all() or (raw < 0).any():
        raise PluginError(f"{expected}, got {raw.tolist()}")
    mean = raw[list(steps)].mean()
    return raw / mean.where(mean > 0, 1.0)
