"""Branch credit: the images that branches of one state end in are compared with each other, and with nothing else.

Source: TempFlow-GRPO (arXiv 2508.04324). A noise-free trajectory branches at a step, every branch goes on without
noise, and the reward of its image is that step's return. Statistics are taken over the branches that share prompt and
initial noise ("seed-group"): the effect of the noise that a trajectory started from is in all of its branches and drops
out. As the trajectory is the branches' common past, a gain over its own completion (`dense.py`) would give the same
advantages.

The other part of the source, weighting a step's loss by its injected noise, is objective.step_weight noise_aware.
"""

from __future__ import annotations

from torch import Tensor

from densegrpo_fast.credit.normalize import Advantages, Std, normalize_groups


def branch_advantages(
    branch_rewards: Tensor,
    *,
    std: Std = "group",
    spread_floor: float = 0.0,
    clip: float | None = 5.0,
    epsilon: float = 1e-4,
) -> Advantages:
    """Advantage of every branch among those of its state.

    Args:
        branch_rewards: [P, N, C, K, L] float: N trajectories of P prompts, C branches at each of K steps, L completions
            of which the last, the finest, counts; NaN = missing.
        std: divide by the "group" standard deviation, of the C branches, or the "global" one of the step's branches of
            all trajectories.
        spread_floor: groups of branches with a smaller standard deviation get advantage 0.
        clip: bound on the magnitude of an advantage; None = none.
        epsilon: added to the standard deviation.

    Returns:
        values [P, G, K] float32 with G = N*C: branch c of trajectory n is sample n*C + c.

    Raises:
        ValueError: the shape of branch_rewards, or an option is out of range.
    """
    found = normalize_groups(
        by_state(branch_rewards)[..., -1], std=std, spread_floor=spread_floor, clip=clip, epsilon=epsilon
    )
    return Advantages(
        found.values.view(len(branch_rewards), -1, found.values.shape[-1]), found.zero_spread, found.missing
    )


def by_state(branch_rewards: Tensor) -> Tensor:
    """Rewards [P*N, C, K, L] with one group for each trajectory.

    Raises:
        ValueError: the shape is not [P, N, C, K, L].
    """
    if branch_rewards.ndim != 5:
        raise ValueError(f"branch_rewards must have shape [P, N, C, K, L], got {list(branch_rewards.shape)}")
    return branch_rewards.flatten(0, 1)
