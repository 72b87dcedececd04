"""Flow-DPPO: instead of clipping ratios, drop the pairs that push the policy further from where it already strayed.

Source: Flow-DPPO (arXiv 2606.11025), formulas from the authors' code. A pair is dropped if the divergence of its step
between new and old policy has reached a threshold *and* its gradient would enlarge it: the ratio is above 1 and the
advantage positive, or below 1 and negative. The divergence is exact (both steps are Gaussians of equal variance), where
the ratio is one noisy sample of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from densegrpo_fast.flow.dynamics import StepCoefficients
from densegrpo_fast.objective.clip import ppo_clip_loss
from densegrpo_fast.objective.kl import gaussian_kl
from densegrpo_fast.objective.pairs import Loss, Pairs


def dppo_keep(log_ratio: Tensor, advantages: Tensor, divergence: Tensor, threshold: float = 1e-5) -> Tensor:
    """Which pairs stay in the loss.

    Args:
        log_ratio: [B] float, log_prob - old_log_prob.
        advantages: [B] float.
        divergence: [B] float, KL of the step between new and old policy, **mean** over latent dims, in nats:
            `gaussian_kl(velocity, old_velocity, table, step_index, scale="paper")`.
        threshold: divergence from which a pair may be dropped; 1e-5 in the source.

    Returns:
        [B] bool.

    Raises:
        ValueError: threshold is negative or not finite.
    """
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"dppo_keep: threshold must be finite and at least 0, got {threshold}")
    outward = log_ratio.detach().sign() * advantages.sign() > 0
    return ~((divergence.detach() >= threshold) & outward)


def dppo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    divergence: Tensor,
    *,
    threshold: float = 1e-5,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """mean(weight * keep * -advantages * ratio) + kl_coef * mean(kl) over B (sample, step) pairs.

    Args:
        log_prob: [B] float32, of the policy being trained; mean over latent dims. Carries gradient.
        old_log_prob: [B] float32, of the policy that sampled.
        advantages: [B] float32.
        divergence: [B] float32; see `dppo_keep`. Takes no gradient.
        threshold: see `dppo_keep`.
        kl: [B] float32, divergence to the reference policy; None: no term.
        kl_coef: weight of mean(kl).
        weight: [B] float32, weight of each pair's policy loss; None = 1.

    Returns:
        loss and metrics as `ppo_clip_loss`, whose clip_fraction is the share of dropped pairs here, and whose
        clip_ratio/* split it by the sign of the advantage.

    Raises:
        ValueError: threshold is out of range; kl_coef is not 0 but kl is None; or shapes disagree.
    """
    if not log_prob.shape == advantages.shape == divergence.shape:
        raise ValueError(
            f"dppo_loss: advantages and divergence must have shape {list(log_prob.shape)} like log_prob, "
            f"got {list(advantages.shape)} and {list(divergence.shape)}"
        )
    kept = dppo_keep(log_prob - old_log_prob, advantages, divergence, threshold)
    keep = kept.to(log_prob.dtype)
    loss, metrics = ppo_clip_loss(
        log_prob,
        old_log_prob,
        advantages,
        clip_range=math.inf,
        kl=kl,
        kl_coef=kl_coef,
        weight=keep if weight is None else keep * weight,
    )
    low, high = ((~kept & side).float().mean() for side in (advantages < 0, advantages > 0))
    return loss, metrics | {
        "clip_fraction": 1 - torch.mean(keep),
        "clip_ratio/low_mean": low,
        "clip_ratio/high_mean": high,
        "clip_ratio/region_mean": low + high,
    }


def dppo_policy(coefficients: StepCoefficients, steps: Sequence[int], *, dppo_threshold: float) -> Loss:
    """`dppo_loss` as a policy loss of the registry."""

    def loss(pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        divergence = gaussian_kl(pairs.velocity.detach(), pairs.old_velocity, coefficients.table, pairs.step_index)
        return dppo_loss(
            pairs.log_prob,
            pairs.old_log_prob,
            pairs.advantages,
            divergence.to(pairs.log_prob.dtype),
            threshold=dppo_threshold,
            kl=pairs.kl,
            kl_coef=pairs.kl_coef,
            weight=pairs.weight,
        )

    return loss
