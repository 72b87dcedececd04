"""What every recorded measurement says about itself, and how variants are timed against each other."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePath
from statistics import median, quantiles
from typing import Any

from densegrpo_fast.runtime.files import replace_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"
NOISY_SPREAD = 0.2
"""A variant whose timings spread more than this share of their median makes the measurement noisy."""

_PACKAGES = ("torch", "diffusers", "transformers", "peft", "numpy", "triton")


def provenance() -> dict[str, Any]:
    """Command line, commit, hardware and versions of the measurement that is being taken; plain JSON data."""
    return {
        "command": _command(),
        "commit": commit(),
        "hardware": hardware(),
        "versions": versions(),
    }


def hardware() -> dict[str, Any]:
    """CPU model, the cores this process may use, torch's threads and wait policy, the GPU if there is one."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages a timing depends on; None = not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def commit() -> str:
    """The commit that is checked out, with "+changes" if the tree differs from it outside of benches/results."""
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", ".", ":!benches/results")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+changes" if changed else "")


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
        UserError: exit code 7, if it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")


def interleaved(
    variants: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Seconds of every variant in every round.

    The variants take turns and every second round runs them backwards, so that a change of the machine's speed
    reaches all of them alike.
    """
    names = list(variants)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, rounds):
        for name in names if turn % 2 == 0 else reversed(names):
            start = time.perf_counter()
            variants[name]()
            elapsed = time.perf_counter() - start
            if turn >= 0:
                seconds[name].append(elapsed)
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


def _command() -> str:
    interpreter, *arguments = sys.orig_argv
    return " ".join([PurePath(interpreter).name, *(_portable_argument(argument) for argument in arguments)])


def _portable_argument(argument: str) -> str:
    name, equals, value = argument.rpartition("=")
    path = Path(value)
    if path.is_absolute():
        value = str(path.relative_to(ROOT)) if path.is_relative_to(ROOT) else path.name
    return name + equals + value


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(ROOT), *arguments], check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
