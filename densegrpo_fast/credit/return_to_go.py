"""Return-to-go credit: each step is judged by its own gain and, discounted, by the gains after it.

DenseGRPO (arXiv 2601.20218, Eq 10) trains on the immediate gain alone; its reviewers asked for the return, and nobody
has published the comparison, so this method is no paper's. Discount 0 is the immediate gain. Discount 1 is the
difference between the final reward and that of the state's completion: the noise-free completion acts as the step's
own baseline. TP-GRPO (arXiv 2602.06422) uses that quantity at its turning points only (`turning_point.py`).
"""

from __future__ import annotations

from torch import Tensor

from densegrpo_fast.credit.dense import reward_gains
from densegrpo_fast.credit.normalize import Advantages, Normalize, Std, normalize_groups


def discounted_sums(values: Tensor, discount: float) -> Tensor:
    """Sum over this and all later steps, a value k steps ahead counting discount^k.

    Args:
        values: [..., T] float; NaN = missing.
        discount: in [0, 1].

    Returns:
        [..., T] in the same dtype; NaN where a value that counts is missing.

    Raises:
        ValueError: discount is out of range.
    """
    if not 0 <= discount <= 1:
        raise ValueError(f"discounted_sums: discount must be in [0, 1], got {discount}")
    if discount == 0:  # 0 * NaN would let a missing value reach steps it does not count for
        return values
    sums = values.clone()
    for step in reversed(range(values.shape[-1] - 1)):
        sums[..., step] += discount * sums[..., step + 1]
    return sums


def returns_to_go(lookahead_rewards: Tensor, discount: float = 1.0) -> Tensor:
    """Discounted sum of every step's reward gain and those after it.

    Args:
        lookahead_rewards: [P, G, T+1] float; index = steps done, the last is the real final image; NaN = missing.
        discount: in [0, 1].

    Returns:
        [P, G, T] in the same dtype. Missing where a reward in the sum is: with discount 1 the sum telescopes to the
        last reward minus the state's, so only these two are needed.

    Raises:
        ValueError: the shape of lookahead_rewards, or discount is out of range.
    """
    gains = reward_gains(lookahead_rewards)
    if discount == 1:
        return lookahead_rewards[..., -1:] - lookahead_rewards[..., :-1]
    return discounted_sums(gains, discount)


def return_advantages(
    lookahead_rewards: Tensor,
    *,
    discount: float = 1.0,
    normalize: Normalize = "step",
    std: Std = "group",
    spread_floor: float = 0.0,
    clip: float | None = 5.0,
    epsilon: float = 1e-4,
) -> Advantages:
    """Group-relative advantage of every step's return-to-go.

    Args:
        lookahead_rewards: [P, G, T+1] float; see `returns_to_go`.
        discount: in [0, 1]; 0 is DenseGRPO's immediate gain.
        normalize: statistics over a group for each "step", or "joint" over all its steps.
        std: divide by the "group" or the "global" standard deviation.
        spread_floor: groups (or group steps) with a smaller standard deviation get advantage 0.
        clip: bound on the magnitude of an advantage; None = none.
        epsilon: added to the standard deviation.

    Returns:
        values [P, G, T] float32.

    Raises:
        ValueError: the shape of lookahead_rewards, or an option is out of range.
    """
    return normalize_groups(
        returns_to_go(lookahead_rewards.double(), discount),
        normalize=normalize,
        std=std,
        spread_floor=spread_floor,
        clip=clip,
        epsilon=epsilon,
    )
