"""The iterations that are compared: ours with sparse and dense rewards, and the baseline's, under the same settings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from benches.common.stock import Stock
from benches.iteration.protocol import SPARSE_RETAINED, STOCK, STOCK_DENSE
from densegrpo_fast.config import Config
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.objective.policy import Objective
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling.cost import (
    Evaluations,
    IterationCost,
    branched_iteration,
    dense_iteration,
    sparse_iteration,
)
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.plan import make_plan
from densegrpo_fast.training.learner import UpdateSums
from densegrpo_fast.training.meter import PhaseTimer, underlying
from densegrpo_fast.training.models import synchronizer
from densegrpo_fast.training.prompts import PromptBatch, TrainingPrompts
from densegrpo_fast.training.rewarding import build_reward
from densegrpo_fast.training.schedule import IterationSteps, Schedule
from densegrpo_fast.training.strategies import Experience
from densegrpo_fast.training.trainer import Trainer

_DRAWS = 200


class Variant:
    """One way to run an iteration; calling it runs the next one.

    What is timed of ours are the phases of `Trainer.step`, without its record, as the baseline writes none either.

    Attributes:
        config: its resolved configuration.
        steps: of every iteration; where they are drawn, those of the draw whose forwards are nearest to the mean.
        trainer: of ours; None of the baseline's.
        cost: what it asks of the model per trajectory, by the closed forms.
        phases: seconds by phase of every call so far.
        models: the policy, and what its lookahead evaluates instead.
    """

    def __init__(self, name: str, config: Config, model: DiffusersModel, reward: RewardMixture):
        self.name, self.config = name, config
        self.steps = _typical(name, config, Schedule(config, model))
        self.cost = _cost(name, config, self.steps)
        self.phases: list[dict[str, float]] = []
        self.models: tuple[DiffusersModel, ...] = (model,)
        self.trainer: Trainer | None = None
        self._iterations, self._prompts = 0, TrainingPrompts.of(config)
        if name in STOCK:
            self._timer = PhaseTimer(synchronizer(model.device))
            self._step = _stock(name, config, model, reward, self._timer)
        else:
            strategy = Retained() if name == SPARSE_RETAINED else None
            self.trainer = trainer = Trainer(config, model=model, reward=reward, strategy=strategy)
            self._timer = trainer.timer
            self._step = lambda batch, iteration: trainer.strategy.run(trainer, batch, self.steps, iteration)
            self.models += copies(trainer.lookahead, model)

    @property
    def rows(self) -> int:
        """Trajectories per iteration, B."""
        return self.config.data.num_prompts * self.config.sampler.group_size

    def __call__(self) -> None:
        batch = self._prompts.batch(self._iterations)
        self._timer.reset()
        self._step(batch, self._iterations)
        self.phases.append(self._timer.seconds())
        self._iterations += 1


class Retained:
    """Every trained step keeps its graph until the picture is scored: a sparse iteration that repeats no forward."""

    def run(self, trainer: Trainer, batch: PromptBatch, steps: IterationSteps, iteration: int) -> Experience:
        learner = trainer.learner
        objective = Objective(learner.options.objective, steps.coefficients, steps.trained, steps.weights)
        sampler = trainer.sampler(batch, steps, iteration)
        graphs = {}
        with trainer.phase("rollout"):
            for step in range(sampler.steps):
                velocities = sampler.evaluate(
                    step, learner.options.guidance_gradient if step in steps.trained else None
                )
                graphs |= {step: velocities} if step in steps.trained else {}
                sampler.advance(step)
        rollout = trainer.shared_and_completed(sampler.trajectory, steps.completed)
        rewards = trainer.score(rollout, trainer.complete(rollout), batch)
        advantages = trainer.credit(rollout, rewards)
        with trainer.phase("update"):
            learner.begin_update()
            sums, values = UpdateSums(), advantages.values.flatten(0, 1).to(trainer.model.device)
            weight = 1 / (len(graphs) * len(sampler.parts))
            for step in list(graphs):
                for rows, velocity in zip(sampler.parts, graphs.pop(step), strict=True):
                    sums.add(learner.step_gradient(rollout, values, objective, step, rows, weight, velocity))
            update = learner.metrics([learner.apply_update(sums)])
        return Experience(rollout, rewards, advantages, update)


def copies(lookahead: Lookahead | None, model: DiffusersModel) -> tuple[DiffusersModel, ...]:
    """What a lookahead evaluates instead of the model, if it does."""
    own = None if lookahead is None else underlying(lookahead.model)
    return (own,) if isinstance(own, DiffusersModel) and own is not model else ()


_Step = Callable[[PromptBatch, int], object]


def _stock(name: str, config: Config, model: DiffusersModel, reward: RewardMixture, timer: PhaseTimer) -> _Step:
    stock = Stock(model, config, reward)

    def step(batch: PromptBatch, iteration: int) -> None:
        stock.iteration(batch.prompts, batch.metadata, timer, dense=name == STOCK_DENSE)

    return step


def _typical(name: str, config: Config, schedule: Schedule) -> IterationSteps:
    if not isinstance(config.objective.trained_steps, int):
        return schedule.at(0)
    draws = [schedule.at(iteration) for iteration in range(_DRAWS)]
    forwards = [_cost(name, config, steps).forwards for steps in draws]
    return draws[min(range(_DRAWS), key=lambda draw: abs(forwards[draw] - fmean(forwards)))]


def _cost(name: str, config: Config, iteration: IterationSteps) -> IterationCost:
    options: dict[str, Any] = {
        "trained_steps": len(iteration.trained),
        "guided": config.sampler.guidance_scale != 1.0,
        "kl": config.objective.kl_coef > 0,
        "guidance_gradient": config.objective.guidance_gradient,
    }
    steps, ahead = config.sampler.num_steps, config.lookahead
    streamed = name == SPARSE_RETAINED or config.optimizer.update == "streamed"
    if name in STOCK:
        return stock_cost(steps, dense=name == STOCK_DENSE, **options)
    if config.credit.method == "sparse":
        return replace(sparse_iteration(steps, **options), streamed=streamed)
    plan = make_plan(ahead.plan, steps, ahead.nodes, ahead.n or 1, ahead.paths)
    if config.sampler.branches is not None:
        options |= {"guidance": ahead.guidance, "decoder": ahead.decoder, "noisy": iteration.coefficients.noisy}
        return branched_iteration(plan, branches=config.sampler.branches, **options)
    options |= {"guidance": ahead.guidance, "decoder": ahead.decoder, "completed": iteration.completed}
    return replace(dense_iteration(plan, **options), streamed=streamed)


def stock_cost(num_steps: int, *, dense: bool, guided: bool, **options: Any) -> IterationCost:
    """What an iteration of the baseline evaluates, decodes and scores per trajectory; `options` of `sparse_iteration`.

    Sparse it is that of `sparse_iteration`. Dense adds T + (T-1) + ... + 1 = T (T+1) / 2 evaluations, T decodes, and
    T + 1 rewards: one per completion and the final image's second.
    """
    cost = sparse_iteration(num_steps, guided=guided, **options)
    if not dense:
        return cost
    completions = Evaluations.of(num_steps * (num_steps + 1) // 2, guided)
    return replace(cost, lookahead=completions, full_decodes=num_steps + 1, rewards=num_steps + 2)


@dataclass
class Work:
    """Rows that went through each part of the model.

    Attributes:
        forwards: through the transformer.
        full_decodes, preview_decodes: through the decoders.
        rewards: images scored.
    """

    forwards: int = 0
    full_decodes: int = 0
    preview_decodes: int = 0
    rewards: int = 0

    def per_trajectory(self, rows: int) -> dict[str, float]:
        """The same for one of `rows` trajectories."""
        return {name: value / rows for name, value in asdict(self).items()}


class Tally:
    """A reward that only counts the pictures; it goes into a mixture with weight 0."""

    def __init__(self) -> None:
        self.images = 0

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        self.images += len(images)
        return torch.zeros(len(images))


def reward_with_tally(config: Config) -> tuple[RewardMixture, Tally]:
    """The rewards of a configuration, and a counter of the pictures that they score."""
    tally, reward = Tally(), build_reward(config.reward.terms, config.reward.options)
    return RewardMixture(reward.terms | {"tally": (tally, 0.0)}), tally


@contextmanager
def counted(models: Sequence[DiffusersModel], tally: Tally) -> Iterator[Work]:
    """Within the context, everything that goes through the parts of the models is counted; complete at its end.

    Args:
        models: which may share parts.
        tally: counts the pictures that are scored.
    """
    work, before = Work(), tally.images

    def count(field: str) -> Callable[..., None]:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            rows = kwargs["hidden_states"] if field == "forwards" else args[0]
            setattr(work, field, getattr(work, field) + len(rows))

        return hook

    parts: dict[torch.nn.Module, str] = {}
    for model in models:
        parts |= {model.network: "forwards", model.pipeline.vae.decoder: "full_decodes"}
        if model.preview_decoder is not None:
            parts[model.preview_decoder.decoder] = "preview_decodes"
    handles = [part.register_forward_pre_hook(count(name), with_kwargs=True) for part, name in parts.items()]
    try:
        yield work
    finally:
        for handle in handles:
            handle.remove()
        work.rewards = tally.images - before
