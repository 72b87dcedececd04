"""Value credit: each step is judged by the completion of the state it leads to, not by what it added to it.

The variant "Dense Reward (Baseline)" in DenseGRPO's ablation (arXiv 2601.20218, Figure 6a): it beats one reward for all
steps and loses to the gains of `dense.py`. What an early step happened to gain stays in the values of all later ones,
which the difference of two neighbours removes.
"""

from __future__ import annotations

from torch import Tensor

from densegrpo_fast.credit.normalize import Advantages, Std, normalize_groups


def state_rewards(lookahead_rewards: Tensor) -> Tensor:
    """Reward of the completion of the state that every step leads to.

    Args:
        lookahead_rewards: [P, G, T+1] float; index = steps done; NaN = missing.

    Returns:
        [P, G, T] in the same dtype: entry t belongs to the step from state t to state t+1.

    Raises:
        ValueError: the shape is not [P, G, T+1] with T of at least 1.
    """
    if lookahead_rewards.ndim != 3 or lookahead_rewards.shape[-1] < 2:
        raise ValueError(
            "state_rewards: lookahead_rewards must have shape [P, G, T+1] with T >= 1, "
            f"got {list(lookahead_rewards.shape)}"
        )
    return lookahead_rewards[..., 1:]


def value_advantages(
    lookahead_rewards: Tensor,
    *,
    std: Std = "group",
    spread_floor: float = 0.0,
    clip: float | None = 5.0,
    epsilon: float = 1e-4,
) -> Advantages:
    """Group-relative advantage of every step's `state_rewards`, normalised for each step on its own.

    Args:
        lookahead_rewards: [P, G, T+1] float; see `state_rewards`. The first entry, the completion of the initial
            noise, is not used.
        std: divide by the "group" or the "global" standard deviation.
        spread_floor: groups' steps with a smaller standard deviation get advantage 0.
        clip: bound on the magnitude of an advantage; None = none.
        epsilon: added to the standard deviation.

    Returns:
        values [P, G, T] float32; the last step's equal the sparse advantage of the final image.

    Raises:
        ValueError: the shape of lookahead_rewards, or an option is out of range.
    """
    return normalize_groups(
        state_rewards(lookahead_rewards), std=std, spread_floor=spread_floor, clip=clip, epsilon=epsilon
    )
