"""The steps of an iteration: which are noisy, which are trained, their coefficients and their weights in the loss."""

from __future__ import annotations

import logging
import random
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import isfinite

import torch
from torch import Tensor

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.flow.dynamics import StepCoefficients, coefficients
from densegrpo_fast.flow.remainder import with_remainder
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.objective.policy import Objective, ObjectiveSettings
from densegrpo_fast.sampling.dedup import CompletionDedup
from densegrpo_fast.sampling.step_draws import draw_steps, inclusion_probabilities
from densegrpo_fast.sampling.windows import remaining_steps

logger = logging.getLogger(__name__)

_LEAST_SIZE = 0.05
"""Share of the mean size that a step with a KL term is drawn by at least, since its policy loss may be far smaller than
its KL, or nothing: any probability above 0 leaves the average as it is, and this bounds the factors of the losses."""


@dataclass(frozen=True)
class IterationSteps:
    """The steps of one iteration.

    Attributes:
        coefficients: of all steps, on the model's device; noise-free but for the noisy ones.
        trained: indices of the trained steps, increasing.
        weights: [T] float32, weight of every step's policy loss.
        draw_weights: [T] float32, factor of every step's whole loss, see `Schedule.draw_weights`.
        completed: the states whose pictures are rewarded, increasing, each with a completion of its own; T is the
            trajectory's end.
    """

    coefficients: StepCoefficients
    trained: list[int]
    weights: Tensor
    draw_weights: Tensor
    completed: tuple[int, ...]

    @property
    def with_gain(self) -> list[int]:
        """The steps with both of their states among the completed ones; one without noise has the gain 0 then."""
        shared_with = CompletionDedup(self.coefficients.noisy).shared_with
        return [step for step in range(len(shared_with) - 1) if {*shared_with[step : step + 2]} <= {*self.completed}]


def objective_settings(config: Config) -> ObjectiveSettings:
    """The settings of the loss."""
    further = {"trained_steps", "step_sampling", "guidance_gradient"}
    return ObjectiveSettings(**config.objective.model_dump(exclude=further))


