"""Sizes and values at the ends of what may come: one row and 4096, one step and 1000, far rows, infinities, nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.flow.ops import euler_jump, grpo_loss, sde_log_prob, sde_step
from densegrpo_fast.flow.schedule import sd3_sigmas

ROW = 2**31
"""Elements from one row to the next in `far_rows`: no 32-bit number holds the offset of the second one."""


def table_of(steps: int, device: torch.device) -> Tensor:
    return coefficients(sd3_sigmas(steps), 0.7, "flow_sde").table.to(device)


def counters(rows: int, device: torch.device) -> dict[str, object]:
    return {"seed": 7, "iteration": 3, "sample_index": torch.arange(rows, device=device)}


@pytest.fixture
def far_rows(device: torch.device, tmp_path: Path) -> Tensor:
    """Two rows of 40 elements that lie 8 GiB apart, in a file that is empty between them."""
    if device.type != "cpu":
        storage = torch.zeros(ROW + 64, device=device)
    else:
        storage = torch.from_file(str(tmp_path / "rows"), shared=True, size=ROW + 64)
    rows = storage.as_strided((2, 40), (ROW, 1))
    rows.copy_(torch.randn(2, 40))
    return rows


@pytest.mark.ci
@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (1, 2), (1, 1000), (4096, 1000)])
def test_few_and_many_rows_and_steps(device: torch.device, rows: int, steps: int) -> None:
    table, (latents, velocity) = table_of(steps, device), torch.randn(2, rows, 4).to(device)
    index = torch.arange(rows, device=device) * 37 % steps
    options = counters(rows, device)
    found = [
        sde_step(latents, velocity, table, index, implementation=name, **options) for name in ("triton", "reference")
    ]
    # the first and last step of a long schedule amplify a rounding of the noise
    torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-3)
    scored = sde_log_prob(latents, velocity, found[0][0], table, index, implementation="triton")
    torch.testing.assert_close(scored, found[0][1], rtol=1e-5, atol=1e-5)


def test_rows_beyond_32_bits(device: torch.device, far_rows: Tensor) -> None:
    near, table = far_rows.clone(memory_format=torch.contiguous_format), table_of(10, device)
    velocity, options = torch.randn(2, 40).to(device), counters(2, device)
    steps = torch.tensor([2, 5], device=device)
    stepped = [sde_step(rows, velocity, table, steps, implementation="triton", **options) for rows in (far_rows, near)]
    assert torch.equal(stepped[0][0], stepped[1][0]) and torch.equal(stepped[0][1], stepped[1][1])
    scored = [
        sde_log_prob(rows, velocity, stepped[0][0], table, steps, implementation="triton") for rows in (far_rows, near)
    ]
    assert torch.equal(*scored)
    levels = torch.tensor([0.75, 0.25], device=device)
    moved = [euler_jump(rows, velocity, *levels, implementation="triton") for rows in (far_rows, near)]
    assert torch.equal(*moved)


@pytest.mark.ci
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("offset", [0, 1, 2, 3, 4])
def test_rows_off_16_bytes(device: torch.device, offset: int, dtype: torch.dtype) -> None:
    table, options = table_of(10, device), counters(3, device)
    near = [torch.randn(3, 32).to(device), torch.randn(3, 32).to(device, dtype)]
    # from an element that starts no 16 bytes, unless it is the fourth
    shifted = [torch.cat([part.new_zeros(offset), part.flatten()])[offset:].view(3, 32) for part in near]
    assert (shifted[0].data_ptr() % 16 == 0) == (offset in (0, 4))
    stepped = [sde_step(*rows, table, 4, implementation="triton", **options) for rows in (near, shifted)]
    assert torch.equal(stepped[0][0], stepped[1][0])
    torch.testing.assert_close(stepped[0][1], stepped[1][1], rtol=1e-6, atol=1e-6)
    scored = [sde_log_prob(*rows, stepped[0][0], table, 4, implementation="triton") for rows in (near, shifted)]
    torch.testing.assert_close(*scored, rtol=1e-6, atol=1e-6)
    levels = torch.tensor([0.75, 0.25], device=device)
    assert torch.equal(*(euler_jump(*rows, *levels, implementation="triton") for rows in (near, shifted)))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_what_is_not_finite_stays_in_its_row(device: torch.device, value: float) -> None:
    table, (latents, velocity) = table_of(10, device), torch.randn(2, 3, 600).to(device)
    clean = sde_step(latents, velocity, table, 4, implementation="triton", **counters(3, device))
    velocity[1, 599] = value
    found = sde_step(latents, velocity, table, 4, implementation="triton", **counters(3, device))
    expected = sde_step(latents, velocity, table, 4, implementation="reference", **counters(3, device))
    assert found[0].isfinite().logical_not().sum() == 1
    assert torch.equal(found[0].isnan(), expected[0].isnan()) and torch.equal(found[1].isnan(), expected[1].isnan())
    assert torch.equal(found[0][[0, 2]], clean[0][[0, 2]]) and torch.equal(found[1][[0, 2]], clean[1][[0, 2]])
    scored = sde_log_prob(latents, velocity, clean[0], table, 4, implementation="triton")
    reference = sde_log_prob(latents, velocity, clean[0], table, 4, implementation="reference")
    assert torch.equal(scored.isfinite(), reference.isfinite()) and scored.isfinite().tolist() == [True, False, True]


def test_nothing_gives_nothing(device: torch.device) -> None:
    nothing, table = torch.zeros(0, 4, device=device), table_of(10, device)
    steps = torch.zeros(0, dtype=torch.int64, device=device)
    assert sde_log_prob(nothing, nothing, nothing, table, steps, implementation="triton").shape == (0,)
    assert euler_jump(nothing, nothing, *table[0, :2], implementation="triton").shape == (0, 4)
    rows = torch.zeros(0, device=device)
    with pytest.raises(ValueError, match="B >= 1"):
        grpo_loss(rows, rows, rows, None, clip_range=0.2, kl_coef=0.0, implementation="triton")
