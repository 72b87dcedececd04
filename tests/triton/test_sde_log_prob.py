from __future__ import annotations

import pytest
import torch
from torch import Tensor

from densegrpo_fast.flow.dynamics import C
from densegrpo_fast.flow.ops import sde_log_prob
from densegrpo_fast.flow.reference import sde_log_prob_ref

SHAPES = [(1,), (3,), (2048,), (5, 7, 9), (4, 33, 65), (33, 64)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.bfloat16),
]


def transition(batch, *shape: int, dtypes=DTYPES[0]) -> tuple[Tensor, Tensor, Tensor]:
    """Latents, velocity and a state that the sampler could have reached; dtypes are the states' and the velocity's."""
    latents, velocity, noise = torch.randn(3, 5, *shape, dtype=torch.float64)
    rows = batch.table.cpu().double()[batch.steps.cpu()].reshape(5, 6, *([1] * len(shape)))
    next_latents = rows[:, 0] * latents + rows[:, 1] * velocity + rows[:, 2] * noise
    device = batch.table.device
    return latents.to(device, dtypes[0]), velocity.to(device, dtypes[1]), next_latents.to(device, dtypes[0])


def score(batch, latents: Tensor, velocity: Tensor, next_latents: Tensor) -> Tensor:
    return sde_log_prob(latents, velocity, next_latents, batch.table, batch.steps, implementation="triton")


@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_value_and_gradient_against_float64(batch, storage_error, shape: tuple[int, ...], dtypes) -> None:
    latents, velocity, next_latents = transition(batch, *shape, dtypes=dtypes)
    leaf = velocity.clone().requires_grad_()
    log_prob = score(batch, latents, leaf, next_latents)
    upstream = torch.tensor([0.3, -1.0, 2.0, 0.5, 1.0], device=log_prob.device)
    log_prob.backward(upstream)

    exact = velocity.double().requires_grad_()
    expected = sde_log_prob_ref(latents.double(), exact, next_latents.double(), batch.table, batch.steps)
    expected.backward(upstream.double())
    assert log_prob.dtype == torch.float32
    error = (log_prob - expected).abs() / expected.abs().clamp(min=1)
    # One rounding of the state, divided by C: visible on single elements only.
    assert error.max() < (1e-6 if latents[0].numel() > 1000 else 1e-4)
    assert leaf.grad.dtype == velocity.dtype
    # The residual carries one rounding of a state of size about 1 in float32; float16 ends at 2^-24.
    allowed = 5e-6 * exact.grad.abs().amax().item() + (2.0**-25 if dtypes[1] == torch.float16 else 0)
    torch.testing.assert_close(leaf.grad.double(), exact.grad, rtol=storage_error[dtypes[1]], atol=allowed)
    assert (leaf.grad[[1, 4]] == 0).all()


@pytest.mark.capabilities(80, 100)
def test_gradient_equals_the_reference(batch) -> None:
    latents, velocity, next_latents = transition(batch, 3, 17, 41)
    gradients = []
    for implementation in ("triton", "reference"):
        leaf = velocity.clone().requires_grad_()
        arguments = (latents, leaf, next_latents, batch.table, batch.steps)
        sde_log_prob(*arguments, implementation=implementation).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-6, atol=0)


def test_only_the_velocity_gets_a_gradient(batch) -> None:
    leaves = [tensor.requires_grad_() for tensor in transition(batch, 6)]
    score(batch, *leaves).sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [False, True, False]


@pytest.mark.capabilities(80, 100)
@pytest.mark.usefixtures("poisoned_memory")
def test_strided_inputs(batch) -> None:
    packed = transition(batch, 6, 5)
    results = []
    for inputs in (packed, tuple(tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in packed)):
        leaf = inputs[1].detach().requires_grad_()
        log_prob = score(batch, inputs[0], leaf, inputs[2])
        log_prob.sum().backward()
        results.append((log_prob.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_row_does_not_depend_on_its_batch(batch) -> None:
    inputs = transition(batch, 4100)
    whole = score(batch, *inputs)
    alone = sde_log_prob(*(tensor[3:4] for tensor in inputs), batch.table, 4, implementation="triton")
    assert torch.equal(alone, whole[3:4])


def test_two_runs_are_bit_equal(batch) -> None:
    inputs = transition(batch, 4100)
    assert torch.equal(score(batch, *inputs), score(batch, *inputs))


@pytest.mark.capabilities(80, 100)
def test_a_step_outside_the_table_is_nan(batch) -> None:
    latents, velocity, next_latents = transition(batch, 10)
    leaf = velocity.requires_grad_()
    steps = torch.tensor([0, 10, 8, -1, 7], device=leaf.device)
    log_prob = sde_log_prob(latents, leaf, next_latents, batch.table, steps, implementation="triton")
    log_prob.nansum().backward()
    assert log_prob.isnan().tolist() == [False, True, False, True, False]
    assert leaf.grad[[0, 2, 4]].isfinite().all()


def test_opcheck(batch) -> None:
    latents, velocity, next_latents = transition(batch, 3, 4)
    rest = (*[None] * 4, next_latents, batch.table, batch.steps, C)
    arguments = (latents, velocity.requires_grad_(), *rest, "triton")
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_log_prob.default, arguments)
    backward = (torch.ones(5, device=latents.device), None, latents, velocity.detach(), *rest, False, "triton")
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_log_prob_backward.default, backward)


def test_under_torch_compile(batch) -> None:
    latents, velocity, next_latents = transition(batch, 3, 4)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss(leaf: Tensor) -> Tensor:
        return score(batch, latents, leaf, next_latents).square().sum()

    leaves = [velocity.clone().requires_grad_() for _ in range(2)]
    loss(leaves[0]).backward()
    score(batch, latents, leaves[1], next_latents).square().sum().backward()
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-6, atol=0)
