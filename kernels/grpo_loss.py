"""Clipped policy loss, its metrics and its gradient in one launch.

There is one value per row of a batch, so one program serves: it visits the rows in order, which makes every sum the
same from run to run.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from densegrpo_fast.kernels._launch import OPTIONS, device_of

_WIDTH = 256
"""Rows handled side by side. Part of the results."""


@triton.jit
def exponential(x):
    """exp(x), exp(x) - 1 and exp(x) - 1 - x, float32; near 0, where the differences lose their digits, as a series."""
    p = tl.fma(x, 1.0 / 40320, 1.0 / 5040)
    p = tl.fma(x, p, 1.0 / 720)
    p = tl.fma(x, p, 1.0 / 120)
    p = tl.fma(x, p, 1.0 / 24)
    p = tl.fma(x, p, 1.0 / 6)
    p = tl.fma(x, p, 0.5)
    near = tl.abs(x) < 0.5
    power = tl.exp(x)
    difference = tl.where(near, x + x * x * p, power - 1.0)
    return tl.where(near, 1.0 + difference, power), difference, tl.where(near, x * x * p, difference - x)


@triton.jit
def grpo_loss_kernel(
    log_prob_ptr,  # [B] float32, like all inputs
    old_log_prob_ptr,
    advantage_ptr,
    kl_ptr,
    scale_ptr,
    bias_ptr,
    weight_ptr,
    loss_ptr,  # [1] float32
    metrics_ptr,  # [5] float32
    grad_ptr,  # [B] float32
    lowest,  # 1 - clip_range
    highest,  # 1 + clip_range
    clip_range,
    kl_coef,
    rows,
    WIDTH: tl.constexpr,
):
    policy_sum = tl.zeros([WIDTH], dtype=tl.float32)
    kl_sum = tl.zeros([WIDTH], dtype=tl.float32)
    clipped_sum = tl.zeros([WIDTH], dtype=tl.float32)
    old_kl_sum = tl.zeros([WIDTH], dtype=tl.float32)
    furthest = tl.zeros([WIDTH], dtype=tl.float32)
    # Divisions round to nearest, as PyTorch's do: an operator / may be off by two units in the last place.
    count = rows * 1.0
    # Not range(): with NumPy 2.4, the interpreter of Triton 3.6 cannot count up to an argument.
    start = 0
    while start < rows:
        row = start + tl.arange(0, WIDTH)
        mask = row < rows
        change = tl.load(log_prob_ptr + row, mask=mask, other=0.0) - tl.load(
            old_log_prob_ptr + row, mask=mask, other=0.0
        )
        scale = tl.load(scale_ptr + row, mask=mask, other=0.0)
        log_ratio = (change + tl.load(bias_ptr + row, mask=mask, other=0.0)) * scale
        ratio, deviation, curvature = exponential(log_ratio)
        deviation = tl.abs(deviation)

        advantage = tl.load(advantage_ptr + row, mask=mask, other=0.0)
        weight = tl.load(weight_ptr + row, mask=mask, other=0.0)
        unclipped = -advantage * ratio
        clipped = -advantage * tl.minimum(tl.maximum(ratio, lowest), highest)
        # Comparisons, not tl.maximum: a NaN must reach the loss, and it makes every comparison false.
        is_clipped = clipped > unclipped
        policy_sum += weight * tl.where(is_clipped, clipped, unclipped)
        slope = tl.where(is_clipped, 0.0, unclipped * scale)
        tl.store(grad_ptr + row, tl.div_rn(weight * slope, count), mask=mask)

        kl_sum += tl.load(kl_ptr + row, mask=mask, other=0.0)
        clipped_sum += (deviation > clip_range).to(tl.float32)
        old_kl_sum += curvature
        furthest = tl.where(deviation <= furthest, furthest, deviation)
        start += WIDTH

    policy_loss = tl.div_rn(tl.sum(policy_sum, axis=0), count)
    mean_kl = tl.div_rn(tl.sum(kl_sum, axis=0), count)
    old_kl = tl.div_rn(tl.sum(old_kl_sum, axis=0), count)
    tl.store(loss_ptr, policy_loss + kl_coef * mean_kl)
    tl.store(metrics_ptr, policy_loss)
    tl.store(metrics_ptr + 1, mean_kl)
    tl.store(metrics_ptr + 2, tl.div_rn(tl.sum(clipped_sum, axis=0), count))
    tl.store(metrics_ptr + 3, old_kl)
    tl.store(metrics_ptr + 4, tl.where(old_kl != old_kl, old_kl, tl.max(furthest, axis=0)))


def grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    kl: Tensor,
    scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    clip_range: float,
    kl_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.grpo_loss` with every optional argument filled in.

    Args:
        log_prob, old_log_prob, advantages, kl, scale, bias, weight: [B] float32, B >= 1.
        clip_range: half width of the trusted interval around ratio 1.
        kl_coef: weight of mean(kl).

    Returns:
        loss, scalar; metrics, [5]; gradient of the loss with respect to `log_prob`, [B].
    """
    inputs = [values.contiguous() for values in (log_prob, old_log_prob, advantages, kl, scale, bias, weight)]
    loss, metrics, grad = log_prob.new_empty(()), log_prob.new_empty(5), log_prob.new_empty(log_prob.shape)
    with device_of(log_prob):
        grpo_loss_kernel[(1,)](
            *inputs,
            loss,
            metrics,
            grad,
            1 - clip_range,
            1 + clip_range,
            clip_range,
            kl_coef,
            log_prob.shape[0],
            WIDTH=_WIDTH,
            **OPTIONS,
        )
    return loss, metrics, grad
