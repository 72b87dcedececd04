"""The default rule of a calibration: an up-down staircase to the highest noise level at which gains are balanced."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from densegrpo_fast.calibration.rules import Limits, Signs

_DRAWS_BELOW = 2
"""Draws that are measured at the lowest level."""


@dataclass
class _Stair:
    """Where one step stands.

    Attributes:
        start: its level at first; 0 = a step without noise.
        ceiling: highest level that it may still have.
        level: what the next round of the climb measures.
        size, direction: of its last move.
        balanced: the level that was last measured and balanced, or None.
        seen: signs at the lowest level, and then those at the balanced one.
        ended: whether it has been bracketed, or the limits or a lack of signs hold it.
        hopeless: whether it was out of balance at the lowest level.
    """

    start: float
    ceiling: float
    level: float
    size: float
    direction: int = 0
    balanced: float | None = None
    seen: Signs = Signs(0, 0)
    ended: bool = False
    hopeless: bool = False

    @property
    def result(self) -> float:
        """What has been found: the balanced level, the start of a hopeless step, else where it has come to."""
        if self.hopeless:
            return self.start
        return self.level if self.balanced is None else self.balanced


class Staircase:
    """Finds the highest balanced level of each step, by an up-down staircase on common random numbers.

    A step is *balanced* if |positive - negative| <= max(share * n, deviations * sqrt(n)), n being the gains with a
    sign: an imbalance that is small, or no larger than fair signs show by chance. A balanced step goes up, another one
    down; each change of direction halves the move until it is `resolution`. A step has ended when it changes its
    direction at that size, is held by a limit, or has too few signs to tell. Levels of 0 (ODE steps) stay.

    First of all, two draws are measured at the lowest level. A step that is out of balance there is *hopeless*: it is
    not the amount of noise that unbalances it, and it keeps the level it started from. Then the others climb, all on
    the first draw. What that finds may be the luckiest level of one draw, so when all steps have ended, a further draw
    confirms the levels found: a step that is out of balance over both draws together goes on, on the new draw, in the
    lower half of what is left to it. The rule has settled when a draw confirms all steps.

    With the paper's count instead, more samples would demand an ever finer balance; with chance alone as the measure,
    enough samples would find some imbalance at any level. The share is what makes the result independent of how many
    samples there are, once they are enough.

    Args:
        levels: noise level of each step to start from.
        limits: range that is searched.
        share: imbalance that does not matter, in [0, 1).
        deviations: standard deviations of n fair signs, at least 0.
        first: size of the first move, at least `resolution`.
        resolution: size of the last moves, positive.

    Raises:
        ValueError: a parameter is out of range.
    """

    name = "staircase"
    enough = 8
    """Gains with a sign that a step needs to be moved."""

    def __init__(
        self,
        levels: Sequence[float],
        limits: Limits,
        *,
        share: float = 0.1,
        deviations: float = 2.0,
        first: float = 0.16,
        resolution: float = 0.02,
    ):
        if not 0 <= share < 1:
            raise ValueError(f"share must be in [0, 1), got {share}")
        if not 0 <= deviations < math.inf:
            raise ValueError(f"deviations must be finite and at least 0, got {deviations}")
        if not 0 < resolution <= first < math.inf:
            raise ValueError(f"moves must fulfil 0 < resolution <= first, got {resolution} and {first}")
        self.limits, self.share, self.deviations = limits, share, deviations
        self.first, self.resolution = first, resolution
        starts = [limits.clamp(level) if level else 0.0 for level in levels]
        self._stairs = [_Stair(start, limits.highest, start, first) for start in starts]
        self._update = self._look_down
        self.draw, self.settled = 0, False

    @property
    def levels(self) -> tuple[float, ...]:
        if self._update == self._look_down:
            return tuple(self.limits.lowest if stair.start else 0.0 for stair in self._stairs)
        return self.result if self._update == self._confirm else tuple(stair.level for stair in self._stairs)

    @property
    def result(self) -> tuple[float, ...]:
        return tuple(stair.result for stair in self._stairs)

    @property
    def hopeless(self) -> tuple[int, ...]:
        return tuple(step for step, stair in enumerate(self._stairs) if stair.hopeless)

    def allowed(self, decided: int) -> float:
        """Largest excess, in gains, of a balanced step with so many signs."""
        return max(self.share * decided, self.deviations * math.sqrt(decided))

    def update(self, signs: Sequence[Signs]) -> None:
        self._update(signs)

    def _look_down(self, signs: Sequence[Signs]) -> None:
        for stair, count in zip(self._stairs, signs, strict=True):
            stair.seen += count
        self.draw += 1
        if self.draw < _DRAWS_BELOW:
            return
        for stair in self._stairs:
            stair.hopeless = not self._balanced(stair.seen) and stair.seen.decided >= self.enough
            stair.ended = stair.hopeless
        self._update, self.draw = self._climb, 0

    def _climb(self, signs: Sequence[Signs]) -> None:
        for stair, count in zip(self._stairs, signs, strict=True):
            if not stair.hopeless:
                self._judge(stair, count)
        if all(stair.ended for stair in self._stairs):
            self.settled = all(stair.balanced is None for stair in self._stairs)
            if not self.settled:
                self._update = self._confirm
                self.draw += 1

    def _confirm(self, signs: Sequence[Signs]) -> None:
        refuted = False
        for stair, count in zip(self._stairs, signs, strict=True):
            if stair.balanced is None or self._balanced(stair.seen + count):
                continue
            below = max(self.resolution, (stair.balanced - self.limits.lowest) / 2)
            stair.ceiling = stair.level = self.limits.clamp(stair.balanced - below)
            stair.balanced, stair.size, stair.direction = None, self.first, -1
            stair.ended, refuted = False, True
        self.settled, self._update = not refuted, self._climb

    def _judge(self, stair: _Stair, count: Signs) -> None:
        if not stair.level or count.decided < self.enough:
            stair.ended = True
            return
        balanced = self._balanced(count)
        if balanced:
            stair.balanced, stair.seen = stair.level, count
        elif stair.balanced == stair.level:
            # an earlier step has moved since this level was balanced
            stair.balanced = None
        self._move(stair, 1 if balanced else -1)

    def _balanced(self, count: Signs) -> bool:
        return abs(count.excess) <= self.allowed(count.decided)

    def _move(self, stair: _Stair, direction: int) -> None:
        if direction == -stair.direction:
            stair.ended |= stair.size == self.resolution
            stair.size = max(stair.size / 2, self.resolution)
        level = min(self.limits.clamp(stair.level + direction * stair.size), stair.ceiling)
        stair.ended |= level == stair.level
        stair.level, stair.direction = level, direction

    def describe(self) -> dict[str, Any]:
        parameters = {key: getattr(self, key) for key in ("share", "deviations", "first", "resolution", "enough")}
        return {"name": self.name, **parameters, "limits": asdict(self.limits)}
