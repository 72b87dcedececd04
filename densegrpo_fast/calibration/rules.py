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
from dataclasses import asdict, astuple, dataclass
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
    def hopeless(self) -> tuple[int, ...]:
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
    hopeless = ()

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
            same draw means the same samples.
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
        done.append(Round(rule.levels, measure(rule.levels, rule.draw)))
        rule.update(done[-1].signs)
        progress(done[-1])
    return done
