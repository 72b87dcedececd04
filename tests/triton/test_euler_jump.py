from __future__ import annotations

import pytest
import torch
from torch import Tensor

from densegrpo_fast.flow.ops import euler_jump
from densegrpo_fast.flow.reference import euler_jump_ref

SHAPES = [(1,), (3,), (2048,), (5, 7, 9), (4, 33, 65), (33, 64)]
DTYPES = [
    (torch.float32, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.float32),
]
SIGMA = (1.0, 0.75, 0.5, 0.9, 0.1)
NEXT = (0.5, 0.0, 0.25, 0.9, 0.0)


@pytest.fixture
def levels(device: torch.device) -> tuple[Tensor, Tensor]:
    """Noise levels that five rows leave and reach."""
    return torch.tensor(SIGMA, device=device), torch.tensor(NEXT, device=device)


def states(device: torch.device, *shape: int, dtypes=DTYPES[0]) -> tuple[Tensor, Tensor]:
    latents, velocity = torch.randn(2, 5, *shape)
    return latents.to(device, dtypes[0]), velocity.to(device, dtypes[1])


@pytest.mark.ci
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_against_float64(device, levels, storage_error, shape: tuple[int, ...], dtypes) -> None:
    latents, velocity = states(device, *shape, dtypes=dtypes)
    moved = euler_jump(latents, velocity, *levels, implementation="triton")
    assert moved.dtype == latents.dtype
    expected = euler_jump_ref(latents.double(), velocity.double(), *levels)
    torch.testing.assert_close(moved.double(), expected, rtol=storage_error[dtypes[0]], atol=2e-7)


@pytest.mark.capabilities(80, 100)
def test_float32_is_the_reference_bit_for_bit(device, levels) -> None:
    latents, velocity = states(device, 3, 29, 41)
    results = [euler_jump(latents, velocity, *levels, implementation=name) for name in ("triton", "reference")]
    assert torch.equal(results[0], results[1])


def test_one_level_serves_all_rows(device, levels) -> None:
    latents, velocity = states(device, 30)
    moved = euler_jump(latents, velocity, levels[0][1], levels[1][1], implementation="triton")
    assert torch.equal(moved, latents - 0.75 * velocity)


@pytest.mark.capabilities(80, 100)
@pytest.mark.usefixtures("poisoned_memory")
def test_strided_inputs(device, levels) -> None:
    latents, velocity = (tensor.transpose(1, 3) for tensor in states(device, 6, 5, 4))
    strided = [torch.stack([level, level], dim=1)[:, 1] for level in levels]
    moved = euler_jump(latents, velocity, *strided, implementation="triton")
    expected = euler_jump(latents.contiguous(), velocity.contiguous(), *levels, implementation="triton")
    assert moved.is_contiguous()
    assert torch.equal(moved, expected)


def test_gradients(device, levels) -> None:
    latents, velocity = (tensor.requires_grad_() for tensor in states(device, 4, dtypes=DTYPES[1]))
    euler_jump(latents, velocity, *levels, implementation="triton").sum().backward()
    assert torch.equal(latents.grad, torch.ones_like(latents))
    dt = (levels[1] - levels[0])[:, None].expand(5, 4)
    assert torch.equal(velocity.grad, dt.bfloat16())


@pytest.mark.capabilities(80, 100)
def test_half_precision_levels(device, levels) -> None:
    latents, velocity = states(device, 30)
    halves = [level.half() for level in levels]
    moved = euler_jump(latents, velocity, *halves, implementation="triton")
    expected = euler_jump(latents, velocity, *(level.float() for level in halves), implementation="triton")
    assert torch.equal(moved, expected)


@pytest.mark.ci
def test_opcheck(device, levels) -> None:
    latents, velocity = (tensor.requires_grad_() for tensor in states(device, 2, 4))
    torch.library.opcheck(torch.ops.densegrpo_fast.euler_jump.default, (latents, velocity, *levels, "triton"))


@pytest.mark.parametrize("rows", [1, 64])
def test_two_runs_and_rows_of_any_batch(device, rows: int) -> None:
    latents, velocity = (values.to(device) for values in torch.randn(2, rows, 3, 29, 41))
    sigma = torch.linspace(1, 0.5, rows, device=device)
    levels = (sigma, sigma / 2)
    moved = euler_jump(latents, velocity, *levels, implementation="triton")
    assert torch.equal(euler_jump(latents, velocity, *levels, implementation="triton"), moved)
    last = [values[-1:] for values in (latents, velocity, *levels)]
    assert torch.equal(euler_jump(*last, implementation="triton"), moved[-1:])


def test_under_torch_compile(device, levels) -> None:
    inputs = states(device, 3, 4)

    def run(x: Tensor, v: Tensor) -> Tensor:
        return euler_jump(x + 1, v, *levels, implementation="triton")

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs), run(*inputs))
