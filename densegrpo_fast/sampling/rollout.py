"""Sampling: stochastic trajectories of the policy, and deterministic images for evaluation."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from densegrpo_fast.flow import ops
from densegrpo_fast.flow.dynamics import StepCoefficients
from densegrpo_fast.flow.noise import Stream, gaussian
from densegrpo_fast.flow.step_op import INPUT_DTYPES
from densegrpo_fast.models.base import Conditioning, FlowModel, Recorder
from densegrpo_fast.sampling.trajectory import Trajectory


def initial_noise(
    model: FlowModel, sample_index: Tensor, *, seed: int, iteration: int, stream: Stream = Stream.INITIAL
) -> Tensor:
    """Standard normal latents [B, ...] float32, each a function of (seed, sample index, iteration, stream) alone."""
    return gaussian(
        model.latent_shape,
        seed=seed,
        sample_index=sample_index,
        step=0,
        stream=stream,
        iteration=iteration,
        device=model.device,
    )


@torch.no_grad()
def rollout(
    model: FlowModel,
    noise: Tensor,
    conditioning: Conditioning,
    coefficients: StepCoefficients,
    *,
    sample_index: Tensor,
    seed: int,
    iteration: int,
    guidance_scale: float = 1.0,
    micro_batch: int | None = None,
    keep_guidance: bool = False,
    keep_hidden: bool = False,
    cache: Recorder | None = None,
    stream: int = Stream.STEP,
    steps: int | None = None,
) -> Trajectory:
    """Run the SDE sampler of Flow-GRPO (arXiv 2505.05470, Eq 9) in whatever family `coefficients` hold.

    Args:
        noise: initial latents [B, ...] float32.
        conditioning: prompts of the B rows.
        coefficients: tables for T steps, on the model's device.
        sample_index: [B] int64, the global index that seeds each row's noise.
        seed, iteration: the other parts of the noise counters.
        guidance_scale: 1 is off.
        micro_batch: rows per forward. The replay in training must use the same split: a forward's rounding may depend
            on its batch shape, and the importance ratio of an unchanged policy shall be 1. None means all rows.
        keep_guidance: keep the guidance terms for a lookahead that reuses them.
        keep_hidden: keep the network's last hidden tokens for a lookahead with a completion head.
        cache: where the forwards leave features for the lookahead; their numbers stay the same to the bit.
        stream: purpose of the steps' noise.
        steps: how many steps are taken, the first ones of T; None = all.

    Raises:
        ValueError: B is not a multiple of `micro_batch`.
    """
    steps, batch = coefficients.num_steps if steps is None else steps, len(noise)
    size = micro_batch or batch
    if batch % size:
        raise ValueError(f"micro_batch must divide the number of samples: {batch} samples, micro_batch {size}")
    sigmas = coefficients.sigmas
    latents = noise.new_empty(steps + 1, *noise.shape)
    velocities = noise.new_empty(steps, *noise.shape)
    log_probs = noise.new_empty(steps, batch)
    terms = torch.empty_like(velocities) if keep_guidance and guidance_scale != 1.0 else None
    latents[0] = entering = noise
    half = model.input_dtype if model.input_dtype in INPUT_DTYPES else None
    hidden = None
    if cache is not None:
        cache.clear()
    with model.tap() if keep_hidden else nullcontext([]) as tokens:
        for step in range(steps):
            for start in range(0, batch, size):
                rows = slice(start, start + size)
                with nullcontext() if cache is None else cache.record(step, rows):
                    velocity = model.velocity(
                        entering[rows], sigmas[step].expand(size), conditioning.select(rows), guidance_scale
                    )
                velocities[step, rows] = velocity.combined()
                if terms is not None:
                    terms[step, rows] = velocity.guidance_term
                if keep_hidden:
                    if hidden is None:
                        hidden = tokens[0].new_empty(steps, batch, *tokens[0].shape[1:])
                    hidden[step, rows] = tokens[0]
                    tokens.clear()
            ahead = coefficients.remainder
            slope = velocities[step] if ahead is None else ahead.along(latents, velocities, step)
            taken = ops.sde_step_outputs(
                latents[step],
                slope,
                coefficients.table,
                step,
                seed=seed,
                sample_index=sample_index,
                iteration=iteration,
                stream=stream,
                input_dtype=half,
            )
            latents[step + 1], log_probs[step] = taken.next_latents, taken.log_prob
            entering = taken.next_latents if taken.model_input is None else taken.model_input
    return Trajectory(latents, velocities, log_probs, coefficients, conditioning, guidance_scale, terms, hidden)


@torch.no_grad()
def sample_ode(
    model: FlowModel,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Tensor,
    *,
    guidance_scale: float = 1.0,
    micro_batch: int | None = None,
) -> Tensor:
    """Euler's method from noise to clean latents [B, ...] float32; `sigmas` [T+1] decrease to 0."""
    sigmas = sigmas.to(noise.device)
    parts = []
    for rows in torch.arange(len(noise), device=noise.device).split(micro_batch or len(noise)):
        latents, condition = noise[rows], conditioning.select(rows)
        for step in range(len(sigmas) - 1):
            sigma, next_sigma = sigmas[step].expand(len(rows)), sigmas[step + 1].expand(len(rows))
            velocity = model.velocity(latents, sigma, condition, guidance_scale).combined()
            latents = ops.euler_jump(latents, velocity, sigma, next_sigma)
        parts.append(latents)
    return torch.cat(parts)
