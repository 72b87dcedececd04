"""Train an embedded pipeline: `python -m densegrpo_fast.embedded.pretrain --output DIR --init PIPELINE`.

Stages: the autoencoder, the data set, the flow, latents that it samples, the preview decoder fitted to these, and an
evaluation on held-out sentences. `--init` takes the encoder, the text encoders and the first weights of the flow and
the decoders from a pipeline directory; without it they are trained from scratch, and the text encoders stay random.
`--world words` draws signs instead of scenes: it takes the autoencoder of `--init` as it is, and has a tokenizer and
random text encoders of its own, as the words are spelt.
Every finished stage is kept in `DIR/stages`, the flow also every 90 seconds, so the same command continues where an
interrupted one stopped. `DIR/pipeline` is the result: a pipeline directory with fp16 safetensors and a model card.

The flow's learning rate falls only in its last steps: as long as it has not begun to fall, `--flow-steps` may be
changed from one command to the next.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from densegrpo_fast.embedded import architecture, card
from densegrpo_fast.embedded.autoencoder import train_preview, train_vae
from densegrpo_fast.embedded.dataset import prepare
from densegrpo_fast.embedded.flow import FlowRecipe, train_flow
from densegrpo_fast.embedded.stages import Stages, save, write_tensors
from densegrpo_fast.embedded.worlds import WORLDS

_SAMPLED_TOGETHER = 48


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    seed: int = 0
    world: str = "scenes"
    chunks: int = 15
    vae_steps: int = 3_500
    decoder_steps: int = 800
    vae_batch: int = 32
    sampled: int = 2_400
    preview_steps: int = 800
    preview_batch: int = 32
    flow: FlowRecipe = field(default_factory=FlowRecipe)


def main(arguments: list[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(prog="python -m densegrpo_fast.embedded.pretrain", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="directory for the stages and the pipeline")
    parser.add_argument("--world", choices=list(WORLDS), default="scenes", help="what the model draws")
    parser.add_argument("--init", type=Path, help="a pipeline directory to start from")
    parser.add_argument("--flow-steps", type=int, default=FlowRecipe.steps, help="optimiser steps of the flow stage")
    parser.add_argument("--note", default="", help="a remark for the model card")
    options = parser.parse_args(arguments)
    if options.world == "words" and options.init is None:
        parser.error("--world words takes the autoencoder of another pipeline: give --init")
    recipe = Recipe(world=options.world, flow=FlowRecipe(steps=options.flow_steps))
    pretrain(options.output, recipe, options.init, options.note)


def pretrain(output: Path, recipe: Recipe, init: Path | None = None, note: str = "") -> StableDiffusion3Pipeline:
    """Run the stages that `output` does not hold yet, then write pipeline and card (with `note`)."""
    torch.manual_seed(recipe.seed)
    stages, world = Stages(output / "stages"), WORLDS[recipe.world]
    pipeline, preview = _modules(recipe.world, init)
    name, steps = ("vae", recipe.vae_steps) if init is None else ("decoder", recipe.decoder_steps)
    if recipe.world == "scenes":
        stages.run(
            name,
            {"vae": pipeline.vae},
            lambda: train_vae(pipeline.vae, recipe.seed, steps, recipe.vae_batch, decoder_only=init is not None),
        )
    pipeline.vae.to(memory_format=torch.channels_last)
    data = prepare(pipeline, recipe.world, stages.directory, recipe.chunks, recipe.seed)
    pipeline.vae.register_to_config(scaling_factor=1 / data.spread, shift_factor=data.shift)
    transformer = pipeline.transformer
    stages.run(
        "flow",
        {"transformer": transformer},
        lambda: train_flow(transformer, data, recipe.flow, stages.directory, lambda: world.brief(pipeline)),
    )
    stages.run(
        "preview",
        {"preview": preview},
        lambda: train_preview(
            preview,
            pipeline.vae,
            sampled_latents(pipeline, stages.directory / "sampled.safetensors", recipe),
            data.latents,
            recipe.seed,
            recipe.preview_steps,
            recipe.preview_batch,
        ),
    )
    target = output / "pipeline"
    save(pipeline, preview, target)
    card.write_card(target, world.card, recipe, stages.log, world.evaluate(pipeline, preview), note)
    return pipeline


def sampled_latents(pipeline: StableDiffusion3Pipeline, path: Path, recipe: Recipe) -> Tensor:
    """Latents [`recipe.sampled`, 4, 16, 16] that the pipeline samples for training sentences, kept in `path`.

    The guidance scales of the evaluation take turns.
    """
    if not path.exists():
        count, seed, parts = recipe.sampled, recipe.seed, []
        drawn = list(WORLDS[recipe.world].examples(count, np.random.default_rng([seed, 5])))
        for number, start in enumerate(tqdm(range(0, count, _SAMPLED_TOGETHER), desc="sampled", mininterval=30.0)):
            sentences = [example.sentence for example in drawn[start : start + _SAMPLED_TOGETHER]]
            scale = card.GUIDANCE_SCALES[number % len(card.GUIDANCE_SCALES)]
            parts.append(card.sample_latents(pipeline, sentences, scale, seed=1_000 * (seed + 1) + number).half())
        write_tensors(path, {"latents": torch.cat(parts)})
    return load_file(path)["latents"]


def _modules(world: str, init: Path | None) -> tuple[StableDiffusion3Pipeline, AutoencoderTiny]:
    """The pipeline and its preview decoder in float32: untrained, or those of a pipeline directory."""
    if init is None:
        pipeline = architecture.build_pipeline(WORLDS[world].vocabulary())
        pipeline.vae.register_to_config(scaling_factor=1.0, shift_factor=0.0)
        return pipeline, architecture.build_preview_decoder()
    loaded = StableDiffusion3Pipeline.from_pretrained(init, text_encoder_3=None, tokenizer_3=None).to(torch.float32)
    if world != "scenes":
        own = architecture.build_pipeline(WORLDS[world].vocabulary())
        own.register_modules(vae=loaded.vae, transformer=loaded.transformer)
        loaded = own
    return loaded, AutoencoderTiny.from_pretrained(init / "preview_decoder").float()


if __name__ == "__main__":
    main()
