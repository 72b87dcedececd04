"""The steps of an iteration: which are noisy, which are trained, their coefficients and their weights in the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.flow.dynamics import StepCoefficients, coefficients
from densegrpo_fast.flow.remainder import with_remainder
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.objective.policy import ObjectiveSettings
from densegrpo_fast.sampling.windows import remaining_steps


@dataclass(frozen=True)
class IterationSteps:
    """The steps of one iteration.

    Attributes:
        coefficients: of all steps, on the model's device; noise-free but for the noisy ones.
        trained: indices of the trained steps, increasing.
        weights: [T] float32, weight of every step's policy loss.
    """

    coefficients: StepCoefficients
    trained: list[int]
    weights: Tensor


def objective_settings(config: Config) -> ObjectiveSettings:
    """The settings of the loss."""
    return ObjectiveSettings(**config.objective.model_dump(exclude={"trained_steps", "guidance_gradient"}))


class Schedule:
    """The steps of a run's iterations: a function of the settings, the seed, the iteration and the noise levels.

    Args:
        config: the run's.
        model: whose sigmas the steps have.

    Raises:
        UsageError: a noise level does not fit the dynamics, whether or not its step is in a window.
    """

    def __init__(self, config: Config, model: FlowModel):
        self.config, self.model = config, model
        self.windows = config.schedule()
        self.coefficients()

    def at(self, iteration: int, levels: Sequence[float] | None = None) -> IterationSteps:
        """The steps of an iteration (from 0).

        Args:
            levels: noise level of every step, T numbers; None = the configuration's.
        """
        trained = self.trained_steps(iteration)
        table = self.coefficients(self.noisy_steps(iteration), levels)
        return IterationSteps(table, trained, self.step_weights(levels))

    def noisy_steps(self, iteration: int) -> Sequence[int]:
        """The steps in which an iteration injects noise: all of its window, or with branches those that it trains."""
        if self.config.sampler.branches is not None:
            return self.trained_steps(iteration)
        return self.windows.steps(iteration)

    def trained_steps(self, iteration: int) -> list[int]:
        """The steps that an iteration trains, increasing: of its window, if there are windows.

        Drawn afresh (from the seed) when a number is configured.
        """
        wanted = self.config.objective.trained_steps
        if isinstance(wanted, list):
            return list(wanted)
        candidates = self.candidates(iteration)
        if wanted == "all_but_last":
            return candidates
        generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + iteration) % 2**63)
        return sorted(candidates[i] for i in torch.randperm(len(candidates), generator=generator)[:wanted].tolist())

    def candidates(self, iteration: int) -> list[int]:
        """The steps that an iteration may train: its window, or all but the last step, which no window holds either."""
        wanted = self.config.objective.trained_steps
        if isinstance(wanted, list):
            return list(wanted)
        return list(self.windows.steps(iteration)[: self.config.window.size or self.config.sampler.num_steps - 1])

    def turns(self) -> list[Sequence[int]]:
        """The noisy steps that iterations take turns with: every window, or all steps of it that branches leave."""
        trained = self.config.objective.trained_steps
        if self.config.sampler.branches is None:
            return [*self.windows.reached()]
        return [trained] if isinstance(trained, list) else [*self.config.windows()]

    def coefficients(
        self, noisy: Sequence[int] | None = None, levels: Sequence[float] | None = None
    ) -> StepCoefficients:
        """The sampler's coefficients on the model's device, noise-free outside of the noisy steps.

        After a window there may be fewer steps than the sampler has (`window.remainder_share`).

        Args:
            noisy: increasing; None = `noisy_steps` of the first iteration.
            levels: as in `at`.
        """
        options = self.config.window
        noisy = self.noisy_steps(0) if noisy is None else noisy
        table, left = self._every_step(levels).only(noisy), self.config.sampler.num_steps - (noisy[-1] + 1)
        if options.size is not None:
            count = remaining_steps(left, options.remainder_share)
            table = with_remainder(table, noisy[-1] + 1, steps=count, second_order=options.remainder == "dpm_solver")
        return table.to(self.model.device)

    def step_weights(self, levels: Sequence[float] | None = None) -> Tensor:
        """Weight of every step's policy loss, over its mean on all steps that the run trains in some iteration.

        So the weight of a step does not depend on which others its iteration trains.

        Returns:
            [T] float32, on the model's device.
        """
        wanted = self.config.objective.trained_steps
        if isinstance(wanted, list):
            steps = wanted
        else:
            steps = sorted({step for window in self.config.windows() for step in window})
        table = self._every_step(levels).only(steps)
        return objective_settings(self.config).step_weights(table, steps).to(self.model.device)

    def _every_step(self, levels: Sequence[float] | None) -> StepCoefficients:
        """Coefficients with noise in every step."""
        options = self.config.sampler
        sigmas = self.model.sigmas(options.num_steps)
        try:
            return coefficients(sigmas, self.config.noise_levels if levels is None else levels, options.dynamics)
        except ValueError as error:
            raise UsageError(f"sampler: {error}") from None
