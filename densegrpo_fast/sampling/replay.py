"""Replay: the policy's velocity and log-probability of steps that a rollout has taken."""

from __future__ import annotations

import torch
from torch import Tensor

from densegrpo_fast.flow import ops
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.sampling.trajectory import Trajectory


def replay(model: FlowModel, trajectory: Trajectory, step: int, rows: slice) -> tuple[Tensor, Tensor]:
    """Score one recorded step again, with gradient to the adapter.

    Args:
        step: index of the step.
        rows: one micro-batch of the rollout: the same rows together give the same rounding, so that an unchanged
            policy's importance ratio is 1.

    Returns:
        log_prob [m] float32 (mean over the latent's elements) and the guided velocity [m, ...] float32.
    """
    latents = trajectory.latents[step, rows]
    velocity = replay_velocity(model, trajectory, step, rows)
    log_prob = ops.sde_log_prob(
        latents, velocity, trajectory.latents[step + 1, rows], trajectory.coefficients.table, step
    )
    return log_prob, velocity


def replay_velocity(model: FlowModel, trajectory: Trajectory, step: int, rows: slice) -> Tensor:
    """The guided velocity [m, ...] at a recorded state, in whichever mode the model is (policy or reference)."""
    latents = trajectory.latents[step, rows]
    sigma = trajectory.coefficients.sigmas[step].expand(len(latents))
    return model.velocity(latents, sigma, trajectory.conditioning.select(rows), trajectory.guidance_scale).combined()


@torch.no_grad()
def reference_velocity(model: FlowModel, trajectory: Trajectory, step: int, rows: slice) -> Tensor:
    """`replay_velocity` of the reference policy: the model without its adapter."""
    with model.reference():
        return replay_velocity(model, trajectory, step, rows)
