from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch._subclasses.fake_tensor import FakeTensorMode

from densegrpo_fast.flow import native
from densegrpo_fast.flow.ops import euler_jump
from densegrpo_fast.flow.reference import euler_jump_ref
from densegrpo_fast.flow.schedule import sd3_sigmas

SIGMA = torch.tensor([1.0, 0.75, 0.5])
NEXT = torch.tensor([0.5, 0.0, 0.25])

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not())
IMPLEMENTATIONS = ["reference", pytest.param("cpu", marks=needs_native)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_rows_move_between_their_own_noise_levels(implementation: str) -> None:
    # dt = -.5, -.75, -.25; with latents 1 and velocity 2 the rows end at 0, -.5 and .5.
    moved = euler_jump(torch.ones(3, 2, 2), torch.full((3, 2, 2), 2.0), SIGMA, NEXT, implementation=implementation)
    assert torch.equal(moved[:, 0, 0], torch.tensor([0.0, -0.5, 0.5]))
    assert torch.equal(moved, moved[:, :1, :1].expand(3, 2, 2))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_the_diffusers_step_bit_for_bit(implementation: str) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    sigmas = sd3_sigmas(10)
    latents, velocity = torch.randn(2, 3, 4, 8, 8)
    for step, timestep in enumerate(scheduler.timesteps):
        expected = scheduler.step(velocity, timestep, latents).prev_sample
        moved = euler_jump(latents, velocity, sigmas[step], sigmas[step + 1], implementation=implementation)
        assert torch.equal(moved, expected)


@needs_native
@pytest.mark.parametrize("shape", [(1,), (5,), (1021,), (4096,), (33, 65), (4, 33, 65), (16, 32, 32)], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_compiled_jump_is_the_reference_bit_for_bit(shape: tuple[int, ...]) -> None:
    latents, velocity = torch.randn(2, 3, *shape)
    expected = euler_jump_ref(latents, velocity, SIGMA, NEXT)
    for _ in range(2):
        assert torch.equal(euler_jump(latents, velocity, SIGMA, NEXT, implementation="cpu"), expected)
    exact = euler_jump_ref(latents.double(), velocity.double(), SIGMA, NEXT)
    torch.testing.assert_close(expected.double(), exact, rtol=1e-6, atol=1e-6)


@needs_native
def test_compiled_jump_does_not_depend_on_the_number_of_threads() -> None:
    latents, velocity = torch.randn(2, 3, 16, 64, 64)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(euler_jump(latents, velocity, SIGMA, NEXT, implementation="cpu"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*results)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("batch", [1, 64])
@pytest.mark.usefixtures("poisoned_memory")
def test_strided_states_and_half_precision_levels(implementation: str, batch: int) -> None:
    latents, velocity = torch.randn(2, batch, 7, 5).transpose(2, 3)
    levels = torch.rand(2, 2 * batch).sort(dim=0, descending=True).values.half()[:, ::2]
    moved = euler_jump(latents, velocity, *levels, implementation=implementation)
    assert moved.is_contiguous()
    dt = (levels[1] - levels[0]).float()[:, None, None]
    assert torch.equal(moved, latents + dt * velocity)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(dtype: torch.dtype) -> None:
    latents, velocity = torch.randn(2, 3, 50).to(dtype)
    expected = euler_jump(latents.float(), velocity.float(), SIGMA, NEXT).to(dtype)
    assert torch.equal(euler_jump(latents, velocity, SIGMA, NEXT), expected)


def test_gradcheck() -> None:
    latents, velocity = torch.randn(2, 3, 4, dtype=torch.float64).unbind()
    latents.requires_grad_()
    velocity.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, v: euler_jump(x, v, SIGMA, NEXT), (latents, velocity))


@needs_native
def test_gradients_of_the_compiled_jump() -> None:
    latents, velocity = torch.randn(2, 3, 40).unbind()
    latents.requires_grad_()
    velocity.requires_grad_()
    upstream = torch.randn(3, 40)
    euler_jump(latents, velocity, SIGMA, NEXT, implementation="cpu").backward(upstream)
    assert torch.equal(latents.grad, upstream)
    torch.testing.assert_close(velocity.grad, (NEXT - SIGMA)[:, None] * upstream, rtol=1e-6, atol=1e-6)


def test_gradients_keep_their_dtypes() -> None:
    latents = torch.randn(3, 4, requires_grad=True)
    velocity = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True)
    euler_jump(latents, velocity, SIGMA, NEXT).sum().backward()
    assert (latents.grad.dtype, velocity.grad.dtype) == (torch.float32, torch.bfloat16)
    assert torch.equal(velocity.grad.float(), (NEXT - SIGMA)[:, None].expand(3, 4))


@pytest.mark.ci
@pytest.mark.parametrize("implementation", ["auto", *IMPLEMENTATIONS])
def test_opcheck(implementation: str) -> None:
    latents, velocity = (torch.randn(3, 2, 4, requires_grad=True) for _ in range(2))
    arguments = (latents, velocity, SIGMA, NEXT, implementation)
    torch.library.opcheck(torch.ops.densegrpo_fast.euler_jump.default, arguments)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_it_is_one_node_of_a_compiled_graph(implementation: str) -> None:
    latents, velocity = torch.randn(2, 3, 4, 5)

    def run(x: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return euler_jump(x + 1, v, SIGMA, NEXT, implementation=implementation)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(latents, velocity), run(latents, velocity))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        moved = euler_jump(torch.empty(3, 8).half(), torch.empty(3, 8), torch.empty(3), torch.empty(()))
    assert (moved.shape, moved.dtype) == ((3, 8), torch.float16)


def test_bad_arguments_are_named() -> None:
    latents = torch.zeros(3, 4)
    with pytest.raises(ValueError, match=r"euler_jump: sigma must have shape \[3\], got \[2\]"):
        euler_jump(latents, latents, SIGMA[:2], NEXT)
    with pytest.raises(TypeError, match="euler_jump: next_sigma must be float32"):
        euler_jump(latents, latents, SIGMA, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(TypeError, match="euler_jump: sigma must be a tensor, got float"):
        euler_jump(latents, latents, 1.0, NEXT)
    with pytest.raises(ValueError, match="euler_jump: velocity must have shape"):
        euler_jump(latents, latents[:2], SIGMA, NEXT)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("sigma", "next_sigma", "message"),
    [
        ([1.0, 0.5, 0.5], [0.5, 0.75, 0.25], "got next_sigma 0.75 and sigma 0.5 in row 1"),
        ([1.0, 0.5, 1.5], [0.5, 0.5, 0.25], "got next_sigma 0.25 and sigma 1.5 in row 2"),
        ([1.0, 0.5, 0.5], [-0.5, 0.5, 0.25], "got next_sigma -0.5 and sigma 1.0 in row 0"),
        ([1.0, float("nan"), 0.5], [0.5, 0.25, 0.25], "got next_sigma 0.25 and sigma nan in row 1"),
    ],
)
def test_noise_levels_go_down_within_0_and_1(implementation: str, sigma, next_sigma, message: str) -> None:
    with pytest.raises(ValueError, match=f"euler_jump: must have 0 <= next_sigma <= sigma <= 1, {message}"):
        levels = (torch.tensor(sigma), torch.tensor(next_sigma))
        euler_jump(torch.zeros(3, 4), torch.zeros(3, 4), *levels, implementation=implementation)
