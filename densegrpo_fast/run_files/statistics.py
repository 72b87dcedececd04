"""Confidence intervals of held-out rewards, and the comparison of several models prompt by prompt.

Samples of one prompt are alike: a hard prompt is hard for all of them. Counting them as independent would make an
interval too narrow, so a prompt's samples are averaged first and the interval is taken over prompts. Models that draw
the same prompts from the same noise are compared by the difference of each prompt: what makes a prompt hard for one
makes it hard for the other, so this interval is narrower than two separate ones suggest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

Scores = Mapping[str, Mapping[str, ArrayLike]]
"""Model -> reward -> [N, S] scores of N prompts with S pictures each; NaN = missing."""

Bounds = tuple[float, float]
"""Between which every value lies, and so their mean."""


class Interval(NamedTuple):
    """A mean with its confidence interval; low and high are NaN where a single prompt allows no interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: ArrayLike, confidence: float = 0.95, bounds: Bounds | None = None) -> Interval:
    """Student-t interval of a mean over prompts.

    Args:
        values: [N], one value per prompt; or [N, S], S samples of each prompt, averaged first. NaN = missing;
            a prompt without any value is left out.
        confidence: coverage, in (0, 1).
        bounds: of the values, beyond which the interval does not reach; None = unknown.

    Raises:
        ValueError: values has another shape or no value present, or confidence is out of range.
    """
    if not 0 < confidence < 1:
        raise ValueError(f"mean_interval: confidence must lie in (0, 1), got {confidence}")
    per_prompt = _per_prompt("mean_interval", values)
    per_prompt = per_prompt[~np.isnan(per_prompt)]
    if per_prompt.size == 0:
        raise ValueError("mean_interval: values must hold at least one value that is not missing, got none")
    mean = float(per_prompt.mean())
    if per_prompt.size == 1:
        return Interval(mean, float("nan"), float("nan"))
    error = per_prompt.std(ddof=1) / np.sqrt(per_prompt.size)
    reach = float(stats.t.ppf((1 + confidence) / 2, per_prompt.size - 1) * error)
    lowest, highest = (-math.inf, math.inf) if bounds is None else bounds
    return Interval(mean, max(mean - reach, lowest), min(mean + reach, highest))


def paired_interval(
    before: ArrayLike, after: ArrayLike, confidence: float = 0.95, bounds: Bounds | None = None
) -> Interval:
    """Student-t interval of the mean change after - before over the same prompts.

    Args:
        before, after: [N] or [N, S] each, rows in the same order of prompts; NaN = missing. A prompt that
            lacks a value on either side is left out.
        confidence: coverage, in (0, 1).
        bounds: of the values, as in `mean_interval`.

    Raises:
        ValueError: the numbers of prompts differ, no prompt has a value on both sides, or confidence is out
            of range.
    """
    first, second = _per_prompt("paired_interval", before), _per_prompt("paired_interval", after)
    if first.shape != second.shape:
        raise ValueError(
            f"paired_interval: before and after must cover the same prompts, got {first.size} and {second.size}"
        )
    span = None if bounds is None else bounds[1] - bounds[0]
    return mean_interval(second - first, confidence, None if span is None else (-span, span))


def compare(scores: Scores, bounds: Mapping[str, Bounds] | None = None) -> dict[str, Any]:
    """Means of every model, and the paired difference of every two, as JSON data with 95% intervals.

    Args:
        bounds: of the rewards that have some, by name.

    Returns:
        subjects: name -> reward -> {mean, low, high, missing}, missing a share in [0, 1];
        differences: {first, second, reward, mean, low, high, verdict} of second - first, the models in the given
        order. verdict is "better", "worse" or "no difference shown" (the interval holds 0, or there is none).
        A number that does not exist is None.
    """
    known = {} if bounds is None else bounds
    subjects: dict[str, Any] = {}
    for name, rewards in scores.items():
        subjects[name] = {}
        for reward, values in rewards.items():
            mean = or_missing(mean_interval, values, bounds=known.get(reward))
            subjects[name][reward] = _json(mean) | {"missing": float(np.isnan(np.asarray(values)).mean())}
    differences = []
    for reward in next(iter(scores.values()), {}):
        for first, second in combinations(scores, 2):
            both = (scores[first][reward], scores[second][reward])
            change = or_missing(paired_interval, *both, bounds=known.get(reward))
            verdict = "better" if change.low > 0 else "worse" if change.high < 0 else "no difference shown"
            pair = {"first": first, "second": second, "reward": reward}
            differences.append(pair | _json(change) | {"verdict": verdict})
    return {"subjects": subjects, "differences": differences}


def tables(comparison: Mapping[str, Any]) -> str:
    """What `compare` returned, as text: one table of means, and one of differences if there are several models."""
    means = [("subject", "reward", "mean", "95% interval", "missing")]
    for name, rewards in comparison["subjects"].items():
        for reward, found in rewards.items():
            means.append((name, reward, *_cells(found, ".4f"), f"{found['missing']:.1%}"))
    text = plain(means)
    if comparison["differences"]:
        rows = [("second - first", "reward", "difference", "95% interval", "second is")]
        for found in comparison["differences"]:
            pair = f"{found['second']} - {found['first']}"
            rows.append((pair, found["reward"], *_cells(found, "+.4f"), found["verdict"]))
        text += "\n\nSame prompts, same noise:\n\n" + plain(rows)
    return text


def _per_prompt(function: str, values: ArrayLike) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if array.ndim not in (1, 2):
        raise ValueError(f"{function}: values must have shape [N] or [N, S], got {list(array.shape)}")
    if array.ndim == 1:
        return array
    present = ~np.isnan(array)
    count = present.sum(1)
    total = np.where(present, array, 0.0).sum(1)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def or_missing(interval: Callable[..., Interval], *values: ArrayLike, bounds: Bounds | None = None) -> Interval:
    """The interval of the values; NaN where no prompt has all that it takes."""
    try:
        return interval(*values, bounds=bounds)
    except ValueError:
        return Interval(math.nan, math.nan, math.nan)


def _json(interval: Interval) -> dict[str, Any]:
    return {name: value if math.isfinite(value) else None for name, value in interval._asdict().items()}


def _cells(found: Mapping[str, Any], form: str) -> tuple[str, str]:
    """Mean and interval as text."""
    mean, low, high = ("-" if found[name] is None else format(found[name], form) for name in Interval._fields)
    return mean, "-" if low == "-" else f"[{low}, {high}]"


def plain(rows: Sequence[tuple[str, ...]]) -> str:
    """Rows of cells as text in columns, the first row above a line."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
