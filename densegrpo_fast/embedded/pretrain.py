"""Train the embedded pipeline from scratch: `python -m densegrpo_fast.embedded.pretrain --output DIR`.

Stages, each deterministic for a given device, thread count and library version: the autoencoder, the flow (transformer
and text encoders together), the preview decoder, and an evaluation on held-out sentences. Every finished stage is kept
in `DIR/stages`, the flow also every few hundred steps, so an interrupted command continues where it stopped.
`DIR/pipeline` is the result: a pipeline directory with fp16 safetensors and a model card.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusion3Pipeline
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from tqdm import tqdm

from densegrpo_fast.embedded import architecture, card, scenes
from densegrpo_fast.embedded.pixel_loss import pixel_loss
from densegrpo_fast.embedded.stages import Loop, Stages, save

_LATENT_NOISE = 0.1
_ANCHOR = 2.0
"""The first three latent channels are drawn towards this many times the picture, averaged over 4x4 pixels."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result. The card of the weights in the package says in what they differ from it."""

    seed: int = 0
    num_scenes: int = 50_000
    vae_steps: int = 3_500
    vae_batch: int = 32
    preview_steps: int = 2_000
    preview_batch: int = 32
    flow_steps: int = 9_000
    flow_batch: int = 64
    flow_lr: float = 1e-3
    drop_prompt: float = 0.1
    pad_share: float = 0.1


def main(arguments: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m densegrpo_fast.embedded.pretrain", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for the stages and the pipeline")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--flow-steps", type=int, default=Recipe.flow_steps, help="optimiser steps of the flow stage")
    parser.add_argument("--note", default="", help="a remark for the model card")
    options = parser.parse_args(arguments)
    recipe = Recipe(flow_steps=options.flow_steps)
    pretrain(options.output, recipe, torch.device(options.device), options.note)


def pretrain(output: Path, recipe: Recipe, device: torch.device, note: str = "") -> StableDiffusion3Pipeline:
    """Run the stages that `output` does not hold yet, then write pipeline and card (with `note`)."""
    torch.manual_seed(recipe.seed)
    stages = Stages(output / "stages", device)
    sentences = [scene.prompt for name in scenes.CATEGORIES for scene in scenes.all_scenes(name)]
    pipeline = architecture.build_pipeline(sentences).to(device)
    preview = architecture.build_preview_decoder().to(device)
    _describe_latents(pipeline, mean=0.0, std=1.0)

    stages.run("vae", {"vae": pipeline.vae}, lambda: train_vae(pipeline.vae, recipe, device))
    images, drawn = _draw_dataset(recipe)
    latents = _encode(pipeline.vae, images, device)
    mean, std = float(latents.mean()), float(latents.std())
    _describe_latents(pipeline, mean, std)
    latents = (latents - mean) / std
    modules = {
        "transformer": pipeline.transformer,
        "text_encoder": pipeline.text_encoder,
        "text_encoder_2": pipeline.text_encoder_2,
    }
    stages.run("flow", modules, lambda: train_flow(pipeline, modules, latents, drawn, recipe, device, stages))
    stages.run("preview", {"preview": preview}, lambda: train_preview(preview, pipeline.vae, latents, recipe, device))
    target = output / "pipeline"
    save(pipeline, preview, target)
    scores = card.evaluate(pipeline, preview)
    card.write_card(target, recipe, stages.log, scores, note)
    return pipeline


