"""DanceGRPO (Xue et al. 2025, arXiv 2505.07818): `flux_step` of its training scripts, on this package's ops.

    python -m densegrpo_fast.launch --host dance_grpo fastvideo/train_grpo_flux.py ...

DanceGRPO defines the step in each script, so the launcher replaces it the moment it is defined. Without the launcher,
call `install()` below the definition, for example as the first line of the script's `main`.

    flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver)
        -> prev_sample, pred_original_sample, log_prob     if grpo
        -> mean of the next state, pred_original_sample    otherwise

    model_output    velocity, noise minus data, [B, ...]
    latents         state, [B, ...]; the scripts lift it to float32
    eta             standard deviation per square root of sigma, the same at every step
    sigmas          grid, [T+1]
    index           step, in [0, T)
    prev_sample     the next state, to be scored; None draws one from torch's global generator
    grpo            whether to draw and to score
    sde_solver      mean of the SDE; False: Euler's, with the same noise around it
    log_prob        [B] float32, mean over elements; without its constants in the earlier scripts

`pred_original_sample` is latents - sigma * model_output. With a velocity of 16 bits, as autocast gives it, every
product of sigma and velocity is rounded to 16 bits, as in the host. log_prob is differentiable in `model_output`.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat.compare import first_equal, known_version
from densegrpo_fast.compat.hosts import HOSTS, signature_of
from densegrpo_fast.compat.patch import Build, CompatError, Patch, install_host, uninstall_host
from densegrpo_fast.compat.probes import flux_calls
from densegrpo_fast.compat.rng import make_noise, philox_samples
from densegrpo_fast.compat.steps import (
    Step,
    as_host,
    equivalent_velocity,
    grid_step,
    is_narrower,
    mean_of,
    sample,
    score,
)
from densegrpo_fast.flow.dynamics import B

__all__ = ["FIXES", "CompatError", "flux_step", "install", "philox_samples", "step_function", "uninstall"]

_logger = logging.getLogger(__name__)

FIXES = HOSTS["dance_grpo"].fixes
"""Flaws of the host that `install(fixes=...)` takes away, one by one; all are kept unless named."""


def step_function(
    *, rng: str = "host", seed: int | None = None, constants: bool = True, upcast: bool = False
) -> Callable[..., tuple[Tensor, ...]]:
    """Make a `flux_step`.

    Args:
        rng: "host" draws what the host draws; "philox" draws from counters (`rng.PhiloxNoise`).
        seed: of "philox"; None takes `torch.initial_seed()`.
        constants: whether log_prob has -ln(std) - ln(2 pi)/2.
        upcast: compute with the velocity in the dtype of the state, without the host's rounding.

    Raises:
        ValueError: an unknown rng, or a seed that it does not take.
    """
    noise = make_noise(rng, seed)

    def flux_step(
        model_output: Tensor,
        latents: Tensor,
        eta: float,
        sigmas: Tensor,
        index: int,
        prev_sample: Tensor | None,
        grpo: bool,
        sde_solver: bool,
    ) -> tuple[Tensor, ...]:
        if grpo and eta == 0:
            raise ValueError("eta must be positive for a log-probability, got 0; the host's logarithm of 0 fails, too")
        step = grid_step(sigmas, index, "dance", eta, euler_mean=not sde_solver, constants=constants)
        if upcast:
            model_output = model_output.to(latents.dtype)
        velocity, data = as_rounded(model_output, latents, sigmas, step, with_score=sde_solver)
        if not grpo:
            return mean_of(latents, velocity, step.row).to(data.dtype), data
        if prev_sample is None:
            next_latents, log_prob = sample(latents, velocity, step, noise, torch.randn_like)
            return next_latents.to(data.dtype), data, log_prob.float()
        return prev_sample, data, score(latents, velocity, prev_sample, step).float()

    return as_host(flux_step, "flux_step", signature_of("flux_step"))


def as_rounded(
    velocity: Tensor, latents: Tensor, sigmas: Tensor, step: Step, *, with_score: bool
) -> tuple[Tensor, Tensor]:
    """Velocity and prediction of data as DanceGRPO's products of sigma, or its difference, and velocity round them."""
    if not is_narrower(velocity, latents):
        return velocity, latents - velocity * step.sigma
    b, sigma = step.row[B], sigmas[step.index]
    line, noise = (sigmas[step.index + 1] - sigma) * velocity, sigma * velocity
    products = [(1.0, line)]
    if with_score:
        products.append(((b - step.dt) / step.sigma, noise))
    return equivalent_velocity(products, latents, b), latents - noise


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
    patch = install_host("dance_grpo", _replacements, say, rng=rng, seed=seed, fixes=fixes)
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
    uninstall_host("dance_grpo")


def _replacements(rng: str, seed: int | None, fixes: frozenset[str]) -> Mapping[str, Build]:
    def build(host: Any) -> tuple[Any, str]:
        known_version(host, "flux_step")
        forms = {"log_prob with constants": True, "log_prob without constants": False}
        candidates = {words: step_function(constants=constants) for words, constants in forms.items()}
        words = first_equal(host, "flux_step", candidates, flux_calls())
        constants = forms[words] or "constants" in fixes
        ours = step_function(rng=rng, seed=seed, constants=constants, upcast="upcast" in fixes)
        return ours, ", ".join([words, f"rng {rng}", *(f"fix {name}" for name in sorted(fixes))])

    return {"flux_step": build}
