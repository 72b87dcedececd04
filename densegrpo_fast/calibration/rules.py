"""How sign counts of reward gains move the noise level of each step: two rules. Pure Python, without tensors.

A gain's sign says whether a step's noise has helped or harmed. Too much noise harms almost always: the step leaves what
the model can still repair, and gains that are all negative tell good noise from bad no longer. So the noise of a step
shall be as strong as its gains stay balanced (DenseGRPO, arXiv 2601.20218, Algorithm 1). With a smooth reward and exact
completions the bias of the gains is of second order in the noise and their spread of first order, so that less noise
brings the balance back, whichever side has been in excess. A step's gains depend on the levels up to that step alone,
so all steps are calibrated at once and the early ones settle first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any, Protocol

_DRAWS_BELOW = 2
"""Draws that are measured at the lowest level."""


@dataclass(frozen=True)
class Signs:
    """Signs of one step's gains.

    Attributes:
        positive, negative: gains above and below 0.
        ties: gains of exactly 0, on neither side.
        missing: gains that could not be judged.
    """

    positive: int
    negative: int
    ties: int = 0
    missing: int = 0

    @classmethod
    def of(cls, gains: Iterable[float]) -> Signs:
        """Count the signs of a step's gains; NaN = missing."""
        values = list(gains)
        positive, negative = sum(gain > 0 for gain in values), sum(gain < 0 for gain in values)
        missing = sum(math.isnan(gain) for gain in values)
        return cls(positive, negative, len(values) - positive - negative - missing, missing)

    def __add__(self, other: Signs) -> Signs:
        """The counts of both."""
        return Signs(*(one + two for one, two in zip(astuple(self), astuple(other), strict=True)))

    @property
    def decided(self) -> int:
        """Gains that have a sign."""
        return self.positive + self.negative

    @property
    def excess(self) -> int:
        """Positive minus negative gains."""
        return self.positive - self.negative

    @property
    def imbalance(self) -> float:
        """Excess as a share of the gains that have a sign, in [-1, 1]; NaN without any."""
        return self.excess / self.decided if self.decided else math.nan


@dataclass(frozen=True)
class Limits:
    """Range of the noise levels, dimensionless, `lowest` <= `highest`.

    Raises:
        ValueError: the range is empty, or below 0.
    """

    lowest: float
    highest: float

    def __post_init__(self) -> None:
        if not 0 <= self.lowest <= self.highest < math.inf:
            raise ValueError(f"noise levels must lie in 0 <= lowest <= highest, got {self.lowest} and {self.highest}")

    def clamp(self, level: float) -> float:
        """The nearest level in the range, free of the rounding that sums of decimals gather."""
        return min(max(round(level, 6), self.lowest), self.highest)


class Rule(Protocol):
    """Moves T noise levels by the sign counts that they have led to.

    Attributes:
        name: how the rule is called on the command line and in a calibration's file.
    """

    name: str

    @property
    def draw(self) -> int:
        """Which samples the next round takes, from 0: rounds of one draw share noise and prompts (common random
        numbers), and what changes between them is the levels alone."""

    @property
    def levels(self) -> tuple[float, ...]:
        """What the next round measures."""

    @property
    def settled(self) -> bool:
        """Whether no further round is needed."""

    @property
    def result(self) -> tuple[float, ...]:
        """The levels found so far."""

    @property
    def unbalanceable(self) -> tuple[int, ...]:
        """Steps that no level has balanced."""

    def update(self, signs: Sequence[Signs]) -> None:
        """Take the counts of `levels`, one per step, and move on."""

    def describe(self) -> dict[str, Any]:
        """Name and parameters, as plain JSON data."""