class Schedule:
    """The steps of a run's iterations: a function of the settings, the seed, the iteration and the noise levels.

    Args:
        config: the run's.
        model: whose sigmas the steps have.

    Raises:
        UsageError: a noise level does not fit the dynamics, whether or not its step is in a window; or step weights
            leave too few steps to draw, or nothing to train in an iteration.
        PluginError: step weights of one's own failed.
    """

    def __init__(self, config: Config, model: FlowModel):
        self.config, self.model = config, model
        self.windows = config.schedule()
        self._known: dict[tuple[float, ...], list[Fraction]] = {}
        self.coefficients()
        self._check_step_weights()
        self.draw_weights(0)

    def at(self, iteration: int, levels: Sequence[float] | None = None) -> IterationSteps:
        """The steps of an iteration (from 0).

        Args:
            levels: noise level of every step, T numbers; None = the configuration's.
        """
        trained = self.trained_steps(iteration, levels)
        table = self.coefficients(self.noisy_steps(iteration, levels), levels)
        draw_weights, completed = self.draw_weights(iteration, levels), self.completed_states(table.noisy, trained)
        return IterationSteps(table, trained, self.step_weights(levels), draw_weights, completed)

    def noisy_steps(self, iteration: int, levels: Sequence[float] | None = None) -> Sequence[int]:
        """The steps in which an iteration injects noise: all of its window, or with branches those that it trains."""
        if self.config.sampler.branches is not None:
            return self.trained_steps(iteration, levels)
        return self.windows.steps(iteration)

    def trained_steps(self, iteration: int, levels: Sequence[float] | None = None) -> list[int]:
        """The steps that an iteration trains, increasing: of its window, if there are windows.

        Drawn afresh (from the seed) when a number is configured.

        Args:
            levels: as in `at`.
        """
        wanted, candidates = self.config.objective.trained_steps, self.candidates(iteration)
        if not isinstance(wanted, int):
            return candidates
        if self.config.objective.step_sampling == "importance":
            # a text seeds Python's generator by its SHA-512, the same in every version and process
            start = random.Random(f"steps {self.config.seed} {iteration}").random()
            drawn = draw_steps(self._probabilities(candidates, wanted, levels), start)
        else:
            generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + iteration) % 2**63)
            drawn = sorted(torch.randperm(len(candidates), generator=generator)[:wanted].tolist())
        return [candidates[index] for index in drawn]

    def draw_weights(self, iteration: int, levels: Sequence[float] | None = None) -> Tensor:
        """Factors [T] float32 with which the mean of the drawn steps' losses is, on average over the draws, the mean
        over all that could be drawn; on the CPU, 1 where all steps are trained, or drawn alike."""
        wanted, candidates = self.config.objective.trained_steps, self.candidates(iteration)
        weights = torch.ones(self.config.sampler.num_steps)
        if isinstance(wanted, int) and self.config.objective.step_sampling == "importance":
            for step, probability in zip(candidates, self._probabilities(candidates, wanted, levels), strict=True):
                if probability:
                    weights[step] = float(wanted / (len(candidates) * probability))
        return weights

    def _probabilities(self, candidates: list[int], count: int, levels: Sequence[float] | None) -> list[Fraction]:
        """Of each candidate, that it is drawn: in proportion to the size that its gradient is expected to have."""
        key = (*candidates, *(levels or ()))
        if key not in self._known:
            table = self._every_step(levels)
            weights = self.step_weights(levels).to(table.table.device)
            noisy = [step for step in candidates if table.noisy[step]]
            objective = Objective(objective_settings(self.config), table, noisy, weights)
            sizes = [objective.gradient_size(step) if step in noisy else 0.0 for step in candidates]
            if self.config.objective.kl_coef:
                least = _LEAST_SIZE * sum(sizes) / max(len(noisy), 1)
                sizes = [
                    max(size, least) if step in noisy else size for step, size in zip(candidates, sizes, strict=True)
                ]
            if not all(map(isfinite, sizes)) or sum(size > 0 for size in sizes) < count:
                raise UsageError(
                    f"objective.step_weight: {self.config.objective.step_weight} gives the gradients of the steps "
                    f"{candidates} the sizes {sizes}; objective.step_sampling importance draws {count} of them, so as "
                    "many must be finite and above 0"
                )
            self._known[key] = inclusion_probabilities(sizes, count)
        return self._known[key]

    def _check_step_weights(self) -> None:
        """Refuse weights with which an iteration would train nothing; say which noisy steps weigh nothing."""
        objective, weights = self.config.objective, self.step_weights().tolist()
        name, wanted, idle = objective.step_weight, objective.trained_steps, set[int]()
        for candidates in [wanted] if isinstance(wanted, list) else self.config.windows():
            noisy = self.config.noisy_among(candidates)
            useful = [step for step in noisy if weights[step]]
            idle |= {*noisy} - {*useful}
            drawn = wanted if isinstance(wanted, int) and objective.step_sampling == "uniform" else len(candidates)
            if drawn <= len(candidates) - len(useful):
                raise UsageError(
                    f"objective.step_weight: {name} gives the steps {sorted({*noisy} - {*useful})} the weight 0, so an "
                    f"iteration of objective.trained_steps {wanted} could train nothing"
                )
        if idle:
            logger.warning(
                "objective.step_weight: %s gives the steps %s the weight 0: they are sampled, but their rewards train "
                "nothing",
                name,
                sorted(idle),
            )

    def completed_states(self, noisy: tuple[bool, ...], trained: Sequence[int]) -> tuple[int, ...]:
        """The states whose pictures an iteration's credit needs, the image always among those of a trajectory.

        A credit that is local to a step needs those at both ends of each trained step, another one all.

        Args:
            noisy: [T] whether each step injects noise.
            trained: steps; one without noise has nothing to be credited with.
        """
        if self.config.uses_branches:
            return tuple(step + 1 for step, injects in enumerate(noisy) if injects)
        ends = {state for step in trained if noisy[step] for state in (step, step + 1)}
        shared_with = CompletionDedup(noisy).shared_with
        if not self.config.uses_lookahead:
            ends = set()
        elif self.config.credit_scope == "whole":
            ends = {*range(len(noisy))}
        return tuple(sorted({shared_with[state] for state in (*ends, len(noisy))}))

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
