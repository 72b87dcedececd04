"""The lookahead alone: completing every state of the same trajectories, serially, exactly in batches, and cheaply.

    python -m benches.iteration.bench_lookahead                                       writes results/lookahead_cpu.json
    pytest benches/iteration/bench_lookahead.py --benchmark-only                      untrained, each way by itself

    serial      every state by itself over all remaining steps, as TurningPoint-GRPO runs it (`common/stock.py`)
    exact       the same completions: states at one sigma together, the rollout's velocities reused
    nodes       the plan, guidance, copy and cache that are asked for; else nodes {4, 7} by the policy itself
    one_step    no evaluation: the clean estimates from the rollout's velocities
    copy        exact, by a copy of the model with the adapter merged: in float32, or the precision that is asked for
    cached      exact, with each sample's own text features of the rollout

Decoding and scoring are not in it. Before anything is timed, serial, exact and a copy in float32 are asserted to agree
to float32 rounding, and every way to evaluate what `sampling/cost.py` says.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# advice about optional packages is none of a bench's business
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from benches.common.record import NOISY_SPREAD, interleaved, load_average, portable, provenance, spread, write_json
from benches.common.stock import Stock
from benches.iteration.models import EMBEDDED_RANDOM, load
from benches.iteration.protocol import (
    DENSE_TRAJECTORIES,
    STOCK_DENSE,
    Protocol,
    default_output,
    parser,
    protocol_of,
    ratios,
)
from benches.iteration.variants import Tally, copies, counted, stock_cost
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config import Config
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.sampling.cost import Evaluations, lookahead_evaluations
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.plan import one_step
from densegrpo_fast.sampling.rollout import Rollout
from densegrpo_fast.training.models import default_device, synchronizer
from densegrpo_fast.training.prompts import TrainingPrompts
from densegrpo_fast.training.rewarding import build_reward
from densegrpo_fast.training.trainer import Trainer

NAMES = ("serial", "exact", "nodes", "one_step", "copy", "cached")
RATIOS = tuple(f"{name}/{other}" for other in ("exact", "serial") for name in NAMES if name != other)
DEFAULTS: dict[str, Any] = {"prompts": 2, "group_size": 8, "plan": "nodes:4,7", "copy_dtype": "null"}
"""What is chosen otherwise than for a whole iteration."""


@dataclass(frozen=True)
class Way:
    """One way to complete the trajectories.

    Attributes:
        complete: returns the clean latents [T+1, B, ...], all work done.
        evaluations: that it asks of the model per trajectory.
        models: that it evaluates.
    """

    complete: Callable[[], Tensor]
    evaluations: Evaluations
    models: tuple[DiffusersModel, ...]


def ways(protocol: Protocol) -> dict[str, Way]:
    """The ways, ready to call; first it is asserted that they are what they should be.

    Raises:
        UserError: an option is wrong, or the model cannot be loaded.
        AssertionError: serial and exact differ, or a way evaluates another number of rows.
    """
    configs, baseline = configurations(protocol), protocol.config(STOCK_DENSE, kl=True)
    exact = configs["exact"]
    model = load(baseline, default_device())
    reward = build_reward(exact.reward.terms, exact.reward.options)
    synchronize = synchronizer(model.device)

    def ours(config: Config, lookahead: Lookahead | None = None) -> tuple[Rollout, Way]:
        trainer = Trainer(config, model=model, reward=reward)
        lookahead = lookahead or trainer.lookahead
        assert lookahead is not None
        # the same trajectories for all, each with what its way needs to be kept
        trajectory = trainer.sample(trainer.prompts.batch(0), trainer.schedule.at(0), iteration=0)

        def complete() -> Tensor:
            clean = lookahead.complete(trajectory)
            synchronize()
            return clean

        evaluations = lookahead_evaluations(lookahead.plan, guided=True, guidance=lookahead.guidance)
        return trajectory, Way(complete, evaluations, (model, *copies(lookahead, model)))

    trajectory, batched = ours(exact)

    stock, prompts = Stock(model, baseline, reward), TrainingPrompts.of(exact).batch(0).prompts
    text, steps = stock.encode(prompts), trajectory.coefficients.num_steps
    stock.set_timesteps()

    def serial() -> Tensor:
        clean = [stock.complete(trajectory.latents[state], state, text) for state in range(steps)]
        synchronize()
        return torch.stack([*clean, trajectory.latents[steps]])

    cost = stock_cost(steps, trained_steps=0, guided=True, kl=False, dense=True)
    found = {
        "serial": Way(serial, cost.lookahead, (model,)),
        "exact": batched,
        "nodes": ours(configs["nodes"])[1],
        "one_step": ours(exact, Lookahead(model, one_step(steps), chunk=exact.lookahead.chunk))[1],
        "copy": ours(configs["copy"])[1],
        "cached": ours(configs["cached"])[1],
    }
    check(found, len(prompts))
    return found


def configurations(protocol: Protocol) -> dict[str, Config]:
    """The configurations of the ways that have one.

    Raises:
        UserError: an option is wrong.
    """
    plain = replace(protocol, plan="exact", guidance="full", cache="null", copy_dtype="null")
    asked = {
        "exact": plain,
        "nodes": protocol,
        "copy": replace(plain, copy_dtype="float32" if protocol.copy_dtype == "null" else protocol.copy_dtype),
        "cached": replace(plain, cache="text:own"),
    }
    return {name: own.config(DENSE_TRAJECTORIES, kl=True) for name, own in asked.items()}


def check(found: dict[str, Way], rows: int) -> None:
    """Assert the work of every way, and that serial, exact and copy agree where they evaluate in float32."""
    clean = {}
    tally = Tally()
    for name, way in found.items():
        with counted(way.models, tally) as work:
            clean[name] = way.complete()
        expected = rows * way.evaluations.forwards
        assert work.forwards == expected, f"{name} took {work.forwards} forwards, expected {expected}"
    scale = clean["exact"].abs().max().item()
    for name in ("serial", "copy"):
        if all(model.network.dtype == torch.float32 for model in found[name].models):
            torch.testing.assert_close(clean[name], clean["exact"], rtol=1e-3, atol=1e-3 * scale)


def measure(protocol: Protocol, *, rounds: int, warmup: int) -> dict[str, Any]:
    """The whole document."""
    started = load_average()
    found = ways(protocol)
    seconds = interleaved({name: way.complete for name, way in found.items()}, rounds=rounds, warmup=warmup)
    summary = {name: {"median": median(own), "spread": spread(own), "rounds": own} for name, own in seconds.items()}
    settings = {name: config.model_dump(mode="json") for name, config in configurations(protocol).items()}
    return provenance() | {
        "ratios": ratios(seconds, RATIOS),
        "seconds": summary,
        "nfe": {name: way.evaluations.forwards for name, way in found.items()},
        "load_average": {"start": started, "end": load_average()},
        "settings": portable({"rounds": rounds, "warmup": warmup, **settings}),
        # a way without a forward is a millisecond's jump, of which no ratio is quoted
        "noisy": any(own["spread"] > NOISY_SPREAD for name, own in summary.items() if found[name].evaluations.forwards),
    }


@pytest.mark.parametrize("name", NAMES)
def bench_lookahead(benchmark: Any, name: str) -> None:
    way = ways(Protocol(**DEFAULTS | {"model": EMBEDDED_RANDOM, "prompts": 1, "group_size": 2}))[name]
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "load_average": load_average()}
    benchmark.extra_info["nfe"] = way.evaluations.forwards
    benchmark.pedantic(way.complete, rounds=3, warmup_rounds=1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    made = parser(__doc__)
    made.set_defaults(**DEFAULTS)
    options = made.parse_args(arguments)
    with user_errors_exit():
        document = measure(protocol_of(options), rounds=options.rounds, warmup=options.warmup)
        write_json(options.output or default_output("lookahead"), document)
    for name, own in document["seconds"].items():
        nfe = document["nfe"][name]
        print(f"  {name:13} {own['median']:8.3f} s  spread {own['spread']:4.0%}  {nfe:4d} NFE per trajectory")
    for pair, value in document["ratios"].items():
        print(f"  {pair:26} {value:6.3f}")
    if document["noisy"]:
        print("noisy: repeat on a quieter machine before quoting")
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
