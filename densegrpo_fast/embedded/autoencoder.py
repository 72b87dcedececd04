"""The autoencoder stages: the autoencoder of scenes and signs, and the small decoder of previews."""

from __future__ import annotations

import math

import numpy as np
import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from torch.nn import functional as F

from densegrpo_fast.embedded import architecture, scenes, words
from densegrpo_fast.embedded.pixel_loss import pixel_loss
from densegrpo_fast.embedded.stages import Loop

_LATENT_NOISE = 0.1
_ANCHOR = 2.0
"""The first three latent channels are drawn towards this many times the picture, averaged over 4x4 pixels."""


def train_vae(vae: AutoencoderKL, seed: int, steps: int, batch: int, decoder_only: bool) -> list[tuple[int, float]]:
    """Fit the autoencoder to scenes and signs, half of them in random colours, cut to 32x32 pixels.

    The latent is the posterior's mean with a little noise; its spread is fixed to that noise afterwards. Three of its
    four channels stay close to a small version of the picture: a flow learns such smooth latents in far fewer samples
    than those that a free encoder finds. With `decoder_only` the encoder, and so every latent, stays as it is.
    """
    generator, numpy_generator = torch.Generator().manual_seed(seed + 1), np.random.default_rng([seed, 1])
    pool = _pictures(numpy_generator)
    vae.to(memory_format=torch.channels_last).train()
    vae.encoder.requires_grad_(not decoder_only)
    parameters = list((vae.decoder if decoder_only else vae).parameters())
    loop = Loop("decoder" if decoder_only else "vae", parameters, steps, lr=2e-3, decay_steps=steps // 2)
    for _ in loop:
        images = pool[torch.randint(len(pool), (batch,), generator=generator)]
        corners = (4 * torch.randint(0, 9, (batch, 2), generator=generator)).tolist()
        images = torch.stack([im[:, y : y + 32, x : x + 32] for im, (y, x) in zip(images, corners, strict=True)])
        if not decoder_only:
            images[: batch // 2] = _recolour(images[: batch // 2], generator)
        images = images.mul(2).sub(1).contiguous(memory_format=torch.channels_last)
        latents = vae.encode(images).latent_dist.mode()
        spread = 2 * _LATENT_NOISE * torch.rand(batch, 1, 1, 1, generator=generator)
        decoded = vae.decode(latents + spread * torch.randn(latents.shape, generator=generator)).sample
        # squared error first of all: L1 alone learns the colours of small objects very slowly
        error = decoded - images
        anchor = (latents[:, :3] - _ANCHOR * F.avg_pool2d(images, 4)).square().mean()
        extra = latents[:, 3:].square().mean()
        loop.update(10 * error.square().mean() + error.abs().mean() + 0.1 * anchor + 1e-3 * extra)
    if not decoder_only:
        with torch.no_grad():
            moments = vae.encoder.conv_out
            moments.weight[architecture.LATENT_CHANNELS :] = 0.0
            moments.bias[architecture.LATENT_CHANNELS :] = 2 * math.log(_LATENT_NOISE)
    vae.requires_grad_(True).eval()
    return loop.curve


def _pictures(generator: np.random.Generator, count: int = 2_000) -> Tensor:
    """As many scenes as signs, neither held out: [2 * count, 3, 64, 64] in [0, 1]."""
    known = words.split(held_out=False)
    signs = [words.render(known[generator.integers(len(known))], generator) for _ in range(count)]
    drawn = scenes.render_batch(scenes.sample_scenes(count, generator), generator)
    return torch.from_numpy(np.concatenate([drawn, np.stack(signs)]))


def _recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Channels permuted, inverted, damped and shifted at random, [N, 3, H, W] in [0, 1]."""
    order = torch.stack([torch.eye(3)[torch.randperm(3, generator=generator)] for _ in images])
    gain = torch.rand(len(images), 3, 1, 1, generator=generator) * 2 - 1
    shift = 0.3 * (torch.rand(len(images), 3, 1, 1, generator=generator) - 0.5)
    mixed = torch.einsum("nij,njhw->nihw", order, images - 0.5)
    return (mixed * gain.sign() * (0.5 + 0.5 * gain.abs()) + 0.5 + shift).clamp(0, 1)


def train_preview(
    preview: AutoencoderTiny, vae: AutoencoderKL, sampled: Tensor, latents: Tensor, seed: int, steps: int, batch: int
) -> list[tuple[int, float]]:
    """Fit the small decoder to what the full one makes of the same latents, with noise up to .2, for each its own.

    What a sampler makes is never quite a picture's latent, so three quarters of a batch are latents that the model
    itself `sampled`, [N, 4, 16, 16] as the data's `latents`; policies that move away from it need the rest.
    """
    generator = torch.Generator().manual_seed(seed + 2)
    preview.decoder.to(memory_format=torch.channels_last).train()
    loop = Loop("preview", list(preview.decoder.parameters()), steps, lr=3e-3, decay_steps=steps // 2)
    for _ in loop:
        own = sampled[torch.randint(len(sampled), (batch - batch // 4,), generator=generator)]
        drawn = latents[torch.randint(len(latents), (batch // 4,), generator=generator)]
        chosen = torch.cat([own, drawn]).float()
        spread = 0.2 * torch.rand(batch, 1, 1, 1, generator=generator)
        chosen = chosen + spread * torch.randn(chosen.shape, generator=generator)
        with torch.no_grad():
            target = vae.decode(chosen / vae.config.scaling_factor + vae.config.shift_factor).sample
        loop.update(pixel_loss(preview.decode(chosen).sample, target))
    preview.eval()
    return loop.curve
