"""The bench of one step op: its implementations, and what training codebases run in its place, side by side.

Rows are what can run on this machine: on a CUDA device if there is one, else on the CPU.

    csrc, triton, csrc_cuda, reference    the op's implementations
    eager                                 the codebases' own form, one PyTorch op at a time (`common/stock.py`)
    eager_compiled                        torch.compile of that
    copy                                  a plain copy that moves as many bytes

On a CUDA device a timing is that of several calls with one synchronisation at the end, per call: of the kernels if they
take longer than their launches, else of the launches.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from benches.common.record import (
    NOISY_SPREAD,
    RESULTS,
    interleaved,
    load_average,
    pairwise_ratio,
    provenance,
    spread,
    write_json,
)
from benches.common.stock import eager_step
from densegrpo_fast.flow import backends
from densegrpo_fast.flow.dynamics import coefficients

BATCH, LATENT_SHAPE = 16, (16, 64, 64)
"""SD3.5 latents of 512 px, float32."""
NUM_STEPS, STEP, NOISE_LEVEL = 10, 4, 0.7

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
CALLS = 20 if DEVICE.type == "cuda" else 1
"""Calls in one timing."""
BEST_OF = 1 if DEVICE.type == "cuda" else 20
"""Timings in a turn, of which the fastest counts: what other processes took of it is left out, for all alike."""
ROW_OF = {"cpu": "csrc", "triton": "triton", "cuda": "csrc_cuda", "reference": "reference"}
ROWS = (*ROW_OF.values(), "eager", "eager_compiled", "copy")

Function = Callable[[], Any]


@dataclass(frozen=True)
class Inputs:
    """What all benches compute on.

    Attributes:
        scheduler: diffusers' Euler scheduler with its timesteps set, as the codebases hold it.
        table: our coefficients of the same schedule, [T, 6].
        latents, velocity, next_latents: [B, 16, 64, 64]; next_latents is one noise level further.
        timestep: of all rows, [1].
    """

    scheduler: Any
    table: Tensor
    latents: Tensor
    velocity: Tensor
    next_latents: Tensor
    timestep: Tensor


def inputs(batch: int) -> Inputs:
    """The same numbers in every run."""
    generator = torch.Generator().manual_seed(0)
    shape = (batch, *LATENT_SHAPE)
    latents, velocity, noise = (torch.randn(shape, generator=generator).to(DEVICE) for _ in range(3))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(NUM_STEPS)
    table = coefficients(scheduler.sigmas, NOISE_LEVEL, "flow_sde").table.to(DEVICE)
    # the codebases keep the schedule where the states are
    scheduler.set_timesteps(NUM_STEPS, device=DEVICE)
    timestep = scheduler.timesteps[STEP].unsqueeze(0)
    step = eager_step(scheduler, velocity, timestep, latents, NOISE_LEVEL, noise=noise)
    return Inputs(scheduler, table, latents, velocity, step.prev_sample, timestep)


def rows_of(
    op: str,
    ours: Callable[[str], Function],
    eager: Callable[..., Any],
    moved_bytes: int,
    codebase: Callable[..., Any] = eager_step,
) -> dict[str, Function]:
    """Everything that can run here, ready to call, the op's fastest implementation first.

    Args:
        op: key of `backends.OPS`.
        ours: makes the call of an implementation.
        eager: takes a function, `codebase` or that compiled, and runs the codebases' form with it.
        moved_bytes: least memory traffic of the op.
        codebase: what the codebases run.
    """
    probe = torch.empty(1, 1, device=DEVICE)
    usable = [name for name in backends.OPS[op] if name in ROW_OF and not backends.why_not(op, name, probe)]
    source = torch.empty(moved_bytes // 8, device=DEVICE)
    destination = torch.empty_like(source)
    # with torch's own generator, which is several times faster on the CPU than the one that is compiled in
    compiled = torch.compile(codebase, options={"fallback_random": True})
    found = {
        **{ROW_OF[name]: ours(name) for name in usable},
        "eager": lambda: eager(codebase),
        "eager_compiled": lambda: eager(compiled),
        "copy": lambda: destination.copy_(source),
    }
    return {name: repeated(function) if DEVICE.type == "cuda" else function for name, function in found.items()}


def bench(benchmark: Any, rows: dict[str, Function], name: str, moved_bytes: int) -> None:
    """Time one row by itself, under pytest-benchmark; skip what cannot run here."""
    if name not in rows:
        pytest.skip(f"{name} cannot run on {DEVICE.type} here")
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "load_average": load_average(), "calls": CALLS}
    rows[name]()
    benchmark(rows[name])
    if benchmark.stats is not None:
        seconds = benchmark.stats.stats.median / CALLS
        benchmark.extra_info["gigabytes_per_second"] = round(moved_bytes / seconds / 1e9, 2)


def record(
    stem: str,
    rows_of_batch: Callable[[int], dict[str, Function]],
    moved_bytes: Callable[[int], int],
    shape: tuple[int, ...] = LATENT_SHAPE,
) -> None:
    """The command line of a bench: time all rows in turns; print and write medians and median ratios within a round.

    Args:
        stem: of the result file.
        rows_of_batch: makes the rows of a batch size.
        moved_bytes: least memory traffic of a batch size.
        shape: of one row of the op's inputs.
    """
    options = options_of(stem)
    rows, traffic = rows_of_batch(options.batch), moved_bytes(options.batch)
    started = load_average()
    turns = interleaved(rows, rounds=options.rounds, warmup=2, best_of=BEST_OF)
    seconds = {name: [turn / CALLS for turn in own] for name, own in turns.items()}
    variants = {
        name: {
            "median_seconds": median(own),
            "spread": spread(own),
            "gigabytes_per_second": traffic / median(own) / 1e9,
            "share_of_copy_bandwidth": pairwise_ratio(seconds["copy"], own),
            "times_faster_than_eager": pairwise_ratio(seconds["eager"], own),
            "times_faster_than_eager_compiled": pairwise_ratio(seconds["eager_compiled"], own),
        }
        for name, own in seconds.items()
    }
    document = provenance() | {
        "load_average": {"start": started, "end": load_average()},
        "settings": {
            "shape": (options.batch, *shape),
            "dtype": "float32",
            "family": "flow_sde",
            "rounds": options.rounds,
            "calls": CALLS,
            "best_of": BEST_OF,
            "threads": torch.get_num_threads(),
        },
        "noisy": any(own["spread"] > NOISY_SPREAD for own in variants.values()),
        "variants": variants,
    }
    write_json(options.output, document)
    for name, own in variants.items():
        print(
            f"{name:15} {own['median_seconds'] * 1e3:8.3f} ms  {own['gigabytes_per_second']:7.2f} GB/s  "
            f"{own['share_of_copy_bandwidth']:4.0%} of a copy's  {own['times_faster_than_eager']:6.2f}x eager  "
            f"{own['times_faster_than_eager_compiled']:6.2f}x compiled, spread {own['spread']:.0%}"
        )


def options_of(stem: str, rounds: int = 40) -> argparse.Namespace:
    """The command line of a bench: batch, rounds (with this default), output."""
    parser = argparse.ArgumentParser(description=f"Time the implementations of {stem}.", allow_abbrev=False)
    default = RESULTS / f"{stem}_{'gpu' if DEVICE.type == 'cuda' else 'cpu'}.json"
    parser.add_argument("--batch", type=_count, default=BATCH, help=f"latents in a batch; default: {BATCH}")
    parser.add_argument("--rounds", type=_count, default=rounds, help=f"timed rounds; default: {rounds}")
    parser.add_argument("--output", type=Path, default=default, help=f"JSON file; default: results/{default.name}")
    return parser.parse_args()


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text}")
    return int(text)


def repeated(function: Function) -> Function:
    """`CALLS` calls, and one synchronisation at their end: what is timed on a CUDA device."""

    def call() -> Any:
        for _ in range(CALLS):
            result = function()
        torch.cuda.synchronize()
        return result

    return call
