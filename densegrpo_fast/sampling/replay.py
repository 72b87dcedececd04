"""Replay: the policy's velocity and log-probability of steps that a rollout has taken."""

from __future__ import annotations

import torch
from torch import Tensor

from densegrpo_fast.flow import ops
from densegrpo_fast.flow.log_prob_op import KlScale
from densegrpo_fast.models.base import FlowModel, GuidanceGradient
from densegrpo_fast.sampling.rollout import Rollout


def replay(
    model: FlowModel,
    rollout: Rollout,
    step: int,
    rows: slice,
    guidance_gradient: GuidanceGradient = "full",
    velocity: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score one recorded step again, with gradient to the adapter.

    A state with K branches is evaluated once, and its velocity scores them all.

    Args:
        step: index of the step.
        rows: one micro-batch of the rollout: the same rows together give the same rounding, so that an unchanged
            policy's importance ratio is 1.
        guidance_gradient: the halves of a guided velocity that the gradient goes through.
        velocity: [m, ...] float32, the guided velocity with its graph where the rollout has kept that; None = it is
            evaluated again.

    Returns:
        log_prob [m*K] float32 (mean over the latent's elements), K = 1 without branches, and the guided velocity
        [m, ...] float32.
    """
    if velocity is None:
        velocity = replay_velocity(model, rollout, step, rows, guidance_gradient)
    log_prob = ops.sde_log_prob(
        per_branch(rollout.latents[step, rows], rollout.branches),
        per_branch(velocity, rollout.branches),
        rollout.next_latents(step, rows),
        rollout.coefficients.table,
        step,
    )
    return log_prob, velocity


def replay_kl(
    model: FlowModel,
    rollout: Rollout,
    step: int,
    rows: slice,
    scale: KlScale,
    guidance_gradient: GuidanceGradient = "full",
    velocity: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`replay`, and in the same pass the step's divergence from the reference policy's.

    Args:
        step, rows, guidance_gradient, velocity: as `replay`.
        scale: standard deviation that the divergence is measured in; see `ops.sde_log_prob_kl`.

    Returns:
        log_prob [m*K] and velocity [m, ...] as `replay`; kl [m*K] float32 in nats, mean over the latent's elements.
    """
    if velocity is None:
        velocity = replay_velocity(model, rollout, step, rows, guidance_gradient)
    log_prob, kl = ops.sde_log_prob_kl(
        per_branch(rollout.latents[step, rows], rollout.branches),
        per_branch(velocity, rollout.branches),
        per_branch(reference_velocity(model, rollout, step, rows), rollout.branches),
        rollout.next_latents(step, rows),
        rollout.coefficients.table,
        step,
        scale=scale,
    )
    return log_prob, velocity, kl


def per_branch(states: Tensor, branches: int) -> Tensor:
    """[m*K, ...] of [m, ...]: each row K times in a row; the tensor itself with K = 1."""
    return states if branches == 1 else states.repeat_interleave(branches, dim=0)


def replay_velocity(
    model: FlowModel, rollout: Rollout, step: int, rows: slice, guidance_gradient: GuidanceGradient = "full"
) -> Tensor:
    """The guided velocity [m, ...] at a recorded state, in whichever mode the model is (policy or reference)."""
    latents = rollout.latents[step, rows]
    sigma = rollout.coefficients.sigmas[step].expand(len(latents))
    conditioning = rollout.conditioning.select(rows)
    return model.velocity(latents, sigma, conditioning, rollout.guidance_scale, guidance_gradient).combined()


@torch.no_grad()
def reference_velocity(model: FlowModel, rollout: Rollout, step: int, rows: slice) -> Tensor:
    """`replay_velocity` of the reference policy: the model without its adapter."""
    with model.reference():
        return replay_velocity(model, rollout, step, rows)
