"""MixGRPO (Li et al. 2025, arXiv 2507.21802): the sampling utilities of its `fastvideo` package.

    import densegrpo_fast.compat.mix_grpo as fast
    fast.install()          # before or after the script's own imports

or, without a change, `python -m densegrpo_fast.launch --host mix_grpo fastvideo/train_grpo_flux.py ...`. The functions
can also be imported and called by their own names. See README.md here; `step`, `dpm` and `sampling` for signatures and
numerics.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from densegrpo_fast.compat._compare import check_parameters, first_equal
from densegrpo_fast.compat._install import Installer, checked_fixes
from densegrpo_fast.compat._patch import CompatError, Patch, Target
from densegrpo_fast.compat.flow_grpo.rng import make_noise, philox_samples
from densegrpo_fast.compat.mix_grpo import dpm, probe, sampling, step
from densegrpo_fast.compat.mix_grpo.dpm import DPMState, dpm_step_function
from densegrpo_fast.compat.mix_grpo.sampling import sampling_function
from densegrpo_fast.compat.mix_grpo.step import VERSIONS, dance_step_function, flow_step_function

__all__ = [
    "FIXES",
    "VERSIONS",
    "CompatError",
    "DPMState",
    "dance_grpo_step",
    "dance_step_function",
    "dpm_step",
    "dpm_step_function",
    "flow_grpo_step",
    "flow_step_function",
    "install",
    "philox_samples",
    "run_sample_step",
    "sampling_function",
    "uninstall",
]

PACKAGE = "fastvideo"
MODULE = f"{PACKAGE}.utils.sampling_utils"

FIXES = {
    "constants": "log_prob of dance_grpo_step has the constants that the host loses",
    "independent_noise": 'dpm_apply_strategy "all" draws new noise at every step, not the same numbers each time',
    "reach_zero": 'dpm_apply_strategy "post" ends at sigma 0 also when the compressed part has one point',
    "upcast": "products with a 16-bit velocity are not rounded to 16 bits",
}
"""Flaws of the host that `install(fixes=...)` takes away, one by one; all are kept unless named."""


def _functions(
    version: str,
    *,
    rng: str = "host",
    seed: int | None = None,
    fixes: Collection[str] = (),
    host_dpm_step: Callable[..., Any] | None = None,
) -> Mapping[str, Callable[..., Any]]:
    upcast = "upcast" in fixes
    flow = flow_step_function(version, rng=rng, seed=seed, upcast=upcast)
    dance = dance_step_function(version, rng=rng, seed=seed, upcast=upcast, constants="constants" in fixes)
    solver = dpm_step_function(rng=rng, seed=seed, upcast=upcast, host=host_dpm_step)
    run = sampling_function(
        version,
        flow,
        dance,
        solver,
        independent_noise="independent_noise" in fixes,
        reach_zero="reach_zero" in fixes,
    )
    return {"flow_grpo_step": flow, "dance_grpo_step": dance, "dpm_step": solver, "run_sample_step": run}


_newest = _functions(VERSIONS[-1])
flow_grpo_step = _newest["flow_grpo_step"]
dance_grpo_step = _newest["dance_grpo_step"]
dpm_step = _newest["dpm_step"]
run_sample_step = _newest["run_sample_step"]
"""The newest version, whose arguments contain those of V1, with the host's random numbers."""


def install(
    *,
    rng: str = "host",
    seed: int | None = None,
    fixes: Collection[str] = (),
    say: Callable[[str], None] | None = None,
) -> Patch:
    """Replace MixGRPO's sampling functions by ours, in modules that are imported already and in those that will be.

    Each original is first compared with its replacement on a few numbers; all four are replaced, or none. Calling it
    again with the same options changes nothing; with others, it replaces anew.

    Args:
        rng: "host" keeps the host's random numbers; "philox" takes counters (`philox_samples`).
        seed: of "philox".
        fixes: names of `FIXES`.
        say: receives a line for each replacement; default: the log, at level INFO.

    Returns:
        the patch: `.messages` says what was replaced, `.uninstall()` or the end of a `with` block undoes it.

    Raises:
        CompatError: the host is not installed, or its functions are not those that are known here.
        ValueError: an option is wrong.
    """
    make_noise(rng, seed)
    return _installer.install(say, rng=rng, seed=seed, fixes=checked_fixes(fixes, FIXES))


def uninstall() -> None:
    """Put the host's own functions back; nothing happens if nothing is replaced."""
    _installer.uninstall()


_PARAMETERS: Mapping[str, Sequence[tuple[str, ...]]] = {
    "flow_grpo_step": list(step.FLOW_PARAMETERS.values()),
    "dance_grpo_step": list(step.DANCE_PARAMETERS.values()),
    "dpm_step": [dpm.PARAMETERS],
    "run_sample_step": [sampling.PARAMETERS],
}


def _targets(rng: str, seed: int | None, fixes: frozenset[str]) -> Sequence[Target]:
    def target(name: str) -> Target:
        def build(host: Any) -> tuple[Any, str]:
            version = detect_version(host, name)
            # While modules are patched, the host's own steps are still in place there.
            own = getattr(host, "__globals__", {}).get("dpm_step") if name != "dpm_step" else host
            ours = _functions(version, rng=rng, seed=seed, fixes=fixes, host_dpm_step=own)[name]
            words = [*([] if name == "dpm_step" else [version]), f"rng {rng}", *(f"fix {fix}" for fix in sorted(fixes))]
            return ours, ", ".join(words)

        return Target(MODULE, name, build)

    return [target(name) for name in _PARAMETERS]


_installer = Installer(PACKAGE, _targets)


def detect_version(host: Callable[..., Any], name: str) -> str:
    """Version of one of a host's functions, by its parameters and by what it computes.

    Args:
        host: the function.
        name: which one it is.

    Raises:
        CompatError: its parameters or its results are none that are known.
    """
    place = check_parameters(host, name, _PARAMETERS[name])
    versions = VERSIONS if len(_PARAMETERS[name]) == 1 else VERSIONS[place : place + 1]
    # The newest first: what does not depend on the version is said to be of the newest.
    forms = {version: _functions(version)[name] for version in reversed(versions)}
    return first_equal(host, name, forms, probe.CALLS[name](versions[-1]))
