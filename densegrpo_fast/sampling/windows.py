"""SDE windows: the few consecutive steps of an iteration that inject noise, and are trained, while the rest is ODE.

Flow-GRPO-Fast draws the window at random; MixGRPO (arXiv 2507.21802) lets it slide from noise to image. A window holds
for a whole iteration, so all members of a group share it: their rewards differ by the noise of the same steps.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Literal, get_args

Schedule = Literal["none", "fixed", "random", "progressive"]


def remaining_steps(steps: int, share: float) -> int:
    """Steps that take the place of the noise-free ones after a window.

    MixGRPO-Flash's count, floor((steps + 1) * share) - 1, but at least 1, as else nothing would lead to the image.

    Args:
        steps: after the window, at least 0; 0 stays 0.
        share: in (0, 1]; 1 keeps all.
    """
    return max(int((steps + 1) * share) - 1, 1) if steps else 0


@dataclass(frozen=True)
class Windows:
    """Which steps of an iteration are stochastic.

    Attributes:
        schedule: "none" = every step; "fixed" = always the window that starts at `first`; "random" = each iteration
            draws one, all alike probable; "progressive" = the window starts at `first`, moves on by `stride` steps
            every `every` iterations, and stays where it meets `last`.
        num_steps: T.
        size: steps of a window.
        first, last: lowest and highest step index that a window may hold.
        stride, every: of the progressive schedule.
        seed: of the random one.

    Raises:
        ValueError: a number is out of range, or no window fits.
    """

    schedule: Schedule
    num_steps: int
    size: int = 1
    first: int = 0
    last: int = 0
    stride: int = 1
    every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.schedule not in get_args(Schedule):
            raise ValueError(f"window schedule must be one of {', '.join(get_args(Schedule))}, got {self.schedule!r}")
        if self.schedule == "none":
            return
        if not 0 <= self.first <= self.last < self.num_steps:
            raise ValueError(
                f"a window must lie within the steps 0..{self.num_steps - 1}, got {self.first}..{self.last}"
            )
        if not 1 <= self.size <= self.last - self.first + 1:
            raise ValueError(f"a window of {self.size} steps does not fit the steps {self.first}..{self.last}")
        if self.stride < 1 or self.every < 1:
            raise ValueError(f"window stride and iterations must be at least 1, got {self.stride} and {self.every}")

    def steps(self, iteration: int) -> range:
        """Stochastic steps of an iteration (from 0): a function of the schedule, the seed and the iteration alone."""
        windows = self.reached()
        chosen = 0
        if self.schedule == "random":
            # a text seeds Python's generator by its SHA-512, the same in every version and process
            chosen = random.Random(f"window {self.seed} {iteration}").randrange(len(windows))
        elif self.schedule == "progressive":
            chosen = min(iteration // self.every, len(windows) - 1)
        return windows[chosen]

    def reached(self) -> list[range]:
        """Every window that some iteration has, from noise to image."""
        if self.schedule == "none":
            return [range(self.num_steps)]
        furthest = self.last - self.size + 1
        starts = [self.first]
        if self.schedule == "random":
            starts = list(range(self.first, furthest + 1))
        elif self.schedule == "progressive":
            starts = [*range(self.first, furthest, self.stride), furthest]
        return [range(start, start + self.size) for start in starts]