class PrintedRule:
    """Algorithm 1 of DenseGRPO as it is printed: raise by `eps2` where |positive - negative| < `eps1`, else lower.

    `eps1` is a count, so however many samples there are, only an all but exact tie raises a level: with fair signs a
    level moves down on average for every even number of samples from 4 and every odd one from 9, and has no level to
    stay at. The paper prints neither a clamp nor a stop; levels are kept in the sampler's own range, without which a
    step has no meaning, and the rounds are what ends it. Steps that start at 0 (ODE steps, which the paper has none of)
    stay there.

    Args:
        levels: noise level of each step to start from.
        limits: range of the sampler.
        eps1: count; 2 in the paper.
        eps2: step of a level; .01 in the paper.
    """

    name = "printed"
    settled = False
    unbalanceable = ()

    def __init__(self, levels: Sequence[float], limits: Limits, *, eps1: int = 2, eps2: float = 0.01):
        self.limits, self.eps1, self.eps2 = limits, eps1, eps2
        self.levels = tuple(limits.clamp(level) for level in levels)
        self._quiet = tuple(not level for level in levels)
        self.draw = 0

    @property
    def result(self) -> tuple[float, ...]:
        return self.levels

    def update(self, signs: Sequence[Signs]) -> None:
        moves = [self.eps2 if abs(count.excess) < self.eps1 else -self.eps2 for count in signs]
        self.levels = tuple(
            0.0 if deterministic else self.limits.clamp(level + move)
            for level, move, deterministic in zip(self.levels, moves, self._quiet, strict=True)
        )
        self.draw += 1

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "eps1": self.eps1, "eps2": self.eps2, "limits": asdict(self.limits)}


@dataclass
class _Stair:
    """The search for one step's level.

    Attributes:
        start: its level at first; 0 = a step without noise.
        ceiling: highest level that it may still have.
        level: what the next round of the climb measures.
        size, direction: of its last move.
        balanced: the level that was last measured and balanced, or None.
        seen: signs at the lowest level, and then those at the balanced one.
        ended: whether it has been bracketed, or the limits or a lack of signs hold it.
        unbalanceable: whether it was out of balance at the lowest level.
    """

    start: float
    ceiling: float
    level: float
    size: float
    direction: int = 0
    balanced: float | None = None
    seen: Signs = Signs(0, 0)
    ended: bool = False
    unbalanceable: bool = False

    @property
    def result(self) -> float:
        """What has been found: the balanced level, the start of an unbalanceable step, else where it has come to."""
        if self.unbalanceable:
            return self.start
        return self.level if self.balanced is None else self.balanced


class Staircase:
    """Finds the highest balanced level of each step, by an up-down staircase on common random numbers.

    A step is *balanced* if |positive - negative| <= max(share * n, deviations * sqrt(n)), n being the gains with a
    sign: an imbalance that is small, or no larger than fair signs show by chance. A balanced step goes up, another one
    down; each change of direction halves the move until it is `resolution`. A step has ended when it changes its
    direction at that size, is held by a limit, or has too few signs to tell. Levels of 0 (ODE steps) stay.

    First of all, two draws are measured at the lowest level. A step that is out of balance there is *unbalanceable*: it
    is not the amount of noise that unbalances it, and it keeps the level it started from. Then the others climb, all on
    the first draw. What that finds may be balanced by chance, so when all steps have ended, a further draw confirms the
    levels found: a step that is out of balance over both draws together goes on, on the new draw, in the lower half of
    what is left to it. The rule has settled when a draw confirms all steps.

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
    def unbalanceable(self) -> tuple[int, ...]:
        return tuple(step for step, stair in enumerate(self._stairs) if stair.unbalanceable)

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
            stair.unbalanceable = not self._balanced(stair.seen) and stair.seen.decided >= self.enough
            stair.ended = stair.unbalanceable
        self._update, self.draw = self._climb, 0

    def _climb(self, signs: Sequence[Signs]) -> None:
        for stair, count in zip(self._stairs, signs, strict=True):
            if not stair.unbalanceable:
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


@dataclass(frozen=True)
class Round:
    """What one round has measured: the levels, and what `measure` returned for them."""

    levels: tuple[float, ...]
    gains: Sequence[Sequence[float]]

    @property
    def signs(self) -> list[Signs]:
        """Counts of each step."""
        return [Signs.of(step) for step in self.gains]


def calibrate(
    rule: Rule,
    measure: Callable[[tuple[float, ...], int], Sequence[Sequence[float]]],
    rounds: int,
) -> list[Round]:
    """Let a rule move its levels until it has settled, or for so many rounds.

    Args:
        rule: holds the levels; its `result` is what was found.
        measure: from noise levels and the number of a draw to the gains of each step, T sequences of N numbers. The
            same draw means the same samples.
        rounds: at most, at least 1.

    Returns:
        The rounds, in order.

    Raises:
        ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    done: list[Round] = []
    while len(done) < rounds and not rule.settled:
        done.append(Round(rule.levels, measure(rule.levels, rule.draw)))
        rule.update(done[-1].signs)
    return done
