"""Where a drop-in step's noise comes from: generators as diffusers uses them, or counters."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from densegrpo_fast.compat.flow_grpo import step_function
from densegrpo_fast.compat.rng import host_noise

diffusers = pytest.importorskip("diffusers")


def sd3_scheduler() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler


def test_generators_are_used_as_diffusers_uses_them() -> None:
    from diffusers.utils.torch_utils import randn_tensor

    like = torch.empty(2, 3, 4)
    for seeds in ([3], [3, 4]):
        made = [[torch.Generator().manual_seed(seed) for seed in seeds] for _ in range(2)]
        assert torch.equal(host_noise(like, made[0]), randn_tensor(like.shape, generator=made[1]))
    with pytest.raises(ValueError, match="one per row"):
        host_noise(like, [torch.Generator() for _ in range(3)])


def test_unnamed_philox_calls_never_repeat() -> None:
    scheduler = sd3_scheduler()
    x, v = torch.randn(2, 2, 16, 4, 4)
    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        step = step_function("V2", rng="philox")
        runs.append([step(scheduler, v, scheduler.timesteps[[2]], x)[0] for _ in range(2)])
    assert not torch.equal(runs[0][0], runs[0][1])
    assert torch.equal(runs[0][0], runs[1][0]) and torch.equal(runs[0][1], runs[1][1])


def test_ranks_draw_different_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    scheduler = sd3_scheduler()
    x, v = torch.randn(2, 2, 16, 4, 4)
    states = []
    for rank in ("0", "1", "0"):
        monkeypatch.setenv("RANK", rank)
        step = step_function("V3", rng="philox", seed=1)
        states.append(step(scheduler, v, scheduler.timesteps[[2]], x)[0])
    assert torch.equal(states[0], states[2]) and not torch.equal(states[0], states[1])


def test_philox_step_can_be_trained_through() -> None:
    scheduler = sd3_scheduler()
    x, v = torch.randn(2, 2, 16, 4, 4)
    v.requires_grad_()
    _, log_prob, mean, _ = step_function("V3", rng="philox", seed=0)(scheduler, v, scheduler.timesteps[[2]], x)
    assert torch.autograd.grad(log_prob.sum() + mean.sum(), v)[0].abs().sum() > 0
