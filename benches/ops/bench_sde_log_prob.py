"""The log-probability of a stored transition and its gradient with respect to the velocity, forward and backward.

    pytest benches/ops/bench_sde_log_prob.py --benchmark-only  each row by itself
    python -m benches.ops.bench_sde_log_prob                   side by side, to results/sde_log_prob_<cpu or gpu>.json

`step_bench.py` says what the rows are. As in training, the codebases' step gets one timestep per sample.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import math
from typing import Any

import pytest
import torch
from torch import Tensor

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
from densegrpo_fast.flow.ops import sde_log_prob


def moved_bytes(batch: int) -> int:
    """Three states read forward, the same three read backward, the gradient written."""
    return 7 * 4 * batch * math.prod(LATENT_SHAPE)


def rows(batch: int = BATCH) -> dict[str, Function]:
    """Everything that can run here; first it is asserted that all compute the same."""
    given = inputs(batch)
    index = torch.full((batch,), STEP, device=DEVICE)
    velocity = given.velocity.clone().requires_grad_()
    upstream = torch.linspace(-1, 1, batch, device=DEVICE)

    def both(log_prob: Tensor) -> tuple[Tensor, Tensor]:
        return log_prob.detach(), torch.autograd.grad(log_prob, velocity, upstream)[0]

    def ours(implementation: str) -> Function:
        arguments = (given.latents, velocity, given.next_latents, given.table, index)
        return lambda: both(sde_log_prob(*arguments, implementation=implementation))

    def eager(step: Any) -> tuple[Tensor, Tensor]:
        timesteps = given.timestep.expand(batch)
        options = {"prev_sample": given.next_latents}
        return both(step(given.scheduler, velocity, timesteps, given.latents, NOISE_LEVEL, **options).log_prob)

    found = rows_of("sde_log_prob", ours, eager, moved_bytes(batch))
    log_prob, gradient = ours("reference")()
    for name in found.keys() - {"copy"}:
        scored, slope = found[name]()
        torch.testing.assert_close(scored, log_prob, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(slope, gradient, rtol=1e-3, atol=1e-5 * gradient.abs().max().item())
    return found


@pytest.mark.parametrize("name", ROWS)
def bench_sde_log_prob(benchmark: Any, name: str) -> None:
    bench(benchmark, rows(), name, moved_bytes(BATCH))


if __name__ == "__main__":
    record("sde_log_prob", rows, moved_bytes)
