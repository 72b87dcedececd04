"""Bad branches that point where good ones of the same state do, held back: an experiment.

The idea is NTHR's (arXiv 2505.18830), for language models: a wrong answer shares tokens with the right ones, and
pushing these down pushes the right answers down too. Tokens whose influence on right answers, summed over them, exceeds
beta times the least that a right answer itself receives get a smaller negative advantage (beta 1, factor 0 there).

The analogue here is ours, and nothing is published on it. The gradient of a branch's log-probability is its noise
carried back through the velocity's Jacobian, and branches of one state share that Jacobian. So to first order in the
velocity an update on branch j moves the log-probability of branch i by a multiple of <noise_i, noise_j>:

    score_j = sum over branches i with advantage above 0 of cos(noise_i, noise_j)
    held back: advantage below 0 and score_j > threshold * min over branches i with advantage above 0 of score_i

A good branch's own score contains its cosine with itself, 1. Independent noise in D dimensions has cosines of about
1/sqrt(D), so that with many dimensions a threshold of 1 holds nothing back; 1/sqrt(D), the default, does.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from densegrpo_fast.flow.dynamics import A, B


def branch_noise(latents: Tensor, velocity: Tensor, arrivals: Tensor, row: Tensor) -> Tensor:
    """The noise of every branch, times its standard deviation.

    Args:
        latents: [m, ...] float, the states.
        velocity: same shape, of the policy that sampled.
        arrivals: [m*K, ...], where the K branches of each state led, one state's after the other.
        row: [6] coefficients of the step (`flow.dynamics`).

    Returns:
        [m, K, D] float32.
    """
    mean = row[A] * latents.float() + row[B] * velocity.float()
    return arrivals.float().unflatten(0, (len(latents), -1)).sub(mean.unsqueeze(1)).flatten(2)


def negative_weights(noise: Tensor, advantages: Tensor, *, factor: float, threshold: float | None = None) -> Tensor:
    """What the advantages of the branches are multiplied by; see the top of this file.

    Args:
        noise: [m, K, D] float, of K branches of m states; its length does not matter.
        advantages: [m, K] float.
        factor: for the branches that are held back, in [0, 1]; 1 = nothing changes.
        threshold: score from which a branch is held back, as a share of the least score of a good one; at least 0.
            None = 1/sqrt(D).

    Returns:
        [m, K] in the dtype of `advantages`: `factor` or 1. States without a good branch hold nothing back.

    Raises:
        ValueError: shapes disagree, or an option is out of range.
    """
    if noise.ndim != 3 or noise.shape[:2] != advantages.shape:
        raise ValueError(
            f"negative_weights: noise must be [m, K, D] for advantages [m, K], got {list(noise.shape)} and "
            f"{list(advantages.shape)}"
        )
    if not 0 <= factor <= 1:
        raise ValueError(f"negative_weights: factor must be in [0, 1], got {factor}")
    if threshold is None:
        threshold = noise.shape[-1] ** -0.5
    if not (math.isfinite(threshold) and threshold >= 0):
        raise ValueError(f"negative_weights: threshold must be finite and at least 0, got {threshold}")
    unit = functional.normalize(noise, dim=-1)
    good = advantages > 0
    score = (unit @ unit.mT * good.unsqueeze(1)).sum(-1)
    least = score.where(good, math.inf).amin(-1, keepdim=True)
    held = (advantages < 0) & (score > threshold * least)
    return torch.ones_like(advantages).masked_fill(held, factor)
