"""Flow-GRPO (Liu et al. 2025, arXiv 2505.05470) and the codebases that carry its `flow_grpo` package.

    import densegrpo_fast.compat.flow_grpo as fast
    fast.install()          # before or after the script's own imports

or, without a change, `python -m densegrpo_fast.launch scripts/train_sd3.py ...`. The functions can also be imported
and called by their own names. See `step` for signatures and numerics.
"""

from __future__ import annotations

from collections.abc import Callable

from densegrpo_fast.compat._patch import CompatError, Patch, Target
from densegrpo_fast.compat.flow_grpo.detect import detect_version, replacement_of, tracker_replacement
from densegrpo_fast.compat.flow_grpo.rng import make_noise, philox_samples
from densegrpo_fast.compat.flow_grpo.step import VERSIONS, step_function
from densegrpo_fast.compat.flow_grpo.tracker import PerPromptStatTracker

__all__ = [
    "VERSIONS",
    "CompatError",
    "PerPromptStatTracker",
    "detect_version",
    "install",
    "philox_samples",
    "sde_step_with_logprob",
    "step_function",
    "uninstall",
]

PACKAGE = "flow_grpo"

sde_step_with_logprob = step_function("V3g")
"""The newest generation, whose arguments contain those of V2 and V3, with the host's random numbers."""

_active: tuple[Patch, tuple[object, ...]] | None = None


def install(
    *,
    version: str | None = None,
    rng: str = "host",
    seed: int | None = None,
    tracker: bool = False,
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
        say: receives a line for each replacement; default: the log, at level INFO.

    Returns:
        the patch: `.messages` says what was replaced, `.uninstall()` or the end of a `with` block undoes it.

    Raises:
        CompatError: the host is not installed, or its functions are not those that are known here.
        ValueError: an option is wrong.
    """
    global _active
    if version is not None and (version not in VERSIONS or version == "Wan"):
        known = ", ".join(name for name in VERSIONS if name != "Wan")
        raise ValueError(f"version must be one of {known}, or None to detect it, got {version!r}")
    make_noise(rng, seed)
    options = (version, rng, seed, tracker)
    if _active is not None and _active[0].installed:
        if _active[1] == options:
            return _active[0]
        _active[0].uninstall()
    folder = f"{PACKAGE}.diffusers_patch"
    targets = [
        Target(
            f"{folder}.sd3_sde_with_logprob",
            "sde_step_with_logprob",
            lambda host: replacement_of(host, version=version, rng=rng, seed=seed),
        ),
        Target(
            f"{folder}.wan_pipeline_with_logprob",
            "sde_step_with_logprob",
            lambda host: replacement_of(host, version="Wan", rng=rng, seed=seed),
        ),
    ]
    if tracker:
        targets.append(Target(f"{PACKAGE}.stat_tracking", "PerPromptStatTracker", tracker_replacement))
    patch = Patch(PACKAGE, targets, say).install()
    _active = patch, options
    return patch


def uninstall() -> None:
    """Put the host's own functions back; nothing happens if nothing is replaced."""
    global _active
    if _active is not None:
        _active[0].uninstall()
        _active = None
