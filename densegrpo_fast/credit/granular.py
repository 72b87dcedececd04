"""Granular credit: branches of one state, judged by completions of several step sizes together.

Source: Granular-GRPO (G2RPO, arXiv 2510.01982; formulas from the authors' code). From one noise-free trajectory, each
trained step is taken with noise in as many directions as the group has samples ("singular stochastic sampling"), and
every branch is completed on grids of several granularities g: the sigmas behind it, every g-th of them. Each
granularity's rewards are normalised over the branches, and the advantage is their sum, clamped after summing:

    A_c = clamp(sum_g (R_gc - mean_c R_gc) / (std_c R_gc + 1e-8), -5, 5)

with the unbiased std (ddof = 1). A completion evaluates the state that the branch leads to, the next one, and from
there every g-th (`sampling.plan.strided`).

A branch that is good by one completion and bad by another is thus held back. The source starts all samples of a prompt
from one noise, sampler.branches = sampler.group_size here; with fewer branches the statistics are over those that
share a state. Where fewer steps are left than the granularity, completions of several granularities are the same and
count as often, as they do there. Its sum over several rewards is not part of this: rewards are mixed before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from densegrpo_fast.credit.branch import by_state
from densegrpo_fast.credit.normalize import Advantages, Std, normalize_groups


def granular_advantages(
    branch_rewards: Tensor,
    *,
    granularities: Sequence[int],
    std: Std = "group",
    spread_floor: float = 0.0,
    clip: float | None = 5.0,
    epsilon: float = 1e-8,
) -> Advantages:
    """Sum over granularities of every branch's advantage among those of its state.

    Args:
        branch_rewards: [P, N, C, K, L] float: N trajectories of P prompts, C branches at each of K steps, completed in
            L granularities; NaN = missing.
        granularities: the L step sizes of the completions, only counted here.
        std: divide by the "group" standard deviation, of the C branches, or the "global" one of the step's branches of
            all trajectories, for each granularity.
        spread_floor: groups of branches with a smaller standard deviation add nothing.
        clip: bound on the magnitude of the sum; None = none.
        epsilon: added to the standard deviation.

    Returns:
        values [P, G, K] float32 with G = N*C: branch c of trajectory n is sample n*C + c. A branch that lacks a reward
        in one granularity is missing in all. zero_spread is the mean over the granularities.

    Raises:
        ValueError: the shape of branch_rewards does not go with the granularities, or an option is out of range.
    """
    rewards = by_state(branch_rewards)
    if rewards.shape[-1] != len(granularities):
        raise ValueError(
            f"granular_advantages: granularities {list(granularities)} are not those of rewards of shape "
            f"{list(branch_rewards.shape)}"
        )
    if clip is not None and not clip > 0:
        raise ValueError(f"granular_advantages: clip must be above 0 or None, got {clip}")
    complete = rewards.where(rewards.isfinite().all(-1, keepdim=True), math.nan)
    parts = [
        normalize_groups(one, std=std, spread_floor=spread_floor, clip=None, epsilon=epsilon, correction=1)
        for one in complete.unbind(-1)
    ]
    total = torch.stack([part.values for part in parts]).sum(0)
    if clip is not None:
        total = total.clamp(-clip, clip)
    return Advantages(
        total.view(len(branch_rewards), -1, total.shape[-1]),
        sum(part.zero_spread for part in parts) / len(parts),
        parts[0].missing,
    )
