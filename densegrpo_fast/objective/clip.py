"""PPO's clipped policy loss, with an optional KL term, as Flow-GRPO (arXiv 2505.05470) uses it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from densegrpo_fast.flow.dynamics import StepCoefficients
from densegrpo_fast.flow.ops import grpo_loss
from densegrpo_fast.objective.pairs import Loss, Pairs

METRICS = ("policy_loss", "kl", "clip_fraction", "approx_kl", "ratio_deviation")


def ppo_clip_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip_range: float,
    kl: Tensor | None = None,
    kl_coef: float = 0.0,
    weight: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Clipped surrogate loss of B (sample, step) pairs.

    ratio = exp(log_prob - old_log_prob);
    loss = mean(weight * max(-advantages * ratio, -advantages * clamp(ratio, 1 - clip_range, 1 + clip_range)))
    + kl_coef * mean(kl).

    Args:
        log_prob: [B] float32, of the policy being trained; **mean** over latent dims, natural log. Carries
            gradient.
        old_log_prob: [B] float32, of the policy that sampled.
        advantages: [B] float32; 0 for missing samples and flat groups.
        clip_range: half-width of the ratio's trust interval. Because log_prob is a mean over D latent dims,
            the log-ratio's spread falls as 1/sqrt(D): 1e-4 suits D = 65536.
        kl: [B] float32, divergence to the reference policy (see `kl.gaussian_kl`); carries gradient. None: no
            term.
        kl_coef: weight of mean(kl).
        weight: [B] float32, weight of each pair's policy loss; None = 1.

    Returns:
        loss: 0-d, differentiable in log_prob and kl.
        metrics: detached 0-d tensors (no host sync): policy_loss; kl; clip_fraction, share of ratios outside
            the trust interval; approx_kl, mean of ratio - 1 - log ratio; ratio_deviation, max |ratio - 1|; and
            those of `clip_ratios`.

    Raises:
        ValueError: kl_coef is not 0 but kl is None; or shapes disagree.
    """
    if kl is None and kl_coef:
        raise ValueError(f"ppo_clip_loss: kl_coef {kl_coef} needs kl, got None")
    loss, metrics = grpo_loss(
        log_prob, old_log_prob, advantages, kl, clip_range=clip_range, kl_coef=kl_coef, weight=weight
    )
    found = dict(zip(METRICS, metrics.detach().unbind(), strict=True))
    return loss, found | clip_ratios(log_prob.detach() - old_log_prob, advantages, clip_range)


def clip_policy(coefficients: StepCoefficients, steps: Sequence[int], *, clip_range: float) -> Loss:
    """`ppo_clip_loss` as a policy loss of the registry."""

    def loss(pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        return ppo_clip_loss(
            pairs.log_prob,
            pairs.old_log_prob,
            pairs.advantages,
            clip_range=clip_range,
            kl=pairs.kl,
            kl_coef=pairs.kl_coef,
            weight=pairs.weight,
        )

    return loss


def clip_ratios(log_ratio: Tensor, advantages: Tensor, clip_range: float) -> dict[str, Tensor]:
    """Shares of the pairs whose gradient the clip cuts off: the ratio is outside, where its advantage drives it.

    Args:
        log_ratio: [B] float32.
        advantages: [B] float32.
        clip_range: half-width of the ratio's trust interval.

    Returns:
        0-d tensors: clip_ratio/low_mean (ratio below, advantage negative), clip_ratio/high_mean (above, positive) and
        their sum, clip_ratio/region_mean; at most clip_fraction, which counts both signs.
    """
    ratio = log_ratio.exp()
    low = ((ratio < 1 - clip_range) & (advantages < 0)).float().mean()
    high = ((ratio > 1 + clip_range) & (advantages > 0)).float().mean()
    return {"clip_ratio/low_mean": low, "clip_ratio/high_mean": high, "clip_ratio/region_mean": low + high}
