"""Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) and the codebases that carry its `flow_grpo` package.

    import densegrpo_fast.compat.flow_grpo as fast
    fast.install()          # before or after the script's own imports

or, without a change, `python -m densegrpo_fast.launch scripts/train_sd3.py ...`. The functions can also be imported
and called by their own names. See `step` and `pipelines` for their numerics.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path

from densegrpo_fast.calibration.store import Calibration
from densegrpo_fast.compat.flow_grpo.levels import read_levels
from densegrpo_fast.compat.flow_grpo.pipelines import (
    Kept,
    keep_velocities,
    pipeline_replacement,
    pipeline_with_logprob,
    pipeline_with_logprob_fast,
)
from densegrpo_fast.compat.flow_grpo.step import VERSIONS, detect_version, step_function, step_replacement
from densegrpo_fast.compat.flow_grpo.tracker import PerPromptStatTracker, tracker_replacement
from densegrpo_fast.compat.hosts import HOSTS
from densegrpo_fast.compat.patch import Build, CompatError, Patch, install_host, uninstall_host
from densegrpo_fast.compat.rng import philox_samples

__all__ = [
    "FIXES",
    "VERSIONS",
    "CompatError",
    "Kept",
    "PerPromptStatTracker",
    "detect_version",
    "install",
    "keep_velocities",
    "philox_samples",
    "pipeline_with_logprob",
    "pipeline_with_logprob_fast",
    "sde_step_with_logprob",
    "step_function",
    "uninstall",
]

sde_step_with_logprob = step_function("V3g")
"""The newest generation, whose arguments contain those of V2 and V3, with the host's random numbers."""

FIXES = HOSTS["flow_grpo"].fixes
"""Flaws of the host that `install(fixes=...)` takes away, one by one; all are kept unless named."""


def install(
    *,
    version: str | None = None,
    rng: str = "host",
    seed: int | None = None,
    tracker: bool = False,
    pipelines: bool = True,
    noise_levels: str | Path | Calibration | None = None,
    fixes: Collection[str] = (),
    say: Callable[[str], None] | None = None,
) -> Patch:
    """Replace Flow-GRPO's functions by ours, in modules that are imported already and in those that will be.

    Each original is first compared with its replacement on a few numbers. Calling it again with the same options
    changes nothing; with others, it replaces anew.

    Args:
        version: signature generation of the SD3/FLUX/Qwen step, one of `VERSIONS` but Wan; None detects it.
        rng: "host" keeps the host's random numbers; "philox" takes counters (`philox_samples`).
        seed: of "philox".
        tracker: replace `PerPromptStatTracker`, too.
        pipelines: replace SD3's `pipeline_with_logprob`, too; a copy of it that is not known is left as it is.
        noise_levels: file of `densegrpo_fast.calibrate`, or what `calibration.store.read_calibration` returns: as in
            `step_function`.
        fixes: names of `FIXES`.
        say: receives a line for each replacement; default: the log, at level INFO.

    Returns:
        the patch: `.messages` says what was replaced, `.uninstall()` or the end of a `with` block undoes it.

    Raises:
        CompatError: the host is not installed, or its step or tracker are not those that are known here.
        ValueError: an option is wrong; UsageError: the file of levels cannot be read.
    """
    return install_host(
        "flow_grpo",
        replacements,
        say,
        version=version,
        rng=rng,
        seed=seed,
        tracker=tracker,
        pipelines=pipelines,
        noise_levels=read_levels(noise_levels),
        fixes=fixes,
    )


def replacements(
    *,
    version: str | None,
    rng: str,
    seed: int | None,
    tracker: bool,
    fixes: Collection[str],
    pipelines: bool = True,
    noise_levels: Calibration | None = None,
) -> Mapping[str, Build]:
    """What replaces each name, also in the other hosts that carry this one's package.

    Raises:
        ValueError: an unknown version.
    """
    if version is not None and (version not in VERSIONS or version == "Wan"):
        known = ", ".join(name for name in VERSIONS if name != "Wan")
        raise ValueError(f"version must be one of {known}, or None to detect it, got {version!r}")
    builds: dict[str, Build] = {
        "sde_step_with_logprob": partial(
            step_replacement, version=version, rng=rng, seed=seed, noise_levels=noise_levels
        ),
    }
    if pipelines:
        builds["pipeline_with_logprob"] = partial(pipeline_replacement, float32="float32_states" in fixes)
    if tracker:
        builds["PerPromptStatTracker"] = tracker_replacement
    return builds


def uninstall() -> None:
    """Put the host's own functions back; nothing happens if nothing is replaced."""
    uninstall_host("flow_grpo")
