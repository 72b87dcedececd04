"""How much of a step's reward gain the step's own noise decides: a diagnostic of the dense reward.

With completions that follow the deterministic flow, the gain y of a step is a function of the state x_t and of the
noise that the step injects, and nothing else. By the law of total variance

    Var(y) = E[Var(y | x_t)] + Var(E[y | x_t])
             own noise         state

The first part is what the step can be credited with. The second belongs to where the step started (prompt and earlier
noise); among group members in different states it reaches the advantages as noise. A step that injects little can
change the reward little, so the first part must vanish with the noise: its root over the injected standard deviation
is the step's sensitivity, which a reward that is consistent along the trajectory keeps of one order. (ICRM, arXiv
2506.09096, asks the like of reward models for text: a likely continuation leaves the reward as it was. The analogue for
flows is ours.)

What can be learnt from is told by the opposite noise. A policy gradient sees of y as a function of the noise z only its
slope. Where y is a straight line, y(z) and y(-z) have the correlation -1; 0, where they have nothing in common, and the
step's noise decides the gain without a slope that would tell which way was better.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class StepConsistency:
    """Variance components of the gains of T steps. All [T] float64; NaN where a step has nothing to tell.

    Attributes:
        mean: mean gain.
        own: E[Var(gain | state)], the variance that the step's own noise makes; unbiased.
        state: Var(E[gain | state]); unbiased, so that it may come out below 0 where it is small.
        own_share: own / (own + max(state, 0)), in [0, 1]; NaN where all gains are equal.
        sensitivity: sqrt(own) / injected standard deviation, in reward per unit of noise; NaN for a noise-free step.
        mirror: correlation of the gain with that of the opposite noise in the same state, in [-1, 1]; NaN without such
            gains, or where the own variance is 0.
        states: how many states count.
    """

    mean: Tensor
    own: Tensor
    state: Tensor
    own_share: Tensor
    sensitivity: Tensor
    mirror: Tensor
    states: Tensor


def neighbour_correlation(gains: Tensor) -> float:
    """Correlation of a step's gain with the next step's, within groups, over all pairs of neighbours.

    Errors of the completions' rewards enter two gains with opposite signs: g_k = true_k + e_(k+1) - e_k. Were a gain
    nothing but independent errors of one variance, neighbours would have the correlation -1/2; true gains that are not
    to be foreseen from earlier ones add nothing to it. (The estimator of a price's bid-ask bounce, Roll 1984.) Below 0
    is also what later steps systematically take back.

    Args:
        gains: [P, G, K] float, of consecutive noisy steps; NaN = missing.

    Returns:
        In [-1, 1]; NaN where there is no pair, or nothing varies.

    Raises:
        ValueError: the shape is not [P, G, K].
    """
    if gains.ndim != 3:
        raise ValueError(f"neighbour_correlation: gains must be [P, G, K], got {list(gains.shape)}")
    pairs = torch.stack([gains[..., :-1], gains[..., 1:]]).double()
    present = pairs.isfinite().all(0)
    pairs = pairs.where(present, torch.nan)
    pairs = (pairs - pairs.nanmean(2, keepdim=True)).where(present, 0.0)
    one, other = pairs[0], pairs[1]
    return ((one * other).sum() / (one.square().sum() * other.square().sum()).sqrt()).item()


def step_consistency(gains: Tensor, step_std: Tensor, mirrored: Tensor | None = None) -> StepConsistency:
    """Estimate the components from N states, each left K times by the same step with fresh noise.

    One-way analysis of variance with random effects:

        own   = mean over states of the sample variance over branches (ddof 1)
        state = sample variance over states of the mean over branches (ddof 1) - own / K

    and, as the noise is symmetric, so that both signs have one variance,

        mirror = 1 - mean over pairs of (y(z) - y(-z))^2 / (own of both signs together)

    where the sum of two variances less twice their covariance is the mean square of the difference.

    Args:
        gains: [N, K, T] float, N and K at least 2; NaN = missing. A state with a missing branch is left out of that
            step.
        step_std: standard deviation of the noise that each step injects, [T]: column C of the step coefficients.
        mirrored: [N, K, T], the gains with the opposite noise, or None. A state with a missing one is left out too.

    Raises:
        ValueError: a shape is wrong, or an injected standard deviation is negative.
    """
    if gains.ndim != 3 or gains.shape[0] < 2 or gains.shape[1] < 2:
        raise ValueError(f"step_consistency: gains must be [N, K, T] with N, K >= 2, got {list(gains.shape)}")
    if step_std.shape != gains.shape[2:] or not bool((step_std >= 0).all()):
        raise ValueError(
            f"step_consistency: step_std must be {gains.shape[2]} numbers of at least 0, got {step_std.tolist()}"
        )
    if mirrored is not None and mirrored.shape != gains.shape:
        raise ValueError(
            f"step_consistency: mirrored must have the shape of gains, {list(gains.shape)}, got {list(mirrored.shape)}"
        )
    gains, step_std = gains.double(), step_std.to(gains.device).double()
    opposite = gains if mirrored is None else mirrored.double()
    branches, present = gains.shape[1], (gains.isfinite() & opposite.isfinite()).all(1)
    states = present.sum(0)
    gains, opposite = (values.where(present[:, None], 0.0) for values in (gains, opposite))
    means, count = gains.mean(1), states.clamp(min=1)
    mean = means.sum(0) / count
    own = gains.var(1).sum(0) / count
    spread = ((means - mean).square() * present).sum(0) / (states - 1).clamp(min=1)
    state = spread - own / branches
    total = own + state.clamp(min=0)
    both = own + opposite.var(1).sum(0) / count
    mirror = 1 - (gains - opposite).square().mean(1).sum(0) / count / both
    nan = torch.full_like(mean, torch.nan)
    told = states >= 2
    return StepConsistency(
        mean=mean.where(told, nan),
        own=own.where(told, nan),
        state=state.where(told, nan),
        own_share=(own / total).where(told & (total > 0), nan),
        sensitivity=(own.sqrt() / step_std).where(told & (step_std > 0), nan),
        mirror=mirror.clamp(-1, 1).where(told & (both > 0) & (mirrored is not None), nan),
        states=states,
    )
