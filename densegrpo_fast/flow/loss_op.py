"""`ops.grpo_loss` as a `torch.library` op: loss, metrics and gradient are made in one forward pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from densegrpo_fast.flow import backends, checks, reference


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
        clip_range: c, positive; infinite = no clipping.
        kl_coef: weight of mean(kl), finite, at least 0.
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
    if not 0 <= kl_coef < math.inf:
        raise ValueError(f"grpo_loss: kl_coef must be finite and at least 0, got {kl_coef}")
    required = {"old_log_prob": old_log_prob, "advantages": advantages}
    optional = {"kl": kl, "log_ratio_scale": log_ratio_scale, "log_ratio_bias": log_ratio_bias, "weight": weight}
    given = {name: value for name, value in optional.items() if value is not None}
    for name, value in (required | given).items():
        checks.check_rows("grpo_loss", name, value, log_prob)
    backends.check_name(implementation)
    dtype = reference.compute_dtype(log_prob)
    values = [None if value is None else value.to(dtype) for value in (log_prob, *(required | optional).values())]
    loss, metrics = _Loss.apply(*values, float(clip_range), float(kl_coef), implementation)
    return loss, metrics.detach()


class _Loss(torch.autograd.Function):
    """Around the op, not registered with it: on [B] numbers, overhead is all there is, and this way has the least."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        loss, metrics, grad_log_prob = _grpo_loss(*inputs)
        ctx.kl_coef = None if inputs[3] is None else inputs[8]
        ctx.save_for_backward(grad_log_prob)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _metrics: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (grad_log_prob,) = ctx.saved_tensors
        grad_kl = None
        if ctx.kl_coef is not None:
            grad_kl = (grad * (ctx.kl_coef / len(grad_log_prob))).expand_as(grad_log_prob)
        return grad * grad_log_prob, None, None, grad_kl, *[None] * 6


@custom_op(
    "densegrpo_fast::grpo_loss",
    mutates_args=(),
    schema="(Tensor log_prob, Tensor old_log_prob, Tensor advantages, Tensor? kl, Tensor? log_ratio_scale, "
    "Tensor? log_ratio_bias, Tensor? weight, float clip_range, float kl_coef, str implementation) "
    "-> (Tensor, Tensor, Tensor)",
)
def _grpo_loss(log_prob, old_log_prob, advantages, kl, scale, bias, weight, clip_range, kl_coef, implementation):
    chosen = backends.choose("grpo_loss", implementation, log_prob)
    optional = [kl, scale, bias, weight]
    if chosen != "cpu":
        zero, one = torch.zeros_like(log_prob), torch.ones_like(log_prob)
        absent = (zero, one, zero, one)
        optional = [other if value is None else value for value, other in zip(optional, absent, strict=True)]
    compute: Callable[..., Any] = (
        reference.grpo_loss_ref if chosen == "reference" else backends.compiled(chosen, "grpo_loss")
    )
    return compute(log_prob, old_log_prob, advantages, *optional, clip_range, kl_coef)


@_grpo_loss.register_fake
def _(log_prob, old_log_prob, advantages, kl, scale, bias, weight, clip_range, kl_coef, implementation):
    return log_prob.new_empty(()), log_prob.new_empty(5), torch.empty_like(log_prob)
