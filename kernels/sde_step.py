"""Noise, affine step and log-probability in one pass over the state: every input is read once, nothing is written but
the next state and, if asked for, its copy in half precision and the mean.

Grid: (samples, blocks of a sample). Seed, iteration, sample and step indices and coefficients are read from device
memory, so a captured launch draws new noise when their tensors change.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from densegrpo_fast.kernels import _affine, philox
from densegrpo_fast.kernels._launch import BLOCK, OPTIONS, blocks_of, device_of, packed, row_stride


@triton.jit
def sde_step_kernel(
    latents_ptr,  # [B, N] floating
    velocity_ptr,  # [B, N] floating; conditional when uncond_ptr is given
    uncond_ptr,  # [B, N] floating, or None
    guidance_ptr,  # [B] float32, or None
    table_ptr,  # [T, 6] float32
    step_ptr,  # [B] int64
    seed_ptr,  # [1] int64
    sample_ptr,  # [B] int64
    epoch_ptr,  # [1] int64
    next_ptr,  # [B, N] as latents
    input_ptr,  # [B, N] float16 or bfloat16, or None
    mean_ptr,  # [B, N] float32, or None
    partial_ptr,  # [B, blocks] float32
    step_stride,
    guidance_stride,
    sample_stride,
    num_steps,
    stream,
    elements,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    block = tl.program_id(1)
    step = tl.load(step_ptr + row * step_stride)
    a = _affine.load_coefficient(table_ptr, step, num_steps, _affine.COLUMN_A)
    b = _affine.load_coefficient(table_ptr, step, num_steps, _affine.COLUMN_B)
    c = _affine.load_coefficient(table_ptr, step, num_steps, _affine.COLUMN_C)
    scale = 1.0
    if uncond_ptr is not None:
        scale = tl.load(guidance_ptr + row * guidance_stride)

    column = block * BLOCK + tl.arange(0, BLOCK)
    mask = column < elements
    offsets = row.to(tl.int64) * elements + column
    latents = tl.load(latents_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    velocity = _affine.load_velocity(velocity_ptr, uncond_ptr, scale, offsets, mask)
    sample = tl.load(sample_ptr + row * sample_stride)
    noise = philox.gaussian(block, step, stream, sample, tl.load(epoch_ptr), tl.load(seed_ptr), BLOCK)
    mean = a * latents + b * velocity
    stored = (mean + c * noise).to(next_ptr.dtype.element_ty)
    tl.store(next_ptr + offsets, stored, mask=mask)
    # The state that the next step will see is the rounded one; the log-probability is that state's.
    _affine.store_square_sum(partial_ptr, stored.to(tl.float32) - mean, mask)
    if input_ptr is not None:
        tl.store(input_ptr + offsets, stored.to(tl.float32).to(input_ptr.dtype.element_ty), mask=mask)
    if mean_ptr is not None:
        tl.store(mean_ptr + offsets, mean, mask=mask)


def sde_step(
    latents: Tensor,
    velocity: Tensor,
    uncond: Tensor | None,
    guidance_scale: Tensor | None,
    table: Tensor,
    step_index: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    iteration: Tensor,
    stream: int,
    input_dtype: torch.dtype | None = None,
    with_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.sde_step` and `ops.sde_step_outputs`.

    Args:
        latents: states, [B, ...] float32/16 or bfloat16.
        velocity: model output, same shape, any of these dtypes; with guidance, that with the prompt.
        uncond: model output without the prompt, likewise; None without guidance.
        guidance_scale: [B] float32; the velocity is uncond + guidance_scale * (velocity - uncond).
        table: step coefficients, [T, 6] float32.
        step_index: [B] int64; a step outside the table makes its row NaN.
        seed, iteration: int64, one element.
        sample_index: [B] int64.
        stream: 16-bit stream number.
        input_dtype: of the copy of the next state that a model in half precision reads; None for no copy.
        with_mean: whether to write the mean.

    Returns:
        next_latents, [B, ...] in the dtype of `latents`; log_prob, [B] float32; the copy, and the mean in float32, of
        the shape of `latents`, empty unless asked for. All contiguous.
    """
    batch, elements, blocks = blocks_of(latents)
    latents, velocity, uncond, table = packed(latents, velocity, uncond, table)
    next_latents = torch.empty_like(latents)
    model_input = latents.new_empty(0) if input_dtype is None else torch.empty_like(latents, dtype=input_dtype)
    mean = torch.empty_like(latents, dtype=torch.float32) if with_mean else latents.new_empty(0)
    partial = latents.new_empty((batch, blocks), dtype=torch.float32)
    if batch:
        with device_of(latents):
            sde_step_kernel[(batch, blocks)](
                latents,
                velocity,
                uncond,
                guidance_scale,
                table,
                step_index,
                seed,
                sample_index,
                iteration,
                next_latents,
                None if input_dtype is None else model_input,
                mean if with_mean else None,
                partial,
                row_stride(step_index),
                row_stride(guidance_scale),
                row_stride(sample_index),
                table.shape[0],
                stream,
                elements,
                BLOCK=BLOCK,
                **OPTIONS,
            )
    return next_latents, _affine.log_prob(partial, table, step_index, elements)[0], model_input, mean
