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
with the reviews.

Unlike in every other method the zero of the rewards matters. Q is a weight only as long as it is not negative: a
trajectory with a Q below 0 weighs its steps alike, as a negative weight would turn an advantage around, and k * Q is a
penalty there. So give VGPO rewards of at least 0.

With noise in all steps every instant reward is Eq 9's. With noise in some only, two things are ours. Q sums the instant
rewards of the noisy steps, each of which discounts once. And as states that noise-free steps join have one completion,
a step's is that of the last of them: of the state before the next noisy step, projected in one ODE step, and after the
last noisy step the real final image, to which the ODE has gone in all its steps. With a window (as in embedded_vgpo) Q
so mixes two estimators: one-step projections, and for the last noisy step a reward without an error of projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

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
        [..., T] in the same dtype, with mean 1 over the steps that have a value. 1 for a trajectory that has a value
        below 0 or none above (ours: nothing readable of the source speaks of these); NaN where the value is missing.
    """
    mean = values.nanmean(-1, keepdim=True)
    usable = (mean > 0) & ~(values < 0).any(-1, keepdim=True)
    return (values / mean.where(usable, 1.0)).where(usable | values.isnan(), 1.0)


def vgpo_advantages(
    lookahead_rewards: Tensor,
    *,
    steps: Sequence[int] | None = None,
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
            image; NaN = missing. Rewards should not be below 0.
        steps: index of each of the T steps in the trajectory, if it has others that are not judged; None = 0..T-1.
        discount: of the instant rewards to come, in [0, 1]; the source's is not verified.
        absolute_coef: k, at least 0; 0 leaves the relative term alone; the source's is not verified.
        absolute_steps: the sampling steps 0..absolute_steps-1 get the absolute term, judged or not; at least 0.
        std: divide by the "group" or the "global" standard deviation of Q, for each step.
        spread_floor: groups' steps with a smaller standard deviation of Q get no relative term; the absolute one stays.
        clip: bound on the magnitude of an advantage; None = none.
        epsilon: added to the standard deviation.

    Returns:
        values [P, G, T] float32; 0 where a reward that the step's value sums is missing. zero_spread counts the units
        without a relative term.

    Raises:
        ValueError: the shape of lookahead_rewards, their number and that of steps, or an option is out of range.
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
    sampled = range(values.shape[-1]) if steps is None else steps
    if len(sampled) != values.shape[-1]:
        raise ValueError(f"vgpo_advantages: steps must name the {values.shape[-1]} judged ones, got {list(sampled)}")
    early = torch.tensor([step < absolute_steps for step in sampled], device=values.device)
    dual = relative.values + absolute_coef * values.where(early, 0.0)
    advantages = (temporal_weights(values) * dual).where(values.isfinite(), 0.0)
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)
    return Advantages(advantages.float(), relative.zero_spread, relative.missing)
