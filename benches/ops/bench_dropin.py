"""A host's step, ours against its own eager one, one PyTorch op at a time.

    pytest benches/ops/bench_dropin.py --benchmark-only      each side of each row by itself
    python -m benches.ops.bench_dropin                       side by side; writes results/dropin_<cpu or gpu>.json

Rows are `<host>.<what>`:

    sample     a step of the rollout: noise from torch's generator, as the host draws it, and a log-probability
    philox     the same with our counters for ours; the host's own side is that of `sample`
    score      a step of training: the log-probability of a stored transition, and its gradient

The hosts' side is restated from their formulas (`common/stock.py`, `tests/hosts`); before anything is timed, it is
asserted that both sides compute the same.

On the CPU a timing is the fastest of several calls, and with one thread the clock is that of the thread: what other
processes take of the core is not counted. The pages of `docs/integrations` quote the result: `pages/write.py`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import importlib.util
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor

from benches.common.record import (
    NOISY_SPREAD,
    ROOT,
    interleaved,
    load_average,
    pairwise_ratio,
    provenance,
    spread,
    write_json,
)
from benches.common.stock import eager_step
from benches.ops.step_bench import (
    BATCH,
    CALLS,
    DEVICE,
    LATENT_SHAPE,
    NOISE_LEVEL,
    STEP,
    Function,
    inputs,
    options_of,
    repeated,
)
from benches.pages.measured import HOSTS, KINDS
from densegrpo_fast.compat import dance_grpo, flow_factory, flow_grpo, mix_grpo

ROWS = tuple(f"{host}.{kind}" for host in HOSTS for kind in KINDS[host])
ETA = 0.3
BEST_OF = 1 if DEVICE.type == "cuda" else 30
"""Calls of which the fastest is a timing; on a CUDA device it is that of `CALLS` calls."""

Step = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor]]
"""(velocity, stored next state or None) -> next state, log_prob."""


def steps(batch: int) -> tuple[dict[str, tuple[Step, Step, Step]], Tensor, Tensor]:
    """Of every host our step, ours with counters, and its own; a velocity, and a state one noise level further."""
    given = inputs(batch)
    x, scheduler, t = given.latents, given.scheduler, given.timestep
    sigmas = scheduler.sigmas.clone()
    eager_dance, eager_mix = _restated("dance_script"), _restated("mix_sampling_utils")
    schedulers = _restated("flow_factory_scheduler")
    factory = schedulers.FlowMatchEulerDiscreteSDEScheduler(sigmas.to(DEVICE))
    entry = factory.timesteps[STEP]

    def flow(function: Any) -> Step:
        return lambda v, given: function(scheduler, v, t, x, NOISE_LEVEL, given)[:2]

    def eager_flow(v: Tensor, stored: Tensor | None) -> tuple[Tensor, Tensor]:
        done = eager_step(scheduler, v, t, x, NOISE_LEVEL, prev_sample=stored)
        return done.prev_sample, done.log_prob

    def dance(function: Any) -> Step:
        return lambda v, given: function(v, x, ETA, sigmas, STEP, given, True, True)[::2]

    mixed = sigmas.to(DEVICE)

    def mix(function: Any) -> Step:
        return lambda v, given: function(v, x, NOISE_LEVEL, mixed, STEP, given)[::2][:2]

    def scheduled(function: Any) -> Step:
        return lambda v, given: function(factory, v, entry, x, given, noise_level=NOISE_LEVEL, return_dict=False)[::3][
            :2
        ]

    counters: dict[str, Any] = {"rng": "philox", "seed": 0}
    found = {
        "flow_grpo": (flow(flow_grpo.step_function("V3")), flow(flow_grpo.step_function("V3", **counters)), eager_flow),
        "dance_grpo": (
            dance(dance_grpo.flux_step),
            dance(dance_grpo.step_function(**counters)),
            dance(eager_dance.flux_step),
        ),
        "mix_grpo": (
            mix(mix_grpo.flow_grpo_step),
            mix(mix_grpo.flow_step_function(**counters)),
            mix(eager_mix.flow_grpo_step),
        ),
        "flow_factory": (
            scheduled(flow_factory.step),
            scheduled(flow_factory.step_function(**counters)),
            scheduled(schedulers.FlowMatchEulerDiscreteSDEScheduler.step),
        ),
    }
    return found, given.velocity, given.next_latents


def sides(batch: int = BATCH) -> dict[str, tuple[Function, Function]]:
    """Ours and the host's own side of every row, ready to call; first it is asserted that both compute the same."""
    found, velocity, stored = steps(batch)
    rows: dict[str, tuple[Function, Function]] = {}
    for host, (ours, counted, eager) in found.items():
        expected = eager(velocity, stored)[1]
        torch.testing.assert_close(ours(velocity, stored)[1], expected, rtol=1e-4, atol=1e-5)
        rows[f"{host}.sample"] = _without_grad(ours, velocity), _without_grad(eager, velocity)
        rows[f"{host}.philox"] = _without_grad(counted, velocity), _without_grad(eager, velocity)
        rows[f"{host}.score"] = _with_grad(ours, velocity, stored), _with_grad(eager, velocity, stored)
        torch.testing.assert_close(rows[f"{host}.score"][0](), rows[f"{host}.score"][1](), rtol=1e-4, atol=1e-8)
    if DEVICE.type == "cuda":
        return {name: (repeated(ours), repeated(eager)) for name, (ours, eager) in rows.items()}
    return rows


