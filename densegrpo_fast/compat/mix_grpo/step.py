"""MixGRPO's steps (Li et al. 2025, arXiv 2507.21802) on this package's ops: the two SDEs of its sampling utilities.

    flow_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, generator, determistic)
        -> prev_sample, pred_original_sample, log_prob, mean, std of the injected noise
    dance_grpo_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver)
        -> prev_sample, pred_original_sample, log_prob     if grpo
        -> mean, pred_original_sample                      otherwise

Version V2 adds sde_type ("sde" or "cps") and noise_level at the end of both; noise_level None is eta for "sde" and 0.8
for "cps". Arguments are DanceGRPO's (`dance_grpo.step`), and "determistic" is the host's spelling of a step that goes
along Euler's line and is still scored under the SDE; its noise is drawn and thrown away. dance_grpo_step without
sde_solver takes its mean (Euler's for "sde") and draws nothing; its "sde" log_prob lacks its constants.
The std is a scalar tensor. log_prob is differentiable in `model_output`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from densegrpo_fast.compat.dance_grpo import as_rounded as dance_as_rounded
from densegrpo_fast.compat.hosts import signature_of
from densegrpo_fast.compat.rng import host_noise, make_noise
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
from densegrpo_fast.flow.dynamics import A, B, C

Version = Literal["V1", "V2"]
VERSIONS: tuple[str, ...] = get_args(Version)

CPS_NOISE_LEVEL = 0.8
"""Of "cps" where no noise_level is given; eta is not used there."""

StepFunction = Callable[..., tuple[Tensor, ...]]


def check_version(version: str) -> None:
    """Refuse an unknown version.

    Raises:
        ValueError: it is none of `VERSIONS`.
    """
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")


def flow_step_function(
    version: str = "V2", *, rng: str = "host", seed: int | None = None, upcast: bool = False
) -> StepFunction:
    """Make a `flow_grpo_step`.

    Args:
        version: one of `VERSIONS`.
        rng: "host" draws what the host draws, from its generators; "philox" draws from counters.
        seed: of "philox"; None takes `torch.initial_seed()`.
        upcast: compute with the velocity in the dtype of the state, without the host's rounding.

    Raises:
        ValueError: an unknown version or rng, or a seed that it does not take.
    """
    check_version(version)
    noise = make_noise(rng, seed)

    def flow_grpo_step(
        model_output: Tensor,
        latents: Tensor,
        eta: float,
        sigmas: Tensor,
        index: int,
        prev_sample: Tensor | None,
        generator: torch.Generator | None = None,
        determistic: bool = False,
        sde_type: str = "sde",
        noise_level: float | None = None,
    ) -> tuple[Tensor, ...]:
        if prev_sample is not None and generator is not None:
            raise ValueError("give prev_sample, to score a transition, or generator, to sample one; not both")
        if sde_type == "sde":
            step = grid_step(sigmas, index, "flow_sde", eta if noise_level is None else noise_level)
        else:
            step = _cps_step(sigmas, index, sde_type, noise_level)
        noise_like = model_output  # in its own dtype, as the host draws
        if upcast:
            model_output = model_output.to(latents.dtype)
        sigmas = _beside(sigmas, model_output, latents)
        velocity, data = _as_rounded(model_output, latents, sigmas, step, sde_type)
        mean = mean_of(latents, velocity, step.row)
        log_prob = None
        if determistic:
            if prev_sample is None and noise is None:
                host_noise(noise_like, generator)
            change = sigmas[index + 1] - sigmas[index] if is_narrower(model_output, latents) else step.dt
            prev_sample = latents + change * model_output
        elif prev_sample is None:
            prev_sample, log_prob = sample(
                latents, velocity, step, noise, lambda mean: host_noise(noise_like, generator), mean
            )
            prev_sample = prev_sample.to(data.dtype)
        if log_prob is None:
            log_prob = score(latents, velocity, prev_sample, step)
        std = step.table(model_output.device).rows[index, C].clone()
        return prev_sample, data, log_prob.to(data.dtype), mean.to(data.dtype), std

    return as_host(flow_grpo_step, "flow_grpo_step", signature_of("flow_grpo_step", version))


def dance_step_function(
    version: str = "V2",
    *,
    rng: str = "host",
    seed: int | None = None,
    upcast: bool = False,
    constants: bool = False,
) -> StepFunction:
    """Make a `dance_grpo_step`.

    Args:
        version, rng, seed, upcast: as in `flow_step_function`.
        constants: whether the log_prob of "sde" has -ln(std) - ln(2 pi)/2.

    Raises:
        ValueError: as there.
    """
    check_version(version)
    noise = make_noise(rng, seed)

    def dance_grpo_step(
        model_output: Tensor,
        latents: Tensor,
        eta: float,
        sigmas: Tensor,
        index: int,
        prev_sample: Tensor | None,
        grpo: bool,
        sde_solver: bool,
        sde_type: str = "sde",
        noise_level: float | None = None,
    ) -> tuple[Tensor, ...]:
        if sde_type == "sde":
            level = eta if noise_level is None else noise_level
            if version == "V1" and grpo and level == 0:
                raise ValueError("eta must be positive for a log-probability, got 0; the host's logarithm fails, too")
            step = grid_step(sigmas, index, "dance", level, euler_mean=not sde_solver, constants=constants)
        else:
            step = _cps_step(sigmas, index, sde_type, noise_level)
        if upcast:
            model_output = model_output.to(latents.dtype)
        sigmas = _beside(sigmas, model_output, latents)
        if sde_type == "sde":
            velocity, data = dance_as_rounded(model_output, latents, sigmas, step, with_score=sde_solver)
        else:
            velocity, data = _as_rounded(model_output, latents, sigmas, step, sde_type)
        if grpo and prev_sample is None and sde_solver:
            prev_sample, log_prob = sample(latents, velocity, step, noise, torch.randn_like)
            return prev_sample.to(data.dtype), data, log_prob.float()
        if not grpo or prev_sample is None:
            prev_sample = mean_of(latents, velocity, step.row).to(data.dtype)
        if not grpo:
            return prev_sample, data
        return prev_sample, data, score(latents, velocity, prev_sample, step).float()

    return as_host(dance_grpo_step, "dance_grpo_step", signature_of("dance_grpo_step", version))


def _cps_step(sigmas: Tensor, index: int, sde_type: str, noise_level: float | None) -> Step:
    if sde_type != "cps":
        raise ValueError(f"sde_type must be one of sde, cps, got {sde_type!r}")
    return grid_step(sigmas, index, "cps", CPS_NOISE_LEVEL if noise_level is None else noise_level)


def _beside(sigmas: Tensor, velocity: Tensor, latents: Tensor) -> Tensor:
    """The grid where the host has it: on the device of the state. It matters only where products are rounded."""
    return sigmas.to(latents.device) if is_narrower(velocity, latents) else sigmas


def _as_rounded(velocity: Tensor, latents: Tensor, sigmas: Tensor, step: Step, sde_type: str) -> tuple[Tensor, Tensor]:
    """Velocity and prediction of data as MixGRPO's products round them, but for those that are DanceGRPO's."""
    if not is_narrower(velocity, latents):
        return velocity, latents - velocity * step.sigma
    a, b, sigma = step.row[A], step.row[B], sigmas[step.index]
    noise = sigma * velocity
    if sde_type == "sde":
        factor = torch.full((), b / step.dt, dtype=sigmas.dtype, device=latents.device)
        products = [(1.0, velocity * factor * (sigmas[step.index + 1] - sigma))]
    else:
        data_weight = 1 - step.next_sigma
        products = [(-data_weight, noise), (a - data_weight, velocity * (1 - sigma))]
    return equivalent_velocity(products, latents, b), latents - noise
