"""TP-GRPO: dense credit in which the steps that turn a trajectory round answer for all that follows.

Source: TurningPoint-GRPO (arXiv 2602.06422), definitions 4.1 and 5.1 and appendix D. With L[j] the reward of the
completion of state j (j = steps done), gain[j] = L[j+1] - L[j] as in `dense.py` and trend = L[T] - L[0], step j is a
turning point if its gain has the trend's sign and the gain before it the opposite sign; the first step has nothing
before it and only needs the trend's sign. Its reward is then L[T] - L[j] in place of the gain.

The consistency constraint also asks that the rest of the trajectory, L[T] - L[j+1], has the gain's sign: replacing
then keeps the sign and enlarges the magnitude. It leaves the last step, which has no rest, as it is.

Places where the released code differs from the paper and this file follows the paper: its reward of the
initial noise comes from another noise sample than the trajectory's, and its balancing ranks and counts by the trend
where the paper does by the replacement. The released code balances each micro-batch of its sampling by itself, this
file all samples of the iteration together, so that advantages do not depend on how many rows fit into memory. Of the
published tables, only the numbers with and without constraint on the task metrics are complete; quality metrics with
the constraint are not verified.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from densegrpo_fast.credit.dense import reward_gains
from densegrpo_fast.credit.normalize import Advantages, Std, normalize_groups


def turning_points(lookahead_rewards: Tensor, *, consistent: bool = True) -> Tensor:
    """Which steps are turning points.

    Args:
        lookahead_rewards: [P, G, T+1] float; index = steps done, the last is the real final image; NaN = missing.
        consistent: apply the consistency constraint (definition 5.1).

    Returns:
        [P, G, T] bool. A step is none where a reward that decides it is missing, or a difference that decides it is 0.

    Raises:
        ValueError: the shape is not [P, G, T+1] with T of at least 1.
    """
    rewards = lookahead_rewards.double()
    gains = reward_gains(rewards)
    trend = rewards[..., -1:] - rewards[..., :1]
    known = rewards.isfinite()
    turning = (gains.sign() * trend.sign() > 0) & known[..., :-1] & known[..., 1:]
    turning &= known[..., :1] & known[..., -1:]
    turning[..., 1:] &= (gains[..., :-1].sign() * trend.sign() < 0) & known[..., :-2]
    if consistent:
        rest = rewards[..., -1:] - rewards[..., 1:]
        turning &= gains.sign() * rest.sign() > 0
    return turning


def turning_point_rewards(lookahead_rewards: Tensor, *, consistent: bool = True, balance: bool = True) -> Tensor:
    """The gain of every step, replaced at turning points by the sum of this and all later gains.

    Args:
        lookahead_rewards: [P, G, T+1] float; see `turning_points`.
        consistent: apply the consistency constraint.
        balance: keep equally many replacements above and below 0 in the batch, the largest magnitudes first; if all
            are on one side, keep them all, as the released code does. Equal magnitudes of which only some can be kept
            are all made in part, by the same share (ours: the source does not say, and equal samples must not differ).
            A replacement of 0 is on neither side and is not made.

    Returns:
        [P, G, T] float64; NaN where the step's own gain is missing.

    Raises:
        ValueError: the shape is not [P, G, T+1] with T of at least 1.
    """
    turning = turning_points(lookahead_rewards, consistent=consistent)
    rewards = lookahead_rewards.double()
    gains, aggregated = reward_gains(rewards), rewards[..., -1:] - rewards[..., :-1]
    share = _balanced(turning, aggregated) if balance else turning.double()
    return torch.lerp(gains, aggregated, share).where(share > 0, gains)


def turning_point_advantages(
    lookahead_rewards: Tensor,
    *,
    consistent: bool = True,
    balance: bool = True,
    std: Std = "group",
    spread_floor: float = 0.0,
    clip: float | None = 5.0,
    epsilon: float = 1e-4,
) -> Advantages:
    """Group-relative advantage of every step's `turning_point_rewards`, normalised for each step on its own.

    Args:
        lookahead_rewards: [P, G, T+1] float; see `turning_points`.
        consistent: apply the consistency constraint; on in the published launch settings.
        balance: see `turning_point_rewards`; on in the published launch settings.
        std: divide by the "group" standard deviation (the source) or the "global" one.
        spread_floor: groups' steps with a smaller standard deviation get advantage 0.
        clip: bound on the magnitude of an advantage; None = none.
        epsilon: added to the standard deviation.

    Returns:
        values [P, G, T] float32.

    Raises:
        ValueError: the shape of lookahead_rewards, or an option is out of range.
    """
    return normalize_groups(
        turning_point_rewards(lookahead_rewards, consistent=consistent, balance=balance),
        std=std,
        spread_floor=spread_floor,
        clip=clip,
        epsilon=epsilon,
    )


def _balanced(turning: Tensor, aggregated: Tensor) -> Tensor:
    """By which share each replacement is made, in [0, 1]; if there are both signs, their shares sum to the same."""
    sides = (turning & (aggregated > 0), turning & (aggregated < 0))
    sizes = torch.stack([side.sum() for side in sides])
    count = sizes.min().where(sizes.min() > 0, sizes.max())
    share = torch.zeros_like(aggregated)
    for side in sides:
        magnitude = aggregated.abs().where(side, -math.inf).contiguous()
        rising = magnitude.flatten().sort().values
        up_to = torch.searchsorted(rising, magnitude, right=True)
        tied = up_to - torch.searchsorted(rising, magnitude)
        part = (count - (rising.numel() - up_to)).to(share.dtype) / tied
        share = part.clamp(0, 1).where(side, share)
    return share