def _without_grad(step: Step, velocity: Tensor) -> Function:
    def call() -> Any:
        with torch.no_grad():
            return step(velocity, None)

    return call


def _with_grad(step: Step, velocity: Tensor, stored: Tensor) -> Function:
    leaf = velocity.clone().requires_grad_()
    return lambda: torch.autograd.grad(step(leaf, stored)[1].sum(), leaf)[0]


def _restated(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "tests" / "hosts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def all_sides() -> dict[str, tuple[Function, Function]]:
    """Made once for all rows."""
    return sides()


@pytest.mark.parametrize("side", ["ours", "eager"])
@pytest.mark.parametrize("row", ROWS)
def bench_dropin(benchmark: Any, all_sides: dict[str, tuple[Function, Function]], row: str, side: str) -> None:
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "load_average": load_average(), "calls": CALLS}
    benchmark(all_sides[row][side == "eager"])


def main() -> None:
    """Time both sides of all rows in turns; print and write medians and the median ratio within a round."""
    options = options_of("dropin", rounds=40)
    started = load_average()
    clock = time.thread_time if DEVICE.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    rows = sides(options.batch)
    calls = {f"{name}/{side}": pair[side == "eager"] for name, pair in rows.items() for side in ("ours", "eager")}
    turns = interleaved(calls, rounds=options.rounds, clock=clock, best_of=BEST_OF)
    seconds = {name: [turn / CALLS for turn in own] for name, own in turns.items()}
    found = {}
    for name in rows:
        ours, eager = seconds[f"{name}/ours"], seconds[f"{name}/eager"]
        found[name] = {
            "median_seconds": median(ours),
            "eager_median_seconds": median(eager),
            "times_faster_than_eager": pairwise_ratio(eager, ours),
            "spread": spread(ours),
            "eager_spread": spread(eager),
        }
        print(
            f"{name:20} {median(ours) * 1e3:8.3f} ms  eager {median(eager) * 1e3:8.3f} ms  "
            f"{found[name]['times_faster_than_eager']:5.2f}x"
        )
    settings = {
        "shape": (options.batch, *LATENT_SHAPE),
        "dtype": "float32",
        "rounds": options.rounds,
        "calls": CALLS,
        "threads": torch.get_num_threads(),
        "best_of": BEST_OF,
        "clock": clock.__name__,
    }
    document = provenance() | {
        "load_average": {"start": started, "end": load_average()},
        "settings": settings,
        "noisy": any(max(own["spread"], own["eager_spread"]) > NOISY_SPREAD for own in found.values()),
        "variants": found,
    }
    write_json(options.output, document)


if __name__ == "__main__":
    main()
