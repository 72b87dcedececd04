"""Held-out scores of several subjects side by side, and their differences prompt by prompt.

All subjects drew the same prompts from the same noise, so the difference of two is taken for each prompt first. Its
interval is narrower than two separate intervals suggest: what makes a prompt hard for one makes it hard for the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from densegrpo_fast.run_files.intervals import Interval, mean_interval, paired_interval

Scores = Mapping[str, Mapping[str, ArrayLike]]
"""Subject -> reward -> [N, S] scores of N prompts with S pictures each; NaN = missing."""

_MISSING = Interval(math.nan, math.nan, math.nan)


def compare(scores: Scores) -> dict[str, Any]:
    """Means of every subject, and the paired difference of every two, as JSON data with 95% intervals.

    Returns:
        subjects: name -> reward -> {mean, low, high, missing}, missing a share in [0, 1];
        differences: {first, second, reward, mean, low, high, verdict} of second - first, the subjects in the given
        order. verdict is "better", "worse" or "no difference shown" (the interval holds 0, or there is none).
        A number that does not exist is None.
    """
    subjects: dict[str, Any] = {
        name: {
            reward: _numbers(_mean(values)) | {"missing": float(np.isnan(np.asarray(values)).mean())}
            for reward, values in rewards.items()
        }
        for name, rewards in scores.items()
    }
    differences = [
        {"first": first, "second": second, "reward": reward}
        | _difference(scores[first][reward], scores[second][reward])
        for reward in next(iter(scores.values()), {})
        for first, second in combinations(scores, 2)
    ]
    return {"subjects": subjects, "differences": differences}


def tables(comparison: Mapping[str, Any]) -> str:
    """What `compare` found, as text: one table of means, and one of differences if there are several subjects."""
    means = [("subject", "reward", "mean", "95% interval", "missing")]
    for name, rewards in comparison["subjects"].items():
        for reward, found in rewards.items():
            means.append((name, reward, _text(found["mean"]), _range(found), f"{found['missing']:.1%}"))
    text = _table(means)
    if comparison["differences"]:
        rows = [("second - first", "reward", "difference", "95% interval", "second is")]
        for found in comparison["differences"]:
            pair = f"{found['second']} - {found['first']}"
            rows.append((pair, found["reward"], _text(found["mean"], "+.4f"), _range(found, "+.4f"), found["verdict"]))
        text += "\n\nSame prompts, same noise:\n\n" + _table(rows)
    return text


def _difference(first: ArrayLike, second: ArrayLike) -> dict[str, Any]:
    try:
        found = paired_interval(first, second)
    except ValueError:  # no prompt has a score on both sides
        found = _MISSING
    verdict = "better" if found.low > 0 else "worse" if found.high < 0 else "no difference shown"
    return _numbers(found) | {"verdict": verdict}


def _mean(values: ArrayLike) -> Interval:
    try:
        return mean_interval(values)
    except ValueError:  # every score is missing
        return _MISSING


def _numbers(interval: Interval) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in interval._asdict().items()}


def _text(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _range(found: Mapping[str, Any], form: str = ".4f") -> str:
    return "-" if found["low"] is None else f"[{found['low']:{form}}, {found['high']:{form}}]"


def _table(rows: Sequence[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])
