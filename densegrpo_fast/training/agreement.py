"""How well cheap lookahead rewards order the samples of a group as the exact ones do.

A group-relative method sees only the order and spread within a group, so agreement is rank correlation inside each
group, per state. Everything is vectorised over groups and states, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from densegrpo_fast.credit.dense import dense_advantages, reward_gains
from densegrpo_fast.credit.normalize import normalize_groups
from densegrpo_fast.sampling.dedup import CompletionDedup


@dataclass(frozen=True)
class Agreement:
    """Agreement of cheap lookahead rewards with exact ones over P groups.

    Rewards are those of states 0..T-2, gains those of steps 0..T-2: the last state is nearly the image itself and would
    flatter any plan. Only states with a completion of their own count, which are those followed by a step with noise
    (`CompletionDedup.states`): the states after a window share the image itself, whatever the plan. Of branches those
    count that lead to the states 0..T-2. A unit is one group at one state or step. Units whose exact values are
    all equal say nothing and are left out; units where only the cheap values are all equal count as correlation 0.
    NaN = nothing to compare.

    Attributes:
        spearman_rewards_mean, spearman_gains_mean: mean Spearman correlation over the units that remain, in [-1, 1].
        spearman_rewards_error, spearman_gains_error: standard error of these means, taken over groups.
        spearman_gains_worst_step: smallest mean over groups of any step.
        spearman_rewards, spearman_gains: mean over groups per state and per step, T-1 numbers each, NaN where nothing
            counts; of branches one for each of their M steps, whether it counts or not.
        sign_agreement: share of gains with the exact sign, among those that are not zero in both.
        sign_agreement_steps: the same per step, as many numbers as of `spearman_gains`.
        sign_agreement_rewards, sign_agreement_rewards_steps: the same of the rewards about their group's mean.
        pooled_rewards, pooled_gains: Pearson correlation over all groups, states and samples together.
        spearman_advantages, sign_agreement_advantages: the same of the normalised advantages, ranked over all samples
            and trained steps of a group together.
        remaining_rewards, remaining_gains: share of units that remain.
        excluded_rewards, excluded_gains: units left out, as a number.
        missing: share of the rewards that are missing in either, those samples being left out of their units.
    """

    spearman_rewards_mean: float
    spearman_rewards_error: float
    spearman_gains_mean: float
    spearman_gains_error: float
    spearman_gains_worst_step: float
    sign_agreement: float
    sign_agreement_steps: tuple[float, ...]
    sign_agreement_rewards: float
    sign_agreement_rewards_steps: tuple[float, ...]
    pooled_rewards: float
    pooled_gains: float
    spearman_advantages: float
    sign_agreement_advantages: float
    remaining_rewards: float
    remaining_gains: float
    excluded_rewards: int
    excluded_gains: int
    missing: float
    spearman_rewards: tuple[float, ...]
    spearman_gains: tuple[float, ...]


def compare(exact: Tensor, cheap: Tensor, noisy: Sequence[bool] | None = None) -> Agreement:
    """Agreement of two sets of lookahead rewards of the same trajectories.

    Args:
        exact: [P, G, T+1] float, the reference; NaN = missing.
        cheap: [P, G, T+1] float.
        noisy: of each of the T steps whether it injects noise, which says which states have a completion of their own.
            None = all do.

    Raises:
        ValueError: the shapes differ, T or G is below 2, or `noisy` is for another T.
    """
    if exact.shape != cheap.shape or exact.ndim != 3 or exact.shape[1] < 2 or exact.shape[2] < 3:
        raise ValueError(
            "compare: exact and cheap must both be [P, G, T+1] with G, T >= 2, "
            f"got {list(exact.shape)} and {list(cheap.shape)}"
        )
    if noisy is not None and len(noisy) != exact.shape[2] - 1:
        raise ValueError(f"compare: noisy must have one entry for each of {exact.shape[2] - 1} steps, got {len(noisy)}")
    present = ~(exact.isnan() | cheap.isnan())
    exact, cheap = (values.double().where(present, math.nan) for values in (exact, cheap))
    states = exact.shape[2] - 2
    counts = torch.zeros(states, dtype=torch.bool)
    counts[[state for state in range(states) if noisy is None or state in CompletionDedup(tuple(noisy)).states]] = True

    def counted(values: Tensor) -> Tensor:
        return values[..., :states].where(counts, math.nan)

    pair = (exact, cheap)
    return _agreement(
        [counted(values) for values in pair],
        [counted(reward_gains(values)) for values in pair],
        [counted(dense_advantages(values).values) for values in pair],
        present,
        counts,
    )


def compare_branches(exact: Tensor, cheap: Tensor, noisy: Sequence[bool]) -> Agreement:
    """Agreement of the rewards of branches, each step's with those that leave the same state.

    The reward of the state itself is the same for all its branches, so their gains rank them as their rewards do; the
    sign of a gain is here that of the reward over the branches' mean.

    Args:
        exact: [P, G, M] float, the reference: G branches at each of M steps of P ODE trajectories; NaN = missing.
        cheap: [P, G, M] float.
        noisy: of each of the T steps whether branches take it, which M of them do.

    Raises:
        ValueError: the shapes differ, G is below 2, or `noisy` is for another M.
    """
    steps = [step for step, branches in enumerate(noisy) if branches]
    if exact.shape != cheap.shape or exact.ndim != 3 or exact.shape[1] < 2 or exact.shape[2] != len(steps):
        raise ValueError(
            f"compare_branches: exact and cheap must both be [P, G, {len(steps)}] with G >= 2, "
            f"got {list(exact.shape)} and {list(cheap.shape)}"
        )
    present = ~(exact.isnan() | cheap.isnan())
    rewards = [values.double().where(present, math.nan) for values in (exact, cheap)]
    gains = [about_mean(values) for values in rewards]
    advantages = [normalize_groups(values).values for values in rewards]
    return _agreement(rewards, gains, advantages, present, torch.tensor([step + 1 < len(noisy) - 1 for step in steps]))


def persistence(exact: Tensor) -> tuple[float, ...]:
    """Correlation of each state's reward with the next state's inside a group, samples of all groups pooled.

    How much of the reward survives a step. With equal spreads a gain has 2 (1 - correlation) times a reward's
    variance: below 1/2, the difference is noisier than either of the two, and taking it costs more than it removes.

    Args:
        exact: [P, G, T+1] float; NaN = missing.

    Returns:
        T numbers in [-1, 1]; NaN where the rewards of a state are all equal in every group.
    """
    pairs = torch.stack([exact[..., :-1], exact[..., 1:]]).double()
    pairs = pairs.where(pairs.isfinite().all(0), math.nan)
    pairs = pairs - pairs.nanmean(2, keepdim=True)
    return tuple(pearson(*(values.permute(2, 0, 1).flatten(1) for values in pairs)).tolist())


def spearman(reference: Tensor, other: Tensor) -> Tensor:
    """Spearman's rank correlation along the last dimension, ties at their average rank.

    Args:
        reference: [..., N] float; NaN = missing, and then missing in both.
        other: [..., N] float.

    Returns:
        [...] float64 in [-1, 1]; NaN where the reference has no two different values, 0 where only `other` has none.
    """
    present = ~(reference.isnan() | other.isnan())
    reference, other = (values.double().where(present, math.nan) for values in (reference, other))
    return pearson(average_ranks(reference), average_ranks(other))


def average_ranks(values: Tensor) -> Tensor:
    """Ranks along the last dimension, from 1; equal values share the mean of their ranks, NaN stays NaN.

    Args:
        values: [..., N] float.

    Returns:
        [..., N] float64.
    """
    here, there = values.unsqueeze(-1), values.unsqueeze(-2)
    below, equal = (there < here).sum(-1), (there == here).sum(-1)
    return (below + 0.5 * (equal + 1)).double().where(~values.isnan(), math.nan)


def pearson(reference: Tensor, other: Tensor) -> Tensor:
    """Pearson's correlation along the last dimension over the entries present in both.

    Args:
        reference: [..., N] float; NaN = missing.
        other: [..., N] float.

    Returns:
        [...] float64 in [-1, 1]; NaN where the reference is constant, 0 where only `other` is.
    """
    present = ~(reference.isnan() | other.isnan())
    count = present.sum(-1, keepdim=True).clamp(min=1)
    parts = []
    for values in (reference, other):
        filled = values.double().where(present, 0.0)
        centred = (filled - filled.sum(-1, keepdim=True) / count).where(present, 0.0)
        highest, lowest = (values.where(present, bound) for bound in (-math.inf, math.inf))
        # rounding of the mean must not make a constant look as if it varied
        constant = highest.amax(-1) <= lowest.amin(-1)
        parts.append((centred, centred.square().sum(-1), constant))
    (first, first_square, flat), (second, second_square, other_flat) = parts
    norm = (first_square * second_square).sqrt().masked_fill(flat | other_flat, 1.0)
    correlation = ((first * second).sum(-1) / norm).clamp(-1, 1)
    return correlation.masked_fill(other_flat, 0.0).masked_fill(flat, math.nan)


def about_mean(rewards: Tensor) -> Tensor:
    """Rewards [P, G, N] less their group's mean; exactly 0 where a group has one value, NaN where one is missing."""
    mean = rewards.nanmean(1, keepdim=True)
    # rounding of the mean must not make a constant look as if it varied
    first = rewards.where(~rewards.isnan(), -math.inf).amax(1, keepdim=True)
    varies = ((rewards != first) & ~rewards.isnan()).any(1, keepdim=True)
    return (rewards - mean).where(varies | rewards.isnan(), 0.0)


