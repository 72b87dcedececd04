"""How sign counts of reward gains move the noise level of each step. Pure Python: no model, no tensors.

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
from dataclasses import asdict, dataclass
from typing import Any, Protocol


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
        fresh: whether each round takes samples of its own; otherwise all rounds share their noise and prompts (common
            random numbers), and what changes between them is the levels alone.
    """

    name: str
    fresh: bool

    @property
    def levels(self) -> tuple[float, ...]:
        """What the next round measures."""

    @property
    def settled(self) -> bool:
        """Whether no further round is needed."""

    @property
    def result(self) -> tuple[float, ...]:
        """The levels found so far."""

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
    fresh = True
    settled = False

    def __init__(self, levels: Sequence[float], limits: Limits, *, eps1: int = 2, eps2: float = 0.01):
        self.limits, self.eps1, self.eps2 = limits, eps1, eps2
        self.levels = tuple(limits.clamp(level) for level in levels)
        self._quiet = tuple(not level for level in levels)

    @property
    def result(self) -> tuple[float, ...]:
        return self.levels

    def update(self, signs: Sequence[Signs]) -> None:
        moves = [self.eps2 if abs(count.excess) < self.eps1 else -self.eps2 for count in signs]
        self.levels = tuple(
            0.0 if quiet else self.limits.clamp(level + move)
            for level, move, quiet in zip(self.levels, moves, self._quiet, strict=True)
        )

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "eps1": self.eps1, "eps2": self.eps2, "limits": asdict(self.limits)}


@dataclass
class _Stair:
    """Where one step stands: its level, the size and direction of its last move, the last balanced level, whether it
    has been bracketed, and whether the limits or a lack of signs hold it."""

    level: float
    size: float
    direction: int = 0
    balanced: float | None = None
    bracketed: bool = False
    held: bool = False


class Staircase:
    """Finds the highest balanced level of each step, by an up-down staircase on common random numbers.

    A step is *balanced* if |positive - negative| <= max(share * n, deviations * sqrt(n)), n being the gains with a
    sign: an imbalance that is small, or no larger than fair signs show by chance. A balanced step goes up, another one
    down; each change of direction halves the move until it is `resolution`. A step has settled when it changes its
    direction at that size, is held by a limit, or has too few signs to tell; the rounds end when all steps have. Levels
    of 0 (ODE steps) stay.

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
    fresh = False
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
        self._stairs = [_Stair(limits.clamp(level) if level else 0.0, first) for level in levels]

    @property
    def levels(self) -> tuple[float, ...]:
        return tuple(stair.level for stair in self._stairs)

    @property
    def settled(self) -> bool:
        return all(stair.bracketed or stair.held for stair in self._stairs)

    @property
    def result(self) -> tuple[float, ...]:
        """The level of each step that was last measured and balanced; where none was, the one it has come to."""
        return tuple(stair.level if stair.balanced is None else stair.balanced for stair in self._stairs)

    def allowed(self, decided: int) -> float:
        """Largest excess, in gains, of a balanced step with so many signs."""
        return max(self.share * decided, self.deviations * math.sqrt(decided))

    def update(self, signs: Sequence[Signs]) -> None:
        for stair, count in zip(self._stairs, signs, strict=True):
            if not stair.level or count.decided < self.enough:
                stair.held = True
                continue
            balanced = abs(count.excess) <= self.allowed(count.decided)
            if balanced:
                stair.balanced = stair.level
            elif stair.balanced == stair.level:
                # an earlier step has moved since this level was balanced
                stair.balanced = None
            self._move(stair, 1 if balanced else -1)

    def _move(self, stair: _Stair, direction: int) -> None:
        if direction == -stair.direction:
            stair.bracketed |= stair.size == self.resolution
            stair.size = max(stair.size / 2, self.resolution)
        level = self.limits.clamp(stair.level + direction * stair.size)
        stair.held, stair.level, stair.direction = level == stair.level, level, direction

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
    progress: Callable[[Round], object] = lambda done: None,
) -> list[Round]:
    """Let a rule move its levels until it has settled, or for so many rounds.

    Args:
        rule: holds the levels; its `result` is what was found.
        measure: from noise levels and the number of a draw to the gains of each step, T sequences of N numbers. The
            same draw means the same samples; without fresh samples it is always 0.
        rounds: at most, at least 1.
        progress: is told each round.

    Returns:
        The rounds, in order.

    Raises:
        ValueError: `rounds` is below 1.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    done: list[Round] = []
    while len(done) < rounds and not rule.settled:
        done.append(Round(rule.levels, measure(rule.levels, len(done) if rule.fresh else 0)))
        rule.update(done[-1].signs)
        progress(done[-1])
    return done
