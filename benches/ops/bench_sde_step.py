"""One stochastic step with its log-probability, noise included.

    pytest benches/ops/bench_sde_step.py --benchmark-only      each row by itself
    python -m benches.ops.bench_sde_step                       side by side; writes results/sde_step_<cpu or gpu>.json

`step_bench.py` says what the rows are. The codebases' step draws torch's noise, ours its own.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import math
from typing import Any

import pytest
import torch

from benches.common.stock import EagerStep, eager_step
from benches.ops.step_bench import (
    BATCH,
    DEVICE,
    LATENT_SHAPE,
    NOISE_LEVEL,
    ROWS,
    STEP,
    Function,
    bench,
    inputs,
    record,
    rows_of,
)
from densegrpo_fast.flow.ops import sde_step


def moved_bytes(batch: int) -> int:
    """Latents and velocity read, next latents written."""
    return 3 * 4 * batch * math.prod(LATENT_SHAPE)


def rows(batch: int = BATCH) -> dict[str, Function]:
    """Everything that can run here; first it is asserted that all compute the same."""
    given = inputs(batch)
    index, samples = torch.full((batch,), STEP, device=DEVICE), torch.arange(batch, device=DEVICE)
    seed, iteration = (torch.zeros(1, dtype=torch.int64, device=DEVICE) for _ in range(2))

    def ours(implementation: str) -> Function:
        return lambda: sde_step(
            given.latents,
            given.velocity,
            given.table,
            index,
            seed=seed,
            sample_index=samples,
            iteration=iteration,
            implementation=implementation,
        )

    def eager(step: Any, **options: Any) -> EagerStep:
        return step(given.scheduler, given.velocity, given.timestep, given.latents, NOISE_LEVEL, **options)

    found = rows_of("sde_step", ours, eager, moved_bytes(batch))
    next_latents, log_prob = ours("reference")()
    for name in found.keys() & {"csrc", "triton", "csrc_cuda"}:
        torch.testing.assert_close(found[name](), (next_latents, log_prob), rtol=1e-6, atol=1e-6)
    for step in (eager_step, torch.compile(eager_step)):
        scored = eager(step, prev_sample=next_latents).log_prob
        torch.testing.assert_close(scored, log_prob, rtol=1e-5, atol=1e-5)
    return found


@pytest.mark.parametrize("name", ROWS)
def bench_sde_step(benchmark: Any, name: str) -> None:
    bench(benchmark, rows(), name, moved_bytes(BATCH))


if __name__ == "__main__":
    record("sde_step", rows, moved_bytes)
