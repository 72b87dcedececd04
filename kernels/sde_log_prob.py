"""Log-probability of a stored transition, if asked with the KL to a reference policy, and the velocity's gradient.

The gradient recomputes the residual instead of reading a stored one: both directions move 10 to 12 bytes an element,
and 2 to 4 more with a reference velocity.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from densegrpo_fast.kernels import _affine
from densegrpo_fast.kernels._launch import BLOCK, OPTIONS, blocks_of, device_of, packed, row_stride


@triton.jit
def sde_log_prob_kernel(
    latents_ptr,  # [B, N] floating
    velocity_ptr,  # [B, N] floating; conditional when uncond_ptr is given
    uncond_ptr,  # [B, N] floating, or None
    guidance_ptr,  # [B] float32, or None
    reference_ptr,  # [B, N] floating, or None; conditional when reference_uncond_ptr is given
    reference_uncond_ptr,  # [B, N] floating, or None
    next_ptr,  # [B, N] floating
    table_ptr,  # [T, 6] float32
    step_ptr,  # [B] int64
    partial_ptr,  # [B, blocks] float32
    distance_ptr,  # [B, blocks] float32, or None
    step_stride,
    guidance_stride,
    num_steps,
    elements,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    step = tl.load(step_ptr + row * step_stride)
    a = _affine.load_coefficient(table_ptr, step, num_steps, _affine.COLUMN_A)
    b = _affine.load_coefficient(table_ptr, step, num_steps, _affine.COLUMN_B)
    scale = 1.0
    if uncond_ptr is not None:
        scale = tl.load(guidance_ptr + row * guidance_stride)

    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < elements
    offsets = row.to(tl.int64) * elements + column
    latents = tl.load(latents_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    velocity = _affine.load_velocity(velocity_ptr, uncond_ptr, scale, offsets, mask)
    stored = tl.load(next_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    _affine.store_square_sum(partial_ptr, stored - (a * latents + b * velocity), mask)
    if reference_ptr is not None:
        reference = _affine.load_velocity(reference_ptr, reference_uncond_ptr, scale, offsets, mask)
        _affine.store_square_sum(distance_ptr, velocity - reference, mask)


@triton.jit
def sde_log_prob_backward_kernel(
    grad_ptr,  # [B] float32
    grad_kl_ptr,  # [B] float32, or None
    latents_ptr,  # [B, N] floating
    velocity_ptr,  # [B, N] floating; conditional when uncond_ptr is given
    uncond_ptr,  # [B, N] floating, or None
    guidance_ptr,  # [B] float32, or None
    reference_ptr,  # [B, N] floating, or None; conditional when reference_uncond_ptr is given
    reference_uncond_ptr,  # [B, N] floating, or None
    next_ptr,  # [B, N] floating
    table_ptr,  # [T, 6] float32
    step_ptr,  # [B] int64
    grad_velocity_ptr,  # [B, N] as velocity
    grad_uncond_ptr,  # [B, N] as uncond, or None when nobody asks for it
    grad_stride,
    grad_kl_stride,
    step_stride,
    guidance_stride,
    num_steps,
    elements,
    STD_COLUMN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    step = tl.load(step_ptr + row * step_stride)
    a = _affine.load_coefficient(table_ptr, step, num_steps, _affine.COLUMN_A)
    b = _affine.load_coefficient(table_ptr, step, num_steps, _affine.COLUMN_B)
    log_prob_scale = _affine.load_coefficient(table_ptr, step, num_steps, _affine.COLUMN_LOG_PROB_SCALE)
    factor = tl.load(grad_ptr + row * grad_stride) * (2.0 / elements) * log_prob_scale * b
    scale = 1.0
    if uncond_ptr is not None:
        scale = tl.load(guidance_ptr + row * guidance_stride)

    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = column < elements
    offsets = row.to(tl.int64) * elements + column
    latents = tl.load(latents_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    velocity = _affine.load_velocity(velocity_ptr, uncond_ptr, scale, offsets, mask)
    stored = tl.load(next_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    grad = factor * (stored - (a * latents + b * velocity))
    if reference_ptr is not None:
        weight = _affine.load_kl_weight(table_ptr, step, num_steps, STD_COLUMN)
        pull = tl.load(grad_kl_ptr + row * grad_kl_stride) * (2.0 / elements) * weight
        reference = _affine.load_velocity(reference_ptr, reference_uncond_ptr, scale, offsets, mask)
        grad += pull * (velocity - reference)
    grad_velocity = grad
    if uncond_ptr is not None:
        grad_velocity = scale * grad
    tl.store(grad_velocity_ptr + offsets, grad_velocity.to(grad_velocity_ptr.dtype.element_ty), mask=mask)
    if grad_uncond_ptr is not None:
        grad_uncond = (1.0 - scale) * grad
        tl.store(grad_uncond_ptr + offsets, grad_uncond.to(grad_uncond_ptr.dtype.element_ty), mask=mask)


def sde_log_prob(
    latents: Tensor,
    velocity: Tensor,
    uncond: Tensor | None,
    guidance_scale: Tensor | None,
    reference: Tensor | None,
    reference_uncond: Tensor | None,
    next_latents: Tensor,
    table: Tensor,
    step_index: Tensor,
    kl_std: int,
) -> tuple[Tensor, Tensor]:
    """`ops.sde_log_prob` and `ops.sde_log_prob_kl`.

    Args:
        latents, next_latents: states before and after the step, [B, ...] float32/16 or bfloat16.
        velocity: model output, same shape, any of these dtypes; with guidance, that with the prompt.
        uncond: model output without the prompt, likewise; None without guidance.
        guidance_scale: [B] float32; the velocity is uncond + guidance_scale * (velocity - uncond).
        reference, reference_uncond: the same of the reference policy; None without a divergence.
        table: step coefficients, [T, 6] float32.
        step_index: [B] int64; a step outside the table makes its row NaN.
        kl_std: column of the divergence's standard deviation.

    Returns:
        log_prob, [B] float32; kl, [B] float32, empty without a reference.
    """
    batch, elements, blocks = blocks_of(latents)
    latents, velocity, uncond, next_latents, table = packed(latents, velocity, uncond, next_latents, table)
    reference, reference_uncond = packed(reference, reference_uncond)
    partial = latents.new_empty((batch, blocks), dtype=torch.float32)
    distance = None if reference is None else torch.empty_like(partial)
    if batch:
        with device_of(latents):
            sde_log_prob_kernel[(batch, blocks)](
                latents,
                velocity,
                uncond,
                guidance_scale,
                reference,
                reference_uncond,
                next_latents,
                table,
                step_index,
                partial,
                distance,
                row_stride(step_index),
                row_stride(guidance_scale),
                table.shape[0],
                elements,
                BLOCK=BLOCK,
                **OPTIONS,
            )
    return _affine.log_prob(partial, table, step_index, elements, distance, kl_std)


def sde_log_prob_backward(
    grad: Tensor,
    grad_kl: Tensor | None,
    latents: Tensor,
    velocity: Tensor,
    uncond: Tensor | None,
    guidance_scale: Tensor | None,
    reference: Tensor | None,
    reference_uncond: Tensor | None,
    next_latents: Tensor,
    table: Tensor,
    step_index: Tensor,
    kl_std: int,
    with_uncond: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of `sde_log_prob` with respect to `velocity` and `uncond`.

    Args:
        grad: gradient arriving at log_prob, [B] float32.
        grad_kl: that arriving at kl, [B] float32; None without a reference.
        latents, velocity, ..., kl_std: as there.
        with_uncond: whether to write the gradient of `uncond`.

    Returns:
        gradients of velocity and of uncond, contiguous, of their shapes and dtypes; the second empty unless asked for.
    """
    batch, elements, blocks = blocks_of(latents)
    latents, velocity, uncond, next_latents, table = packed(latents, velocity, uncond, next_latents, table)
    reference, reference_uncond = packed(reference, reference_uncond)
    grad_velocity = torch.empty_like(velocity)
    grad_uncond = torch.empty_like(velocity if uncond is None else uncond) if with_uncond else velocity.new_empty(0)
    if batch and elements:
        with device_of(latents):
            sde_log_prob_backward_kernel[(batch, blocks)](
                grad,
                grad_kl,
                latents,
                velocity,
                uncond,
                guidance_scale,
                reference,
                reference_uncond,
                next_latents,
                table,
                step_index,
                grad_velocity,
                grad_uncond if with_uncond else None,
                row_stride(grad),
                row_stride(grad_kl),
                row_stride(step_index),
                row_stride(guidance_scale),
                table.shape[0],
                elements,
                STD_COLUMN=kl_std,
                BLOCK=BLOCK,
                **OPTIONS,
            )
    return grad_velocity, grad_uncond
