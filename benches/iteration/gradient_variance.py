"""How much a gradient varies if only some steps are trained, and what an iteration then costs.

    python -m benches.iteration.gradient_variance                  writes results/gradient_variance.json

Measured is DenseGRPO by exact completions under the paper's settings (`embedded_paper`, gradient through both halves of
guidance): the policy gradient of every trained step of groups of samples, each with a prompt of its own. From the inner
products of a group's nine gradients follows, for every way to draw steps, the variance of the mean gradient, draw
included, over that of all steps; its price is counted by the closed forms of `densegrpo_fast/sampling/cost.py`.

An estimator of a product of price and variance below 1 reaches a given precision of the gradient with fewer operations
than all steps do. All of these have the same mean.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benches.common.operations import IterationOperations, draws
from benches.common.record import RESULTS, load_average, portable, provenance, write_json
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import load_config
from densegrpo_fast.doctor.loop import randomize_lora_
from densegrpo_fast.fidelity.price import DRAWS
from densegrpo_fast.fidelity.variance import step_gradients
from densegrpo_fast.models.flops import ModelFlops
from densegrpo_fast.objective.policy import Objective
from densegrpo_fast.sampling.cost import IterationCost, dense_iteration, sparse_iteration
from densegrpo_fast.sampling.plan import exact
from densegrpo_fast.training.trainer import Trainer

COUNTS = (2, 3, 4, 5)
"""Of nine, how many steps are drawn."""
WEIGHTS = ("none", "noise_aware", "flash")
"""`objective.step_weight`."""


def settings(weight: str, **further: Any) -> Config:
    """The paper's settings for groups of one prompt."""
    own = {
        "data.num_prompts": 1,
        "sampler.group_size": 16,
        "sampler.micro_batch": 16,
        "objective.step_weight": weight,
        "objective.kl_coef": 0.0,
        "lookahead.monitor_every": 0,
    }
    return load_config("embedded_paper", own | further)


def gradients_of(trainer: Trainer, group: int) -> Tensor:
    """The gradients of the policy losses of every trained step of one group: [steps, parameters] float32."""
    batch, steps = trainer.prompts.batch(group), trainer.schedule.at(group)
    rollout = trainer.sample(batch, steps, group)
    advantages = trainer.credit(rollout, trainer.score(rollout, trainer.complete(rollout), batch))
    weights, options = torch.ones(steps.coefficients.num_steps), trainer.learner.options.objective
    objective = Objective(options, steps.coefficients, steps.trained, weights)
    values = advantages.values.flatten(0, 1)
    return step_gradients(trainer, rollout, values, objective, steps.trained, slice(0, rollout.batch))


