"""GRPO-Guard: importance ratios centred on 1 and of equal spread at every step, and steps of equal weight.

Source: GRPO-Guard (arXiv 2510.22319), formulas from notes on it and from the loss of that name in verl-omni. With dmu
the old mean minus the new one, s = C the injected standard deviation and z the noise of the step,
log ratio = -dmu^2 / (2 s^2) - dmu*z / s: its mean lies below 0 and both terms grow as s falls, so a fixed clip range
never stops steps with positive advantage and always stops late ones. Ratio normalisation adds the first term back and
multiplies by s, which leaves -dmu*z; all terms are means over the latent's elements, like log_prob. Each sample's ratio
gets its own first term, as in verl-omni. The script in flow_grpo takes that mean over the batch as well (its `dim` is
empty, which reduces all dimensions), so that every sample gets the batch's mean: the same as long as all drifted
alike.

Published: clip_range 2e-6 (4e-6 PickScore), learning rate 1e-4 on SD3.5-M, no KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from densegrpo_fast.flow.dynamics import B, C, StepCoefficients
from densegrpo_fast.flow.ops import grpo_loss
from densegrpo_fast.objective.clip import METRICS, clip_ratios
from densegrpo_fast.objective.kl import gaussian_kl
from densegrpo_fast.objective.pairs import Loss, Pairs

GuardWeight = Literal["paper", "jacobian", "none"]


@dataclass(frozen=True, eq=False)
class GuardTable:
    """GRPO-Guard's constants of every step.

    Attributes:
        log_ratio_scale: [T] float32, the step's injected standard deviation.
        weight: [T] float32, of the step's policy loss.
    """

    log_ratio_scale: Tensor
    weight: Tensor


def guard_table(coefficients: StepCoefficients, steps: Sequence[int], weight: GuardWeight = "paper") -> GuardTable:
    """Tabulate the ratio's scale and the loss's weight of every step.

    Args:
        coefficients: of the sampler.
        steps: the trained steps.
        weight: "paper" = 1/|dt| for flow_sde, where the mean's derivative B in the velocity is proportional to dt; for
            dance (1 + noise_level^2 (1 - sigma) / (2 sigma)) / |dt|, as a note on the paper has it (not verified:
            balancing the steps would need the bracket's inverse). "jacobian" = 1/|B|, over its mean on the trained
            steps, for any sampler: ours, after the same idea in the Precise repository (arXiv 2605.23522).
            "none" = 1: ratio normalisation alone.

    Raises:
        ValueError: the sampler's log-probability carries no variance, a trained step is noise-free, steps is empty, or
            weight is unknown or not defined for the sampler.
    """
    family = coefficients.family
    if family in ("cps", "ode"):
        raise ValueError(
            f"guard_table: GRPO-Guard needs a log-probability with a variance, sampler family {family!r} has none; "
            "use flow_sde, dance, wan or precise"
        )
    if not steps:
        raise ValueError("guard_table: needs at least one trained step")
    deterministic = [step for step in steps if not coefficients.noisy[step]]
    if deterministic:
        raise ValueError(
            f"guard_table: trained steps {deterministic} inject no noise, so they have no ratio to normalise"
        )
    table = coefficients.table
    if weight == "none":
        weights = torch.ones(len(table), device=table.device)
    elif weight == "jacobian":
        inverse = 1 / table[:, B].abs()
        weights = inverse / inverse[list(steps)].mean()
    elif weight == "paper":
        dt = coefficients.sigmas.diff().abs()
        if family == "flow_sde":
            weights = 1 / dt
        elif family == "dance":  # B = bracket * dt
            weights = table[:, B].abs() / dt.square()
        else:
            raise ValueError(
                f"guard_table: weight 'paper' is defined for flow_sde and dance, not {family!r}; "
                "use 'jacobian' or 'none'"
            )
    else:
        raise ValueError(f"guard_table: weight must be paper, jacobian or none, got {weight!r}")
    return GuardTable(table[:, C], weights)


def guard_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    velocity: Tensor,
    old_velocity: Tensor,
    coefficients: StepCoefficients,
    step_index: Tensor,
    guard: GuardTable,
    clip_range: float,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate loss of B (sample, step) pairs on normalised ratios.

    ratio = exp((log_prob - old_log_prob + mean((mean_new - mean_old)^2) / (2 C^2)) * C). The squared term carries
    gradient, without which the gradient off the old policy would not be that of -dmu*z; `grpo_loss` takes its
    log_ratio_bias as a constant, so the sum is handed over as the log-ratio.

    Args:
        log_prob: [B] float32, of the policy being trained; mean over latent dims. Carries gradient.
        old_log_prob: [B] float32, of the policy that sampled.
        advantages: [B] float32.
        velocity: [B, ...] float, of the policy being trained; carries gradient.
        old_velocity: same shape, of the policy that sampled (`Trajectory.velocities`).
        coefficients: of the sampler.
        step_index: [B] int64, each row's step.
        guard: what `guard_table` made for these coefficients.
        clip_range: half-width of the normalised ratio's trust interval.
        kl: [B] float32, divergence to the reference policy; None: no term.
        kl_coef: weight of mean(kl).
        weight: [B] float32, further weight of each pair; None = 1.

    Returns:
        loss and metrics as `ppo_clip_loss`, its ratios being the normalised ones.

    Raises:
        ValueError: kl_coef is not 0 but kl is None; or shapes disagree.
    """
    if kl is None and kl_coef:
        raise ValueError(f"guard_loss: kl_coef {kl_coef} needs kl, got None")
    centre = gaussian_kl(velocity, old_velocity.detach(), coefficients.table, step_index)
    log_ratio = log_prob - old_log_prob + centre.to(log_prob.dtype)
    weights, scale = guard.weight[step_index], guard.log_ratio_scale[step_index]
    loss, metrics = grpo_loss(
        log_ratio,
        torch.zeros_like(old_log_prob),
        advantages,
        kl,
        clip_range=clip_range,
        kl_coef=kl_coef,
        log_ratio_scale=scale,
        weight=weights if weight is None else weights * weight,
    )
    found = dict(zip(METRICS, metrics.detach().unbind(), strict=True))
    return loss, found | clip_ratios(log_ratio.detach() * scale, advantages, clip_range)


def guard_policy(
    coefficients: StepCoefficients, steps: Sequence[int], *, clip_range: float, guard_weight: GuardWeight
) -> Loss:
    """`guard_loss` as a policy loss of the registry.

    Raises:
        ValueError: as `guard_table`.
    """
    guard = guard_table(coefficients, steps, guard_weight)

    def loss(pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        return guard_loss(
            pairs.log_prob,
            pairs.old_log_prob,
            pairs.advantages,
            velocity=pairs.velocity,
            old_velocity=pairs.old_velocity,
            coefficients=coefficients,
            step_index=pairs.step_index,
            guard=guard,
            clip_range=clip_range,
            kl=pairs.kl,
            kl_coef=pairs.kl_coef,
            weight=pairs.weight,
        )

    return loss
