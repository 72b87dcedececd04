"""MixGRPO's `dpm_step`: DPM-Solver++ on the flow's grid, of MixGRPO-Flash, with a log_prob.

    dpm_step(args, model_output, sample, step_index, timesteps, sigmas, dpm_state, generator, variance_noise,
             sde_solver)
        -> prev_sample, pred_original_sample, log_prob

    args            dpm_algorithm_type "dpmsolver++", dpm_solver_order 1 or 2, dpm_solver_type "midpoint" or "heun"
    timesteps       only its length T is used: the last step has order 1
    dpm_state       `DPMState`, the memory; None takes a step of order 1 and remembers nothing
    variance_noise  noise of an SDE step, instead of the generator's
    sde_solver      a step of the SDE; False: of the ODE

The host scores every step, also one of the ODE, under the SDE's mean and noise. The step onto sigma 0 has no noise and
log_prob NaN. The mathematics is `flow.dpm_solver`.

Order 3 is not offered, nor is "dpmsolver", which in the host takes a prediction of data for one of noise; `install`
leaves such calls to the host's own function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat.hosts import signature_of
from densegrpo_fast.compat.rng import host_noise, make_noise
from densegrpo_fast.compat.steps import Row, Step, as_host, is_narrower, score, unit_grid
from densegrpo_fast.compat.steps import sample as draw_sample
from densegrpo_fast.flow.dpm_solver import ORDERS, SolverStep, combine, solver_step
from densegrpo_fast.flow.dynamics import LOG_PROB_CONST, LOG_PROB_SCALE


class DPMState:
    """The host's memory of predictions of data, oldest first.

    Attributes:
        order: how many are kept.
        model_outputs: the predictions; None where there is none yet.
        lower_order_nums: steps taken so far, at most `order`.
    """

    def __init__(self, order: int) -> None:
        self.order = order
        self.model_outputs: list[Tensor | None] = [None] * order
        self.lower_order_nums = 0

    def update(self, model_output: Tensor) -> None:
        """Remember a prediction, and forget the oldest."""
        self.model_outputs = [*self.model_outputs[1:], model_output]

    def update_lower_order(self) -> None:
        """Count a step."""
        self.lower_order_nums = min(self.lower_order_nums + 1, self.order)


def dpm_step_function(
    *,
    rng: str = "host",
    seed: int | None = None,
    upcast: bool = False,
    host: Callable[..., tuple[Tensor, ...]] | None = None,
) -> Callable[..., tuple[Tensor, ...]]:
    """Make a `dpm_step`.

    Args:
        rng: "host" draws what the host draws, from its generators; "philox" draws from counters.
        seed: of "philox"; None takes `torch.initial_seed()`.
        upcast: compute with the velocity in the dtype of the state, without the host's rounding.
        host: the host's own function, for solvers that are not offered here.

    Raises:
        ValueError: an unknown rng, or a seed that it does not take.
    """
    noise = make_noise(rng, seed)

    def dpm_step(
        args: Any,
        model_output: Tensor,
        sample: Tensor,
        step_index: int,
        timesteps: Any,
        sigmas: Tensor,
        dpm_state: Any = None,
        generator: torch.Generator | None = None,
        variance_noise: Tensor | None = None,
        sde_solver: bool = False,
    ) -> tuple[Tensor, ...]:
        if args.dpm_algorithm_type != "dpmsolver++" or args.dpm_solver_order not in ORDERS:
            if host is None:
                raise ValueError(
                    "dpm_step takes dpm_algorithm_type dpmsolver++ with dpm_solver_order 1 or 2, got "
                    f"{args.dpm_algorithm_type!r} with {args.dpm_solver_order!r}"
                )
            return host(
                args,
                model_output,
                sample,
                step_index,
                timesteps,
                sigmas,
                dpm_state,
                generator,
                variance_noise,
                sde_solver,
            )
        if upcast:
            model_output = model_output.to(sample.dtype)
        grid = unit_grid(sigmas)
        sigma = grid[step_index]
        rounds = is_narrower(model_output, sample)
        noise_part = sigmas[step_index] * model_output if rounds else model_output * sigma
        data = sample - noise_part
        if dpm_state is not None:
            dpm_state.update(data)
        first = dpm_state is None or args.dpm_solver_order == 1 or dpm_state.lower_order_nums < 1
        order = 1 if first or step_index == len(timesteps) - 1 else 2
        predictions = [data] if order == 1 else [data, dpm_state.model_outputs[-2]]

        step, weights = _scored_step(grid, step_index, order, args.dpm_solver_type)
        latents = sample.float()
        velocity = noise_part.float() / sigma if rounds else model_output.float()
        # The mean is affine in state and velocity, but for the part of the earlier prediction.
        earlier = 0 if order == 1 else weights.data_weights[1] * predictions[1].float()
        if sde_solver:
            philox = noise if variance_noise is None else None

            def draw(mean: Tensor) -> Tensor:
                return host_noise(mean, generator) if variance_noise is None else variance_noise.to(mean)

            shifted, log_prob = draw_sample(latents, velocity, step, philox, draw)
            next_latents = shifted + earlier
        else:
            ode = solver_step(grid, step_index, order=order, solver_type=args.dpm_solver_type)
            next_latents = combine(latents, predictions, ode)
            log_prob = score(latents, velocity, next_latents - earlier, step)
        if dpm_state is not None:
            dpm_state.update_lower_order()
        return next_latents.to(data.dtype), data, log_prob

    return as_host(dpm_step, "dpm_step", signature_of("dpm_step"))


@lru_cache(maxsize=256)
def _scored_step(grid: tuple[float, ...], index: int, order: int, solver_type: str) -> tuple[Step, SolverStep]:
    """The SDE step, under which the host scores: as a row of `dynamics`, and its weights."""
    weights = solver_step(grid, index, order=order, solver_type=solver_type, stochastic=True)
    row = weights.row()
    if weights.std == 0:
        row[LOG_PROB_SCALE] = row[LOG_PROB_CONST] = math.nan
    nowhere: Row = (0.0,) * len(row)
    return Step((*[nowhere] * index, tuple(row)), index, grid[index], grid[index + 1]), weights
