"""The steps of a run: which are noisy, which are trained, and their coefficients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.flow.dynamics import StepCoefficients, coefficients
from densegrpo_fast.flow.remainder import with_remainder
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.sampling.windows import Windows, remaining_steps
from densegrpo_fast.training.builders.settings import learner_options


def build_windows(config: Config) -> Windows:
    """Which steps of each iteration are stochastic."""
    return config.schedule()


def build_coefficients(
    config: Config, model: FlowModel, window: Sequence[int] | None = None, levels: Sequence[float] | None = None
) -> StepCoefficients:
    """The sampler's step coefficients on the model's device, noise-free outside of a window.

    After a window there may be fewer steps than the sampler has (`window.remainder_share`).

    Args:
        window: stochastic steps, increasing; None = the `noisy_steps` of the first iteration.
        levels: noise level of every step, T numbers; None = the configuration's.

    Raises:
        UsageError: a noise level does not fit the dynamics, whether or not it is in the window.
    """
    options, table = config.sampler, _every_step(config, model, levels)
    noisy = noisy_steps(config, 0) if window is None else window
    table, left = table.only(noisy), options.num_steps - (noisy[-1] + 1)
    if config.window.size is not None:
        count = remaining_steps(left, config.window.remainder_share)
        table = with_remainder(table, noisy[-1] + 1, steps=count, second_order=config.window.remainder == "dpm_solver")
    return table.to(model.device)


def build_step_weights(config: Config, model: FlowModel, levels: Sequence[float] | None = None) -> Tensor:
    """Weight of every step's policy loss, over its mean on all steps that the run trains in one iteration or another.

    So the weight of a step does not depend on which others its iteration trains.

    Args:
        levels: as in `build_coefficients`.

    Returns:
        [T] float32, on the model's device.

    Raises:
        UserError: as `build_coefficients`.
    """
    wanted = config.objective.trained_steps
    steps = wanted if isinstance(wanted, list) else sorted({step for window in config.windows() for step in window})
    table = _every_step(config, model, levels).only(steps)
    return learner_options(config).objective.step_weights(table, steps).to(model.device)


def _every_step(config: Config, model: FlowModel, levels: Sequence[float] | None) -> StepCoefficients:
    """Coefficients of a schedule without windows."""
    options = config.sampler
    try:
        return coefficients(
            model.sigmas(options.num_steps), config.noise_levels if levels is None else levels, options.dynamics
        )
    except ValueError as error:
        raise UsageError(f"sampler: {error}") from None


def noisy_steps(config: Config, iteration: int) -> Sequence[int]:
    """The steps in which an iteration injects noise: all of its window, or with branches those that it trains."""
    if config.sampler.branches is not None:
        return trained_steps(config, iteration)
    return build_windows(config).steps(iteration)


def trained_steps(config: Config, iteration: int) -> list[int]:
    """The steps that an iteration trains, increasing: of its window, if there are windows.

    Drawn afresh (from the seed) when a number is configured.
    """
    wanted = config.objective.trained_steps
    if isinstance(wanted, list):
        return list(wanted)
    # without windows all but the last step, which no window holds either
    candidates = build_windows(config).steps(iteration)[: config.window.size or config.sampler.num_steps - 1]
    if wanted == "all_but_last":
        return list(candidates)
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + iteration) % 2**63)
    return sorted(candidates[i] for i in torch.randperm(len(candidates), generator=generator)[:wanted].tolist())
