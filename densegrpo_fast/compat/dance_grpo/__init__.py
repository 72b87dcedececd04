"""DanceGRPO (Xue et al. 2025, arXiv 2505.07818): `flux_step` of its training scripts.

    python -m densegrpo_fast.launch --host dance_grpo fastvideo/train_grpo_flux.py ...

DanceGRPO defines the step in each script, so the launcher replaces it the moment it is defined. Without the launcher,
call `install()` below the definition, for example as the first line of the script's `main`. See README.md here, and
`step` for signature and numerics.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat._compare import Call, check_parameters, first_equal
from densegrpo_fast.compat._install import Installer, checked_fixes
from densegrpo_fast.compat._patch import CompatError, Patch, Target
from densegrpo_fast.compat.dance_grpo.step import PARAMETERS, step_function
from densegrpo_fast.compat.flow_grpo.rng import make_noise, philox_samples
from densegrpo_fast.flow.schedule import dance_sigmas

__all__ = ["FIXES", "CompatError", "flux_step", "install", "philox_samples", "step_function", "uninstall"]

_logger = logging.getLogger(__name__)

PACKAGE = "fastvideo"
SCRIPTS = ("flux", "flux_lora", "hunyuan", "qwenimage", "qwenimage_edit", "skyreels_i2v", "wan_2_1")
"""Which `fastvideo/train_grpo_<name>.py` define a `flux_step`."""

FIXES = {
    "constants": "log_prob keeps its constants where the host's script loses them",
    "upcast": "products with a 16-bit velocity are not rounded to 16 bits",
}
"""Flaws of the host that `install(fixes=...)` takes away, one by one; all are kept unless named."""

flux_step = step_function()
"""With the host's random numbers, and log_prob with its constants."""


def install(
    *,
    rng: str = "host",
    seed: int | None = None,
    fixes: Collection[str] = (),
    say: Callable[[str], None] | None = None,
) -> Patch:
    """Replace `flux_step` in the running script, if it has defined it, and in DanceGRPO's scripts imported as modules.

    Each original is first compared with its replacement on a few numbers. Calling it again with the same options
    replaces what has been defined since; with others, it replaces anew.

    Args:
        rng: "host" keeps the host's random numbers; "philox" takes counters (`philox_samples`).
        seed: of "philox".
        fixes: names of `FIXES`.
        say: receives a line for each replacement; default: the log, at level INFO.

    Returns:
        the patch: `.messages` says what was replaced, `.uninstall()` or the end of a `with` block undoes it.

    Raises:
        CompatError: the host is not installed, or its function is not the one that is known here.
        ValueError: an option is wrong.
    """
    make_noise(rng, seed)
    patch = _installer.install(say, rng=rng, seed=seed, fixes=checked_fixes(fixes, FIXES))
    step = vars(sys.modules["__main__"]).get("flux_step")
    if getattr(step, "__module__", None) == "__main__":
        # Defined since an earlier call.
        patch.on_definition(step)
    if not patch.messages and say is None:
        _logger.warning(
            "nothing is replaced yet: the script has defined no flux_step so far. If it does so below, call install() "
            "below that, or run the script by python -m densegrpo_fast.launch --host dance_grpo"
        )
    return patch


def uninstall() -> None:
    """Put the host's own functions back; nothing happens if nothing is replaced."""
    _installer.uninstall()


def _targets(rng: str, seed: int | None, fixes: frozenset[str]) -> Sequence[Target]:
    def build(host: Any) -> tuple[Any, str]:
        constants = detect_constants(host)
        ours = step_function(rng=rng, seed=seed, constants=constants or "constants" in fixes, upcast="upcast" in fixes)
        words = [f"log_prob {'with' if constants else 'without'} constants", f"rng {rng}"]
        return ours, ", ".join(words + [f"fix {name}" for name in sorted(fixes)])

    modules = ["__main__", *(f"{PACKAGE}.train_grpo_{script}" for script in SCRIPTS)]
    return [Target(module, "flux_step", build, required=module != "__main__") for module in modules]


_installer = Installer(PACKAGE, _targets)


def detect_constants(host: Callable[..., Any]) -> bool:
    """Whether the log_prob of a host's `flux_step` has its constants.

    Raises:
        CompatError: its parameters or its results are none that are known.
    """
    check_parameters(host, "flux_step", [PARAMETERS])
    forms = {str(constants): step_function(constants=constants) for constants in (True, False)}
    return first_equal(host, "flux_step", forms, _calls()) == "True"


def _calls() -> list[Call]:
    ramp = torch.linspace(-1, 1, 12).reshape(2, 3, 2)
    grid = dance_sigmas(4)

    def call(index: int, given: Tensor | None, grpo: bool, sde_solver: bool) -> Callable[..., Any]:
        # One state of 16 bits, because products with it are rounded.
        velocity = ramp.cos().bfloat16() if index == 2 else ramp.cos()
        return lambda step: step(velocity, ramp, 0.3, grid, index, given, grpo, sde_solver)

    calls: list[Call] = []
    for solver in (True, False):
        for index in (0, 2):
            calls.append((f"scoring step {index}", call(index, 0.3 * ramp + 0.1, True, solver)))
            calls.append((f"sampling step {index}", call(index, None, True, solver)))
        calls.append(("without grpo", call(1, None, False, solver)))
    return calls
