"""A straight-line move between two noise levels: the inner step of the lookahead.

    pytest benches/ops/bench_euler_jump.py --benchmark-only    each row by itself
    python -m benches.ops.bench_euler_jump                     side by side; writes results/euler_jump_<cpu or gpu>.json

`step_bench.py` says what the rows are. The codebases take their stochastic step at noise level 0: it draws noise as
well, and scores it.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from benches.ops.step_bench import BATCH, DEVICE, LATENT_SHAPE, ROWS, STEP, Function, bench, inputs, record, rows_of
from densegrpo_fast.flow.ops import euler_jump


def moved_bytes(batch: int) -> int:
    """Latents and velocity read, next latents written."""
    return 3 * 4 * batch * math.prod(LATENT_SHAPE)


def rows(batch: int = BATCH) -> dict[str, Function]:
    """Everything that can run here; first it is asserted that all compute the same."""
    given = inputs(batch)
    levels = [sigma.to(DEVICE).repeat(batch) for sigma in given.scheduler.sigmas[STEP : STEP + 2]]

    def ours(implementation: str) -> Function:
        return lambda: euler_jump(given.latents, given.velocity, *levels, implementation=implementation)

    def eager(step: Any) -> Tensor:
        return step(given.scheduler, given.velocity, given.timestep, given.latents, 0.0).prev_sample

    found = rows_of("euler_jump", ours, eager, moved_bytes(batch))
    expected = ours("reference")()
    for name in found.keys() - {"copy"}:
        torch.testing.assert_close(found[name](), expected, rtol=1e-6, atol=1e-6)
    return found


@pytest.mark.parametrize("name", ROWS)
def bench_euler_jump(benchmark: Any, name: str) -> None:
    bench(benchmark, rows(), name, moved_bytes(BATCH))


if __name__ == "__main__":
    record("euler_jump", rows, moved_bytes)
