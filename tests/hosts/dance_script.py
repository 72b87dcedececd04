"""A miniature of DanceGRPO's script-level step, restated from its formulas; `CONSTANTS` is the later scripts' form."""

import math

import torch

CONSTANTS = True


def flux_step(model_output, latents, eta, sigmas, index, prev_sample, grpo, sde_solver):
    here, there = sigmas[index], sigmas[index + 1]
    change = there - here
    clean = latents - here * model_output
    mean = latents + change * model_output
    spread = eta * math.sqrt(-change)
    if sde_solver:
        # Along the score of a Gaussian around (1 - sigma) * clean with deviation sigma.
        score = ((1 - here) * clean - latents) / here**2
        mean = mean - 0.5 * eta**2 * score * change
    if not grpo:
        return mean, clean
    if prev_sample is None:
        prev_sample = mean + spread * torch.randn_like(mean)
    wide = torch.promote_types(mean.dtype, torch.float32)
    density = -((prev_sample.detach().to(wide) - mean.to(wide)) ** 2) / (2 * spread**2)
    normaliser = math.log(spread) + 0.5 * math.log(2 * math.pi)
    if CONSTANTS:
        density = density - normaliser
    return prev_sample, clean, density.flatten(1).mean(1)
