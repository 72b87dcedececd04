"""What the flow is trained on: pictures as latents, kept on disk, and the text features of every sentence.

A training step then costs the transformer alone. Pictures come in chunks, a file each, that a seed and a number decide;
more of them may be added to a data set later without changing the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from densegrpo_fast.embedded import architecture
from densegrpo_fast.embedded.stages import CHUNK, write_tensors
from densegrpo_fast.embedded.worlds import WORLDS, World

_TOGETHER = 50


@dataclass(frozen=True)
class Dataset:
    """Pictures of a world and its sentences.

    Attributes:
        latents: [N, 4, 16, 16] float16; those of the first chunk have zero mean and unit spread.
        sentence: [N] int64, the row of each picture's sentence.
        kinds, places: [N, 64] uint8 and [N, 64, 3] float16, as in `worlds.Example`.
        num_kinds: the world's.
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
    num_kinds: int

    def __len__(self) -> int:
        return len(self.latents)


def prepare(pipeline: StableDiffusion3Pipeline, world: str, directory: Path, chunks: int, seed: int) -> Dataset:
    """Load the first `chunks` chunks of `directory`, drawing and encoding those that are not there yet."""
    sentences = WORLDS[world].sentences()
    row = {sentence: index for index, sentence in enumerate(sentences)}
    parts = []
    for number in range(chunks):
        path = directory / f"{world}-{number:03}.safetensors"
        if not path.exists():
            write_tensors(path, _chunk(pipeline.vae, WORLDS[world], row, [seed, 4, number]))
        parts.append(load_file(path))
    first = parts[0]["latents"].float()
    shift, spread = float(first.mean()), float(first.std())
    latents = torch.cat([((part["latents"].float() - shift) / spread).half() for part in parts])
    embeds, pooled = encode_prompts(pipeline, [*sentences, ""])
    sentence, kinds, places = (torch.cat([part[key] for part in parts]) for key in ("sentence", "kinds", "places"))
    return Dataset(latents, sentence, kinds, places, embeds, pooled, shift, spread, WORLDS[world].kinds)


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
def _chunk(vae: Any, world: World, row: dict[str, int], seed: list[int]) -> dict[str, Tensor]:
    """Posterior means, sentences and objects of `CHUNK` pictures."""
    examples = world.examples(CHUNK, np.random.default_rng(seed))
    latents, sentences, kinds, places = [], [], [], []
    for _ in tqdm(range(0, CHUNK, _TOGETHER), desc=f"pictures {seed[-1]}", mininterval=30.0):
        part = list(islice(examples, _TOGETHER))
        images = torch.from_numpy(np.stack([example.picture for example in part])).mul(2).sub(1)
        latents.append(vae.encode(images.contiguous(memory_format=torch.channels_last)).latent_dist.mode().half())
        sentences += [row[example.sentence] for example in part]
        kinds.append(np.stack([example.kinds for example in part]))
        places.append(np.stack([example.places for example in part]))
    return {
        "latents": torch.cat(latents),
        "sentence": torch.tensor(sentences),
        "kinds": torch.from_numpy(np.concatenate(kinds)),
        "places": torch.from_numpy(np.concatenate(places)),
    }
