"""Flow-Factory: the `step` of its `FlowMatchEulerDiscreteSDEScheduler`.

    import densegrpo_fast.compat.flow_factory as fast
    fast.install()          # before or after Flow-Factory has been imported

or, without a change, `python -m densegrpo_fast.launch --host flow_factory script.py ...`. The method of the class is
replaced, so that schedulers that exist already take it, too. See README.md here, and `step` for signature and numerics.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from densegrpo_fast.compat._compare import check_parameters, first_equal
from densegrpo_fast.compat._install import Installer, checked_fixes
from densegrpo_fast.compat._patch import CompatError, Patch, Target
from densegrpo_fast.compat.flow_factory.probe import calls
from densegrpo_fast.compat.flow_factory.step import PARAMETERS, SDESchedulerOutput, step_function
from densegrpo_fast.compat.flow_grpo.rng import make_noise, philox_samples

__all__ = [
    "FIXES",
    "CompatError",
    "SDESchedulerOutput",
    "install",
    "philox_samples",
    "step",
    "step_function",
    "uninstall",
]

PACKAGE = "flow_factory"
MODULE = f"{PACKAGE}.scheduler.flow_match_euler_discrete"
NAME = "FlowMatchEulerDiscreteSDEScheduler.step"

FIXES = {
    "round_trip": "a drawn state is rounded to the dtype of the latents before it is scored, also in earlier versions",
}
"""Flaws of the host that `install(fixes=...)` takes away, one by one; all are kept unless named."""

step = step_function()
"""Of the newest version, with the host's random numbers."""

_FORMS: dict[str, dict[str, Any]] = {
    f"{'with' if round_trip else 'without'} round trip, Dance-SDE's std {'injected' if injected else 'as given'}": {
        "round_trip": round_trip,
        "dance_std_injected": injected,
    }
    for round_trip in (True, False)
    for injected in (False, True)
}


def install(
    *,
    rng: str = "host",
    seed: int | None = None,
    fixes: Collection[str] = (),
    say: Callable[[str], None] | None = None,
) -> Patch:
    """Replace the scheduler's `step` by ours, now or as soon as Flow-Factory is imported.

    The original is first compared with its replacement on a few numbers. Calling it again with the same options changes
    nothing; with others, it replaces anew.

    Args:
        rng: "host" keeps the host's random numbers; "philox" takes counters (`philox_samples`).
        seed: of "philox".
        fixes: names of `FIXES`.
        say: receives a line for each replacement; default: the log, at level INFO.

    Returns:
        the patch: `.messages` says what was replaced, `.uninstall()` or the end of a `with` block undoes it.

    Raises:
        CompatError: the host is not installed, or its step is not the one that is known here.
        ValueError: an option is wrong.
    """
    make_noise(rng, seed)
    return _installer.install(say, rng=rng, seed=seed, fixes=checked_fixes(fixes, FIXES))


def uninstall() -> None:
    """Put the host's own step back; nothing happens if nothing is replaced."""
    _installer.uninstall()


def detect_form(host: Callable[..., Any]) -> str:
    """Key of `_FORMS` of a host's step, by what it computes.

    Raises:
        CompatError: its parameters or its results are none that are known.
    """
    check_parameters(host, NAME, [PARAMETERS])
    return first_equal(host, NAME, {form: step_function(**options) for form, options in _FORMS.items()}, calls())


def _targets(rng: str, seed: int | None, fixes: frozenset[str]) -> Sequence[Target]:
    def build(host: Any) -> tuple[Any, str]:
        form = detect_form(host)
        options = dict(_FORMS[form])
        options["round_trip"] |= "round_trip" in fixes
        output_type = host.__globals__.get("SDESchedulerOutput")
        if not hasattr(output_type, "from_dict"):
            raise CompatError(f"{MODULE} has no SDESchedulerOutput to return results in; nothing was replaced")
        ours = step_function(rng=rng, seed=seed, output_type=output_type, **options)
        return ours, ", ".join([form, f"rng {rng}", *(f"fix {fix}" for fix in sorted(fixes))])

    return [Target(MODULE, NAME, build)]


_installer = Installer(PACKAGE, _targets)
