"""The host's scheduler contract: which step a timestep is, read once, without waiting for a device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast.compat.flow_grpo import sde_step_with_logprob, step_function
from densegrpo_fast.compat.flow_grpo.schedule import Schedule, schedule_of
from densegrpo_fast.compat.steps import HostTable

diffusers = pytest.importorskip("diffusers")


def sd3_scheduler() -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    return scheduler


def test_the_scheduler_is_read_once_per_schedule() -> None:
    scheduler = sd3_scheduler()
    scheduler.index_for_timestep = None  # the host's lookup, which waits for the device, is not called
    known = schedule_of(scheduler)
    assert [known.find(t.unsqueeze(0)) for t in scheduler.timesteps] == [(i, 1) for i in range(10)]
    assert known.find(scheduler.timesteps[3].expand(4)) == (3, 4)
    assert known.find(scheduler.timesteps[7].item()) == (7, 1)
    index, length = known.find(scheduler.timesteps[[4, 2]].clone())
    assert isinstance(index, Tensor) and index.tolist() == [4, 2] and length == 2
    assert schedule_of(scheduler) is known
    scheduler.set_timesteps(20)
    assert schedule_of(scheduler).num_steps == 20
    scheduler.timesteps[0] += 1
    assert schedule_of(scheduler).find(1001.0) == (0, 1)


class Grid:
    def __init__(self, sigmas: Tensor, timesteps: Tensor) -> None:
        self.sigmas, self.timesteps = sigmas, timesteps


def test_a_repeated_timestep_is_its_second_place() -> None:
    grid = Grid(torch.tensor([0.9, 0.8, 0.7, 0.0]), torch.tensor([900, 900, 700]))
    known = schedule_of(grid)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    expected = [scheduler.index_for_timestep(t, grid.timesteps) for t in grid.timesteps]
    assert expected == [1, 1, 2]
    assert [known.find(t.unsqueeze(0))[0] for t in grid.timesteps] == expected
    assert known.find(grid.timesteps.clone())[0].tolist() == expected
    assert known._find_on_device(grid.timesteps.clone()).tolist() == expected


def test_a_timestep_off_the_grid() -> None:
    scheduler = sd3_scheduler()
    x = torch.zeros(2, 4, 2, 2)
    with pytest.raises(ValueError, match="timestep 3.0 is not in the scheduler's timesteps"):
        sde_step_with_logprob(scheduler, x, torch.tensor([3.0]), x)
    with pytest.raises(ValueError, match="1 entry or one per row"):
        sde_step_with_logprob(scheduler, x, scheduler.timesteps[:3], x)
    # Asking a device whether all are there would mean waiting for it; the results say it instead.
    known = schedule_of(scheduler)
    index = known._find_on_device(torch.tensor([3.0, scheduler.timesteps[1]]))
    assert index.tolist() == [10, 1]
    table = HostTable.of(known.table("flow_sde", 0.7, x.device).rows, x.device, nowhere=True)
    assert table.rows[10].isnan().all() and table.usable[10].isnan().all() and known.dt(x.device)[10].isnan()
    assert known.table("flow_sde", 0.7, torch.device("meta")).rows.shape == (11, 6)


def test_nothing_is_read_back_from_the_device() -> None:
    """Tensors on the meta device have no values: reading one raises."""
    scheduler = sd3_scheduler()
    x, v, prev = (torch.empty(3, 4, 8, 8, device="meta") for _ in range(3))
    for version in ("V3g", "Wan"):
        shape = (3, 4, 2, 8, 8) if version == "Wan" else (3, 4, 8, 8)
        x, v, prev = (torch.empty(shape, device="meta") for _ in range(3))
        for rng in ("host", "philox"):
            step = step_function(version, rng=rng)
            for t in (torch.empty(3, device="meta"), torch.empty(1, device="meta"), scheduler.timesteps[2:3]):
                for given in (None, prev):
                    assert step(scheduler, v, t, x, prev_sample=given)[1].device.type == "meta"


def test_a_schedule_first_met_in_inference_mode_serves_training() -> None:
    scheduler = sd3_scheduler()
    x, v = torch.randn(2, 2, 4, 4, 4)
    with torch.inference_mode():
        sde_step_with_logprob(scheduler, v, scheduler.timesteps[[1, 2]], x)
    v.requires_grad_()
    result = sde_step_with_logprob(scheduler, v, scheduler.timesteps[[1, 2]], x, prev_sample=x)
    (result[1].sum() + result[2].sum()).backward()
    assert v.grad is not None


def test_a_scheduler_without_a_schedule() -> None:
    with pytest.raises(TypeError, match="must hold tensors sigmas and timesteps"):
        Schedule(object())
    with pytest.raises(ValueError, match="call its set_timesteps first"):
        Schedule(Grid(torch.ones(3), torch.ones(3)))


class Watched(Tensor):
    """Counts how often its values, or those of what is computed from it, are asked for."""

    reads = 0
    READING = ("tolist", "item", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__", "__iter__")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # a CPU tensor's own values are also read by moving it there
        Watched.reads += getattr(func, "__name__", "") in cls.READING
        return super().__torch_function__(func, types, args, kwargs)


def test_values_are_read_once_per_schedule_and_never_per_step() -> None:
    scheduler = sd3_scheduler()
    x, v = torch.randn(2, 3, 4, 8, 8)
    for num_steps in (4, 6):
        scheduler.set_timesteps(num_steps)
        scheduler.sigmas = scheduler.sigmas.as_subclass(Watched)
        scheduler.timesteps = scheduler.timesteps.as_subclass(Watched)
        Watched.reads = 0
        for version in ("V1", "V2", "V3", "V3g"):
            step = step_function(version)
            for index in range(num_steps):
                for t in (scheduler.timesteps[index : index + 1], scheduler.timesteps[index].expand(3)):
                    step(scheduler, v, t, x)
                    step(scheduler, v, t, x, prev_sample=v)
        assert Watched.reads == 1
