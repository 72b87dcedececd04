"""What the flow is trained on: scenes as latents, kept on disk, and the text features of every sentence.

A training step then costs the transformer alone. Scenes come in chunks, a file each, that a seed and a number decide;
more of them may be added to a data set later without changing the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from densegrpo_fast.embedded import architecture, scenes
from densegrpo_fast.embedded.stages import write_tensors

CHUNK = 4_000


@dataclass(frozen=True)
class Dataset:
    """Scenes and sentences.

    Attributes:
        latents: [N, 4, 16, 16] float16; those of the first chunk have zero mean and unit spread.
        sentence: [N] int64, the row of each scene's sentence.
        embeds: [S, MAX_TOKENS, 128] float32; the last row is the empty sentence.
        pooled: [S, 128] float32.
        shift, spread: mean and standard deviation of the autoencoder's own latents in the first chunk.
    """

    latents: Tensor
    sentence: Tensor
    embeds: Tensor
    pooled: Tensor
    shift: float
    spread: float

    def __len__(self) -> int:
        return len(self.latents)


def prepare(pipeline: StableDiffusion3Pipeline, directory: Path, chunks: int, seed: int) -> Dataset:
    """Load the first `chunks` chunks of `directory`, drawing and encoding those that are not there yet."""
    sentences = [scene.prompt for deck in scenes.split(held_out=False).values() for scene in deck]
    row = {sentence: index for index, sentence in enumerate(sentences)}
    parts = []
    for number in range(chunks):
        path = directory / f"scenes-{number:03}.safetensors"
        if not path.exists():
            write_tensors(path, _chunk(pipeline.vae, row, [seed, 4, number]))
        parts.append(load_file(path))
    first = parts[0]["latents"].float()
    shift, spread = float(first.mean()), float(first.std())
    latents = torch.cat([((part["latents"].float() - shift) / spread).half() for part in parts])
    embeds, pooled = encode_prompts(pipeline, [*sentences, ""])
    return Dataset(latents, torch.cat([part["sentence"] for part in parts]), embeds, pooled, shift, spread)


@torch.no_grad()
def encode_prompts(pipeline: StableDiffusion3Pipeline, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """SD3's conditioning without T5: both encoders' penultimate states side by side, and their pooled outputs."""
    ids = pipeline.tokenizer(
        prompts, padding="max_length", max_length=architecture.MAX_TOKENS, truncation=True, return_tensors="pt"
    ).input_ids
    embeds, pooled = [], []
    for part in ids.split(512):
        outputs = [e(part, output_hidden_states=True) for e in (pipeline.text_encoder, pipeline.text_encoder_2)]
        embeds.append(torch.cat([output.hidden_states[-2] for output in outputs], dim=-1))
        pooled.append(torch.cat([output[0] for output in outputs], dim=-1))
    return torch.cat(embeds), torch.cat(pooled)


@torch.no_grad()
def _chunk(vae: Any, row: dict[str, int], seed: list[int]) -> dict[str, Tensor]:
    """Posterior means and sentences of `CHUNK` scenes."""
    generator = np.random.default_rng(seed)
    drawn = scenes.sample_scenes(CHUNK, generator)
    parts = []
    for start in tqdm(range(0, CHUNK, 50), desc=f"scenes {seed[-1]}", mininterval=30.0):
        images = torch.from_numpy(scenes.render_batch(drawn[start : start + 50], generator)).mul(2).sub(1)
        parts.append(vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist.mode().half())
    return {"latents": torch.cat(parts), "sentence": torch.tensor([row[scene.prompt] for scene in drawn])}