def sign_agreement(reference: Tensor, other: Tensor) -> float:
    """Share of entries of equal sign, in [0, 1], among those present in both and not zero in both; NaN if none."""
    counted = ~(reference.isnan() | other.isnan()) & ((reference != 0) | (other != 0))
    return _share((reference.sign() == other.sign())[counted])


def _agreement(
    rewards: list[Tensor],
    gains: list[Tensor],
    advantages: list[Tensor],
    present: Tensor,
    counted: Tensor,
) -> Agreement:
    """Agreement of exact and cheap rewards, gains and their advantages, all [P, G, N]; see `compare`.

    Only where `counted` [N] bool is true there are units; the numbers of each of the N places are there all the same.
    """
    advantages = [values.where(~gains[0].isnan(), math.nan) for values in advantages]
    deviations = [about_mean(values) for values in rewards]
    at_each = [spearman(*(values.transpose(1, 2) for values in pair)) for pair in (rewards, gains)]
    signs_at_each = [_by_step(*pair) for pair in (deviations, gains)]
    reward_units, gain_units = (~by[:, counted].isnan() for by in at_each)
    by_rewards, by_gains = (by.where(counted, math.nan) for by in at_each)
    rewards, gains, advantages, deviations = (
        [values.where(counted, math.nan) for values in pair] for pair in (rewards, gains, advantages, deviations)
    )
    return Agreement(
        spearman_rewards_mean=_mean(by_rewards),
        spearman_rewards_error=_error(by_rewards),
        spearman_gains_mean=_mean(by_gains),
        spearman_gains_error=_error(by_gains),
        spearman_gains_worst_step=_smallest(by_gains.nanmean(0)),
        sign_agreement=sign_agreement(*gains),
        sign_agreement_steps=signs_at_each[1],
        sign_agreement_rewards=sign_agreement(*deviations),
        sign_agreement_rewards_steps=signs_at_each[0],
        pooled_rewards=pearson(*(values.flatten() for values in rewards)).item(),
        pooled_gains=pearson(*(values.flatten() for values in gains)).item(),
        spearman_advantages=_mean(spearman(*(values.flatten(1) for values in advantages))),
        sign_agreement_advantages=sign_agreement(*advantages),
        remaining_rewards=_share(reward_units),
        remaining_gains=_share(gain_units),
        excluded_rewards=int((~reward_units).sum()),
        excluded_gains=int((~gain_units).sum()),
        missing=_share(~present),
        spearman_rewards=tuple(at_each[0].nanmean(0).tolist()),
        spearman_gains=tuple(at_each[1].nanmean(0).tolist()),
    )


def _by_step(reference: Tensor, other: Tensor) -> tuple[float, ...]:
    """`sign_agreement` at each of the N places of the last dimension."""
    pairs = zip(reference.unbind(-1), other.unbind(-1), strict=True)
    return tuple(sign_agreement(*pair) for pair in pairs)


def _mean(values: Tensor) -> float:
    return values.nanmean().item()


def _error(values: Tensor) -> float:
    """Standard error over groups (dimension 0) of the mean of values [P, N]; NaN for fewer than two groups."""
    groups = values.nanmean(1)
    groups = groups[~groups.isnan()]
    return groups.std().item() / math.sqrt(len(groups)) if len(groups) > 1 else math.nan


def _smallest(values: Tensor) -> float:
    present = values[~values.isnan()]
    return present.min().item() if present.numel() else math.nan


def _share(mask: Tensor) -> float:
    return mask.double().mean().item() if mask.numel() else math.nan
