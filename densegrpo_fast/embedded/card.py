"""Measures an embedded pipeline on held-out sentences of scenes, and writes model cards."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from torch import Tensor

from densegrpo_fast.embedded import scenes
from densegrpo_fast.embedded.stages import CHUNK
from densegrpo_fast.rewards.scenes import ScenesReward

EVALUATION_STEPS = 10
GUIDANCE_SCALES = (1.0, 2.0, 4.5)


@torch.no_grad()
def brief(pipeline: StableDiffusion3Pipeline) -> dict[str, Any]:
    """Strict and graded scores by guidance and category from few pictures: a point of the training's curve."""
    chosen = held_out_prompts(20)
    scored = {str(scale): _scores(pipeline, chosen, scale, copies=1)[0] for scale in GUIDANCE_SCALES[:2]}
    return {kind: {scale: both[kind] for scale, both in scored.items()} for kind in ("strict", "graded")}


@torch.no_grad()
def evaluate(
    pipeline: StableDiffusion3Pipeline, preview: AutoencoderTiny, prompts_per_category: int = 40
) -> dict[str, Any]:
    """Scores of the pipeline on held-out sentences, two pictures each, by plain diffusers calls.

    Returns:
        `strict` and `graded` per guidance scale and category (10 Euler steps); `round_trip`, the strict score of
        rendered scenes after the autoencoder; `preview_agreement`, how often both decoders agree on strict.
    """
    chosen = held_out_prompts(prompts_per_category)
    result: dict[str, Any] = {"strict": {}, "graded": {}}
    agreements: list[bool] = []
    for scale in GUIDANCE_SCALES:
        both, agree = _scores(pipeline, chosen, scale, copies=2, preview=preview)
        agreements += agree
        for kind in ("strict", "graded"):
            result[kind][str(scale)] = both[kind]
    generator = np.random.default_rng(12)
    drawn = scenes.sample_scenes(400, generator, held_out=True)
    images = torch.from_numpy(scenes.render_batch(drawn, generator)).to(pipeline.vae.device)
    restored = pipeline.vae.decode(pipeline.vae.encode(images * 2 - 1).latent_dist.mode()).sample
    sentences = [scene.prompt for scene in drawn]
    result["round_trip"] = float(np.mean(ScenesReward().both((restored / 2 + 0.5).clamp(0, 1), sentences)[1]))
    result["preview_agreement"] = float(np.mean(agreements))
    return result


def held_out_prompts(per_category: int) -> dict[str, list[str]]:
    """`per_category` held-out sentences of each category, repeated where there are fewer."""
    generator, chosen = np.random.default_rng(11), {}
    for name, deck in scenes.split(held_out=True).items():
        prompts = [deck[i].prompt for i in generator.permutation(len(deck))[:per_category]]
        chosen[name] = (prompts * per_category)[:per_category]
    return chosen


def _scores(
    pipeline: StableDiffusion3Pipeline,
    chosen: dict[str, list[str]],
    scale: float,
    copies: int,
    preview: AutoencoderTiny | None = None,
) -> tuple[dict[str, dict[str, float]], list[bool]]:
    """Mean strict and graded scores per category and over them; and where both decoders agree on strict."""
    reward = ScenesReward()
    result: dict[str, dict[str, float]] = {"strict": {}, "graded": {}}
    agreements: list[bool] = []
    for number, (name, prompts) in enumerate(chosen.items()):
        repeated = prompts * copies
        latents = sample_latents(pipeline, repeated, scale, seed=number)
        graded, strict = reward.both(decode(pipeline, latents), repeated)
        result["strict"][name], result["graded"][name] = float(np.mean(strict)), float(np.mean(graded))
        if preview is not None:
            agreements += list(np.equal(strict, reward.both(preview_decode(preview, latents), repeated)[1]))
    for kind, scores in result.items():
        result[kind] = scores | {"mean": float(np.mean(list(scores.values())))}
    return result, agreements


def sample_latents(pipeline: StableDiffusion3Pipeline, prompts: list[str], guidance_scale: float, seed: int) -> Tensor:
    """[N, 4, 16, 16] by diffusers' own sampler without T5's zero tokens."""
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        prompts,
        num_inference_steps=EVALUATION_STEPS,
        guidance_scale=guidance_scale,
        max_sequence_length=0,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
    ).images


