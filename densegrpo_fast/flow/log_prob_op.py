"""`ops.sde_log_prob`: the score of a stored transition and its gradient as `torch.library` ops.

Plain or guided, alone or with the KL divergence from a reference policy, which the same pass yields. Where no fused
implementation serves the call, PyTorch combines before and compares beside the plain op: the same numbers.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.library import custom_op

from densegrpo_fast.flow import backends, checks, reference
from densegrpo_fast.flow.dynamics import STD_DEV, C

KlScale = Literal["paper", "flow_grpo"]

KL_STD: dict[str, int] = {"paper": C, "flow_grpo": STD_DEV}
"""Column of the table with the standard deviation that a divergence is measured in."""


def sde_log_prob(
    latents: Tensor,
    velocity: Tensor,
    next_latents: Tensor,
    table: Tensor,
    step_index: int | Tensor,
    *,
    uncond: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    implementation: str = "auto",
) -> Tensor:
    """Log-probability of a stored transition under the current velocity. Differentiable in `velocity` and `uncond`.

    Args:
        latents: states before the step, [B, ...] floating.
        velocity: model output there, same shape; with `uncond`, that given the prompt.
        next_latents: states after the step, same shape.
        table: step coefficients, [T, 6] float32.
        step_index: step of every row, in [0, T): one int, or [B] int64.
        uncond: model output without the prompt, same shape, for classifier-free guidance as in `sde_step`.
        guidance_scale: one number, or [B] float32; 1 without `uncond`.
        implementation: "auto" or a name of `backends.IMPLEMENTATIONS`.

    Returns:
        log_prob, [B] float32 (float64 if an input is), natural log, mean over the elements of a sample; 0 for
        noise-free rows.

    Raises:
        TypeError, ValueError, RuntimeError: as `sde_step`.
    """
    transition = (latents, next_latents, table, step_index)
    return _score("sde_log_prob", velocity, uncond, None, None, guidance_scale, *transition, C, implementation)[0]


def sde_log_prob_kl(
    latents: Tensor,
    velocity: Tensor,
    reference_velocity: Tensor,
    next_latents: Tensor,
    table: Tensor,
    step_index: int | Tensor,
    *,
    scale: KlScale = "paper",
    uncond: Tensor | None = None,
    reference_uncond: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`sde_log_prob` and the KL divergence of the step from the reference policy's, in one pass.

    Both policies' steps are Gaussians of one standard deviation, so only velocities count:
    kl = B^2 / (2 std^2) * mean((velocity - reference_velocity)^2). Differentiable in `velocity` and `uncond`.

    Args:
        latents, velocity, next_latents, table, step_index, uncond, guidance_scale, implementation: as `sde_log_prob`.
        reference_velocity: of the reference policy, shape of `latents`, floating.
        scale: "paper" takes for std the one really injected, column C (Flow-GRPO, arXiv 2505.05470); "flow_grpo" the
            column STD_DEV, as that paper's code does.
        reference_uncond: of the reference policy without the prompt; given with `uncond`, and only then.

    Returns:
        log_prob as `sde_log_prob`; kl, [B] of the same dtype, in nats, mean over the elements of a sample; both 0 for
        noise-free rows.

    Raises:
        TypeError, ValueError, RuntimeError: as `sde_step`.
    """
    op = "sde_log_prob_kl"
    if scale not in get_args(KlScale):
        raise ValueError(f"{op}: scale must be {' or '.join(map(repr, get_args(KlScale)))}, got {scale!r}")
    if (uncond is None) != (reference_uncond is None):
        missing = "uncond" if uncond is None else "reference_uncond"
        raise ValueError(f"{op}: uncond and reference_uncond go together, got no {missing}")
    velocities = (velocity, uncond, reference_velocity, reference_uncond, guidance_scale)
    return _score(op, *velocities, latents, next_latents, table, step_index, KL_STD[scale], implementation)


def _score(
    op,
    velocity,
    uncond,
    reference_velocity,
    reference_uncond,
    guidance_scale,
    latents,
    next_latents,
    table,
    step_index,
    kl_std,
    implementation,
):
    states = {
        "velocity": velocity,
        "next_latents": next_latents,
        "uncond": uncond,
        "reference_velocity": reference_velocity,
        "reference_uncond": reference_uncond,
    }
    required = ("velocity", "next_latents", *(("reference_velocity",) if op == "sde_log_prob_kl" else ()))
    present = {name: state for name, state in states.items() if state is not None or name in required}
    checks.check_latents(op, latents, **present)
    checks.check_table(op, table, latents)
    rows = checks.guidance_rows(op, guidance_scale, uncond, latents)
    step_index = checks.step_rows(op, step_index, latents)
    backends.check_name(implementation)
    velocities = (velocity, uncond, rows, reference_velocity, reference_uncond)
    return _sde_log_prob(latents, *velocities, next_latents, table, step_index, kl_std, implementation)


_INPUTS = (
    "Tensor latents, Tensor velocity, Tensor? uncond, Tensor? guidance_scale, Tensor? reference, "
    "Tensor? reference_uncond, Tensor next_latents, Tensor table, Tensor step_index, int kl_std"
)


