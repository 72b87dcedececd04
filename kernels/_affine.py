"""Device functions of the affine step: its coefficients, its velocity, and log-probability and KL from partial sums.

`sde_step` and `sde_log_prob` share them, and both compile without fusing products into sums, so that a transition
scored again under the same velocity gives the same residuals bit for bit.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from densegrpo_fast.kernels._launch import OPTIONS, device_of, row_stride

_WIDTH = 128
"""Partial sums that the last stage adds side by side. Part of the results, like the block size."""

# Columns of a table of step coefficients, as in flow/dynamics.py.
COLUMN_A = tl.constexpr(0)
COLUMN_B = tl.constexpr(1)
COLUMN_C = tl.constexpr(2)
COLUMN_LOG_PROB_SCALE = tl.constexpr(4)
COLUMN_LOG_PROB_CONST = tl.constexpr(5)
NUM_COLUMNS = tl.constexpr(6)


@triton.jit
def load_coefficient(table_ptr, step, num_steps, COLUMN: tl.constexpr):
    """One coefficient of a step; NaN when the step is not in the table, since nothing can be raised here."""
    inside = (step >= 0) & (step < num_steps)
    return tl.load(table_ptr + step * NUM_COLUMNS + COLUMN, mask=inside, other=float("nan"))


@triton.jit
def load_velocity(velocity_ptr, uncond_ptr, scale, offsets, mask):
    """Velocity in float32; guided, uncond + scale * (velocity - uncond), when there is an unconditional one."""
    velocity = tl.load(velocity_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    if uncond_ptr is not None:
        uncond = tl.load(uncond_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        velocity = uncond + scale * (velocity - uncond)
    return velocity


@triton.jit
def load_kl_weight(table_ptr, step, num_steps, STD_COLUMN: tl.constexpr):
    """B^2 / (2 std^2) of a step, which times a squared distance of velocities is the divergence; 0 without noise."""
    b = load_coefficient(table_ptr, step, num_steps, COLUMN_B)
    noise = load_coefficient(table_ptr, step, num_steps, COLUMN_C)
    std = load_coefficient(table_ptr, step, num_steps, STD_COLUMN)
    gain = b / tl.where(noise > 0, std, 1.0)
    # Not noise > 0: the NaN of a step outside the table must stay.
    return tl.where(noise == 0, 0.0, gain * gain * 0.5)


@triton.jit
def store_square_sum(partial_ptr, residual, mask):
    """Write this program's sum of squares at its place in a [B, blocks] buffer."""
    total = tl.sum(tl.where(mask, residual * residual, 0.0), axis=0)
    tl.store(partial_ptr + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), total)


@triton.jit
def mean_square(partial_ptr, blocks, elements, WIDTH: tl.constexpr):
    """Mean over this program's sample of what its partial sums added up, always in the same order."""
    row = tl.program_id(0)
    lane = tl.arange(0, WIDTH)
    sums = tl.zeros([WIDTH], dtype=tl.float32)
    # Not range(): with NumPy 2.4, the interpreter of Triton 3.6 cannot count up to an argument.
    start = 0
    while start < blocks:
        block = start + lane
        sums += tl.load(partial_ptr + row * blocks + block, mask=block < blocks, other=0.0)
        start += WIDTH
    return tl.sum(sums, axis=0) / elements


@triton.jit
def log_prob_kernel(
    partial_ptr,  # [B, blocks] float32
    distance_ptr,  # [B, blocks] float32, or None
    table_ptr,  # [T, 6] float32
    step_ptr,  # [B] int64
    log_prob_ptr,  # [B] float32
    kl_ptr,  # [B] float32, or None
    step_stride,
    num_steps,
    blocks,
    elements,
    STD_COLUMN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Log-probability of every sample from its partial sums, if asked with its divergence; one program per sample."""
    row = tl.program_id(0)
    step = tl.load(step_ptr + row * step_stride)
    scale = load_coefficient(table_ptr, step, num_steps, COLUMN_LOG_PROB_SCALE)
    const = load_coefficient(table_ptr, step, num_steps, COLUMN_LOG_PROB_CONST)
    tl.store(log_prob_ptr + row, -scale * mean_square(partial_ptr, blocks, elements, WIDTH) + const)
    if distance_ptr is not None:
        weight = load_kl_weight(table_ptr, step, num_steps, STD_COLUMN)
        tl.store(kl_ptr + row, weight * mean_square(distance_ptr, blocks, elements, WIDTH))


def log_prob(
    partial: Tensor,
    table: Tensor,
    step_index: Tensor,
    elements: int,
    distance: Tensor | None = None,
    kl_std: int = COLUMN_C.value,
) -> tuple[Tensor, Tensor]:
    """Second stage of a log-probability and of a divergence.

    Args:
        partial: sums of squared residuals, [B, blocks] float32.
        table: step coefficients, [T, 6] float32.
        step_index: [B] int64.
        elements: per sample.
        distance: sums of squared distances of two velocities, [B, blocks] float32; None without a divergence.
        kl_std: column of the divergence's standard deviation.

    Returns:
        log_prob, [B] float32; kl, [B] float32, empty without distances.
    """
    batch, blocks = partial.shape
    result = partial.new_empty(batch)
    kl = partial.new_empty(0 if distance is None else batch)
    if batch:
        with device_of(partial):
            log_prob_kernel[(batch,)](
                partial,
                distance,
                table,
                step_index,
                result,
                None if distance is None else kl,
                row_stride(step_index),
                table.shape[0],
                blocks,
                elements,
                STD_COLUMN=kl_std,
                WIDTH=_WIDTH,
                **OPTIONS,
            )
    return result, kl
