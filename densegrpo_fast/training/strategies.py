"""The order in which an iteration's phases run, and where the update's gradients come from."""

from __future__ import annotations

import gc
import logging
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from densegrpo_fast.common.errors import SetupError
from densegrpo_fast.config import Config
from densegrpo_fast.credit.normalize import Advantages
from densegrpo_fast.objective.policy import Objective
from densegrpo_fast.rewards.base import Scores
from densegrpo_fast.sampling.dedup import CompletionDedup
from densegrpo_fast.sampling.rollout import Rollout
from densegrpo_fast.training.learner import UpdateSums
from densegrpo_fast.training.prompts import PromptBatch
from densegrpo_fast.training.rewarding import RewardBatch, check_missing
from densegrpo_fast.training.schedule import IterationSteps

if TYPE_CHECKING:
    from densegrpo_fast.training.trainer import Trainer

logger = logging.getLogger(__name__)


class Experience(NamedTuple):
    """What an iteration has sampled and learned from.

    Attributes:
        rollout: trajectories, or branches.
        rewards: of their completions.
        advantages: [P, G, T] of every step.
        update: metrics of the policy update.
    """

    rollout: Rollout
    rewards: RewardBatch
    advantages: Advantages
    update: dict[str, float]


class UpdateStrategy(Protocol):
    """Runs an iteration by the trainer's phases."""

    def run(self, trainer: Trainer, batch: PromptBatch, steps: IterationSteps, iteration: int) -> Experience:
        """Sample, reward and train."""


def strategy_of(config: Config) -> UpdateStrategy:
    """What `optimizer.update` names."""
    return Streamed() if config.optimizer.update == "streamed" else Replayed()


class Replayed:
    """One phase after the other, each for all steps; the update runs the forward of each trained step again.

    It serves every credit method and any number of updates per sample.
    """

    def run(self, trainer: Trainer, batch: PromptBatch, steps: IterationSteps, iteration: int) -> Experience:
        rollout = trainer.sample(batch, steps, iteration)
        completions = trainer.complete(rollout)
        rewards = trainer.score(rollout, completions, batch)
        if trainer.monitor.due(iteration):
            trainer.observe(rollout, rewards, batch, iteration)
        advantages = trainer.credit(rollout, rewards, iteration)
        update = trainer.update(rollout, advantages, steps)
        return Experience(rollout, rewards, advantages, update)


class Streamed:
    """A step is updated on the rollout's own graph as soon as the states around it are scored: the same gradient.

    No forward is repeated, as in LeanGRPO's *Retain*, here with a reward for every step. For a credit that is local to
    a step and one update per sample, whose ratio is 1. The graphs of two steps of the whole batch exist at once: where
    the memory runs out, this and all further iterations are replayed.

    Attributes:
        fits: whether the memory has not run out yet.
    """

    def __init__(self) -> None:
        self.fits = True

    def run(self, trainer: Trainer, batch: PromptBatch, steps: IterationSteps, iteration: int) -> Experience:
        if self.fits:
            try:
                return self._run(trainer, batch, steps, iteration)
            except torch.OutOfMemoryError:
                if trainer.world.size > 1:
                    raise SetupError(
                        "optimizer.update: the memory ran out with the graphs of two steps in it, in one of several "
                        "processes; set it to replayed"
                    ) from None
                self.fits = False
            # only here, where the error and the frames that it kept alive are gone
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning(
                "optimizer.update: the memory ran out with the graphs of two steps in it; from here on every trained "
                "step's forward is replayed, with the same gradient"
            )
        return Replayed().run(trainer, batch, steps, iteration)

    def _run(self, trainer: Trainer, batch: PromptBatch, steps: IterationSteps, iteration: int) -> Experience:
        learner, count = trainer.learner, steps.coefficients.num_steps
        objective = Objective(learner.options.objective, steps.coefficients, steps.trained, steps.weights)
        factors = (steps.draw_weights / len(steps.trained)).tolist()
        shared_with = CompletionDedup(steps.coefficients.noisy).shared_with
        sampler = trainer.sampler(batch, steps, iteration)
        groups = (-1, batch.group_size)
        final = torch.full((len(batch.prompts),), torch.nan).view(groups)
        by_state = final[..., None].repeat(1, 1, count + 1)
        scores: list[Scores] = []
        graphs: dict[int, list[Tensor]] = {}
        sums, advantages = UpdateSums(), None
        learner.begin_update()
        for state in range(count + 1):
            if state < count:
                with trainer.phase("rollout"):
                    trained = state in steps.trained
                    velocities = sampler.evaluate(state, learner.options.guidance_gradient if trained else None)
                    if trained:
                        graphs[state] = velocities
            if state in steps.completed:
                here = trainer.shared_and_completed(sampler.trajectory, (state,))
                rewards = trainer.score(here, trainer.complete(here), batch, complete=False)
                scores.append(rewards.scores)
                final = rewards.rewards
                assert rewards.lookahead_rewards is not None
                known = ~rewards.lookahead_rewards.isnan()
                by_state[known] = rewards.lookahead_rewards[known]
                advantages = trainer.credit(here, RewardBatch(final, by_state, None, rewards.scores), iteration)
                # a step without noise shares a completion with the next state
                for step in [step for step in graphs if shared_with[step + 1] <= state]:
                    with trainer.phase("update"):
                        values = trainer.own_advantages(here, advantages)
                        for rows, velocity in zip(sampler.parts, graphs.pop(step), strict=True):
                            weight = factors[step] / learner.micro_batches(sampler.parts)
                            sums.add(learner.step_gradient(here, values, objective, step, rows, weight, velocity))
                            del velocity
            if state < count:
                with trainer.phase("rollout"):
                    sampler.advance(state)
        rollout = trainer.shared_and_completed(sampler.trajectory, steps.completed)
        rewards = RewardBatch(final, by_state, None, Scores.joined(scores))
        check_missing(rewards.scores, trainer.rewards.max_missing)
        assert advantages is not None
        if trainer.monitor.due(iteration):
            trainer.observe(rollout, rewards, batch, iteration)
        with trainer.phase("update"):
            update = learner.metrics([learner.apply_update(sums)])
        return Experience(rollout, rewards, advantages, update)
