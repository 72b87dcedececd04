"""Every op in plain PyTorch: the ground truth that the compiled implementations are held to.

Arithmetic runs in float32, or in float64 when an input is float64, whatever the storage dtype. The functions
trust their arguments (`ops.py` checks them) and are differentiable by autograd; where an op needs its
gradient in closed form, that form stands beside the function, and the tests compare the two.
"""

from __future__ import annotations

import torch
from torch import Tensor

from densegrpo_fast.flow.dynamics import LOG_PROB_CONST, LOG_PROB_SCALE, A, B, C


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Dtype in which a step is computed.

    Args:
        tensors: floating point inputs.

    Returns:
        float64 if any input is float64, float32 otherwise.
    """
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def sde_step_ref(
    latents: Tensor, velocity: Tensor, table: Tensor, step_index: Tensor, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """One affine step with given noise, and the log-probability of the state it stored.

    Args:
        latents: states, [B, ...] floating.
        velocity: model output, noise minus data, same shape.
        table: step coefficients, [T, 6] (`dynamics.coefficients`).
        step_index: row of the table for every sample, [B] int64.
        noise: standard normal, same shape.

    Returns:
        next_latents, [B, ...] in the dtype of `latents`; log_prob, [B] in the compute dtype, natural log,
        mean over the elements of a sample, computed from `next_latents` as stored, after rounding.
    """
    dtype = compute_dtype(latents, velocity)
    rows = _rows(table, step_index, latents.ndim, dtype)
    next_latents = (_mean(latents, velocity, rows, dtype) + rows[C] * noise.to(dtype)).to(latents.dtype)
    return next_latents, sde_log_prob_ref(latents, velocity, next_latents, table, step_index)


def sde_log_prob_ref(
    latents: Tensor, velocity: Tensor, next_latents: Tensor, table: Tensor, step_index: Tensor
) -> Tensor:
    """Log-probability of a stored transition under the current velocity.

    Args:
        latents: states before the step, [B, ...] floating.
        velocity: model output there, same shape.
        next_latents: states after the step, same shape.
        table: step coefficients, [T, 6].
        step_index: row of the table for every sample, [B] int64.

    Returns:
        log_prob, [B] in the compute dtype, natural log, mean over the elements of a sample; 0 for ODE rows.
    """
    dtype = compute_dtype(latents, velocity, next_latents)
    rows = _rows(table, step_index, latents.ndim, dtype)
    residual = next_latents.to(dtype) - _mean(latents, velocity, rows, dtype)
    mean_square = residual.square().flatten(1).mean(1)
    return -rows[LOG_PROB_SCALE].flatten() * mean_square + rows[LOG_PROB_CONST].flatten()


def sde_log_prob_grad_ref(
    grad: Tensor, latents: Tensor, velocity: Tensor, next_latents: Tensor, table: Tensor, step_index: Tensor
) -> Tensor:
    """Gradient of `sde_log_prob_ref` with respect to `velocity`.

    d log_prob / d velocity = 2 * LOG_PROB_SCALE * B * (next_latents - mean) / elements.

    Args:
        grad: gradient arriving at log_prob, [B].
        latents, velocity, next_latents, table, step_index: as for `sde_log_prob_ref`.

    Returns:
        gradient, shape and dtype of `velocity`.
    """
    dtype = compute_dtype(latents, velocity, next_latents)
    rows = _rows(table, step_index, latents.ndim, dtype)
    residual = next_latents.to(dtype) - _mean(latents, velocity, rows, dtype)
    elements = max(latents[:1].numel(), 1)
    factor = _per_row(grad.to(dtype), latents.ndim) * (2 / elements) * rows[LOG_PROB_SCALE] * rows[B]
    return (factor * residual).to(velocity.dtype)


def guided_velocity_ref(cond: Tensor, uncond: Tensor, guidance_scale: Tensor) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): uncond + guidance_scale * (cond - uncond).

    Args:
        cond, uncond: model outputs with and without the prompt, [B, ...] floating.
        guidance_scale: [B] float32.

    Returns:
        velocity, [B, ...] in the compute dtype.
    """
    dtype = compute_dtype(cond, uncond)
    scale = _per_row(guidance_scale.to(dtype), cond.ndim)
    return uncond.to(dtype) + scale * (cond.to(dtype) - uncond.to(dtype))


def sde_mean_ref(latents: Tensor, velocity: Tensor, table: Tensor, step_index: Tensor) -> Tensor:
    """Mean of the next state, A * latents + B * velocity, [B, ...] in the compute dtype; arguments as above."""
    dtype = compute_dtype(latents, velocity)
    return _mean(latents, velocity, _rows(table, step_index, latents.ndim, dtype), dtype)


