"""Sparse credit: one reward per image, given to every step alike (Flow-GRPO, arXiv 2505.05470)."""

from __future__ import annotations

from torch import Tensor

from densegrpo_fast.credit.normalize import Advantages, Std, normalize_groups


def sparse_advantages(
    rewards: Tensor,
    num_steps: int,
    *,
    std: Std = "group",
    spread_floor: float = 0.0,
    clip: float | None = 5.0,
    epsilon: float = 1e-4,
) -> Advantages:
    """Group-relative advantage of each image, repeated over its steps.

    Args:
        rewards: [P, G] float, reward of the final images; NaN = missing.
        num_steps: T, at least 1.
        std: divide by the "group" or the "global" standard deviation of the rewards.
        spread_floor: groups with a smaller standard deviation get advantage 0.
        clip: bound on the magnitude of an advantage; None = none.
        epsilon: added to the standard deviation.

    Returns:
        values [P, G, T] float32, equal along T.

    Raises:
        ValueError: the shape of rewards, num_steps, or an option is out of range.
    """
    if rewards.ndim != 2:
        raise ValueError(f"sparse_advantages: rewards must have shape [P, G], got {list(rewards.shape)}")
    if num_steps < 1:
        raise ValueError(f"sparse_advantages: num_steps must be at least 1, got {num_steps}")
    one_step = normalize_groups(rewards.unsqueeze(-1), std=std, spread_floor=spread_floor, clip=clip, epsilon=epsilon)
    return Advantages(one_step.values.repeat(1, 1, num_steps), one_step.zero_spread, one_step.missing)
