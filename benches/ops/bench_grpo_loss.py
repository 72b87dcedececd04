"""The loss of a micro-batch with its metrics and its gradient with respect to the log-probabilities and the KL.

    pytest benches/ops/bench_grpo_loss.py --benchmark-only     each row by itself
    python -m benches.ops.bench_grpo_loss                      side by side; writes results/grpo_loss_<cpu or gpu>.json

`step_bench.py` says what the rows are. One number per row of a batch: what is timed is overhead, not bandwidth.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
from typing import Any

import pytest
import torch
from torch import Tensor

from benches.ops.step_bench import BATCH, DEVICE, ROWS, Function, bench, record, rows_of
from densegrpo_fast.flow.ops import grpo_loss

CLIP_RANGE, KL_COEF = 1e-4, 0.04


def eager_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, kl: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Flow-GRPO's clipped loss with its metrics: loss, policy loss, mean KL, share of clipped ratios."""
    ratio = torch.exp(log_prob - old_log_prob)
    unclipped = -advantages * ratio
    clipped = -advantages * torch.clamp(ratio, 1.0 - CLIP_RANGE, 1.0 + CLIP_RANGE)
    policy_loss, kl_loss = torch.mean(torch.maximum(unclipped, clipped)), torch.mean(kl)
    outside = torch.mean((torch.abs(ratio - 1.0) > CLIP_RANGE).float())
    return policy_loss + KL_COEF * kl_loss, policy_loss.detach(), kl_loss.detach(), outside


def moved_bytes(batch: int) -> int:
    """Four rows of numbers read, two gradients written."""
    return 6 * 4 * batch


def rows(batch: int = BATCH) -> dict[str, Function]:
    """Everything that can run here; first it is asserted that all compute the same."""
    generator = torch.Generator().manual_seed(0)
    change, old, advantages, kl = torch.randn(4, batch, generator=generator).to(DEVICE)
    leaves = ((old + 2 * CLIP_RANGE * change).requires_grad_(), kl.abs().requires_grad_())
    given = (leaves[0], old, advantages, leaves[1])

    def both(loss: Tensor, *metrics: Tensor) -> tuple[Tensor, ...]:
        return loss.detach(), *metrics, *torch.autograd.grad(loss, leaves)

    def ours(implementation: str) -> Function:
        options = {"clip_range": CLIP_RANGE, "kl_coef": KL_COEF, "implementation": implementation}

        def run() -> tuple[Tensor, ...]:
            loss, metrics = grpo_loss(*given, **options)
            return both(loss, *metrics[:3].unbind())

        return run

    def eager(loss: Any) -> tuple[Tensor, ...]:
        return both(*loss(*given))

    found = rows_of("grpo_loss", ours, eager, moved_bytes(batch), codebase=eager_loss)
    expected = ours("reference")()
    for name in found.keys() - {"copy"}:
        torch.testing.assert_close(found[name](), expected, rtol=1e-5, atol=1e-6)
    return found


@pytest.mark.parametrize("name", ROWS)
def bench_grpo_loss(benchmark: Any, name: str) -> None:
    bench(benchmark, rows(), name, moved_bytes(BATCH))


if __name__ == "__main__":
    record("grpo_loss", rows, moved_bytes, shape=())
