"""Classifier-free guidance inside the step and the score: the plain op's numbers, gradients to both velocities."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from densegrpo_fast.flow import native
from densegrpo_fast.flow.dynamics import C, coefficients
from densegrpo_fast.flow.ops import sde_log_prob, sde_step
from densegrpo_fast.flow.reference import guided_velocity_ref, sde_log_prob_ref
from densegrpo_fast.flow.schedule import sd3_sigmas
from densegrpo_fast.models.base import Velocity

TABLE = coefficients(sd3_sigmas(10), [0.7, 0.7, 0.0, 0.5, 0.7, 0.7, 0.9, 0.0, 0.7, 0.7], "flow_sde").table
STEPS = torch.tensor([0, 2, 8, 4])
SCALE = torch.tensor([1.0, 4.5, 7.0, 0.0])
COUNTERS = {"seed": 1234, "sample_index": torch.tensor([3, 0, 70000, 5]), "iteration": 6}

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not())
IMPLEMENTATIONS = ["reference", pytest.param("cpu", marks=needs_native)]


def states(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    latents, cond, uncond = torch.randn(3, 4, *shape, dtype=dtype)
    return latents, cond, uncond


def guided_step(latents: Tensor, cond: Tensor, uncond: Tensor, scale, **options) -> tuple[Tensor, Tensor]:
    guidance = {"uncond": uncond, "guidance_scale": scale}
    return sde_step(latents, cond, TABLE, STEPS, **guidance, **COUNTERS, **options)


def guided_score(latents: Tensor, cond: Tensor, uncond: Tensor, scale, next_latents: Tensor, **options) -> Tensor:
    return sde_log_prob(latents, cond, next_latents, TABLE, STEPS, uncond=uncond, guidance_scale=scale, **options)


def test_the_reference_is_the_models_own_guidance() -> None:
    _, cond, uncond = states(3, 5)
    guided = guided_velocity_ref(cond, uncond, torch.full((4,), 4.5))
    assert torch.equal(guided, Velocity(cond, uncond, 4.5).combined())
    assert torch.equal(guided_velocity_ref(cond, uncond, SCALE)[3], uncond[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("poisoned_memory")
def test_it_is_the_plain_op_of_the_combined_velocity(dtype: torch.dtype) -> None:
    latents, cond, uncond = (tensor.to(dtype) for tensor in states(3, 5))
    velocity = guided_velocity_ref(cond, uncond, SCALE)
    next_latents, log_prob = guided_step(latents, cond, uncond, SCALE)
    expected = sde_step(latents, velocity, TABLE, STEPS, **COUNTERS)
    assert (next_latents.dtype, log_prob.dtype) == (dtype, expected[1].dtype)
    assert torch.equal(next_latents, expected[0])
    assert torch.equal(log_prob, expected[1])
    rescored = guided_score(latents, cond, uncond, SCALE, next_latents)
    assert torch.equal(rescored, sde_log_prob(latents, velocity, next_latents, TABLE, STEPS))


@needs_native
@pytest.mark.parametrize("shape", [(1,), (4099,), (4, 33, 65)], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_compiled_forms_repeat_the_plain_ones_bit_for_bit(shape: tuple[int, ...]) -> None:
    latents, cond, uncond = states(*shape)
    velocity = guided_velocity_ref(cond, uncond, SCALE)
    next_latents, log_prob = guided_step(latents, cond, uncond, SCALE, implementation="cpu")
    plain = sde_step(latents, velocity, TABLE, STEPS, implementation="cpu", **COUNTERS)
    assert torch.equal(next_latents, plain[0])
    assert torch.equal(log_prob, plain[1])
    leaves = [cond.requires_grad_(), uncond.requires_grad_()]
    rescored = guided_score(latents, *leaves, SCALE, next_latents, implementation="cpu")
    assert torch.equal(rescored, log_prob), "an unchanged policy's ratio is 1"
    upstream = torch.tensor([0.3, -1.0, 2.0, 0.5])
    found = torch.autograd.grad(rescored, leaves, upstream)
    leaf = velocity.detach().requires_grad_()
    score = sde_log_prob(latents, leaf, next_latents, TABLE, STEPS, implementation="cpu")
    (gradient,) = torch.autograd.grad(score, leaf, upstream)
    factor = SCALE.reshape(-1, *[1] * len(shape))
    assert torch.equal(found[0], factor * gradient)
    assert torch.equal(found[1], (1 - factor) * gradient)


def test_half_precision_velocities() -> None:
    latents, cond, uncond = states(3, 5)
    halves = (cond.bfloat16(), uncond.bfloat16())
    next_latents, log_prob = guided_step(latents, *halves, SCALE)
    expected = sde_step(latents, guided_velocity_ref(*halves, SCALE), TABLE, STEPS, **COUNTERS)
    assert torch.equal(next_latents, expected[0])
    leaves = [half.requires_grad_() for half in halves]
    guided_score(latents, *leaves, SCALE, next_latents).sum().backward()
    exact = [half.detach().float().requires_grad_() for half in halves]
    guided_score(latents, *exact, SCALE, next_latents).sum().backward()
    for leaf, target in zip(leaves, exact, strict=True):
        assert torch.equal(leaf.grad, target.grad.bfloat16())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_number_serves_all_rows(implementation: str) -> None:
    inputs = states(3, 5)
    number = guided_step(*inputs, 4.5, implementation=implementation)
    rows = guided_step(*inputs, torch.full((4,), 4.5), implementation=implementation)
    assert torch.equal(number[0], rows[0])


def test_gradcheck() -> None:
    latents, cond, uncond = states(5, dtype=torch.float64)
    next_latents = torch.randn(4, 5, dtype=torch.float64)
    leaves = (cond.requires_grad_(), uncond.requires_grad_())
    assert torch.autograd.gradcheck(lambda c, u: guided_score(latents, c, u, SCALE, next_latents), leaves)


def test_gradients_equal_autograd_through_the_reference() -> None:
    latents, cond, uncond = states(3, 5, dtype=torch.float64)
    next_latents = torch.randn_like(latents)
    results = []
    for through_op in (True, False):
        leaves = [cond.clone().requires_grad_(), uncond.clone().requires_grad_()]
        if through_op:
            log_prob = guided_score(latents, *leaves, SCALE, next_latents)
        else:
            log_prob = sde_log_prob_ref(latents, guided_velocity_ref(*leaves, SCALE), next_latents, TABLE, STEPS)
        results.append(torch.autograd.grad(log_prob, leaves, torch.tensor([0.3, -1, 2, 0.5], dtype=torch.float64)))
    for name, actual, expected in zip(("cond", "uncond"), *results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12), name


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.usefixtures("poisoned_memory")
def test_uncond_without_gradient(implementation: str) -> None:
    latents, cond, uncond = states(3, 5)
    leaves = [cond.clone().requires_grad_() for _ in range(2)]
    other = uncond.clone().requires_grad_()
    guided_score(latents, leaves[0], uncond, 4.5, latents, implementation=implementation).sum().backward()
    guided_score(latents, leaves[1], other, 4.5, latents, implementation=implementation).sum().backward()
    assert uncond.grad is None
    assert torch.equal(leaves[0].grad, leaves[1].grad)
    assert other.grad[0].count_nonzero() > 0


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_opcheck(implementation: str) -> None:
    latents, cond, uncond = states(3, 4)
    words = (torch.tensor([5]), COUNTERS["sample_index"], torch.tensor([2]), 1)
    step = (latents, cond, uncond, SCALE, TABLE, STEPS, *words, None, False, implementation)
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_step.default, step)
    cond.requires_grad_()
    uncond.requires_grad_()
    score = (latents, cond, uncond, SCALE, None, None, latents, TABLE, STEPS, C, implementation)
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_log_prob.default, score)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        latents, index = torch.empty(4, 8).bfloat16(), torch.zeros(4, dtype=torch.int64)
        counters = {"seed": index[:1], "sample_index": index, "iteration": index[:1]}
        guidance = {"uncond": latents, "guidance_scale": 4.5}
        moved, log_prob = sde_step(latents, latents, torch.empty(10, 6), index, **guidance, **counters)
    assert (moved.shape, moved.dtype) == ((4, 8), torch.bfloat16)
    assert (log_prob.shape, log_prob.dtype) == ((4,), torch.float32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"uncond": torch.zeros(4, 7)}, ValueError, r"sde_log_prob: uncond must have shape \[4, 8\] like"),
        ({"uncond": torch.zeros(4, 8, device="meta")}, ValueError, "sde_log_prob: uncond must be on cpu, got meta"),
        ({"uncond": None}, ValueError, "sde_log_prob: guidance_scale 4.5 needs uncond, got None"),
        ({"velocity": torch.zeros(4, 8).int()}, TypeError, "sde_log_prob: velocity must be float32"),
        ({"guidance_scale": SCALE[:3]}, ValueError, r"sde_log_prob: guidance_scale must have shape \[4\], got"),
        ({"guidance_scale": SCALE.double()}, TypeError, "guidance_scale must be float32, got torch.float64"),
        ({"guidance_scale": float("nan")}, ValueError, "sde_log_prob: guidance_scale must be finite, got nan"),
        ({"step_index": STEPS[:3]}, ValueError, "sde_log_prob: step_index must have shape"),
        ({"implementation": "cuda"}, RuntimeError, "guided_sde_log_prob: implementation 'cuda' cannot serve this call"),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type[Exception], message: str) -> None:
    zeros = torch.zeros(4, 8)
    arguments = {"velocity": zeros, "uncond": zeros, "guidance_scale": 4.5, "step_index": STEPS, **options}
    with pytest.raises(error, match=message):
        sde_log_prob(zeros, next_latents=zeros, table=TABLE, **arguments)
