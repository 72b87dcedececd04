"""The log-probability of a stored transition with the KL to a reference policy, and the gradient of both.

    pytest benches/ops/bench_sde_log_prob_kl.py --benchmark-only  each row by itself
    python -m benches.ops.bench_sde_log_prob_kl                   side by side, to results/

`step_bench.py` says what the rows are. The codebases take their step a second time with the reference velocity, and
compare the two means.
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
from densegrpo_fast.flow.ops import sde_log_prob_kl


def moved_bytes(batch: int) -> int:
    """Three states and the reference velocity read forward and backward, the gradient written."""
    return 9 * 4 * batch * math.prod(LATENT_SHAPE)


def rows(batch: int = BATCH) -> dict[str, Function]:
    """Everything that can run here; first it is asserted that all compute the same."""
    given = inputs(batch)
    index = torch.full((batch,), STEP, device=DEVICE)
    velocity = given.velocity.clone().requires_grad_()
    reference = given.velocity + 0.01 * given.latents
    upstream = torch.linspace(-1, 1, batch, device=DEVICE)

    def both(log_prob: Tensor, kl: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (slope,) = torch.autograd.grad((log_prob, kl), velocity, (upstream, upstream.square()))
        return log_prob.detach(), kl.detach(), slope

    def ours(implementation: str) -> Function:
        arguments = (given.latents, velocity, reference, given.next_latents, given.table, index)
        return lambda: both(*sde_log_prob_kl(*arguments, scale="flow_grpo", implementation=implementation))

    def eager(step: Any) -> tuple[Tensor, Tensor, Tensor]:
        rest = (given.timestep.expand(batch), given.latents, NOISE_LEVEL)
        options = {"prev_sample": given.next_latents}
        scored = step(given.scheduler, velocity, *rest, **options)
        with torch.no_grad():
            held = step(given.scheduler, reference, *rest, **options)
        kl = ((scored.mean - held.mean) ** 2).mean(dim=(1, 2, 3), keepdim=True) / (2 * scored.std_dev**2)
        return both(scored.log_prob, kl.flatten())

    found = rows_of("sde_log_prob_kl", ours, eager, moved_bytes(batch))
    expected = ours("reference")()
    for name in found.keys() - {"copy"}:
        *values, slope = found[name]()
        torch.testing.assert_close(tuple(values), expected[:2], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(slope, expected[2], rtol=1e-3, atol=1e-5 * expected[2].abs().max().item())
    return found


@pytest.mark.parametrize("name", ROWS)
def bench_sde_log_prob_kl(benchmark: Any, name: str) -> None:
    bench(benchmark, rows(), name, moved_bytes(BATCH))


if __name__ == "__main__":
    record("sde_log_prob_kl", rows, moved_bytes)
