"""VGPO: one-step rewards summed over the rest of the trajectory, and an advantage that outlives a flat group.

Source: VGPO (arXiv 2512.12387). There is no public code, and what follows was gathered from reviews and notes, not
from the paper's text:

    * the instant reward of a step is that of the next latents projected to the image in one ODE step (Eq 9): the
      `state_rewards` of a `one_step` lookahead;
    * its value Q is the discounted sum of the instant rewards from this step on (Eq 10), and its weight is Q over the
      mean of Q along the trajectory (Eq 11);
    * the dual advantage (Eq 13) adds to the relative term (Q - mean) / std an absolute term alpha * Q / std with
      alpha = k * std, which is k * Q and remains when the group's spread vanishes; first 5 sampling steps only.

Not verified: the values of the discount and of k (so neither has a default here), and how weight and dual advantage
combine. This file multiplies them: advantage = weight * ((Q - mean) / std + k * Q), one algebraic form that agrees
with the reviews. Unlike in every other method a shift of the rewards matters: Q must be positive to be a weight.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from densegrpo_fast.credit.normalize import Advantages, Std, normalize_groups
from densegrpo_fast.credit.return_to_go import discounted_sums
from densegrpo_fast.credit.value import state_rewards


def temporal_weights(values: Tensor) -> Tensor:
    """Each step's value over the mean of its trajectory (Eq 11).

    Args:
        values: [..., T] float; NaN = missing, left out of the mean.

    Returns:
        [..., T] in the same dtype, with mean 1 over the steps that have a value. 1 for a trajectory whose mean is not
        above 0 (ours: the source assumes positive rewards); NaN where the value is missing.
    """
    mean = values.nanmean(-1, keepdim=True)
    usable = mean > 0
    return (values / mean.where(usable, 1.0)).where(usable | values.isnan(), 1.0)


def vgpo_advantages(
    lookahead_rewards: Tensor,
    *,
    discount: float,
    absolute_coef: float,
    absolute_steps: int = 5,
    std: Std = "group",
    spread_floor: float = 0.0,
    clip: float | None = 5.0,
    epsilon: float = 1e-4,
) -> Advantages:
    """Weight of the step times (relative plus absolute advantage) of its value; see the top of this file.

    Args:
        lookahead_rewards: [P, G, T+1] float, of one-step completions; index = steps done, the last is the real final
            image; NaN = missing. Rewards should be positive.
        discount: of the instant rewards to come, in [0, 1]; the source's is not verified.
        absolute_coef: k, at least 0; 0 leaves the relative term alone; the source's is not verified.
        absolute_steps: how many steps at the start get the absolute term, at least 0.
        std: divide by the "group" or the "global" standard deviation of Q, for each step.
        spread_floor: groups' steps with a smaller standard deviation of Q get no relative term; the absolute one stays.
        clip: bound on the magnitude of an advantage; None = none.
        epsilon: added to the standard deviation.

    Returns:
        values [P, G, T] float32; 0 where a reward that the step's value sums is missing. zero_spread counts the units
        without a relative term.

    Raises:
        ValueError: the shape of lookahead_rewards, or an option is out of range.
    """
    if not (math.isfinite(absolute_coef) and absolute_coef >= 0):
        raise ValueError(f"vgpo_advantages: absolute_coef must be finite and at least 0, got {absolute_coef}")
    if absolute_steps < 0:
        raise ValueError(f"vgpo_advantages: absolute_steps must be at least 0, got {absolute_steps}")
    if clip is not None and not clip > 0:
        raise ValueError(f"vgpo_advantages: clip must be above 0 or None, got {clip}")
    rewards = state_rewards(lookahead_rewards).double()
    values = discounted_sums(rewards.where(rewards.isfinite(), math.nan), discount)
    relative = normalize_groups(values, std=std, spread_floor=spread_floor, clip=None, epsilon=epsilon)
    early = torch.arange(values.shape[-1], device=values.device) < absolute_steps
    dual = relative.values + absolute_coef * values.where(early, 0.0)
    advantages = (temporal_weights(values) * dual).where(values.isfinite(), 0.0)
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    return Advantages(advantages.float(), relative.zero_spread, relative.missing)
