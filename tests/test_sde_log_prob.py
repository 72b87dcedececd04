from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from densegrpo_fast.flow import native
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.flow.ops import sde_log_prob, sde_step
from densegrpo_fast.flow.reference import sde_log_prob_ref
from densegrpo_fast.flow.schedule import sd3_sigmas

LEVELS = [0.7, 0.7, 0.0, 0.5, 0.7, 0.7, 0.9, 0.0, 0.7, 0.7]
TABLE = coefficients(sd3_sigmas(10), LEVELS, "flow_sde").table
STEPS = torch.tensor([0, 2, 8, 4])


def transition(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    latents, velocity, noise = torch.randn(3, 4, *shape, dtype=torch.float64)
    rows = TABLE.double()[STEPS].reshape(4, 6, *([1] * len(shape)))
    next_latents = rows[:, 0] * latents + rows[:, 1] * velocity + rows[:, 2] * noise
    return latents.to(dtype), velocity.to(dtype), next_latents.to(dtype)


def test_value_by_hand() -> None:
    # mean = 2*1 - 1*3 = -1, residuals 1 and -2, mean square 2.5; log_prob = -.5*2.5 + .25 = -1.
    table = torch.tensor([[2.0, -1.0, 1.0, 1.0, 0.5, 0.25]])
    log_prob = sde_log_prob(torch.ones(1, 2), torch.full((1, 2), 3.0), torch.tensor([[0.0, -3.0]]), table, 0)
    torch.testing.assert_close(log_prob, torch.tensor([-1.0]))


def test_it_is_the_mean_gaussian_log_density() -> None:
    latents, velocity, next_latents = transition(3, 5, dtype=torch.float64)
    log_prob = sde_log_prob(latents, velocity, next_latents, TABLE, STEPS)
    row = TABLE.double()[4]
    density = torch.distributions.Normal(row[0] * latents[3] + row[1] * velocity[3], row[2]).log_prob(next_latents[3])
    torch.testing.assert_close(log_prob[3], density.mean(), rtol=1e-6, atol=1e-6)
    assert log_prob[1] == 0


@pytest.mark.parametrize(
    "implementation",
    [
        "reference",
        pytest.param("cpu", marks=pytest.mark.skipif(not native.available(), reason=native.why_not())),
    ],
)
def test_rescoring_a_rollout_gives_ratio_one(implementation: str) -> None:
    latents, velocity = torch.randn(2, 6, 16, 32, 32)
    steps = torch.tensor([0, 1, 4, 6, 8, 9])
    next_latents, old_log_prob = sde_step(
        latents,
        velocity,
        TABLE,
        steps,
        seed=1,
        sample_index=torch.arange(6),
        epoch=0,
        implementation=implementation,
    )
    log_prob = sde_log_prob(latents, velocity, next_latents, TABLE, steps)
    assert ((log_prob - old_log_prob).exp() - 1).abs().max() <= 1e-6


def test_gradient_equals_autograd_through_the_reference() -> None:
    latents, velocity, next_latents = transition(4, 7, dtype=torch.float64)
    upstream = torch.tensor([0.3, -1.0, 2.0, 0.5], dtype=torch.float64)
    gradients = []
    for function in (sde_log_prob, sde_log_prob_ref):
        leaf = velocity.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(function(latents, leaf, next_latents, TABLE, STEPS), leaf, upstream)
        gradients.append(gradient)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)
    assert (gradients[0][1] == 0).all()


def test_gradcheck() -> None:
    latents, velocity, next_latents = transition(5, dtype=torch.float64)
    velocity.requires_grad_()
    assert torch.autograd.gradcheck(lambda v: sde_log_prob(latents, v, next_latents, TABLE, STEPS), velocity)


def test_gradient_gain_of_the_published_sampler() -> None:
    # |d mean / d velocity| / C on the SD3 grid at a = .7, label 10 ... 1.
    table = coefficients(sd3_sigmas(10), 0.7, "flow_sde").table
    expected = torch.tensor([0.057, 0.078, 0.129, 0.188, 0.264, 0.371, 0.536, 0.825, 1.487, 1.771])
    # With one element, next = mean + C and upstream gradient 1, the gradient is exactly B/C.
    latents, velocity = torch.zeros(10, 1), torch.zeros(10, 1, requires_grad=True)
    sde_log_prob(latents, velocity, table[:, 2:3], table, torch.arange(10)).sum().backward()
    torch.testing.assert_close(velocity.grad.flatten().abs(), expected, atol=6e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_half_precision_velocity(dtype: torch.dtype) -> None:
    latents, velocity, next_latents = transition(16, 16, 4)
    velocity = velocity.to(dtype).requires_grad_()
    log_prob = sde_log_prob(latents, velocity, next_latents, TABLE, STEPS)
    log_prob.sum().backward()
    assert log_prob.dtype == torch.float32
    assert velocity.grad.dtype == dtype
    leaf = velocity.detach().double().requires_grad_()
    expected = sde_log_prob_ref(latents.double(), leaf, next_latents.double(), TABLE, STEPS)
    expected.sum().backward()
    error = (log_prob - expected).abs() / expected.abs().clamp(min=1)
    assert error.max() < 1e-6
    # float16 holds these gradients (about 1e-3) to 2^-11 of their value, bfloat16 to 2^-8.
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]
    torch.testing.assert_close(velocity.grad.double(), leaf.grad, rtol=tolerance, atol=1e-7)


def test_strided_velocity() -> None:
    latents, velocity, next_latents = (tensor.transpose(1, 2) for tensor in transition(6, 5))
    strided = velocity.detach().requires_grad_()
    packed = velocity.contiguous().requires_grad_()
    for leaf in (strided, packed):
        sde_log_prob(latents, leaf, next_latents, TABLE, STEPS).sum().backward()
    torch.testing.assert_close(strided.grad, packed.grad)


def test_opcheck() -> None:
    latents, velocity, next_latents = transition(3, 4)
    velocity.requires_grad_()
    arguments = (latents, velocity, next_latents, TABLE, STEPS, "reference")
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_log_prob.default, arguments)
    backward = (torch.ones(4), latents, velocity.detach(), next_latents, TABLE, STEPS, "reference")
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_log_prob_backward.default, backward)


def test_two_runs_are_bit_equal() -> None:
    inputs = transition(16, 32, 32)
    first = sde_log_prob(*inputs, TABLE, STEPS)
    assert torch.equal(first, sde_log_prob(*inputs, TABLE, STEPS))
    assert all(math.isfinite(value) for value in first.tolist())


def test_bad_arguments_are_named() -> None:
    latents, velocity, next_latents = transition(3, 4)
    with pytest.raises(ValueError, match=r"sde_log_prob: next_latents must have shape \[4, 3, 4\] like latents"):
        sde_log_prob(latents, velocity, next_latents[:, :2], TABLE, STEPS)
    with pytest.raises(ValueError, match="sde_log_prob: step_index must have shape"):
        sde_log_prob(latents, velocity, next_latents, TABLE, STEPS[:2])
    with pytest.raises(RuntimeError, match="sde_log_prob: implementation 'cpu' cannot serve this call"):
        sde_log_prob(latents, velocity, next_latents, TABLE, STEPS, implementation="cpu")
