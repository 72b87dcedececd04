"""From the runs of a study to the board: what each method spent until its mean curve crossed the marks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FRACTIONS = (0.5, 1.0)
"""Of sparse's gain: the marks."""


def board(study: Mapping[str, Any], seconds: Mapping[str, float], sparse: str, score: str = "reward") -> dict[str, Any]:
    """Marks, and for each method what it needed.

    Args:
        study: a document of `study.py`, whose runs know their operations.
        seconds: of an iteration, by method.
        sparse: the method that sets the marks.
        score: which held-out score.

    Returns:
        `marks`, `seeds`, and under `methods` by name: `operations_to_mark` (TFLOP), `forwards_to_mark`,
        `iterations_to_mark`, `seconds_to_mark`, `ratio_to_sparse` (of operations) and `interval`, a number each per
        mark, None where a mark was not reached; `spent`, TFLOP of a run; `start`, `final`, held-out scores before
        and after it, mean over seeds.

    Raises:
        ValueError: no seed was run by every method.
    """
    runs = {(run["variant"], run["seed"]): run for run in study["runs"]}
    methods = list(dict.fromkeys(method for method, _ in runs))
    seeds = sorted({seed for _, seed in runs if all((method, seed) in runs for method in methods)})
    if not seeds:
        raise ValueError("board: no seed was run by every method")
    curves = {method: Curves([runs[method, seed] for seed in seeds], score) for method in methods}
    all_seeds = np.arange(len(seeds))
    marks = curves[sparse].marks(all_seeds)
    draws = [np.array(draw) for draw in product(range(len(seeds)), repeat=len(seeds))]
    found = {}
    for method, own in curves.items():
        reached = [own.crossing(mark, all_seeds) for mark in marks]
        ratios = np.array([_ratios(own, curves[sparse], draw) for draw in draws])
        per_iteration = seconds.get(method)
        iterations = [own.spent("iterations", at) for at in reached]
        found[method] = {
            "operations_to_mark": [own.spent("operations", at) for at in reached],
            "forwards_to_mark": [own.spent("forwards", at) for at in reached],
            "iterations_to_mark": iterations,
            "seconds_to_mark": [None if None in (n, per_iteration) else n * per_iteration for n in iterations],
            "ratio_to_sparse": [_finite(value) for value in _ratios(own, curves[sparse], all_seeds)],
            "interval": [[_finite(value) for value in _quantiles(column)] for column in ratios.T],
            "curve": {"operations": own.spent_at("operations"), "values": own.values.tolist()},
            "final": {name: float(np.mean(values)) for name, values in own.final.items()},
            "start": {name: float(np.mean(values)) for name, values in own.start.items()},
        }
    return {"seeds": seeds, "score": score, "marks": [float(mark) for mark in marks], "methods": found}


class Curves:
    """The held-out scores of one method's runs, one per seed, all evaluated at the same iterations.

    Attributes:
        values: [seeds, evaluations] of the score.
        final, start: by name, [seeds] of every score at the end and before the first iteration.
    """

    def __init__(self, runs: Sequence[Mapping[str, Any]], score: str):
        points = [run["points"] for run in runs]
        self.values: Array = np.array([[point["held_out"][score] for point in own] for own in points])
        self._axes: dict[str, Array] = {
            "operations": np.mean([[point["operations"] for point in own] for own in points], axis=0),
            "forwards": np.mean([[sum(point["nfe"].values()) for point in own] for own in points], axis=0),
            "iterations": np.array([point["iteration"] for point in points[0]], dtype=float),
        }
        self.final = {name: [own[-1]["held_out"][name] for own in points] for name in points[0][0]["held_out"]}
        self.start = {name: [own[0]["held_out"][name] for own in points] for name in points[0][0]["held_out"]}

    def marks(self, draw: NDArray[np.intp]) -> Array:
        """The start plus `FRACTIONS` of the gain at the end, of some seeds' mean curve."""
        mean = self.values[draw].mean(axis=0)
        return np.array([mean[0] + fraction * (mean[-1] - mean[0]) for fraction in FRACTIONS])

    def crossing(self, mark: float, draw: NDArray[np.intp]) -> float | None:
        """Where the mean curve of some seeds first reaches a mark, in evaluations; None = nowhere."""
        mean = self.values[draw].mean(axis=0)
        above = np.flatnonzero(mean >= mark)
        if not len(above):
            return None
        after = int(above[0])
        if after == 0:
            return 0.0
        return after - 1 + float((mark - mean[after - 1]) / (mean[after] - mean[after - 1]))

    def spent_at(self, axis: str) -> list[float]:
        """What was spent at every evaluation."""
        return [float(value) for value in self._axes[axis]]

    def spent(self, axis: str, at: float | None) -> float | None:
        """What was spent at a place between evaluations: `operations` (TFLOP), `forwards` or `iterations`."""
        if at is None:
            return None
        return float(np.interp(at, np.arange(len(self._axes[axis])), self._axes[axis]))


def _ratios(own: Curves, sparse: Curves, draw: NDArray[np.intp]) -> list[float]:
    """Operations to each mark over sparse's, for some seeds; inf = not reached, NaN = sparse gained nothing."""
    found = []
    for mark in sparse.marks(draw):
        spent, base = (curve.spent("operations", curve.crossing(mark, draw)) for curve in (own, sparse))
        found.append(float("nan") if not base else float("inf") if spent is None else spent / base)
    return found


def _quantiles(ratios: Array) -> list[float]:
    """The middle 95%; draws in which sparse gained nothing say nothing."""
    known = np.sort(ratios[~np.isnan(ratios)])
    if not len(known):
        return [float("nan"), float("nan")]
    outside = int(0.025 * (len(known) - 1))
    return [float(known[outside]), float(known[-1 - outside])]


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None