def decode(pipeline: StableDiffusion3Pipeline, latents: Tensor) -> Tensor:
    """[N, 3, 64, 64] in [0, 1] by the full decoder."""
    config = pipeline.vae.config
    decoded = pipeline.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
    return (decoded / 2 + 0.5).clamp(0, 1)


def preview_decode(preview: AutoencoderTiny, latents: Tensor) -> Tensor:
    """[N, 3, 64, 64] in [0, 1] by the small decoder."""
    return (preview.decode(latents).sample / 2 + 0.5).clamp(0, 1)


def write_card(
    directory: Path,
    text: Callable[[dict[str, Any]], str],
    recipe: Any,
    log: Any,
    scores: dict[str, Any],
    note: str = "",
) -> None:
    """Write `README.md` (the model card) and `pretraining.json` (its evidence) into the pipeline directory.

    `text` makes the one from the other; `note` says in what these weights differ from a plain run of the command.
    """
    evidence = {
        "recipe": asdict(recipe),
        "note": note,
        "seconds": log.seconds,
        "losses": log.losses,
        "scores": scores,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }
    (directory / "pretraining.json").write_text(json.dumps(evidence, indent=1) + "\n")
    (directory / "README.md").write_text(text(evidence))


def stage_table(evidence: dict[str, Any]) -> str:
    """The loss curve and minutes of every stage, as lines of a table."""
    return "\n".join(
        f"| {name} | {evidence['losses'][name][0][1]:.4f} | {_at(evidence, name, 0.5):.4f} | "
        f"{_at(evidence, name, 0.9):.4f} | {evidence['losses'][name][-1][1]:.4f} | "
        f"{evidence['seconds'][name] / 60:.0f} |"
        for name in evidence["losses"]
    )


def text(evidence: dict[str, Any]) -> str:
    """The card of the scenes model."""
    scores, recipe = evidence["scores"], evidence["recipe"]
    rows = []
    for name in (*scenes.CATEGORIES, "mean"):
        cells = [f"{scores['strict'][s][name]:.2f} / {scores['graded'][s][name]:.2f}" for s in scores["strict"]]
        rows.append(f"| {name} | " + " | ".join(cells) + " |")
    header = " | ".join(f"guidance {scale}" for scale in scores["strict"])
    note = f"\n{evidence['note']}\n" if evidence["note"] else ""
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# The embedded scenes model

A small Stable Diffusion 3 pipeline that draws 64x64 scenes of coloured shapes, for example "a red circle to the left
of a blue square". It exists so that densegrpo-fast trains, tests and measures on a laptop; it has no other use.

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained(path, text_encoder_3=None, tokenizer_3=None)
pipe("a red circle to the left of a blue square", num_inference_steps=10, guidance_scale=2.0).images[0]
```

(diffusers wants to be told that there is no T5.) `preview_decoder/` is an `AutoencoderTiny` for the same latents.

## How it was made
`python -m densegrpo_fast.embedded.pretrain`, deterministic for a given machine and library version:
{recipe["chunks"] * CHUNK} rendered scenes (anti-aliased; random sizes, places, shades, greys), none of them for a
held-out sentence; one in five sentences is held out by meaning. Torch {evidence["versions"]["torch"]}.
{note}
| stage | loss at start | half way | at 90% | end | minutes |
|---|---|---|---|---|---|
{stage_table(evidence)}

## Held-out sentences, {EVALUATION_STEPS} Euler steps: strict pass rate / graded score

| category | {header} |
|---|{"---|" * len(scores["strict"])}
{chr(10).join(rows)}

Rendered scenes after encoding and decoding: strict {scores["round_trip"]:.3f}. Preview and full decoder agree on
strict for {scores["preview_agreement"]:.3f} of the pictures.
"""


def _at(evidence: dict[str, Any], stage: str, share: float) -> float:
    curve = evidence["losses"][stage]
    return curve[min(int(share * len(curve)), len(curve) - 1)][1]
