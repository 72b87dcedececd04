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
        kinds: [N, 64] uint8, what covers each token of the transformer: 0 background, else the object's kind.
        places: [N, 64, 3] float16, where a token is covered: that object's centre from the token's, and its radius, in
            units of 16 pixels.
        embeds: [S, MAX_TOKENS, 128] float32; the last row is the empty sentence.
        pooled: [S, 128] float32.
        shift, spread: mean and standard deviation of the autoencoder's own latents in the first chunk.
    """

    latents: Tensor
    sentence: Tensor
    kinds: Tensor
    places: Tensor
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
    sentence, kinds, places = (torch.cat([part[key] for part in parts]) for key in ("sentence", "kinds", "places"))
    return Dataset(latents, sentence, kinds, places, embeds, pooled, shift, spread)


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
    """Posterior means, sentences and objects of `CHUNK` scenes."""
    generator = np.random.default_rng(seed)
    drawn = scenes.sample_scenes(CHUNK, generator)
    latents, kinds, places = [], [], []
    for start in tqdm(range(0, CHUNK, 50), desc=f"scenes {seed[-1]}", mininterval=30.0):
        pictures, figures = zip(*(scenes.compose(s, generator) for s in drawn[start : start + 50]), strict=True)
        images = torch.from_numpy(np.stack(pictures)).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
        latents.append(vae.encode(images).latent_dist.mode().half())
        for found in figures:
            kind, place = covering(found)
            kinds.append(torch.from_numpy(kind))
            places.append(torch.from_numpy(place))
    return {
        "latents": torch.cat(latents),
        "sentence": torch.tensor([row[scene.prompt] for scene in drawn]),
        "kinds": torch.stack(kinds),
        "places": torch.stack(places),
    }


def covering(figures: tuple[scenes.Figure, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One scene's `kinds` [64] and `places` [64, 3]: a token, 8x8 pixels, is covered from an eighth of it on."""
    kinds, places = np.zeros(64, np.uint8), np.zeros((64, 3), np.float16)
    y, x = np.mgrid[0:64, 0:64] + 0.5
    rows, columns = (grid.reshape(-1) for grid in np.mgrid[4:64:8, 4:64:8])
    for figure in figures:
        inside = scenes.signed_distance(figure.shape, x - figure.x, y - figure.y, figure.radius) < 0
        covered = inside.reshape(8, 8, 8, 8).mean((1, 3)).reshape(-1) > 1 / 8
        kind = scenes.SHAPES.index(figure.shape) * len(scenes.COLOURS) + list(scenes.COLOURS).index(figure.colour)
        kinds[covered] = 1 + kind
        place = np.stack([figure.x - columns, figure.y - rows, np.full(64, figure.radius)], 1) / 16
        places[covered] = place[covered]
    return kinds, places
