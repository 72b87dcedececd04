"""DanceGRPO's `flux_step` (Xue et al. 2025, arXiv 2505.07818) on this package's ops.

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

from collections.abc import Callable

import torch
from torch import Tensor

from densegrpo_fast.compat._steps import (
    Step,
    equivalent_velocity,
    grid_step,
    is_narrower,
    mean_of,
    sample,
    score,
)
from densegrpo_fast.compat.flow_grpo.rng import make_noise
from densegrpo_fast.flow.dynamics import B

PARAMETERS = ("model_output", "latents", "eta", "sigmas", "index", "prev_sample", "grpo", "sde_solver")


def step_function(
    *, rng: str = "host", seed: int | None = None, constants: bool = True, upcast: bool = False
) -> Callable[..., tuple[Tensor, ...]]:
    """Make a `flux_step`.

    Args:
        rng: "host" draws what the host draws; "philox" draws from counters (`flow_grpo.rng.PhiloxNoise`).
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

    flux_step.__qualname__ = "flux_step"
    return flux_step


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
