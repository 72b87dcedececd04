"""CoCA: one reward per image, shared out over its steps by how much nearer each brought the latents to the image.

Source: "Step-level Reward for Free in RL-based T2I Diffusion Model Fine-tuning" (arXiv 2505.19196), formulas as in its
released code, which is for DDPM: 50 steps of Stable Diffusion 1.4/1.5, windows of 5. The port to flow models is ours:

    * similarity: cosine between the final latents and the clean latents predicted at each state,
      latents - sigma*velocity; the final state's prediction is itself. The released code compares predicted clean
      latents, the paper's text intermediate latents, which at sigma 1 are pure noise.
    * a step is credited with the rise from the state it leaves to the state it leads to. On a noise-free last step,
      which lands on its own prediction, that is 0.
    * windows: the source's 10 windows per trajectory are windows of 1 on a ten-step grid, hence the default.
    * a trajectory whose similarity does not rise by `similarity_floor` shares its reward out evenly; the source
      divides by the rise as it is.
    * statistics of both normalisations are this iteration's. The source keeps a prompt's rewards of earlier epochs, and
      divides by its oldest kept statistics in the second.

DenseGRPO (arXiv 2601.20218) compares with a "Flow-GRPO + CoCA" of its own, whose details are not verified.
No network forward and no decode beyond Flow-GRPO's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from densegrpo_fast.credit.normalize import Advantages, Std, normalize_groups


def latent_similarity(latents: Tensor, velocities: Tensor, sigmas: Tensor) -> Tensor:
    """Cosine between the clean latents predicted at each state and the final ones.

    Args:
        latents: [T+1, B, ...] float; index = steps done.
        velocities: [T, B, ...] float, at each state; v = noise - data.
        sigmas: [T+1] float, the grid.

    Returns:
        [B, T+1] float64, in [-1, 1]; index = steps done, the last is the final latents' own, 1. 0 where either is all
        zeros.

    Raises:
        ValueError: shapes disagree.
    """
    if latents.shape[1:] != velocities.shape[1:] or not len(latents) == len(sigmas) == len(velocities) + 1:
        raise ValueError(
            "latent_similarity: latents [T+1, B, ...], velocities [T, B, ...] and sigmas [T+1] must agree, "
            f"got {list(latents.shape)}, {list(velocities.shape)} and {list(sigmas.shape)}"
        )
    # float64: shares are differences of cosines that may lie close together
    final = latents[-1].double().flatten(1)
    predicted = (
        (state.double() - sigma * velocity.double()).flatten(1)
        for state, velocity, sigma in zip(latents[:-1], velocities, sigmas[:-1].double(), strict=True)
    )
    return torch.stack([torch.cosine_similarity(clean, final, dim=1) for clean in (*predicted, final)], dim=1)


def contribution_weights(similarity: Tensor, *, window: int = 1, similarity_floor: float = 1e-3) -> Tensor:
    """Share of every step in its trajectory's rise of similarity; shares may be negative and sum to 1.

    With m_k the mean similarity of the states that the steps of window k lead to, and m_(-1) that of the initial noise:
    gain_k = m_k - m_(k-1), share = gain_k / (window * sum of the gains) for each step of window k.

    Args:
        similarity: [..., T+1] float, of each state; see `latent_similarity`.
        window: steps per window; must divide T.
        similarity_floor: a trajectory whose gains sum to less gets equal shares.

    Returns:
        [..., T] float64; NaN where a similarity of the trajectory is NaN.

    Raises:
        ValueError: window does not divide T, or similarity_floor is not above 0.
    """
    num_steps = similarity.shape[-1] - 1
    if window < 1 or num_steps % window:
        raise ValueError(f"contribution_weights: window must divide the {num_steps} steps, got {window}")
    if not (math.isfinite(similarity_floor) and similarity_floor > 0):
        raise ValueError(f"contribution_weights: similarity_floor must be finite and above 0, got {similarity_floor}")
    exact = similarity.double()
    gains = exact[..., 1:].unflatten(-1, (-1, window)).mean(-1).diff(dim=-1, prepend=exact[..., :1])
    total = gains.sum(-1, keepdim=True)
    stalled = total < similarity_floor
    shares = gains / (window * total.masked_fill(stalled, 1.0))
    return shares.masked_fill(stalled, 1 / num_steps).repeat_interleave(window, dim=-1)


def coca_advantages(
    rewards: Tensor,
    similarity: Tensor,
    *,
    steps: Sequence[int] | None = None,
    window: int = 1,
    alpha: float = 0.0,
    similarity_floor: float = 1e-3,
    std: Std = "group",
    spread_floor: float = 0.0,
    clip: float | None = 5.0,
    epsilon: float = 1e-4,
) -> Advantages:
    """Advantage of each image times the shares of contribution still to come, normalised again over all its steps.

    step value = advantage * (alpha + (1 - alpha) * sum of `contribution_weights` from this step on). The source's
    second normalisation, over all samples and steps of a prompt, is `normalize_groups` with "joint".

    Args:
        rewards: [P, G] float, of the final images; NaN = missing.
        similarity: [P, G, T+1] float; see `latent_similarity`, whose rows b = p*G + g.
        steps: the K steps that are judged; None = all. What the others contribute counts among what is still to come,
            but they take no part in the second normalisation.
        window: steps per window; must divide T. The source has 5 of 50 steps.
        alpha: part of the advantage that every step gets alike, in [0, 1]; 0 in the source.
        similarity_floor: see `contribution_weights`.
        std: divide by the "group" standard deviation (the source) or the "global" one, in both normalisations.
        spread_floor: groups whose rewards have a smaller standard deviation get advantage 0.
        clip: bound on the magnitude of an advantage, after both normalisations; None = none.
        epsilon: added to the standard deviations.

    Returns:
        values [P, G, T] float32, or [P, G, K] of the judged steps.

    Raises:
        ValueError: a shape or an option is out of range.
    """
    if similarity.ndim != 3 or rewards.shape != similarity.shape[:2]:
        raise ValueError(
            "coca_advantages: rewards [P, G] and similarity [P, G, T+1] must agree, "
            f"got {list(rewards.shape)} and {list(similarity.shape)}"
        )
    if not 0 <= alpha <= 1:
        raise ValueError(f"coca_advantages: alpha must be in [0, 1], got {alpha}")
    shares = contribution_weights(similarity, window=window, similarity_floor=similarity_floor)
    to_come = shares.flip(-1).cumsum(-1).flip(-1)
    # a sample without shares is missing as a whole: it must not move the others' mean either
    known = rewards.isfinite() & similarity.isfinite().all(-1)
    images = rewards.double().where(known, math.nan).unsqueeze(-1)
    image = normalize_groups(images, std=std, spread_floor=spread_floor, clip=clip, epsilon=epsilon).values
    values = image.double() * (alpha + (1 - alpha) * to_come)
    if steps is not None:
        values = values[..., list(steps)]
    return normalize_groups(
        values.where(known.unsqueeze(-1), math.nan), normalize="joint", std=std, clip=clip, epsilon=epsilon
    )
