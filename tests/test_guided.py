from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.flow.guided import combine, guided_sde_log_prob, guided_sde_step
from densegrpo_fast.flow.ops import sde_log_prob, sde_step
from densegrpo_fast.flow.reference import sde_log_prob_ref
from densegrpo_fast.flow.schedule import sd3_sigmas
from densegrpo_fast.models.base import Velocity

TABLE = coefficients(sd3_sigmas(10), [0.7, 0.7, 0.0, 0.5, 0.7, 0.7, 0.9, 0.0, 0.7, 0.7], "flow_sde").table
STEPS = torch.tensor([0, 2, 8, 4])
SCALE = torch.tensor([1.0, 4.5, 7.0, 0.0])
COUNTERS = {"seed": 1234, "sample_index": torch.tensor([3, 0, 70000, 5]), "epoch": 6}


def states(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    latents, cond, uncond = torch.randn(3, 4, *shape, dtype=dtype)
    return latents, cond, uncond


def test_combine_is_the_models_own_guidance() -> None:
    _, cond, uncond = states(3, 5)
    assert torch.equal(combine(cond, uncond, torch.full((4,), 4.5)), Velocity(cond, uncond, 4.5).combined())
    assert torch.equal(combine(cond, uncond, SCALE)[3], uncond[3])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.usefixtures("poisoned_memory")
def test_it_is_the_plain_op_of_the_combined_velocity(dtype: torch.dtype) -> None:
    latents, cond, uncond = (tensor.to(dtype) for tensor in states(3, 5))
    velocity = combine(cond, uncond, SCALE)
    next_latents, log_prob = guided_sde_step(latents, cond, uncond, SCALE, TABLE, STEPS, **COUNTERS)
    expected = sde_step(latents, velocity, TABLE, STEPS, **COUNTERS)
    assert (next_latents.dtype, log_prob.dtype) == (dtype, expected[1].dtype)
    assert torch.equal(next_latents, expected[0])
    assert torch.equal(log_prob, expected[1])
    rescored = guided_sde_log_prob(latents, cond, uncond, SCALE, next_latents, TABLE, STEPS)
    assert torch.equal(rescored, sde_log_prob(latents, velocity, next_latents, TABLE, STEPS))


def test_half_precision_velocities() -> None:
    latents, cond, uncond = states(3, 5)
    halves = (cond.bfloat16(), uncond.bfloat16())
    next_latents, log_prob = guided_sde_step(latents, *halves, SCALE, TABLE, STEPS, **COUNTERS)
    expected = sde_step(latents, combine(*halves, SCALE), TABLE, STEPS, **COUNTERS)
    assert torch.equal(next_latents, expected[0])
    leaves = [half.requires_grad_() for half in halves]
    guided_sde_log_prob(latents, *leaves, SCALE, next_latents, TABLE, STEPS).sum().backward()
    exact = [half.detach().float().requires_grad_() for half in halves]
    guided_sde_log_prob(latents, *exact, SCALE, next_latents, TABLE, STEPS).sum().backward()
    for leaf, target in zip(leaves, exact, strict=True):
        assert torch.equal(leaf.grad, target.grad.bfloat16())


def test_a_number_serves_all_rows() -> None:
    inputs = states(3, 5)
    number = guided_sde_step(*inputs, 4.5, TABLE, STEPS, **COUNTERS)
    rows = guided_sde_step(*inputs, torch.full((4,), 4.5), TABLE, STEPS, **COUNTERS)
    assert torch.equal(number[0], rows[0])


def test_gradcheck() -> None:
    latents, cond, uncond = states(5, dtype=torch.float64)
    next_latents = torch.randn(4, 5, dtype=torch.float64)
    leaves = (cond.requires_grad_(), uncond.requires_grad_())

    def score(cond: Tensor, uncond: Tensor) -> Tensor:
        return guided_sde_log_prob(latents, cond, uncond, SCALE, next_latents, TABLE, STEPS)

    assert torch.autograd.gradcheck(score, leaves)


def test_gradients_equal_autograd_through_the_reference() -> None:
    latents, cond, uncond = states(3, 5, dtype=torch.float64)
    next_latents = torch.randn_like(latents)
    results = []
    for through_op in (True, False):
        leaves = [cond.clone().requires_grad_(), uncond.clone().requires_grad_()]
        if through_op:
            log_prob = guided_sde_log_prob(latents, *leaves, SCALE, next_latents, TABLE, STEPS)
        else:
            log_prob = sde_log_prob_ref(latents, combine(*leaves, SCALE), next_latents, TABLE, STEPS)
        results.append(torch.autograd.grad(log_prob, leaves, torch.tensor([0.3, -1, 2, 0.5], dtype=torch.float64)))
    for name, actual, expected in zip(("cond", "uncond"), *results, strict=True):
        assert torch.allclose(actual, expected, rtol=1e-12, atol=1e-12), name


def test_uncond_without_gradient() -> None:
    latents, cond, uncond = states(3, 5)
    guided_sde_log_prob(latents, cond.requires_grad_(), uncond, 4.5, latents, TABLE, STEPS).sum().backward()
    assert cond.grad is not None
    assert uncond.grad is None


def test_opcheck() -> None:
    latents, cond, uncond = states(3, 4)
    words = (torch.tensor([5]), COUNTERS["sample_index"], torch.tensor([2]), 1)
    step = (latents, cond, uncond, SCALE, TABLE, STEPS, *words, "reference")
    torch.library.opcheck(torch.ops.densegrpo_fast.guided_sde_step.default, step)
    cond.requires_grad_()
    uncond.requires_grad_()
    score = (latents, cond, uncond, SCALE, latents, TABLE, STEPS, "reference")
    torch.library.opcheck(torch.ops.densegrpo_fast.guided_sde_log_prob.default, score)


def test_fake_tensors() -> None:
    with FakeTensorMode():
        latents, index = torch.empty(4, 8).bfloat16(), torch.zeros(4, dtype=torch.int64)
        counters = {"seed": index[:1], "sample_index": index, "epoch": index[:1]}
        moved, log_prob = guided_sde_step(latents, latents, latents, 4.5, torch.empty(10, 6), index, **counters)
    assert (moved.shape, moved.dtype) == ((4, 8), torch.bfloat16)
    assert (log_prob.shape, log_prob.dtype) == ((4,), torch.float32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"uncond": torch.zeros(4, 7)}, ValueError, r"guided_sde_log_prob: uncond must have shape \[4, 8\] like"),
        ({"cond": torch.zeros(4, 8).int()}, TypeError, "guided_sde_log_prob: cond must be float32"),
        ({"guidance_scale": SCALE[:3]}, ValueError, r"guided_sde_log_prob: guidance_scale must have shape \[4\], got"),
        ({"guidance_scale": SCALE.double()}, TypeError, "guidance_scale must be float32, got torch.float64"),
        ({"step_index": STEPS[:3]}, ValueError, "guided_sde_log_prob: step_index must have shape"),
        ({"implementation": "cuda"}, RuntimeError, "guided_sde_log_prob: implementation 'cuda' cannot serve this call"),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type[Exception], message: str) -> None:
    zeros = torch.zeros(4, 8)
    arguments = {"cond": zeros, "uncond": zeros, "guidance_scale": 4.5, "step_index": STEPS, **options}
    with pytest.raises(error, match=message):
        guided_sde_log_prob(zeros, next_latents=zeros, table=TABLE, **arguments)