@custom_op(
    "densegrpo_fast::sde_log_prob",
    mutates_args=(),
    schema=f"({_INPUTS}, str implementation) -> (Tensor, Tensor)",
)
def _sde_log_prob(latents, velocity, uncond, scale, ref, ref_uncond, next_latents, table, step_index, kl_std, named):
    op = _form(uncond, ref)
    chosen = backends.choose(op, named, *_given(latents, velocity, next_latents, uncond, ref, ref_uncond))
    checks.check_finite(op, table)
    if chosen != "triton":  # which in its interpreter does as it does on a device
        checks.check_steps(op, step_index, table)
    if chosen in ("triton", "cpu"):
        launch = backends.compiled(chosen, "sde_log_prob")
        return launch(latents, velocity, uncond, scale, ref, ref_uncond, next_latents, table, step_index, kl_std)
    velocity, ref = _combined(velocity, uncond, ref, ref_uncond, scale)
    chosen = _plain(op, named, chosen, latents, velocity, next_latents)
    if chosen == "cuda":
        log_prob = backends.compiled(chosen, "sde_log_prob")(latents, velocity, next_latents, table, step_index)
    elif chosen == "reference":
        log_prob = reference.sde_log_prob_ref(latents, velocity, next_latents, table, step_index)
    else:
        launch = backends.compiled(chosen, "sde_log_prob")
        log_prob, _ = launch(latents, velocity, *[None] * 4, next_latents, table, step_index, kl_std)
    if ref is None:
        return log_prob, log_prob.new_empty(0)
    return log_prob, reference.gaussian_kl_ref(velocity, ref, table, step_index, kl_std).to(log_prob.dtype)


@_sde_log_prob.register_fake
def _(latents, velocity, uncond, scale, ref, ref_uncond, next_latents, table, step_index, kl_std, named):
    dtype = reference.compute_dtype(*_given(latents, velocity, next_latents, uncond, ref, ref_uncond))
    batch = latents.shape[0]
    return latents.new_empty(batch, dtype=dtype), latents.new_empty(0 if ref is None else batch, dtype=dtype)


@custom_op(
    "densegrpo_fast::sde_log_prob_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? grad_kl, {_INPUTS}, bool with_uncond, str implementation) -> (Tensor, Tensor)",
)
def _sde_log_prob_backward(
    grad,
    grad_kl,
    latents,
    velocity,
    uncond,
    scale,
    ref,
    ref_uncond,
    next_latents,
    table,
    step_index,
    kl_std,
    with_uncond,
    named,
):
    op = _form(uncond, ref)
    chosen = backends.choose(op, named, *_given(latents, velocity, next_latents, uncond, ref, ref_uncond))
    transition = (next_latents, table, step_index)
    if chosen in ("triton", "cpu"):
        launch = backends.compiled(chosen, "sde_log_prob_backward")
        velocities = (velocity, uncond, scale, ref, ref_uncond)
        return launch(grad, grad_kl, latents, *velocities, *transition, kl_std, with_uncond)
    guided, ref = _combined(velocity, uncond, ref, ref_uncond, scale)
    chosen = _plain(op, named, chosen, latents, guided, next_latents)
    if chosen == "cuda":
        grad_velocity = backends.compiled(chosen, "sde_log_prob_backward")(grad, latents, guided, *transition)
    elif chosen == "reference":
        grad_velocity = reference.sde_log_prob_grad_ref(grad, latents, guided, *transition)
    else:
        launch = backends.compiled(chosen, "sde_log_prob_backward")
        grad_velocity, _ = launch(grad, None, latents, guided, *[None] * 4, *transition, kl_std, False)
    if ref is not None:
        pull = reference.gaussian_kl_grad_ref(grad_kl, guided, ref, table, step_index, kl_std)
        grad_velocity = grad_velocity + pull.to(grad_velocity.dtype)
    if uncond is None:
        return grad_velocity.to(velocity.dtype).contiguous(), velocity.new_empty(0)
    factor = scale.to(grad_velocity.dtype).reshape(-1, *([1] * (latents.ndim - 1)))
    grad_uncond = ((1 - factor) * grad_velocity).to(uncond.dtype) if with_uncond else uncond.new_empty(0)
    return (factor * grad_velocity).to(velocity.dtype).contiguous(), grad_uncond.contiguous()


@_sde_log_prob_backward.register_fake
def _(
    grad,
    grad_kl,
    latents,
    velocity,
    uncond,
    scale,
    ref,
    ref_uncond,
    next_latents,
    table,
    step_index,
    kl_std,
    with_uncond,
    named,
):
    grad_velocity = torch.empty_like(velocity, memory_format=torch.contiguous_format)
    if not with_uncond:
        return grad_velocity, velocity.new_empty(0)
    return grad_velocity, torch.empty_like(uncond, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.kl_std, ctx.implementation = inputs
    ctx.save_for_backward(*tensors)


def _grad(ctx: Any, grad: Tensor, grad_kl: Tensor) -> tuple:
    has_reference, with_uncond = ctx.saved_tensors[4] is not None, ctx.needs_input_grad[2]
    options = (ctx.kl_std, with_uncond, ctx.implementation)
    found = _sde_log_prob_backward(grad, grad_kl if has_reference else None, *ctx.saved_tensors, *options)
    return None, found[0], found[1] if with_uncond else None, *[None] * 8


_sde_log_prob.register_autograd(_grad, setup_context=_setup)


def _combined(velocity, uncond, ref, ref_uncond, scale):
    """Guided velocities of the policy and of the reference policy; where they are summed up, wide enough for it."""
    if uncond is None:
        return velocity if ref is None else velocity.to(reference.compute_dtype(velocity)), ref
    guided = reference.guided_velocity_ref
    return guided(velocity, uncond, scale), None if ref is None else guided(ref, ref_uncond, scale)


def _plain(op, named, chosen, latents, velocity, next_latents):
    """What serves the plain op; what was not named may fit it better than it fits the whole call."""
    if named != "auto" or op == "sde_log_prob":
        return chosen
    return backends.choose("sde_log_prob", named, latents, velocity, next_latents)


def _form(uncond: Tensor | None, ref: Tensor | None) -> str:
    """Name in `backends.OPS` of what a call asks for."""
    return "sde_log_prob_kl" if ref is not None else "guided_sde_log_prob" if uncond is not None else "sde_log_prob"


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]
