"""How far a tuned model has moved from its base: its pictures from the same noise, and its policy on its own path."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from densegrpo_fast.flow.dynamics import StepCoefficients
from densegrpo_fast.flow.noise import Stream
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.objective.kl import KlScale, gaussian_kl
from densegrpo_fast.sampling.rollout import Trajectory, initial_noise, rollout, sample_ode
from densegrpo_fast.training.evaluation import HeldOut

_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2


def pixel_distance(images: Tensor, base: Tensor) -> Tensor:
    """[N] root mean square difference of the pixels of two sets of pictures [N, 3, H, W] in [0, 1]."""
    return (images - base).square().flatten(1).mean(1).sqrt()


def dissimilarity(images: Tensor, base: Tensor) -> Tensor:
    """[N] 1 - SSIM of two sets of pictures [N, 3, H, W] in [0, 1], mean over pixels and colours.

    Structural similarity with the published Gaussian window of 11 pixels, sigma 1.5 (Wang et al., 2004), where it lies
    within the picture.
    """
    mean, other = _smoothed(images), _smoothed(base)
    variance = _smoothed(images.square()) - mean.square()
    other_variance = _smoothed(base.square()) - other.square()
    covariance = _smoothed(images * base) - mean * other
    light = (2 * mean * other + _C1) / (mean.square() + other.square() + _C1)
    structure = (2 * covariance + _C2) / (variance + other_variance + _C2)
    return 1 - (light * structure).flatten(1).mean(1)


def _smoothed(images: Tensor) -> Tensor:
    reach = torch.arange(_WINDOW, dtype=images.dtype) - _WINDOW // 2
    row = torch.exp(-0.5 * (reach / _SIGMA) ** 2)
    row = (row / row.sum()).expand(3, 1, -1)
    return F.conv2d(F.conv2d(images, row[..., None, :], groups=3), row[..., :, None], groups=3)


@torch.no_grad()
def held_out_pictures(model: FlowModel, held_out: HeldOut, samples: int) -> Tensor:
    """The first pictures of each prompt that `held_out` would draw with the model as it stands.

    Returns:
        [N*S, 3, H, W] float32 in [0, 1] on the CPU, of N prompts by S `samples`.
    """
    index = (torch.arange(len(held_out.prompts))[:, None] * held_out.samples + torch.arange(samples)).flatten()
    noise = initial_noise(model, index, seed=held_out.seed, iteration=0, stream=Stream.EVALUATION)
    conditioning = model.encode([prompt for prompt in held_out.prompts for _ in range(samples)])
    sigmas = model.sigmas(held_out.num_steps)

    def draw(part: slice) -> Tensor:
        rows = conditioning.select(part)
        return model.decode(
            sample_ode(model, model.start(noise[part], sigmas), rows, sigmas, guidance_scale=held_out.guidance_scale)
        )

    return torch.cat(list(held_out.rows.each(slice(0, len(index)), draw))).float().cpu()


def stochastic_trajectories(
    model: FlowModel, coefficients: StepCoefficients, held_out: HeldOut, samples: int, *, guidance_scale: float
) -> Trajectory:
    """Trajectories of the policy as it stands on the first held-out prompts, one each.

    They start from the noise of the first held-out picture of each prompt; their steps have the noise of the evaluation
    stream's second iteration, so every model takes the same.
    """
    index = torch.arange(samples) * held_out.samples
    return rollout(
        model,
        initial_noise(model, index, seed=held_out.seed, iteration=0, stream=Stream.EVALUATION),
        model.encode(held_out.prompts[:samples]),
        coefficients,
        sample_index=index,
        seed=held_out.seed,
        iteration=1,
        guidance_scale=guidance_scale,
        stream=Stream.EVALUATION,
    )


@torch.no_grad()
def divergence(model: FlowModel, trajectory: Trajectory, scale: KlScale) -> Tensor:
    """KL of each step of another policy's trajectories from the model's own: the loss's term, `objective/kl.py`.

    Args:
        model: the base, without the adapter that drew the trajectories.
        trajectory: [T] steps of B samples.
        scale: which of the loss's two.

    Returns:
        [T, B] in nats, mean over latent dims; 0 at noise-free steps.
    """
    table = trajectory.coefficients.table
    found = torch.zeros(trajectory.num_steps, trajectory.batch)
    for step, noisy in enumerate(trajectory.coefficients.noisy):
        if not noisy:
            continue
        sigma = trajectory.coefficients.sigmas[step].expand(trajectory.batch)
        latents, conditioning = trajectory.latents[step], trajectory.conditioning
        velocity = model.velocity(latents, sigma, conditioning, trajectory.guidance_scale).combined()
        steps = torch.full((trajectory.batch,), step)
        found[step] = gaussian_kl(trajectory.velocities[step], velocity, table, steps, scale=scale)
    return found


def divergence_record(model: FlowModel, trajectory: Trajectory) -> dict[str, Any]:
    """`divergence` in both scales by name, mean over samples.

    Each has `per_step` [T], `per_trajectory`, the sum over the steps, and `per_noisy_step`, their mean over those with
    noise.
    """
    record, noisy = {}, sum(trajectory.coefficients.noisy)
    for scale in ("flow_grpo", "paper"):
        per_step = divergence(model, trajectory, scale).mean(1)
        total = float(per_step.sum())
        record[scale] = {"per_step": per_step.tolist(), "per_trajectory": total, "per_noisy_step": total / noisy}
    return record
