from __future__ import annotations

import pytest
import torch
from torch import Tensor

from densegrpo_fast.flow.dynamics import C
from densegrpo_fast.flow.noise import Stream, gaussian
from densegrpo_fast.flow.ops import sde_log_prob, sde_step
from densegrpo_fast.flow.reference import sde_log_prob_ref, sde_step_ref

SHAPES = [(1,), (5, 7, 9), (2, 33, 65), (33, 64)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float16),
]
SCALES = (1.0, 4.5, 7.0, 0.0, 4.5)


def states(device: torch.device, *shape: int, dtypes=DTYPES[0]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Latents, conditional and unconditional velocity, and a guidance scale per row."""
    latents, cond, uncond = torch.randn(3, 5, *shape)
    velocities = [velocity.to(device, dtypes[1]) for velocity in (cond, uncond)]
    return latents.to(device, dtypes[0]), *velocities, torch.tensor(SCALES, device=device)


def guided(batch, *inputs: Tensor, implementation: str = "triton") -> tuple[Tensor, Tensor]:
    counters = {"seed": 1234, "sample_index": batch.samples, "iteration": 6, "implementation": implementation}
    latents, cond, uncond, scale = inputs
    return sde_step(latents, cond, batch.table, batch.steps, uncond=uncond, guidance_scale=scale, **counters)


def score(batch, latents: Tensor, cond: Tensor, uncond: Tensor, scale, next_latents: Tensor) -> Tensor:
    guidance = {"uncond": uncond, "guidance_scale": scale, "implementation": "triton"}
    return sde_log_prob(latents, cond, next_latents, batch.table, batch.steps, **guidance)


def combined(cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
    """The guided velocity in float64."""
    scale = scale.double().reshape(-1, *([1] * (cond.ndim - 1)))
    return uncond.double() + scale * (cond.double() - uncond.double())


@pytest.mark.ci
@pytest.mark.capabilities(80, 100)
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_step_against_float64(device, batch, storage_error, shape: tuple[int, ...], dtypes) -> None:
    latents, cond, uncond, scale = states(device, *shape, dtypes=dtypes)
    next_latents, log_prob = guided(batch, latents, cond, uncond, scale)
    velocity = combined(cond, uncond, scale)
    noise = gaussian(shape, seed=1234, sample_index=batch.samples, step=batch.steps, stream=Stream.STEP, iteration=6)
    expected, _ = sde_step_ref(latents.double(), velocity, batch.table, batch.steps, noise.double())
    torch.testing.assert_close(next_latents.double(), expected, rtol=storage_error[dtypes[0]], atol=2e-6)
    rescored = sde_log_prob_ref(latents.double(), velocity, next_latents.double(), batch.table, batch.steps)
    error = (log_prob - rescored).abs() / rescored.abs().clamp(min=1)
    # The guided velocity is about 7 in size, and so is its rounding, which C divides.
    assert error.max() < (2e-6 if latents[0].numel() > 1000 else 5e-4)


@pytest.mark.ci
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_gradients_by_name(device, batch, storage_error, shape: tuple[int, ...], dtypes) -> None:
    latents, cond, uncond, scale = states(device, *shape, dtypes=dtypes)
    next_latents, _ = guided(batch, latents, cond, uncond, scale)
    leaves = {"cond": cond.requires_grad_(), "uncond": uncond.requires_grad_()}
    score(batch, latents, **leaves, scale=scale, next_latents=next_latents).sum().backward()

    exact = {name: leaf.detach().double().requires_grad_() for name, leaf in leaves.items()}
    velocity = combined(exact["cond"], exact["uncond"], scale)
    log_prob = sde_log_prob_ref(latents.double(), velocity, next_latents.double(), batch.table, batch.steps)
    log_prob.sum().backward()
    for name, leaf in leaves.items():
        expected = exact[name].grad
        assert leaf.grad.dtype == leaf.dtype, name
        largest = expected.abs().amax().item()
        error = (leaf.grad - expected).abs() - storage_error[leaf.dtype] * expected.abs()
        assert error.max() <= 2e-5 * largest, name


@pytest.mark.capabilities(80, 100)
def test_it_is_the_plain_step_of_the_combined_velocity(device, batch) -> None:
    latents, cond, uncond, _ = states(device, 3, 29, 41)
    velocity = uncond + 4.5 * (cond - uncond)
    next_latents, log_prob = guided(batch, latents, cond, uncond, 4.5)
    counters = {"seed": 1234, "sample_index": batch.samples, "iteration": 6, "implementation": "triton"}
    expected = sde_step(latents, velocity, batch.table, batch.steps, **counters)
    assert torch.equal(next_latents, expected[0])
    torch.testing.assert_close(log_prob, expected[1], rtol=1e-6, atol=1e-6)
    transition = (next_latents, batch.table, batch.steps)
    rescored = score(batch, latents, cond, uncond, 4.5, next_latents)
    plain = sde_log_prob(latents, velocity, *transition, implementation="triton")
    torch.testing.assert_close(rescored, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.capabilities(80, 100)
def test_without_a_gradient_for_uncond(device, batch) -> None:
    latents, cond, uncond, scale = states(device, 700)
    next_latents, _ = guided(batch, latents, cond, uncond, scale)
    gradients = []
    for with_uncond in (False, True):
        leaf, other = cond.clone().requires_grad_(), uncond.clone().requires_grad_(with_uncond)
        score(batch, latents, leaf, other, scale, next_latents).sum().backward()
        gradients.append(leaf.grad)
        assert (other.grad is not None) == with_uncond
    assert torch.equal(gradients[0], gradients[1])


def test_opcheck(device, batch) -> None:
    latents, cond, uncond, scale = states(device, 3, 4)
    seed, iteration = (torch.tensor([value], device=device) for value in (5, 2))
    words = (batch.steps, seed, batch.samples, iteration, 1)
    step = (latents, cond, uncond, scale, batch.table, *words, None, False, "triton")
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_step.default, step)
    velocities = (cond.requires_grad_(), uncond.requires_grad_(), scale, None, None)
    scored = (latents, *velocities, latents, batch.table, batch.steps, C, "triton")
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_log_prob.default, scored)
