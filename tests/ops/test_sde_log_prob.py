from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from densegrpo_fast.flow import native
from densegrpo_fast.flow.dynamics import C, coefficients
from densegrpo_fast.flow.ops import sde_log_prob, sde_step
from densegrpo_fast.flow.reference import sde_log_prob_ref
from densegrpo_fast.flow.schedule import sd3_sigmas

LEVELS = [0.7, 0.7, 0.0, 0.5, 0.7, 0.7, 0.9, 0.0, 0.7, 0.7]
TABLE = coefficients(sd3_sigmas(10), LEVELS, "flow_sde").table
STEPS = torch.tensor([0, 2, 8, 4])

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not())
IMPLEMENTATIONS = ["reference", pytest.param("cpu", marks=needs_native)]
SHAPES = [(1,), (3,), (5,), (1021,), (4096,), (33, 65), (4, 33, 65), (16, 32, 32)]


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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_value_and_gradient_against_float64(implementation: str, shape: tuple[int, ...]) -> None:
    latents, velocity, next_latents = transition(*shape)
    upstream = torch.tensor([0.3, -1.0, 2.0, 0.5])
    leaf, double_leaf = velocity.clone().requires_grad_(), velocity.double().requires_grad_()
    log_prob = sde_log_prob(latents, leaf, next_latents, TABLE, STEPS, implementation=implementation)
    expected = sde_log_prob_ref(latents.double(), double_leaf, next_latents.double(), TABLE, STEPS)
    (gradient,) = torch.autograd.grad(log_prob, leaf, upstream)
    (expected_gradient,) = torch.autograd.grad(expected, double_leaf, upstream.double())
    # A residual is known to about one rounding of the state, 2e-7, and counts in units of C, here at least .02.
    tolerance = 1e-6 if math.prod(shape) > 1000 else 5e-4
    torch.testing.assert_close(log_prob.double(), expected, rtol=tolerance, atol=tolerance)
    slope = expected_gradient.flatten(1).abs().amax(1).reshape(-1, *[1] * len(shape))
    assert ((gradient - expected_gradient).abs() <= 1e-4 * slope).all()
    assert gradient.shape == velocity.shape
    assert log_prob[1] == 0
    assert (gradient[1] == 0).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
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
        iteration=0,
        implementation=implementation,
    )
    log_prob = sde_log_prob(latents, velocity, next_latents, TABLE, steps, implementation=implementation)
    assert ((log_prob - old_log_prob).exp() - 1).abs().max() <= 1e-6
    if implementation == "cpu":
        assert torch.equal(log_prob, old_log_prob)


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


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.usefixtures("poisoned_memory")
def test_strided_velocity(implementation: str) -> None:
    latents, velocity, next_latents = (tensor.transpose(1, 2) for tensor in transition(6, 5))
    strided = velocity.detach().requires_grad_()
    packed = velocity.contiguous().requires_grad_()
    for leaf in (strided, packed):
        sde_log_prob(latents, leaf, next_latents, TABLE, STEPS, implementation=implementation).sum().backward()
    torch.testing.assert_close(strided.grad, packed.grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_opcheck(implementation: str) -> None:
    latents, velocity, next_latents = transition(3, 4)
    velocity.requires_grad_()
    rest = (*[None] * 4, next_latents, TABLE, STEPS, C)
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_log_prob.default, (latents, velocity, *rest, implementation))
    backward = (torch.ones(4), None, latents, velocity.detach(), *rest, False, implementation)
    torch.library.opcheck(torch.ops.densegrpo_fast.sde_log_prob_backward.default, backward)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_two_runs_are_bit_equal(implementation: str) -> None:
    latents, velocity, next_latents = transition(16, 32, 32)
    runs = []
    for _ in range(2):
        leaf = velocity.clone().requires_grad_()
        log_prob = sde_log_prob(latents, leaf, next_latents, TABLE, STEPS, implementation=implementation)
        log_prob.sum().backward()
        runs.append((log_prob, leaf.grad))
    assert torch.equal(runs[0][0], runs[1][0])
    assert torch.equal(runs[0][1], runs[1][1])
    assert all(math.isfinite(value) for value in runs[0][0].tolist())


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_a_row_does_not_depend_on_its_batch(implementation: str, batch: int) -> None:
    latents, velocity, next_latents = torch.randn(3, batch, 4, 17, 5)
    steps = torch.arange(batch) % len(TABLE)
    whole = sde_log_prob(latents, velocity, next_latents, TABLE, steps, implementation=implementation)
    last = [tensor[-1:] for tensor in (latents, velocity, next_latents)]
    alone = sde_log_prob(*last, TABLE, steps[-1:], implementation=implementation)
    if implementation == "cpu":
        assert torch.equal(alone, whole[-1:])
    torch.testing.assert_close(alone, whole[-1:], rtol=1e-6, atol=1e-6)


@needs_native
def test_compiled_gradient_does_not_depend_on_the_number_of_threads() -> None:
    latents, velocity, next_latents = transition(16, 64, 64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            leaf = velocity.clone().requires_grad_()
            log_prob = sde_log_prob(latents, leaf, next_latents, TABLE, STEPS, implementation="cpu")
            log_prob.sum().backward()
            results.append((log_prob, leaf.grad))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_one_node_of_a_compiled_graph(implementation: str) -> None:
    latents, velocity, next_latents = transition(3, 7)

    def run(v: Tensor) -> Tensor:
        return sde_log_prob(latents, 2 * v, next_latents, TABLE, STEPS, implementation=implementation)

    gradients = []
    for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
        leaf = velocity.clone().requires_grad_()
        function(leaf).sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_bad_arguments_are_named() -> None:
    latents, velocity, next_latents = transition(3, 4)
    with pytest.raises(ValueError, match=r"sde_log_prob: next_latents must have shape \[4, 3, 4\] like latents"):
        sde_log_prob(latents, velocity, next_latents[:, :2], TABLE, STEPS)
    with pytest.raises(ValueError, match="sde_log_prob: step_index must have shape"):
        sde_log_prob(latents, velocity, next_latents, TABLE, STEPS[:2])
    with pytest.raises(
        RuntimeError, match="sde_log_prob: implementation 'cpu' cannot serve this call: it needs float32"
    ):
        sde_log_prob(latents, velocity.half(), next_latents, TABLE, STEPS, implementation="cpu")
    for implementation in ("reference", *(["cpu"] if native.available() else [])):
        with pytest.raises(ValueError, match=r"sde_log_prob: step_index must be in \[0, 10\), got 10 in row 2"):
            sde_log_prob(latents, velocity, next_latents, TABLE, STEPS + 2, implementation=implementation)
