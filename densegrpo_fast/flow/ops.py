"""The public ops. Each is a `torch.library` op: autograd, `torch.compile` and CUDA graphs see one node.

The functions check their arguments and call the op; the op picks an implementation (`backends.py`). Nothing
here reads a tensor on the host. Integer arguments become constants when traced or captured: pass tensors to
change them between replays.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from densegrpo_fast.flow import backends, checks, noise, reference
from densegrpo_fast.flow.noise import Stream


def sde_step(
    latents: Tensor,
    velocity: Tensor,
    table: Tensor,
    step_index: int | Tensor,
    *,
    seed: int | Tensor,
    sample_index: Tensor,
    epoch: int | Tensor,
    stream: int = Stream.STEP,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of the sampler, with its own noise, and the log-probability of the state it reached.

    Not differentiable: it belongs to the rollout. `sde_log_prob` scores the stored transition in training.

    Args:
        latents: states, [B, ...] float32/16, bfloat16 or float64.
        velocity: model output there (noise minus data), same shape, any of these dtypes.
        table: step coefficients, [T, 6] float32, from `dynamics.coefficients`.
        step_index: step of every row, in [0, T): one int, or [B] int64. It also names the noise to draw.
        seed: run seed in [0, 2^63), or int64 of one element.
        sample_index: global index of every row, [B] int64 in [0, 2^32).
        epoch: iteration in [0, 2^32), or int64 of one element.
        stream: purpose of the noise, a `Stream` or `branch_stream(k)`.
        implementation: "auto" or a name of `backends.IMPLEMENTATIONS`.

    Returns:
        next_latents, [B, ...] in the dtype of `latents`, contiguous; log_prob, [B] float32 (float64 if an
        input is), natural log, mean over the elements of a sample, of `next_latents` as stored; 0 for
        noise-free rows.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, device, integer or implementation name that is not.
        RuntimeError: the named implementation cannot serve the call.
    """
    checks.check_latents("sde_step", latents, velocity=velocity)
    checks.check_table("sde_step", table, latents)
    noise.check_stream(stream)
    device, batch = latents.device, latents.shape[0]
    step_index = row_index("sde_step: step_index", step_index, latents)
    sample_index = noise.integer_tensor("sde_step: sample_index", sample_index, 32, (batch,), device)
    seed = noise.integer_tensor("sde_step: seed", seed, 63, (1,), device)
    epoch = noise.integer_tensor("sde_step: epoch", epoch, 32, (1,), device)
    backends.check_name(implementation)
    return _sde_step(latents, velocity, table, step_index, seed, sample_index, epoch, int(stream), implementation)


def sde_log_prob(
    latents: Tensor,
    velocity: Tensor,
    next_latents: Tensor,
    table: Tensor,
    step_index: int | Tensor,
    *,
    implementation: str = "auto",
) -> Tensor:
    """Log-probability of a stored transition under the current velocity. Differentiable in `velocity` only.

    Args:
        latents: states before the step, [B, ...] floating.
        velocity: model output there, same shape.
        next_latents: states after the step, same shape.
        table: step coefficients, [T, 6] float32.
        step_index: step of every row, in [0, T): one int, or [B] int64.
        implementation: "auto" or a name of `backends.IMPLEMENTATIONS`.

    Returns:
        log_prob, [B] float32 (float64 if an input is), natural log, mean over the elements of a sample; 0 for
        noise-free rows.

    Raises:
        TypeError, ValueError, RuntimeError: as `sde_step`.
    """
    checks.check_latents("sde_log_prob", latents, velocity=velocity, next_latents=next_latents)
    checks.check_table("sde_log_prob", table, latents)
    step_index = row_index("sde_log_prob: step_index", step_index, latents)
    backends.check_name(implementation)
    return _sde_log_prob(latents, velocity, next_latents, table, step_index, implementation)


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
        sigma: noise level of every row, [B] float32; a scalar tensor serves all rows.
        next_sigma: noise level to move to, likewise.
        implementation: "auto" or a name of `backends.IMPLEMENTATIONS`.

    Returns:
        states at `next_sigma`, [B, ...] in the dtype of `latents`, contiguous.

    Raises:
        TypeError, ValueError, RuntimeError: as `sde_step`.
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


def grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    kl: Tensor | None,
    *,
    clip_range: float,
    kl_coef: float,
    log_ratio_scale: Tensor | None = None,
    log_ratio_bias: Tensor | None = None,
    weight: Tensor | None = None,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Clipped policy loss with a KL penalty. Differentiable in `log_prob` and `kl`.

    ratio = exp((log_prob - old_log_prob + log_ratio_bias) * log_ratio_scale)
    loss  = mean(weight * max(-A * ratio, -A * clamp(ratio, 1 - c, 1 + c))) + kl_coef * mean(kl)

    Scale, bias and weight per row express GRPO-Guard's ratio normalisation and per-step weights as data. A
    row with advantage 0 (a missing sample, a group without spread) adds nothing to the policy loss.

    Args:
        log_prob: log-probabilities under the current policy, [B] float32 or float64.
        old_log_prob: the same under the policy that sampled, [B].
        advantages: [B].
        kl: divergence from the reference policy per row, [B]; None when there is no penalty.
        clip_range: c, positive.
        kl_coef: weight of mean(kl), at least 0.
        log_ratio_scale: [B]; None is 1.
        log_ratio_bias: [B]; None is 0.
        weight: [B]; None is 1.
        implementation: "auto" or a name of `backends.IMPLEMENTATIONS`.

    Returns:
        loss, scalar; metrics, [5] without gradient: policy loss, mean kl, share of rows with |ratio-1| >
        clip_range, mean((ratio-1) - log ratio) as estimate of the KL to the old policy, max |ratio-1|.

    Raises:
        TypeError: an argument is not floating.
        ValueError: a shape, device, range or implementation name is wrong.
        RuntimeError: the named implementation cannot serve the call.
    """
    checks.check_floating("grpo_loss", "log_prob", log_prob)
    if log_prob.ndim != 1 or log_prob.numel() == 0:
        raise ValueError(f"grpo_loss: log_prob must have shape [B] with B >= 1, got {list(log_prob.shape)}")
    if not clip_range > 0:
        raise ValueError(f"grpo_loss: clip_range must be positive, got {clip_range}")
    if not kl_coef >= 0:
        raise ValueError(f"grpo_loss: kl_coef must be at least 0, got {kl_coef}")
    rows = {
        "old_log_prob": old_log_prob,
        "advantages": advantages,
        "kl": torch.zeros_like(log_prob) if kl is None else kl,
        "log_ratio_scale": torch.ones_like(log_prob) if log_ratio_scale is None else log_ratio_scale,
        "log_ratio_bias": torch.zeros_like(log_prob) if log_ratio_bias is None else log_ratio_bias,
        "weight": torch.ones_like(log_prob) if weight is None else weight,
    }
    for name, value in rows.items():
        checks.check_rows("grpo_loss", name, value, log_prob)
    backends.check_name(implementation)
    dtype = reference.compute_dtype(log_prob)
    values = [value.to(dtype) for value in (log_prob, *rows.values())]
    loss, metrics, _ = _grpo_loss(*values, float(clip_range), float(kl_coef), implementation)
    return loss, metrics.detach()


def row_index(name: str, index: int | Tensor, latents: Tensor) -> Tensor:
    """Step of every row as [B] int64; one number serves all rows."""
    batch = latents.shape[0]
    sizes = (batch,) if isinstance(index, Tensor) else (1,)
    return noise.integer_tensor(name, index, 16, sizes, latents.device).expand(batch)


@custom_op(
    "densegrpo_fast::sde_step",
    mutates_args=(),
    schema="(Tensor latents, Tensor velocity, Tensor table, Tensor step_index, Tensor seed, "
    "Tensor sample_index, Tensor epoch, int stream, str implementation) -> (Tensor, Tensor)",
)
def _sde_step(latents, velocity, table, step_index, seed, sample_index, epoch, stream, implementation):
    chosen = backends.choose("sde_step", implementation, latents, velocity)
    if chosen != "reference":
        launch = backends.compiled(chosen, "sde_step")
        return launch(latents, velocity, table, step_index, seed, sample_index, epoch, stream)
    shape = latents.shape[1:]
    draw = noise.gaussian(shape, seed=seed, sample_index=sample_index, step=step_index, stream=stream, epoch=epoch)
    next_latents, log_prob = reference.sde_step_ref(latents, velocity, table, step_index, draw)
    return next_latents.contiguous(), log_prob


@_sde_step.register_fake
def _(latents, velocity, table, step_index, seed, sample_index, epoch, stream, implementation):
    log_prob = latents.new_empty(latents.shape[0], dtype=reference.compute_dtype(latents, velocity))
    return torch.empty_like(latents, memory_format=torch.contiguous_format), log_prob


@custom_op(
    "densegrpo_fast::sde_log_prob",
    mutates_args=(),
    schema="(Tensor latents, Tensor velocity, Tensor next_latents, Tensor table, "
    "Tensor step_index, str implementation) -> Tensor",
)
def _sde_log_prob(latents, velocity, next_latents, table, step_index, implementation):
    chosen = backends.choose("sde_log_prob", implementation, latents, velocity, next_latents)
    if chosen != "reference":
        return backends.compiled(chosen, "sde_log_prob")(latents, velocity, next_latents, table, step_index)
    return reference.sde_log_prob_ref(latents, velocity, next_latents, table, step_index)


@_sde_log_prob.register_fake
def _(latents, velocity, next_latents, table, step_index, implementation):
    return latents.new_empty(latents.shape[0], dtype=reference.compute_dtype(latents, velocity, next_latents))


@custom_op(
    "densegrpo_fast::sde_log_prob_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor latents, Tensor velocity, Tensor next_latents, Tensor table, "
    "Tensor step_index, str implementation) -> Tensor",
)
def _sde_log_prob_backward(grad, latents, velocity, next_latents, table, step_index, implementation):
    chosen = backends.choose("sde_log_prob", implementation, latents, velocity, next_latents)
    if chosen != "reference":
        launch = backends.compiled(chosen, "sde_log_prob_backward")
        return launch(grad, latents, velocity, next_latents, table, step_index)
    grad_velocity = reference.sde_log_prob_grad_ref(grad, latents, velocity, next_latents, table, step_index)
    return grad_velocity.contiguous()


@_sde_log_prob_backward.register_fake
def _(grad, latents, velocity, next_latents, table, step_index, implementation):
    return torch.empty_like(velocity, memory_format=torch.contiguous_format)


def _sde_log_prob_setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.implementation = inputs
    ctx.save_for_backward(*tensors)


def _sde_log_prob_grad(ctx: Any, grad: Tensor) -> tuple:
    return None, _sde_log_prob_backward(grad, *ctx.saved_tensors, ctx.implementation), None, None, None, None


_sde_log_prob.register_autograd(_sde_log_prob_grad, setup_context=_sde_log_prob_setup)


@custom_op(
    "densegrpo_fast::euler_jump",
    mutates_args=(),
    schema="(Tensor latents, Tensor velocity, Tensor sigma, Tensor next_sigma, str implementation) -> Tensor",
)
def _euler_jump(latents, velocity, sigma, next_sigma, implementation):
    chosen = backends.choose("euler_jump", implementation, latents, velocity)
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


@custom_op(
    "densegrpo_fast::grpo_loss",
    mutates_args=(),
    schema="(Tensor log_prob, Tensor old_log_prob, Tensor advantages, Tensor kl, Tensor log_ratio_scale, "
    "Tensor log_ratio_bias, Tensor weight, float clip_range, float kl_coef, str implementation) "
    "-> (Tensor, Tensor, Tensor)",
)
def _grpo_loss(log_prob, old_log_prob, advantages, kl, scale, bias, weight, clip_range, kl_coef, implementation):
    chosen = backends.choose("grpo_loss", implementation, log_prob)
    if chosen != "reference":
        launch = backends.compiled(chosen, "grpo_loss")
        return launch(log_prob, old_log_prob, advantages, kl, scale, bias, weight, clip_range, kl_coef)
    loss, metrics = reference.grpo_loss_ref(
        log_prob, old_log_prob, advantages, kl, scale, bias, weight, clip_range, kl_coef
    )
    # Made in the forward pass: a fused kernel has every number of the gradient at hand.
    grad = reference.grpo_loss_grad_ref(log_prob, old_log_prob, advantages, scale, bias, weight, clip_range)
    return loss, metrics, grad


@_grpo_loss.register_fake
def _(log_prob, old_log_prob, advantages, kl, scale, bias, weight, clip_range, kl_coef, implementation):
    return log_prob.new_empty(()), log_prob.new_empty(5), torch.empty_like(log_prob)


def _grpo_loss_setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.kl_coef = inputs[8]
    ctx.save_for_backward(output[2])


def _grpo_loss_grad(ctx: Any, grad: Tensor, _metrics: Tensor | None, _grad_log_prob: Tensor | None) -> tuple:
    (grad_log_prob,) = ctx.saved_tensors
    grad_kl = (grad * (ctx.kl_coef / grad_log_prob.numel())).expand_as(grad_log_prob)
    return grad * grad_log_prob, None, None, grad_kl, *[None] * 6


_grpo_loss.register_autograd(_grpo_loss_grad, setup_context=_grpo_loss_setup)
