"""Guided forms of the step ops: classifier-free guidance (arXiv 2207.12598) inside the step's own pass.

    velocity = uncond + guidance_scale * (cond - uncond)

The Triton kernels read both model outputs once and never write the velocity; the other implementations combine first
and then take the plain step, which gives the same numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from densegrpo_fast.flow import backends, checks, noise, ops, reference
from densegrpo_fast.flow.noise import Stream


def combine(cond: Tensor, uncond: Tensor, guidance_scale: Tensor) -> Tensor:
    """Guided velocity.

    Args:
        cond, uncond: model outputs with and without the prompt, [B, ...] floating.
        guidance_scale: [B] float32.

    Returns:
        velocity, [B, ...] float32 (float64 if an input is).
    """
    dtype = reference.compute_dtype(cond, uncond)
    scale = guidance_scale.to(dtype).reshape(-1, *([1] * (cond.ndim - 1)))
    return uncond.to(dtype) + scale * (cond.to(dtype) - uncond.to(dtype))


def guided_sde_step(
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor,
    guidance_scale: float | Tensor,
    table: Tensor,
    step_index: int | Tensor,
    *,
    seed: int | Tensor,
    sample_index: Tensor,
    epoch: int | Tensor,
    stream: int = Stream.STEP,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`ops.sde_step` under a guided velocity. Not differentiable.

    Args:
        cond, uncond: model outputs with and without the prompt, shape of `latents`, any of its dtypes.
        guidance_scale: one number, or [B] float32; 1 is the conditional velocity alone.
        latents, table, step_index, seed, sample_index, epoch, stream, implementation: as `ops.sde_step`.

    Returns:
        next_latents, log_prob: as `ops.sde_step`.

    Raises:
        TypeError, ValueError, RuntimeError: as `ops.sde_step`.
    """
    op = "guided_sde_step"
    checks.check_latents(op, latents, cond=cond, uncond=uncond)
    checks.check_table(op, table, latents)
    noise.check_stream(stream)
    batch, device = len(latents), latents.device
    scale = _scale(op, guidance_scale, latents)
    step_index = ops.row_index(f"{op}: step_index", step_index, latents)
    sample_index = noise.integer_tensor(f"{op}: sample_index", sample_index, 32, (batch,), device)
    seed = noise.integer_tensor(f"{op}: seed", seed, 63, (1,), device)
    epoch = noise.integer_tensor(f"{op}: epoch", epoch, 32, (1,), device)
    backends.check_name(implementation)
    words = (seed, sample_index, epoch, int(stream))
    return _guided_sde_step(latents, cond, uncond, scale, table, step_index, *words, implementation)


def guided_sde_log_prob(
    latents: Tensor,
    cond: Tensor,
    uncond: Tensor,
    guidance_scale: float | Tensor,
    next_latents: Tensor,
    table: Tensor,
    step_index: int | Tensor,
    *,
    implementation: str = "auto",
) -> Tensor:
    """`ops.sde_log_prob` under a guided velocity. Differentiable in `cond` and `uncond`.

    Args:
        cond, uncond: model outputs with and without the prompt, shape of `latents`, any of its dtypes.
        guidance_scale: one number, or [B] float32; 1 is the conditional velocity alone.
        latents, next_latents, table, step_index, implementation: as `ops.sde_log_prob`.

    Returns:
        log_prob: as `ops.sde_log_prob`.

    Raises:
        TypeError, ValueError, RuntimeError: as `ops.sde_step`.
    """
    op = "guided_sde_log_prob"
    checks.check_latents(op, latents, cond=cond, uncond=uncond, next_latents=next_latents)
    checks.check_table(op, table, latents)
    scale = _scale(op, guidance_scale, latents)
    step_index = ops.row_index(f"{op}: step_index", step_index, latents)
    backends.check_name(implementation)
    return _guided_sde_log_prob(latents, cond, uncond, scale, next_latents, table, step_index, implementation)


def _scale(op: str, guidance_scale: float | Tensor, latents: Tensor) -> Tensor:
    if not isinstance(guidance_scale, Tensor):
        guidance_scale = torch.full((1,), float(guidance_scale), device=latents.device).expand(len(latents))
    checks.check_rows(op, "guidance_scale", guidance_scale, latents)
    if guidance_scale.dtype != torch.float32:
        raise TypeError(f"{op}: guidance_scale must be float32, got {guidance_scale.dtype}")
    return guidance_scale


def _plain(implementation: str, chosen: str) -> str:
    """What takes the plain step after combining: where nothing was named, more may fit its float32 velocity."""
    return implementation if implementation == "auto" else chosen


