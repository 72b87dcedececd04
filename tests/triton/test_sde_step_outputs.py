from __future__ import annotations

import pytest
import torch

from densegrpo_fast.flow.ops import sde_step, sde_step_outputs
from densegrpo_fast.flow.reference import sde_mean_ref

HALVES = [None, torch.float16, torch.bfloat16]


@pytest.mark.ci
@pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])
@pytest.mark.parametrize("input_dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (2049,), (5, 7, 9)], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_they_go_with_the_state(device, batch, storage_error, guided: bool, input_dtype, shape) -> None:
    latents, velocity, uncond = (values.to(device) for values in torch.randn(3, 5, *shape))
    options = {"uncond": uncond, "guidance_scale": 4.5} if guided else {}
    options |= {"seed": 1234, "sample_index": batch.samples, "iteration": 6, "implementation": "triton"}
    rest = (batch.table, batch.steps)
    found = sde_step_outputs(latents, velocity, *rest, input_dtype=input_dtype, with_mean=True, **options)
    next_latents, log_prob = sde_step(latents, velocity, *rest, **options)
    assert torch.equal(found.next_latents, next_latents)
    assert torch.equal(found.log_prob, log_prob)
    if guided:
        velocity = uncond + 4.5 * (velocity - uncond)
    assert torch.equal(found.mean, sde_mean_ref(latents, velocity, *rest))
    if input_dtype is None:
        assert found.model_input is None
    else:
        assert found.model_input.dtype == input_dtype
        error = storage_error[input_dtype]
        torch.testing.assert_close(found.model_input.float(), next_latents, rtol=error, atol=2.0**-24)


@pytest.mark.capabilities(80, 100)
def test_half_precision_latents_are_copied_as_they_are(device, batch) -> None:
    latents, velocity = (values.to(device, torch.float16) for values in torch.randn(2, 5, 700))
    options = {"seed": 1234, "sample_index": batch.samples, "iteration": 6, "implementation": "triton"}
    options |= {"input_dtype": torch.float16}
    found = sde_step_outputs(latents, velocity, batch.table, batch.steps, **options)
    assert torch.equal(found.model_input, found.next_latents)
    assert found.mean is None


def test_opcheck(device, batch) -> None:
    latents, velocity = (values.to(device) for values in torch.randn(2, 5, 3, 4))
    seed, iteration = (torch.tensor([value], device=device) for value in (5, 2))
    words = (batch.steps, seed, batch.samples, iteration, 1)
    arguments = (latents, velocity, None, None, batch.table, *words, torch.bfloat16, True, "triton")
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_step.default, arguments)
