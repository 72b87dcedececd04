"""Smoothing of the rewards along a trajectory: a step that injected little noise can have changed the value little.

The rewards of completions are noisy measurements R_k = V_k + error of the values V_k of the states, whose gains are
the larger the more noise their step has injected. If errors have variance tau^2, and true gains the variance
s^2 c_k^2 / mean(c^2) for a step of injected standard deviation c_k, the likeliest values minimise

    sum over inner states of (V_k - R_k)^2 + strength * sum over steps of (V_(k+1) - V_k)^2 * mean(c^2) / c_k^2

with strength = tau^2 / s^2. Both ends are kept: the last reward is the image's own, and the first the baseline that
all of the trajectory's gains are measured from; so the gains still telescope to the same sum. Strength 0 changes
nothing; at large strengths the sum is spread over the steps in proportion to their injected variance.

The idea is ICRM's (arXiv 2506.09096), which asks of rewards for text that likely continuations leave them as they were;
the analogue for flows, and this form of it, are ours. Of gains whose neighbours have correlation -r
(`consistency.neighbour_correlation`), errors explain all if strength = r / (1 - 2 r).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def smooth_rewards(rewards: Tensor, step_std: Tensor, strength: float) -> Tensor:
    """The likeliest values of a trajectory's states, given the rewards of their completions.

    Args:
        rewards: [..., K+1] float; entry k belongs to the state before the k-th noisy step, the last to the image; NaN =
            missing.
        step_std: standard deviation of the noise that each of the K steps injects, [K], positive: column C of the step
            coefficients.
        strength: variance of the rewards' errors in units of the mean variance of the true gains, at least 0.

    Returns:
        [..., K+1] in the dtype of `rewards`; the ends as they were. A missing state stays missing, and the others are
        what they most likely are without it.

    Raises:
        ValueError: shapes disagree, or a number is out of range.
    """
    if rewards.ndim < 1 or step_std.shape != (rewards.shape[-1] - 1,) or not len(step_std):
        raise ValueError(
            "smooth_rewards: rewards [..., K+1] and step_std [K] must agree, "
            f"got {list(rewards.shape)} and {list(step_std.shape)}"
        )
    if not bool(((step_std > 0) & step_std.isfinite()).all()):
        raise ValueError(f"smooth_rewards: step_std must be positive, got {step_std.tolist()}")
    if not (math.isfinite(strength) and strength >= 0):
        raise ValueError(f"smooth_rewards: strength must be finite and at least 0, got {strength}")
    if strength == 0 or rewards.shape[-1] < 3:
        return rewards
    present = rewards.isfinite()
    variance = step_std.to(rewards.device).double().square()
    stiffness = strength * variance.mean() / variance
    # the normal equations: measured states on the diagonal, and each step's spring between its two states
    ends = torch.zeros(rewards.shape[-1], dtype=torch.bool, device=rewards.device)
    ends[[0, -1]] = True
    springs = torch.zeros(len(ends), len(ends), dtype=torch.float64, device=rewards.device)
    before = torch.arange(len(stiffness), device=rewards.device)
    springs[before, before] += stiffness
    springs[before + 1, before + 1] += stiffness
    springs[before, before + 1] = springs[before + 1, before] = -stiffness
    matrix = springs + torch.diag_embed(present.double())
    # a present end is held where it is; a trajectory without any reward is given something solvable
    held = (ends & present) | ~present.any(-1, keepdim=True)
    identity = torch.eye(len(ends), dtype=torch.float64, device=rewards.device)
    matrix = identity.where(held[..., None], matrix)
    known = rewards.double().where(present, 0.0)
    values = torch.linalg.solve(matrix, known)
    # what is held is exact, not solved
    values = rewards.double().where(ends, values).where(present, math.nan)
    return values.to(rewards.dtype)
