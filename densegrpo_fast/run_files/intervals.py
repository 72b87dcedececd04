"""Confidence intervals for held-out rewards.

Samples of one prompt are alike: a hard prompt is hard for all of them. Counting them as independent would
make an interval too narrow, so a prompt's samples are averaged first and the interval is taken over prompts.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats


class Interval(NamedTuple):
    """A mean with its confidence interval; low and high are NaN where a single prompt allows no interval."""

    mean: float
    low: float
    high: float


def mean_interval(values: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student-t interval of a mean over prompts.

    Args:
        values: [N], one value per prompt; or [N, S], S samples of each prompt, averaged first. NaN = missing;
            a prompt without any value is left out.
        confidence: coverage, in (0, 1).

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
    return Interval(mean, mean - reach, mean + reach)


def paired_interval(before: ArrayLike, after: ArrayLike, confidence: float = 0.95) -> Interval:
    """Student-t interval of the mean change after - before over the same prompts.

    Args:
        before, after: [N] or [N, S] each, rows in the same order of prompts; NaN = missing. A prompt that
            lacks a value on either side is left out.
        confidence: coverage, in (0, 1).

    Raises:
        ValueError: the numbers of prompts differ, no prompt has a value on both sides, or confidence is out
            of range.
    """
    first, second = _per_prompt("paired_interval", before), _per_prompt("paired_interval", after)
    if first.shape != second.shape:
        raise ValueError(
            f"paired_interval: before and after must cover the same prompts, got {first.size} and {second.size}"
        )
    return mean_interval(second - first, confidence)


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