def products(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Mean inner products of the steps' gradients: within a group, and between different groups (of their means).

    Args:
        gradients: [groups, steps, parameters].

    Returns:
        Both [steps, steps] float64.
    """
    count, steps = gradients.shape[:2]
    own, total = torch.zeros(steps, steps, dtype=torch.float64), gradients.sum(0, dtype=torch.float64)
    for group in gradients:
        own += group.double() @ group.double().T
    return own / count, (total @ total.T - own) / (count * (count - 1))


def variance(config: Config, within: Tensor, between: Tensor, groups: int) -> float:
    """Total variance of the mean gradient of so many groups that share a draw.

    Args:
        within, between: of `products`, of unweighted losses.
        groups: of an iteration.
    """
    weights = IterationOperations(config).schedule.step_weights()[: len(within)].double()
    second = torch.zeros((), dtype=torch.float64)
    for steps, factors, times in draws(config):
        share = torch.zeros(len(within), dtype=torch.float64)
        share[list(steps)] = factors[list(steps)].double() / len(steps)
        share *= weights
        mean_square = (within / groups + between * (1 - 1 / groups)).mul(share[:, None] * share).sum()
        second += times / DRAWS * mean_square
    every = weights / len(within)
    return (second - between.mul(every[:, None] * every).sum()).item()


def operations(config: Config, unit: ModelFlops, *, sparse: bool = False, streamed: bool = False, kl: bool) -> float:
    """Mean operations of a sample's share of an iteration, over the draws."""
    steps = config.sampler.num_steps
    own = {"guided": config.sampler.guidance_scale != 1.0, "kl": kl}
    schedule, total = IterationOperations(config).schedule, 0.0
    for trained, _, times in draws(config):
        cost: IterationCost = sparse_iteration(steps, trained_steps=len(trained), **own)
        if not sparse:
            completed = schedule.completed_states((True,) * steps, trained)
            cost = dense_iteration(exact(steps), trained_steps=len(trained), completed=completed, **own)
        total += times / DRAWS * replace(cost, streamed=streamed).flops(unit)
    return total


def forms() -> dict[str, dict[str, Any]]:
    """Ways to choose the trained steps, by name: options over the paper's settings."""
    found: dict[str, dict[str, Any]] = {"all nine": {}}
    for count in COUNTS:
        for how in ("uniform", "importance"):
            own = {"objective.trained_steps": count, "objective.step_sampling": how}
            found[f"{count} of nine, {how}"] = own
    return found


def measure(groups: int, *, perturbed: bool) -> dict[str, Any]:
    """The whole document."""
    started = load_average()
    config = settings("none")
    trainer = Trainer(config)
    if perturbed:
        randomize_lora_(trainer.model.network)
    gradients = []
    for group in range(groups):
        gradients.append(gradients_of(trainer, group))
        print(f"group {group + 1} of {groups}", flush=True)
    within, between = products(torch.stack(gradients))
    unit = IterationOperations(config).unit
    every, found = {}, {}
    for weight in WEIGHTS:
        own = settings(weight)
        every[weight] = {batch: variance(own, within, between, batch) for batch in (1, 3, 48)}
    for name, options in forms().items():
        found[name] = {}
        for weight in WEIGHTS:
            own = settings(weight, **options)
            price = operations(own, unit, kl=True) / operations(config, unit, kl=True)
            ratios = {
                str(batch): variance(own, within, between, batch) / whole for batch, whole in every[weight].items()
            }
            found[name][weight] = {
                "operations_over_all_steps": price,
                "variance_over_all_steps": ratios,
                "product": {batch: price * ratio for batch, ratio in ratios.items()},
                "drawn_with": schedule_probabilities(own),
            }
    return provenance() | {
        "load_average": {"start": started, "end": load_average()},
        "settings": portable(config.model_dump(mode="json")) | {"adapter": "perturbed" if perturbed else "fresh"},
        "groups": groups,
        "samples_per_group": config.sampler.group_size,
        "mean_square_of_step_gradients": within.diagonal().tolist(),
        "inner_products_within": within.tolist(),
        "inner_products_between": between.tolist(),
        "forms": found,
    }


def schedule_probabilities(config: Config) -> list[float]:
    """Of each step that could be trained, that it is (counted over draws)."""
    count = config.sampler.num_steps - 1
    shares = [0.0] * count
    for steps, _, times in draws(config):
        for step in steps:
            shares[step] += times / DRAWS
    return [round(share, 4) for share in shares]


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--groups", type=int, default=40, help="of 16 samples each; default: %(default)s")
    parser.add_argument("--perturbed", action="store_true", help="random adapter weights in the place of fresh ones")
    parser.add_argument("--output", type=Path, default=RESULTS / "gradient_variance.json")
    options = parser.parse_args(arguments)
    with user_errors_exit():
        document = measure(options.groups, perturbed=options.perturbed)
        write_json(options.output, document)
    for name, by_weight in document["forms"].items():
        for weight, own in by_weight.items():
            ratio = own["variance_over_all_steps"]["3"]
            print(
                f"{name:22} {weight:12} operations {own['operations_over_all_steps']:.2f}  "
                f"variance {ratio:.2f}  product {own['product']['3']:.2f}"
            )
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