def gaussian_kl_ref(
    velocity: Tensor, reference_velocity: Tensor, table: Tensor, step_index: Tensor, kl_std: int = C
) -> Tensor:
    """KL divergence of a step from the reference policy's: B^2 / (2 std^2) * mean((velocity - reference_velocity)^2).

    Args:
        velocity: [B, ...] floating.
        reference_velocity: of the reference policy, same shape.
        table: step coefficients, [T, 6].
        step_index: row of the table for every sample, [B] int64.
        kl_std: column of the table that holds std.

    Returns:
        kl, [B] in the compute dtype, in nats, mean over the elements of a sample; 0 for ODE rows.
    """
    dtype = compute_dtype(velocity, reference_velocity)
    distance = velocity.to(dtype) - reference_velocity.to(dtype)
    return _kl_weight(table, step_index, kl_std, dtype) * distance.square().flatten(1).mean(1)


def gaussian_kl_grad_ref(
    grad: Tensor, velocity: Tensor, reference_velocity: Tensor, table: Tensor, step_index: Tensor, kl_std: int = C
) -> Tensor:
    """Gradient of `gaussian_kl_ref` with respect to `velocity`, in its shape and dtype.

    Args:
        grad: gradient arriving at kl, [B].
        velocity, reference_velocity, table, step_index, kl_std: as there.
    """
    dtype = compute_dtype(velocity, reference_velocity)
    elements = max(velocity[:1].numel(), 1)
    factor = grad.to(dtype) * (2 / elements) * _kl_weight(table, step_index, kl_std, dtype)
    return (_per_row(factor, velocity.ndim) * (velocity.to(dtype) - reference_velocity.to(dtype))).to(velocity.dtype)


def euler_jump_ref(latents: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """Straight-line move between two noise levels: latents + (next_sigma - sigma) * velocity.

    Args:
        latents: states at `sigma`, [B, ...] floating.
        velocity: model output there, same shape.
        sigma, next_sigma: noise levels in [0, 1], [B] float32.

    Returns:
        states at `next_sigma`, [B, ...] in the dtype of `latents`.
    """
    dtype = compute_dtype(latents, velocity)
    dt = _per_row((next_sigma - sigma).to(dtype), latents.ndim)
    return (latents.to(dtype) + dt * velocity.to(dtype)).to(latents.dtype)


def grpo_loss_ref(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    kl: Tensor,
    log_ratio_scale: Tensor,
    log_ratio_bias: Tensor,
    weight: Tensor,
    clip_range: float,
    kl_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Clipped policy-gradient loss of PPO (Schulman et al. 2017, eq. 7) with a KL penalty.

    Args:
        log_prob, old_log_prob, advantages, kl: one value per row, [B].
        log_ratio_scale, log_ratio_bias, weight: per row, [B]; ratio = exp((log_prob - old_log_prob + bias) *
            scale).
        clip_range: half width of the trusted interval around ratio 1.
        kl_coef: weight of mean(kl).

    Returns:
        loss, scalar, differentiable; metrics, [5]: policy loss, mean kl, share of rows with |ratio-1| > clip_range,
        the low-variance estimate mean((ratio-1) - log ratio) of the KL to the old policy, and max |ratio-1|; the
        gradient of the loss with respect to `log_prob` in closed form, [B], 0 where the clipped branch is the larger
        one. Metrics and gradient carry no gradient of their own.
    """
    log_ratio = (log_prob - old_log_prob + log_ratio_bias) * log_ratio_scale
    ratio, descent = log_ratio.exp(), -advantages
    unclipped, clipped = descent * ratio, descent * ratio.clamp(1 - clip_range, 1 + clip_range)
    deviation = (ratio - 1).abs()
    means = torch.stack(
        [
            weight * torch.maximum(unclipped, clipped),
            kl,
            (deviation > clip_range).to(ratio.dtype),
            # expm1 keeps the digits that (ratio - 1) loses when the log-ratio is about 1e-4, as it is here.
            torch.expm1(log_ratio) - log_ratio,
        ]
    ).mean(1)
    policy_loss, mean_kl, _, _ = means.unbind()
    metrics = torch.cat([means, deviation.max()[None]])
    slope = (unclipped * log_ratio_scale).masked_fill(clipped > unclipped, 0.0)
    return policy_loss + kl_coef * mean_kl, metrics.detach(), (weight * slope / len(log_prob)).detach()


def _rows(table: Tensor, step_index: Tensor, ndim: int, dtype: torch.dtype) -> list[Tensor]:
    """Columns of the coefficient table for every sample, each [B, 1, ...]."""
    return [_per_row(column, ndim) for column in table.index_select(0, step_index).to(dtype).unbind(1)]


def _kl_weight(table: Tensor, step_index: Tensor, kl_std: int, dtype: torch.dtype) -> Tensor:
    rows = table.index_select(0, step_index).to(dtype)
    noisy = rows[:, C] > 0
    gain = rows[:, B] / rows[:, kl_std].where(noisy, 1.0)
    return (gain.square() / 2).where(noisy, 0.0)


def _per_row(values: Tensor, ndim: int) -> Tensor:
    return values.reshape(-1, *([1] * (ndim - 1)))


def _mean(latents: Tensor, velocity: Tensor, rows: list[Tensor], dtype: torch.dtype) -> Tensor:
    return rows[A] * latents.to(dtype) + rows[B] * velocity.to(dtype)
