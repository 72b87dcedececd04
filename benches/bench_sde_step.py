"""One stochastic step with its log-probability: compiled, plain PyTorch, and the step that training codebases run.

    pytest benches/bench_sde_step.py --benchmark-only      each implementation by itself
    python benches/bench_sde_step.py                       side by side; writes results/sde_step_cpu.json

All run on the CPU, on 8 SD3.5 latents of 512 px: [8, 16, 64, 64] float32.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# what is measured is the checkout around this file
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import math
from collections.abc import Callable
from statistics import median
from typing import Any

import pytest
import torch
from _record import NOISY_SPREAD, RESULTS, interleaved, load_average, pairwise_ratio, provenance, spread, write_json
from _stock import eager_step
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from densegrpo_fast.flow import native
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.flow.ops import sde_step

SHAPE = (8, 16, 64, 64)
NUM_STEPS, STEP, NOISE_LEVEL = 10, 4, 0.7
BYTES = 3 * 4 * math.prod(SHAPE)
"""Least memory traffic of a step: latents and velocity read, next latents written."""

Step = Callable[[], tuple[Tensor, Tensor]]


def steps() -> dict[str, Step]:
    """The implementations, ready to call; first it is asserted that they agree."""
    generator = torch.Generator().manual_seed(0)
    latents, velocity = (torch.randn(SHAPE, generator=generator) for _ in range(2))
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(NUM_STEPS)
    timestep = scheduler.timesteps[STEP].unsqueeze(0)
    table = coefficients(scheduler.sigmas, NOISE_LEVEL, "flow_sde").table
    rows = torch.arange(SHAPE[0])

    def ours(implementation: str) -> Step:
        return lambda: sde_step(
            latents, velocity, table, STEP, seed=0, sample_index=rows, epoch=0, implementation=implementation
        )

    compiled = {"csrc": ours("cpu")} if native.available() else {}
    found = {
        **compiled,
        "reference": ours("reference"),
        "eager": lambda: eager_step(scheduler, velocity, timestep, latents, NOISE_LEVEL)[:2],
    }
    next_latents, log_prob = found["reference"]()
    for step in compiled.values():
        torch.testing.assert_close(step(), (next_latents, log_prob), rtol=1e-6, atol=1e-6)
    scored = eager_step(scheduler, velocity, timestep, latents, NOISE_LEVEL, prev_sample=next_latents).log_prob
    torch.testing.assert_close(scored, log_prob, rtol=1e-6, atol=1e-6)
    return found


@pytest.mark.parametrize("name", ["csrc", "reference", "eager"])
def bench_sde_step(benchmark: Any, name: str) -> None:
    step = steps().get(name)
    if step is None:
        pytest.skip(native.why_not())
    benchmark.extra_info |= {"threads": torch.get_num_threads(), "load_average": load_average()}
    benchmark(step)
    if benchmark.stats is not None:
        benchmark.extra_info["gigabytes_per_second"] = round(BYTES / benchmark.stats.stats.median / 1e9, 2)


def main(rounds: int = 200) -> None:
    """Time all of them in turns and record medians and the ratios to the eager step."""
    started = load_average()
    seconds = interleaved(steps(), rounds=rounds)
    variants = {
        name: {
            "median_seconds": median(own),
            "spread": spread(own),
            "gigabytes_per_second": BYTES / median(own) / 1e9,
            "times_faster_than_eager": pairwise_ratio(seconds["eager"], own),
        }
        for name, own in seconds.items()
    }
    document = provenance() | {
        "load_average": {"start": started, "end": load_average()},
        "settings": {"shape": SHAPE, "dtype": "float32", "family": "flow_sde", "rounds": rounds},
        "noisy": any(own["spread"] > NOISY_SPREAD for own in variants.values()),
        "variants": variants,
    }
    write_json(RESULTS / "sde_step_cpu.json", document)
    for name, own in variants.items():
        print(
            f"{name:10} {own['median_seconds'] * 1e3:8.3f} ms  {own['gigabytes_per_second']:6.2f} GB/s  "
            f"{own['times_faster_than_eager']:5.2f}x the eager step, spread {own['spread']:.0%}"
        )


if __name__ == "__main__":
    main()
