"""What an iteration of a configuration costs, in iterations with one reward per picture."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from torch import Tensor

from densegrpo_fast.config import Config
from densegrpo_fast.credit import registry
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.cost import (
    IterationCost,
    UnitFlops,
    branched_iteration,
    dense_iteration,
    mean_cost,
    sparse_iteration,
)
from densegrpo_fast.training.lookahead import build_plan
from densegrpo_fast.training.schedule import Schedule

DRAWS = 1000
"""Iterations over which draws of the trained steps, and windows that move, are averaged."""


class Draw(NamedTuple):
    """Steps that some iterations train.

    Attributes:
        steps: increasing.
        factors: [T] float32 of the steps' losses (`Schedule.draw_weights`).
        times: in how many of `DRAWS` iterations.
    """

    steps: tuple[int, ...]
    factors: Tensor
    times: int


@dataclass(frozen=True)
class Price:
    """An iteration's operations over those of one with one reward per picture.

    Attributes:
        over_replayed_sparse: that trains every step that may be trained, and repeats each one's forward (Flow-GRPO).
        over_streamed_sparse: likewise without a repeated forward.
        over_sparse_of_as_many_steps: replayed, with as many trained steps as this one.
    """

    over_replayed_sparse: float
    over_streamed_sparse: float
    over_sparse_of_as_many_steps: float


def draws(schedule: Schedule) -> list[Draw]:
    """Every set of steps that the iterations of a fixed window train."""
    factors = schedule.draw_weights(0)
    if not isinstance(schedule.config.objective.trained_steps, int):
        return [Draw(tuple(schedule.trained_steps(0)), factors, DRAWS)]
    counted = Counter(tuple(schedule.trained_steps(iteration)) for iteration in range(DRAWS))
    return [Draw(steps, factors, times) for steps, times in counted.items()]


def step_cost(
    config: Config, schedule: Schedule, noisy: tuple[bool, ...], trained: Sequence[int], *, guided: bool
) -> IterationCost:
    """A sample's share of an iteration with noise in some steps, of which some are trained.

    Args:
        config: with a plan that is chosen.
        schedule: of the configuration.
        noisy: [T] whether each step injects noise.
        trained: steps.
        guided: whether guidance takes a second forward.
    """
    ahead, method, steps = config.lookahead, registry.find(config.credit.method), len(noisy)
    kept: dict[str, Any] = {"trained_steps": len(trained), "guided": guided, "kl": config.objective.kl_coef > 0}
    kept["guidance_gradient"] = config.objective.guidance_gradient
    completing: dict[str, Any] = {"guidance": ahead.guidance, "decoder": ahead.decoder, "noisy": noisy}
    group, branches = config.sampler.group_size, config.sampler.branches
    if not (method.uses_lookahead or method.uses_branches):
        cost = sparse_iteration(steps, **kept)
    elif branches is None:
        own = (ahead.guidance == "reuse" and guided) or ahead.cache is not None
        completed = schedule.completed_states(noisy, trained)
        shared = group if config.sampler.shared_noise and not own else 1
        plan = build_plan(config, steps)
        cost = dense_iteration(plan, shared=shared, completed=completed, **completing, **kept)
    else:
        ways = [build_plan(config, steps)]
        if "granularities" in method.options:
            ways = [plans.strided(steps, stride) for stride in config.credit.granularities]
        cost = branched_iteration(ways[0], branches=branches, others=ways[1:], **completing, **kept)
    return replace(cost, streamed=config.optimizer.update == "streamed")


def iteration_cost(config: Config, schedule: Schedule, *, guided: bool, drawn: Sequence[Draw] = ()) -> IterationCost:
    """A sample's share of an iteration, on average over draws of the steps and over windows that move.

    Args:
        config, schedule, guided: as for `step_cost`.
        drawn: of `draws`, if they are known already.
    """
    counted: Counter[tuple[tuple[int, ...], tuple[int, ...]]] = Counter()
    if drawn:
        for draw in drawn:
            noisy = draw.steps if config.sampler.branches is not None else tuple(schedule.noisy_steps(0))
            counted[noisy, draw.steps] += draw.times
    else:
        for iteration in range(DRAWS):
            counted[tuple(schedule.noisy_steps(iteration)), tuple(schedule.trained_steps(iteration))] += 1
    costs = []
    for (noisy, trained), times in counted.items():
        table = schedule.coefficients(noisy).noisy
        costs += [step_cost(config, schedule, table, trained, guided=guided)] * times
    return mean_cost(costs)


def price(cost: IterationCost, config: Config, unit: UnitFlops, ahead: float, *, guided: bool) -> Price:
    """What an iteration costs, on average, over sparse ones.

    Args:
        cost: of `iteration_cost`.
        config: whose steps, guidance and KL the sparse iterations have.
        unit: operations of each part of the model.
        ahead: of one network forward of the lookahead.
        guided: as for `step_cost`.
    """
    trained = config.objective.trained_steps
    every = len(trained) if isinstance(trained, list) else config.window.size or config.sampler.num_steps - 1
    few = min(trained, every) if isinstance(trained, int) else every

    def sparse(count: int, streamed: bool = False) -> float:
        whole = sparse_iteration(
            config.sampler.num_steps,
            trained_steps=count,
            guided=guided,
            kl=config.objective.kl_coef > 0,
            guidance_gradient=config.objective.guidance_gradient,
        )
        return replace(whole, streamed=streamed).flops(unit)

    own = cost.flops(unit, ahead)
    return Price(own / sparse(every), own / sparse(every, streamed=True), own / sparse(few))
