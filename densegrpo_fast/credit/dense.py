"""Dense credit: each step is judged by what it adds to the reward of the picture the ODE would end in.

DenseGRPO (arXiv 2601.20218, Eq 7-10): the lookahead completes every state of the trajectory without noise and
rewards the result. The gain of a step is the difference between the rewards after and before it. Gains
telescope: their sum is the reward of the final image minus that of the noise-free image of the same seed.
"""

from __future__ import annotations

from torch import Tensor

from densegrpo_fast.credit.normalize import Advantages, Normalize, Std, normalize_groups


def reward_gains(lookahead_rewards: Tensor) -> Tensor:
    """Reward gain of every step (DenseGRPO, Eq 7-9).

    Args:
        lookahead_rewards: [P, G, T+1] float; index = steps done, the last is the real final image; NaN =
            missing.

    Returns:
        [P, G, T] in the same dtype: entry t is the gain of the step from state t to state t+1; missing if
        either reward is.

    Raises:
        ValueError: the shape is not [P, G, T+1] with T of at least 1.
    """
    if lookahead_rewards.ndim != 3 or lookahead_rewards.shape[-1] < 2:
        raise ValueError(
            "reward_gains: lookahead_rewards must have shape [P, G, T+1] with T >= 1, "
            f"got {list(lookahead_rewards.shape)}"
        )
    return lookahead_rewards.diff(dim=-1)


def dense_advantages(
    lookahead_rewards: Tensor,
    *,
    normalize: Normalize = "step",
    std: Std = "group",
    spread_floor: float = 0.0,
    clip: float | None = 5.0,
    epsilon: float = 1e-4,
) -> Advantages:
    """Group-relative advantage of every step's reward gain (DenseGRPO, Eq 10).

    Args:
        lookahead_rewards: [P, G, T+1] float; see `reward_gains`.
        normalize: "step" as in DenseGRPO, or "joint" over all steps of the group as in Stepwise-Flow-GRPO.
        std: divide by the "group" or the "global" standard deviation of the gains.
        spread_floor: groups (or group steps) whose gains have a smaller standard deviation get advantage 0.
        clip: bound on the magnitude of an advantage; None = none.
        epsilon: added to the standard deviation.

    Returns:
        values [P, G, T] float32. A step without noise has equal (zero) gains over the group and so, under
        "step", advantage 0.

    Raises:
        ValueError: the shape of lookahead_rewards, or an option is out of range.
    """
    # float64 before the difference: gains are small against the rewards they come from
    return normalize_groups(
        reward_gains(lookahead_rewards.double()),
        normalize=normalize,
        std=std,
        spread_floor=spread_floor,
        clip=clip,
        epsilon=epsilon,
    )
