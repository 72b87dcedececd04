"""Pairs the runs of two variants seed by seed and puts intervals on their difference.

A run is a dict as `study.py` records it: `variant`, `seed`, `points` (one per evaluation, oldest first, each with
`iteration`, cumulative `seconds` and `nfe` by phase, cumulative `operations` in TFLOP (None = not known), and the
held-out means `held_out`), and `before` and `after` (per score an [N, S] list: N prompts by S samples, None = missing).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from densegrpo_fast.run_files.statistics import Interval, paired_interval

Run = dict[str, Any]


def pairs(runs: Sequence[Run], first: str, second: str) -> list[tuple[Run, Run]]:
    """The runs of two variants that share a seed, in increasing order of the seed."""
    by_key = {(run["variant"], run["seed"]): run for run in runs}
    seeds = sorted({run["seed"] for run in runs})
    return [
        (by_key[first, seed], by_key[second, seed])
        for seed in seeds
        if (first, seed) in by_key and (second, seed) in by_key
    ]


def seconds_of(run: Run) -> np.ndarray:
    """Cumulative training seconds at every evaluation of a run, all phases together; evaluation is not counted."""
    return np.array([sum(point["seconds"].values()) for point in run["points"]])


def held_out_of(run: Run, score: str) -> np.ndarray:
    """Held-out mean of a score at every evaluation of a run; NaN = missing."""
    return np.array([point["held_out"][score] for point in run["points"]], dtype=float)


def operations_of(run: Run) -> np.ndarray | None:
    """Cumulative training operations at every evaluation of a run, TFLOP (`common/operations.py`); None = not known."""
    counted = [point.get("operations") for point in run["points"]]
    return None if None in counted else np.array(counted)


def at(run: Run, score: str, spent: np.ndarray, stop: float) -> float:
    """Held-out mean of a score when so much was spent, linear between two evaluations.

    Args:
        run: the run.
        score: its name.
        spent: what counts, cumulative, one number per evaluation: `seconds_of` or `operations_of`.
        stop: how much of it.

    Raises:
        ValueError: the run spent less than that.
    """
    if not 0 <= stop <= spent[-1]:
        raise ValueError(f"at: stop must lie in 0..{spent[-1]}, what the run spent, got {stop}")
    return float(np.interp(stop, spent, held_out_of(run, score)))


def compare(runs: Sequence[Run], first: str, second: str, *, timed: bool = True) -> dict[str, Any]:
    """Held-out difference first - second, with 95% intervals.

    Args:
        runs: as above.
        first, second: variants.
        timed: whether seconds of different runs can be compared: they were done at the same load.

    Returns:
        `seeds`, the seeds that both variants have, and under `scores` per score:
            `equal_iterations`: one interval over seeds for each iteration at which all paired runs were evaluated;
                the last is the end of the runs.
            `equal_seconds`: the interval over seeds when both runs of a pair are stopped at the shorter one's time,
                and these times; None unless `timed`.
            `equal_compute`: the same when both are stopped at the smaller one's operations, and these (TFLOP); None
                where those of a run are not known.
            `equal_iterations_over_prompts`: at the end, the interval over held-out prompts for the mean over these
                very seeds; narrower, and says nothing about other seeds.

    Raises:
        ValueError: the variants share no seed.
    """
    paired = pairs(runs, first, second)
    if not paired:
        raise ValueError(f"compare: {first} and {second} must share a seed, got none")
    scores = {name: _score(paired, name, timed) for name in paired[0][0]["points"][0]["held_out"]}
    return {"first": first, "second": second, "seeds": [run["seed"] for run, _ in paired], "scores": scores}


def _score(paired: list[tuple[Run, Run]], score: str, timed: bool) -> dict[str, Any]:
    curves = [[_by_iteration(run, score) for run in pair] for pair in paired]
    common = sorted(set.intersection(*(set(curve) for pair in curves for curve in pair)))
    prompts = [np.concatenate([_table(pair[side], score) for pair in paired], axis=1) for side in (0, 1)]
    return {
        "equal_iterations": [
            {"iteration": iteration} | _interval([[curve[iteration] for curve in pair] for pair in curves])
            for iteration in common
        ],
        "equal_seconds": _stopped(paired, score, seconds_of) if timed else None,
        "equal_compute": _stopped(paired, score, operations_of),
        "equal_iterations_over_prompts": paired_interval(prompts[1], prompts[0])._asdict(),
    }


def _stopped(
    paired: list[tuple[Run, Run]], score: str, spent_by: Callable[[Run], np.ndarray | None]
) -> dict[str, Any] | None:
    """The interval when the runs of each pair have spent alike, as much as the one that spent less; None = unknown."""
    stops, values = [], []
    for pair in paired:
        spent = [found for run in pair if (found := spent_by(run)) is not None]
        if len(spent) < len(pair):
            return None
        stops.append(float(min(own[-1] for own in spent)))
        values.append([at(run, score, own, stops[-1]) for run, own in zip(pair, spent, strict=True)])
    return {"stopped_at": stops} | _interval(values)


def _by_iteration(run: Run, score: str) -> dict[int, float]:
    return {point["iteration"]: value for point, value in zip(run["points"], held_out_of(run, score), strict=True)}


def _interval(values: list[list[float]]) -> dict[str, float]:
    """Interval of first - second over seeds; values are [seeds, 2]."""
    first, second = np.array(values, dtype=float).T
    if np.isnan(first - second).all():
        return Interval(float("nan"), float("nan"), float("nan"))._asdict()
    return paired_interval(second, first)._asdict()


def _table(run: Run, score: str) -> np.ndarray:
    return np.array(run["after"][score], dtype=float)
