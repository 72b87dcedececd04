"""Straight-line moves of a batch whose rows go between noise levels of their own."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from densegrpo_fast.kernels._launch import BLOCK, OPTIONS, blocks_of, device_of, row_stride


@triton.jit
def euler_jump_kernel(
    latents_ptr,  # [B, N] floating
    velocity_ptr,  # [B, N] floating
    sigma_ptr,  # [B] floating
    next_sigma_ptr,  # [B] floating
    moved_ptr,  # [B, N] as latents
    sigma_stride,
    next_sigma_stride,
    elements,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    sigma = tl.load(sigma_ptr + row * sigma_stride).to(tl.float32)
    dt = tl.load(next_sigma_ptr + row * next_sigma_stride).to(tl.float32) - sigma
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < elements
    offsets = row.to(tl.int64) * elements + column
    latents = tl.load(latents_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    velocity = tl.load(velocity_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    tl.store(moved_ptr + offsets, (latents + dt * velocity).to(moved_ptr.dtype.element_ty), mask=mask)


def euler_jump(latents: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """`ops.euler_jump`.

    Args:
        latents: states at `sigma`, [B, ...] float32/16 or bfloat16.
        velocity: model output there, same shape, any of these dtypes.
        sigma, next_sigma: noise levels, [B], any of these dtypes; their difference is taken in float32.

    Returns:
        states at `next_sigma`, [B, ...] in the dtype of `latents`, contiguous.
    """
    batch, elements, blocks = blocks_of(latents)
    latents, velocity = latents.contiguous(), velocity.contiguous()
    moved = torch.empty_like(latents)
    if batch and elements:
        with device_of(latents):
            euler_jump_kernel[(batch, blocks)](
                latents,
                velocity,
                sigma,
                next_sigma,
                moved,
                row_stride(sigma),
                row_stride(next_sigma),
                elements,
                BLOCK=BLOCK,
                **OPTIONS,
            )
    return moved