@custom_op(
    "densegrpo_fast::guided_sde_step",
    mutates_args=(),
    schema="(Tensor latents, Tensor cond, Tensor uncond, Tensor guidance_scale, Tensor table, Tensor step_index, "
    "Tensor seed, Tensor sample_index, Tensor epoch, int stream, str implementation) -> (Tensor, Tensor)",
)
def _guided_sde_step(
    latents, cond, uncond, scale, table, step_index, seed, sample_index, epoch, stream, implementation
):
    chosen = backends.choose("guided_sde_step", implementation, latents, cond, uncond)
    words = (table, step_index, seed, sample_index, epoch, stream)
    if chosen == "triton":
        return backends.compiled(chosen, "guided_sde_step")(latents, cond, uncond, scale, *words)
    plain = _plain(implementation, chosen)
    return torch.ops.densegrpo_fast.sde_step(latents, combine(cond, uncond, scale), *words, plain)


@_guided_sde_step.register_fake
def _(latents, cond, uncond, scale, table, step_index, seed, sample_index, epoch, stream, implementation):
    log_prob = latents.new_empty(latents.shape[0], dtype=reference.compute_dtype(latents, cond, uncond))
    return torch.empty_like(latents, memory_format=torch.contiguous_format), log_prob


@custom_op(
    "densegrpo_fast::guided_sde_log_prob",
    mutates_args=(),
    schema="(Tensor latents, Tensor cond, Tensor uncond, Tensor guidance_scale, Tensor next_latents, Tensor table, "
    "Tensor step_index, str implementation) -> Tensor",
)
def _guided_sde_log_prob(latents, cond, uncond, scale, next_latents, table, step_index, implementation):
    chosen = backends.choose("guided_sde_log_prob", implementation, latents, cond, uncond, next_latents)
    if chosen == "triton":
        launch = backends.compiled(chosen, "guided_sde_log_prob")
        return launch(latents, cond, uncond, scale, next_latents, table, step_index)
    velocity = combine(cond, uncond, scale)
    plain = _plain(implementation, chosen)
    return torch.ops.densegrpo_fast.sde_log_prob(latents, velocity, next_latents, table, step_index, plain)


@_guided_sde_log_prob.register_fake
def _(latents, cond, uncond, scale, next_latents, table, step_index, implementation):
    dtype = reference.compute_dtype(latents, cond, uncond, next_latents)
    return latents.new_empty(latents.shape[0], dtype=dtype)


@custom_op(
    "densegrpo_fast::guided_sde_log_prob_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor latents, Tensor cond, Tensor uncond, Tensor guidance_scale, Tensor next_latents, "
    "Tensor table, Tensor step_index, bool with_uncond, str implementation) -> (Tensor, Tensor)",
)
def _guided_sde_log_prob_backward(
    grad, latents, cond, uncond, scale, next_latents, table, step_index, with_uncond, implementation
):
    chosen = backends.choose("guided_sde_log_prob", implementation, latents, cond, uncond, next_latents)
    if chosen == "triton":
        launch = backends.compiled(chosen, "guided_sde_log_prob_backward")
        return launch(grad, latents, cond, uncond, scale, next_latents, table, step_index, with_uncond)
    inputs = (latents, combine(cond, uncond, scale), next_latents, table, step_index)
    plain = _plain(implementation, chosen)
    grad_velocity = torch.ops.densegrpo_fast.sde_log_prob_backward(grad, *inputs, plain)
    scale = scale.to(grad_velocity.dtype).reshape(-1, *([1] * (latents.ndim - 1)))
    grad_cond = (scale * grad_velocity).to(cond.dtype)
    return grad_cond, ((1 - scale) * grad_velocity).to(uncond.dtype) if with_uncond else uncond.new_empty(0)


@_guided_sde_log_prob_backward.register_fake
def _(grad, latents, cond, uncond, scale, next_latents, table, step_index, with_uncond, implementation):
    grads = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (cond, uncond)]
    return grads[0], grads[1] if with_uncond else uncond.new_empty(0)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.implementation = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, grad: Tensor) -> tuple:
    with_uncond = ctx.needs_input_grad[2]
    grad_cond, grad_uncond = _guided_sde_log_prob_backward(grad, *ctx.saved_tensors, with_uncond, ctx.implementation)
    return None, grad_cond, grad_uncond if with_uncond else None, *[None] * 5


_guided_sde_log_prob.register_autograd(_grad, setup_context=_setup)
