"""The loss of one training step, put together from what is configured: a policy loss, step weights, a KL term."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from densegrpo_fast.flow.dynamics import StepCoefficients
from densegrpo_fast.objective.clip import ppo_clip_loss
from densegrpo_fast.objective.dppo import dppo_loss
from densegrpo_fast.objective.guard import GuardWeight, guard_loss, guard_table
from densegrpo_fast.objective.kl import KlScale, gaussian_kl
from densegrpo_fast.objective.weights import StepWeight, step_weights

Policy = Literal["clip", "guard", "dppo"]


@dataclass(frozen=True)
class ObjectiveSettings:
    """What the loss is made of.

    Attributes:
        policy: "clip" = PPO's clipped ratios; "guard" = GRPO-Guard's normalised ones; "dppo" = Flow-DPPO's mask.
        clip_range: of clip and guard; guard's ratios are smaller by the injected standard deviation of the step.
        guard_weight: see `guard.guard_table`.
        dppo_threshold: see `dppo.dppo_keep`.
        step_weight: see `weights.step_weights`; multiplies guard's own weight.
        kl_coef: weight of the KL to the reference policy; 0 = no term.
        kl_scale: see `kl.gaussian_kl`.
        negative_factor: what the negative advantages of branches that point where good ones do are multiplied by, see
            `negatives.negative_weights`; 1 = off.
        negative_threshold: see there.
    """

    policy: Policy
    clip_range: float
    guard_weight: GuardWeight
    dppo_threshold: float
    step_weight: StepWeight
    kl_coef: float
    kl_scale: KlScale
    negative_factor: float = 1.0
    negative_threshold: float = 1.0


class Objective:
    """The loss of every trained step of one iteration.

    Args:
        settings: what it is made of.
        coefficients: of the iteration's sampler.
        steps: the trained steps.

    Raises:
        ValueError: settings.policy is unknown, or "guard" and the sampler gives it no ratio to normalise.
    """

    def __init__(self, settings: ObjectiveSettings, coefficients: StepCoefficients, steps: Sequence[int]):
        if settings.policy not in get_args(Policy):
            raise ValueError(f"Objective: policy must be one of {', '.join(get_args(Policy))}, got {settings.policy!r}")
        self.settings, self.coefficients = settings, coefficients
        self.weights = step_weights(coefficients.table, steps, settings.step_weight, sigmas=coefficients.sigmas)
        self.guard = guard_table(coefficients, steps, settings.guard_weight) if settings.policy == "guard" else None

    def loss(
        self,
        step: int,
        *,
        log_prob: Tensor,
        old_log_prob: Tensor,
        advantages: Tensor,
        velocity: Tensor,
        old_velocity: Tensor,
        kl: Tensor | None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of B samples' transition at one step.

        Args:
            step: its index.
            log_prob: [B] float32, of the policy being trained; mean over latent dims. Carries gradient.
            old_log_prob: [B] float32, of the policy that sampled.
            advantages: [B] float32.
            velocity: [B, ...] float, of the policy being trained; carries gradient.
            old_velocity: same shape, of the policy that sampled.
            kl: [B] float, divergence from the reference policy in `settings.kl_scale`, as `ops.sde_log_prob_kl` gives
                it; carries gradient. Needed where kl_coef is not 0.

        Returns:
            loss and metrics as `clip.ppo_clip_loss`. The ratios are guard's normalised ones with "guard", and
            clip_fraction is the share of dropped samples with "dppo".

        Raises:
            ValueError: kl_coef is not 0 but kl is None; or shapes disagree.
        """
        settings, table = self.settings, self.coefficients.table
        index = torch.full((len(velocity),), step, device=velocity.device)
        weight = self.weights[step].expand(len(advantages))
        if self.guard is not None:
            return guard_loss(
                log_prob,
                old_log_prob,
                advantages,
                velocity=velocity,
                old_velocity=old_velocity,
                coefficients=self.coefficients,
                step_index=index,
                guard=self.guard,
                clip_range=settings.clip_range,
                kl=kl,
                kl_coef=settings.kl_coef,
                weight=weight,
            )
        if settings.policy == "dppo":
            divergence = gaussian_kl(velocity.detach(), old_velocity, table, index)
            return dppo_loss(
                log_prob,
                old_log_prob,
                advantages,
                divergence.to(log_prob.dtype),
                threshold=settings.dppo_threshold,
                kl=kl,
                kl_coef=settings.kl_coef,
                weight=weight,
            )
        return ppo_clip_loss(
            log_prob,
            old_log_prob,
            advantages,
            clip_range=settings.clip_range,
            kl=kl,
            kl_coef=settings.kl_coef,
            weight=weight,
        )
