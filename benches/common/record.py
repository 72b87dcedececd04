"""What every recorded measurement says about itself, and how variants are timed against each other."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from statistics import median, quantiles
from typing import Any

from densegrpo_fast.common import files
from densegrpo_fast.run_files.provenance import commit, hardware, provenance

__all__ = ["commit", "hardware", "provenance"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benches" / "results"
NOISY_SPREAD = 0.2
"""A variant whose timings spread more than this share of their median makes the measurement noisy."""


def load_average() -> list[float]:
    """Runnable processes over the last 1, 5 and 15 minutes."""
    return [round(load, 2) for load in os.getloadavg()]


def portable(value: Any) -> Any:
    """JSON data without the directories of this machine: an absolute path keeps its last name only."""
    if isinstance(value, Mapping):
        return {portable(key): portable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item) for item in value]
    if isinstance(value, str) and PurePath(value).is_absolute():
        return PurePath(value).name
    return value


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document as a whole (a reader finds the old one or the new one); NaN and infinities become null.

    Raises:
        OutputError: if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(path, document)


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    *,
    rounds: int,
    warmup: int = 3,
    clock: Callable[[], float] = time.perf_counter,
    best_of: int = 1,
) -> dict[str, list[float]]:
    """Seconds of every variant in every round.

    The variants take turns and every second round runs them backwards, so that a change of the machine's speed
    reaches all of them alike.

    Args:
        variants: what to time, by name.
        rounds: timed turns of each.
        warmup: turns before them.
        clock: gives the time in seconds; `time.thread_time` leaves out what other processes took of a core.
        best_of: calls in a turn, of which the fastest counts.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            elapsed = []
            for _ in range(best_of):
                start = clock()
                variants[name]()
                elapsed.append(clock() - start)
            if turn >= 0:
                seconds[name].append(min(elapsed))
    return seconds


def pairwise_ratio(slow: Sequence[float], fast: Sequence[float]) -> float:
    """Median over rounds of how many times longer `slow` took than `fast` in the same round."""
    return median(a / b for a, b in zip(slow, fast, strict=True))


def spread(seconds: Sequence[float]) -> float:
    """Distance between the quartiles as a share of the median; 0 for a single timing."""
    if len(seconds) < 2:
        return 0.0
    low, middle, high = quantiles(seconds, n=4, method="inclusive")
    return (high - low) / middle
