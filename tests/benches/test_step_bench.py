"""The inputs of the step benches, on a device other than the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benches.common.stock import EagerStep
from benches.ops import step_bench


def test_all_inputs_are_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []

    def step(scheduler: Any, *tensors: Any, noise: Tensor) -> EagerStep:
        given.extend((scheduler.sigmas, scheduler.timesteps, *tensors, noise))
        return EagerStep(noise, noise, noise, noise)

    # the meta device has shapes alone, so what the codebases' step reads back from it is left out
    monkeypatch.setattr(step_bench, "DEVICE", torch.device("meta"))
    monkeypatch.setattr(step_bench, "eager_step", step)
    made = step_bench.inputs(2)
    tensors = [each for each in (*given, *vars(made).values()) if isinstance(each, Tensor)]
    assert len(tensors) > 8 and {each.device.type for each in tensors} == {"meta"}
