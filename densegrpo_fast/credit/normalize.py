"""Group-relative normalisation: (value - mean) / (std + epsilon), with missing values and flat groups.

GRPO's baseline is the mean of the group, so one judgement counts only against the others of its prompt. Two
traps are handled here, once, for all credit methods. A *missing* value (NaN, or infinite) takes no part in
mean and std and gets advantage 0, as if its sample had never been drawn. A *flat* group carries no
preference: dividing its rounding noise by its tiny std would make large random advantages, so it gets 0.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Normalize = Literal["step", "joint"]
Std = Literal["group", "global"]


@dataclass(frozen=True)
class Advantages:
    """Advantages of a batch of groups.

    Attributes:
        values: [P, G, T] float32; 0 where the value is missing or its group is flat.
        zero_spread: share of the units of normalisation (a group, or a group's step) that are flat, among
            those with at least one value present; in [0, 1].
        missing: share of the P*G*T values that are missing, in [0, 1].
    """

    values: Tensor
    zero_spread: float
    missing: float


def normalize_groups(
    values: Tensor,
    *,
    normalize: Normalize = "step",
    std: Std = "group",
    spread_floor: float = 0.0,
    clip: float | None = 5.0,
    epsilon: float = 1e-4,
    correction: Literal[0, 1] = 0,
) -> Advantages:
    """Centre each group on its mean and divide by a standard deviation.

    All statistics are in float64.

    Args:
        values: [P, G, T] float; NaN and infinities are missing.
        normalize: "step" takes mean and std over a group separately for every step (DenseGRPO, Eq 10);
            "joint" over all steps of a group together (Stepwise-Flow-GRPO), which keeps the difference in
            level between steps.
        std: "group" divides by the group's own std; "global" by that of all groups of the batch together,
            around their common mean (Flow-GRPO's global_std), per step or jointly as `normalize` says.
        spread_floor: a group (or group's step) whose own std is below this, in units of the values, is flat.
            Groups whose values are all equal are flat at any floor.
        clip: bound on the magnitude of an advantage; None = none.
        epsilon: added to the std, in units of the values; 1e-4 in Flow-GRPO.
        correction: of the degrees of freedom: 0 = numpy's std, Flow-GRPO's; 1 = torch's, unbiased in the square, that
            of Granular-GRPO and DanceGRPO, whose advantages of G samples are smaller by sqrt((G-1)/G). The std of a
            single value is 0.

    Raises:
        TypeError: values is not floating point.
        ValueError: an argument is out of range.
    """
    if not values.is_floating_point():
        raise TypeError(f"normalize_groups: values must be floating point, got {values.dtype}")
    if values.ndim != 3:
        raise ValueError(f"normalize_groups: values must have shape [P, G, T], got {list(values.shape)}")
    if normalize not in ("step", "joint"):
        raise ValueError(f"normalize_groups: normalize must be 'step' or 'joint', got {normalize!r}")
    if std not in ("group", "global"):
        raise ValueError(f"normalize_groups: std must be 'group' or 'global', got {std!r}")
    if not (math.isfinite(spread_floor) and spread_floor >= 0):
        raise ValueError(f"normalize_groups: spread_floor must be finite and at least 0, got {spread_floor}")
    if not (math.isfinite(epsilon) and epsilon >= 0):
        raise ValueError(f"normalize_groups: epsilon must be finite and at least 0, got {epsilon}")
    if clip is not None and not clip > 0:
        raise ValueError(f"normalize_groups: clip must be above 0 or None, got {clip}")

    present = values.isfinite()
    exact = values.double().where(present, 0.0)
    over = (1,) if normalize == "step" else (1, 2)
    mean, spread = _mean_and_std(exact, present, over, correction)
    flat = (spread < spread_floor) | _all_equal(exact, present, over)
    if std == "global":
        _, spread = _mean_and_std(exact, present, (0, *over), correction)
    # a flat group's own std may be 0 together with epsilon; its advantages are 0 whatever the divisor
    scale = (spread + epsilon).masked_fill(flat, 1.0)
    advantages = ((exact - mean) / scale).where(present & ~flat, 0.0)
    if clip is not None:
        advantages = advantages.clamp(-clip, clip)

    judged = present.any(dim=over, keepdim=True)
    return Advantages(
        values=advantages.float(),
        zero_spread=_share(flat & judged, judged),
        missing=1.0 - _share(present, torch.ones_like(present)),
    )


def _mean_and_std(values: Tensor, present: Tensor, over: tuple[int, ...], correction: int) -> tuple[Tensor, Tensor]:
    count = present.sum(over, keepdim=True).clamp(min=1)
    mean = values.sum(over, keepdim=True) / count
    # centred first: the short formula E[v^2] - mean^2 loses a small spread on top of a large mean
    centred = (values - mean).where(present, 0.0)
    return mean, (centred.square().sum(over, keepdim=True) / (count - correction).clamp(min=1)).sqrt()


def _all_equal(values: Tensor, present: Tensor, over: tuple[int, ...]) -> Tensor:
    highest = values.where(present, -math.inf).amax(over, keepdim=True)
    lowest = values.where(present, math.inf).amin(over, keepdim=True)
    return highest <= lowest


def _share(part: Tensor, whole: Tensor) -> float:
    return (part.sum().double() / whole.sum().clamp(min=1)).item()
