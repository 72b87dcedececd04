"""MixGRPO (Li et al. 2025, arXiv 2507.21802): the sampling utilities of its `fastvideo` package.

    import densegrpo_fast.compat.mix_grpo as fast
    fast.install()          # before or after the script's own imports

or, without a change, `python -m densegrpo_fast.launch --host mix_grpo fastvideo/train_grpo_flux.py ...`. The functions
can also be imported and called by their own names. See `step`, `dpm` and `sampling` for their numerics.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

from densegrpo_fast.compat import probes
from densegrpo_fast.compat.compare import Call, first_equal, known_version
from densegrpo_fast.compat.hosts import HOSTS
from densegrpo_fast.compat.mix_grpo.dpm import DPMState, dpm_step_function
from densegrpo_fast.compat.mix_grpo.sampling import sampling_function
from densegrpo_fast.compat.mix_grpo.step import VERSIONS, dance_step_function, flow_step_function
from densegrpo_fast.compat.patch import Build, CompatError, Patch, install_host, uninstall_host
from densegrpo_fast.compat.rng import philox_samples

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

FIXES = HOSTS["mix_grpo"].fixes
"""Flaws of the host that `install(fixes=...)` takes away, one by one; all are kept unless named."""

_CALLS: Mapping[str, Callable[[str], list[Call]]] = {
    "flow_grpo_step": probes.flow_grpo_step_calls,
    "dance_grpo_step": probes.dance_grpo_step_calls,
    "dpm_step": probes.dpm_step_calls,
    "run_sample_step": probes.run_sample_step_calls,
}


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
    return install_host("mix_grpo", _replacements, say, rng=rng, seed=seed, fixes=fixes)


def uninstall() -> None:
    """Put the host's own functions back; nothing happens if nothing is replaced."""
    uninstall_host("mix_grpo")


def _replacements(rng: str, seed: int | None, fixes: frozenset[str]) -> Mapping[str, Build]:
    def build(name: str, host: Any) -> tuple[Any, str]:
        version = known_version(host, name)
        # Parameters that are those of every version: the newest first, which is what is said of a function that does
        # not depend on the version.
        candidates = {known: _functions(known)[name] for known in ([version] if version else reversed(VERSIONS))}
        found = first_equal(host, name, candidates, _CALLS[name](version or VERSIONS[-1]))
        # While modules are patched, the host's own steps are still in place there.
        own = host if name == "dpm_step" else getattr(host, "__globals__", {}).get("dpm_step")
        ours = _functions(found, rng=rng, seed=seed, fixes=fixes, host_dpm_step=own)[name]
        words = [*([] if name == "dpm_step" else [found]), f"rng {rng}", *(f"fix {fix}" for fix in sorted(fixes))]
        return ours, ", ".join(words)

    return {name: partial(build, name) for name in _CALLS}
