"""`ops.euler_jump` as a `torch.library` op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from densegrpo_fast.flow import backends, checks, reference


def euler_jump(
    latents: Tensor,
    velocity: Tensor,
    sigma: Tensor,
    next_sigma: Tensor,
    *,
    implementation: str = "auto",
) -> Tensor:
    """Straight-line move latents + (next_sigma - sigma) * velocity, each row between its own noise levels.

    Differentiable in `latents` and `velocity`.

    Args:
        latents: states at `sigma`, [B, ...] floating.
        velocity: model output there, same shape.
        sigma: noise level of every row, [B] float32 in [0, 1]; a scalar tensor serves all rows.
        next_sigma: noise level to move to, at most `sigma`, likewise; 0 gives clean latents.
        implementation: "auto" or a name of `backends.IMPLEMENTATIONS`.

    Returns:
        states at `next_sigma`, [B, ...] in the dtype of `latents`, contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as `sde_step`; noise levels out of range or order, seen on the CPU alone.
    """
    checks.check_latents("euler_jump", latents, velocity=velocity)
    levels = []
    for name, level in (("sigma", sigma), ("next_sigma", next_sigma)):
        checks.check_floating("euler_jump", name, level)
        level = level.expand(latents.shape[:1]) if level.ndim == 0 else level
        checks.check_rows("euler_jump", name, level, latents)
        levels.append(level)
    backends.check_name(implementation)
    return _euler_jump(latents, velocity, levels[0], levels[1], implementation)


@custom_op(
    "densegrpo_fast::euler_jump",
    mutates_args=(),
    schema="(Tensor latents, Tensor velocity, Tensor sigma, Tensor next_sigma, str implementation) -> Tensor",
)
def _euler_jump(latents, velocity, sigma, next_sigma, implementation):
    chosen = backends.choose("euler_jump", implementation, latents, velocity)
    checks.check_levels("euler_jump", sigma, next_sigma)
    if chosen != "reference":
        return backends.compiled(chosen, "euler_jump")(latents, velocity, sigma, next_sigma)
    return reference.euler_jump_ref(latents, velocity, sigma, next_sigma).contiguous()


@_euler_jump.register_fake
def _(latents, velocity, sigma, next_sigma, implementation):
    return torch.empty_like(latents, memory_format=torch.contiguous_format)


def _euler_jump_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, velocity, sigma, next_sigma, _ = inputs
    ctx.velocity_dtype = velocity.dtype
    ctx.save_for_backward(sigma, next_sigma)


def _euler_jump_grad(ctx: Any, grad: Tensor) -> tuple:
    sigma, next_sigma = ctx.saved_tensors
    dtype = torch.promote_types(grad.dtype, torch.float32)
    dt = (next_sigma - sigma).to(dtype).reshape(-1, *([1] * (grad.ndim - 1)))
    return grad, (dt * grad.to(dtype)).to(ctx.velocity_dtype), None, None, None


_euler_jump.register_autograd(_euler_jump_grad, setup_context=_euler_jump_setup)