def train_vae(vae: AutoencoderKL, recipe: Recipe, device: torch.device) -> list[tuple[int, float]]:
    """Fit the autoencoder to rendered scenes, half of them in random colours, three quarters cut to 32x32 pixels.

    The latent is the posterior's mean with a little noise; its spread is fixed to that noise afterwards. Three of its
    four channels stay close to a small version of the picture: a flow learns such smooth latents in far fewer samples
    than those that a free encoder finds.
    """
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    numpy_generator = np.random.default_rng([recipe.seed, 1])
    drawn = scenes.sample_scenes(4_000, numpy_generator)
    pool = torch.from_numpy(scenes.render_batch(drawn, numpy_generator))
    vae.to(memory_format=torch.channels_last).train()
    loop = Loop("vae", list(vae.parameters()), recipe.vae_steps, lr=2e-3)
    for step in loop:
        count = recipe.vae_batch if step % 4 else recipe.vae_batch // 4
        images = pool[torch.randint(len(pool), (count,), generator=generator)]
        if step % 4:
            corners = torch.randint(0, scenes.IMAGE_SIZE // 2 + 1, (count, 2), generator=generator).tolist()
            half = scenes.IMAGE_SIZE // 2
            images = torch.stack(
                [im[:, y : y + half, x : x + half] for im, (y, x) in zip(images, corners, strict=True)]
            )
        images[: count // 2] = _recolour(images[: count // 2], generator)
        images = images.to(device, memory_format=torch.channels_last).mul(2).sub(1)
        latents = vae.encode(images).latent_dist.mode()
        noise = torch.randn(latents.shape, generator=generator).to(device)
        decoded = vae.decode(latents + _LATENT_NOISE * noise).sample
        # squared error first of all: L1 alone learns the colours of small objects very slowly
        error = decoded - images
        anchor = (latents[:, :3] - _ANCHOR * F.avg_pool2d(images, 4)).square().mean()
        extra = latents[:, 3:].square().mean()
        loop.update(10 * error.square().mean() + error.abs().mean() + 0.1 * anchor + 1e-3 * extra)
    with torch.no_grad():
        moments = vae.encoder.conv_out
        moments.weight[architecture.LATENT_CHANNELS :] = 0.0
        moments.bias[architecture.LATENT_CHANNELS :] = 2 * math.log(_LATENT_NOISE)
    vae.eval()
    return loop.curve


def _recolour(images: Tensor, generator: torch.Generator) -> Tensor:
    """Channels permuted, inverted, damped and shifted at random, [N, 3, H, W] in [0, 1]."""
    order = torch.stack([torch.eye(3)[torch.randperm(3, generator=generator)] for _ in images])
    gain = torch.rand(len(images), 3, 1, 1, generator=generator) * 2 - 1
    shift = 0.3 * (torch.rand(len(images), 3, 1, 1, generator=generator) - 0.5)
    mixed = torch.einsum("nij,njhw->nihw", order, images - 0.5)
    return (mixed * gain.sign() * (0.5 + 0.5 * gain.abs()) + 0.5 + shift).clamp(0, 1)


@torch.no_grad()
def _blurred(latents: Tensor, generator: torch.Generator) -> Tensor:
    """Latents with noise up to .4, for each its own: what a sampler makes is never quite a picture's latent."""
    spread = 0.4 * torch.rand(len(latents), 1, 1, 1, generator=generator)
    return latents + spread * torch.randn(latents.shape, generator=generator)


def train_preview(
    preview: AutoencoderTiny, vae: AutoencoderKL, latents: Tensor, recipe: Recipe, device: torch.device
) -> list[tuple[int, float]]:
    """Fit the small decoder to what the full one makes of the same latents, some of them noisy."""
    generator = torch.Generator().manual_seed(recipe.seed + 2)
    preview.decoder.to(memory_format=torch.channels_last).train()
    loop = Loop("preview", list(preview.decoder.parameters()), recipe.preview_steps, lr=3e-3)
    for _ in loop:
        index = torch.randint(len(latents), (recipe.preview_batch,), generator=generator)
        chosen = _blurred(latents[index].float(), generator).to(device)
        with torch.no_grad():
            target = vae.decode(chosen / vae.config.scaling_factor + vae.config.shift_factor).sample
        loop.update(pixel_loss(preview.decode(chosen).sample, target))
    preview.eval()
    return loop.curve


def train_flow(
    pipeline: StableDiffusion3Pipeline,
    modules: dict[str, nn.Module],
    latents: Tensor,
    drawn: list[scenes.Scene],
    recipe: Recipe,
    device: torch.device,
    stages: Stages,
) -> list[tuple[int, float]]:
    """Rectified-flow matching (arXiv 2403.03206): velocity = noise - data, sigma logit-normal and shifted by 3.

    A tenth of the prompts is dropped for guidance. In a tenth of the batches a random number of zero tokens stands
    where SD3 puts T5's, so that the model gives the same picture with and without diffusers' 256 zero tokens. The
    exponential average of the weights is kept.
    """
    torch.manual_seed(recipe.seed + 3)
    tokens = tokenize(pipeline, [scene.prompt for scene in drawn] + [""])
    parameters = [p for module in modules.values() for p in module.parameters()]
    average = EMAModel(parameters, decay=0.999, use_ema_warmup=True, power=0.75, foreach=True)
    # a third faster; lengths that change from batch to batch stay eager
    compiled = torch.compile(pipeline.transformer, dynamic=False)
    blocks = pipeline.transformer.transformer_blocks
    matrices = [p for p in blocks.parameters() if p.ndim == 2]
    loop = Loop("flow", parameters, recipe.flow_steps, lr=recipe.flow_lr, matrices=matrices)
    loop.restore(stages.directory / "flow.partial.safetensors", modules, average)
    for module in modules.values():
        module.train()
    for step in loop:
        # every step has its own generator: a continued run draws what an uninterrupted one draws
        generator = torch.Generator().manual_seed(recipe.seed * 1_000_003 + step)
        index = torch.randint(len(latents), (recipe.flow_batch,), generator=generator)
        clean = latents[index].to(device).float()
        dropped = torch.rand(len(index), generator=generator) < recipe.drop_prompt
        ids = tokens[torch.where(dropped, len(drawn), index)].to(device)
        normal = torch.randn(len(index), generator=generator).sigmoid()
        uniform = torch.rand(len(index), generator=generator)
        sigma = torch.where(torch.rand(len(index), generator=generator) < 0.2, uniform, normal).to(device)
        sigma = (3 * sigma / (1 + 2 * sigma)).view(-1, 1, 1, 1)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        pad = _pad_length(generator, recipe)
        embeds, pooled = encode_prompts(modules, ids, pad)
        velocity = (pipeline.transformer if pad else compiled)(
            hidden_states=(1 - sigma) * clean + sigma * noise,
            encoder_hidden_states=embeds,
            pooled_projections=pooled,
            timestep=1000 * sigma.flatten(),
        ).sample
        loop.update(F.mse_loss(velocity, noise - clean))
        average.step(parameters)
        if (step + 1) % 250 == 0:
            loop.keep(stages.directory / "flow.partial.safetensors", modules, average)
    average.copy_to(parameters)
    for module in modules.values():
        module.eval()
    return loop.curve


def tokenize(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> Tensor:
    """[N, MAX_TOKENS] int64."""
    return pipeline.tokenizer(
        prompts,
        padding="max_length",
        max_length=architecture.MAX_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).input_ids


def encode_prompts(modules: dict[str, nn.Module], ids: Tensor, pad: int) -> tuple[Tensor, Tensor]:
    """SD3's conditioning, with gradients: both encoders' penultimate states side by side, `pad` zero tokens; pooled."""
    first = modules["text_encoder"](ids, output_hidden_states=True)
    second = modules["text_encoder_2"](ids, output_hidden_states=True)
    embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
    return F.pad(embeds, (0, 0, 0, pad)), torch.cat([first[0], second[0]], dim=-1)


def _pad_length(generator: torch.Generator, recipe: Recipe) -> int:
    chance, size = torch.rand(2, generator=generator).tolist()
    return round(256**size) if chance < recipe.pad_share else 0


def _draw_dataset(recipe: Recipe) -> tuple[Tensor, list[scenes.Scene]]:
    """[N, 3, 64, 64] uint8 pictures and their scenes."""
    generator = np.random.default_rng([recipe.seed, 4])
    drawn = scenes.sample_scenes(recipe.num_scenes, generator)
    images = np.empty((len(drawn), 3, scenes.IMAGE_SIZE, scenes.IMAGE_SIZE), np.uint8)
    for i, scene in enumerate(tqdm(drawn, desc="render", mininterval=5.0)):
        images[i] = np.rint(scenes.render(scene, generator) * 255)
    return torch.from_numpy(images), drawn


@torch.no_grad()
def _encode(vae: Any, images: Tensor, device: torch.device, chunk: int = 64) -> Tensor:
    """Latent means [N, 4, 16, 16] float32 of uint8 pictures."""
    parts = []
    for batch in tqdm(images.split(chunk), desc="encode", mininterval=5.0):
        parts.append(vae.encode(batch.to(device).float().div(127.5).sub(1)).latent_dist.mode().cpu())
    return torch.cat(parts)


def _describe_latents(pipeline: StableDiffusion3Pipeline, mean: float, std: float) -> None:
    pipeline.vae.register_to_config(scaling_factor=1.0 / std, shift_factor=mean)


if __name__ == "__main__":
    main()
