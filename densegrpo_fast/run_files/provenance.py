"""What a measurement says about where it comes from: command, commit, hardware and versions, as plain JSON data."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path, PurePath
from typing import Any

_PACKAGES = ("densegrpo-fast", "torch", "diffusers", "transformers", "peft", "numpy", "triton")
_CHECKOUT = Path(__file__).resolve().parents[2]


def provenance() -> dict[str, Any]:
    """Keys command, commit, hardware and versions of the measurement that is being taken."""
    return {"command": command(), "commit": commit(), "hardware": hardware(), "versions": versions()}


def command() -> str:
    """The command line, with absolute paths shortened to their last name."""
    interpreter, *arguments = sys.orig_argv
    return " ".join([PurePath(interpreter).name, *(_portable(argument) for argument in arguments)])


def commit() -> str:
    """Commit of the checkout that the package runs from, "+changes" if its tree differs; "unknown" if installed."""
    try:
        top, head = _git("rev-parse", "--show-toplevel", "HEAD").splitlines()
        # an installed package may lie inside somebody else's repository
        if Path(top).resolve() != _CHECKOUT:
            return "unknown"
        # results are written while a study runs; they are what is recorded, not what made it
        elsewhere = ("--", ".", ":!benches/results")
        changed = _git("status", "--porcelain", "--untracked-files=no", *elsewhere)
    except (OSError, subprocess.SubprocessError, ValueError):
        return "unknown"
    return head + ("+changes" if changed else "")


def hardware() -> dict[str, Any]:
    """CPU model, cores this process may use, torch's threads and wait policy, load average, and the GPU or None."""
    import torch

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", "unset"),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that results depend on; None = not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _portable(argument: str) -> str:
    name, equals, value = argument.rpartition("=")
    return name + equals + (PurePath(value).name if PurePath(value).is_absolute() else value)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def _git(*arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(_CHECKOUT), *arguments], check=True, capture_output=True, text=True, timeout=60
    ).stdout.strip()
