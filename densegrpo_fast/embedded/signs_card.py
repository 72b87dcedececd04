"""Measures the words model on held-out words by the OCR reward, and its model card."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline
from torch import Tensor

from densegrpo_fast.embedded import card, words
from densegrpo_fast.embedded.stages import CHUNK


@torch.no_grad()
def brief(pipeline: StableDiffusion3Pipeline) -> dict[str, Any]:
    """Exact and graded scores by guidance, of held-out words, one picture each: a point of the training's curve."""
    chosen = words.split(held_out=True)
    scored = {str(scale): _scores(pipeline, chosen, scale, copies=2)[0] for scale in card.GUIDANCE_SCALES[:2]}
    return {kind: {scale: both[kind] for scale, both in scored.items()} for kind in ("exact", "graded")}


@torch.no_grad()
def evaluate(pipeline: StableDiffusion3Pipeline, preview: AutoencoderTiny, copies: int = 8) -> dict[str, Any]:
    """Scores by the OCR reward, by plain diffusers calls.

    Returns:
        `exact`, how often the very word is read, and `graded`, the reward, per guidance scale and list (`held_out` or
        `known` words; 10 Euler steps); `round_trip`, how often a rendered sign is read after the autoencoder;
        `preview_agreement`, how often both decoders agree on exact.
    """
    result: dict[str, Any] = {"exact": {}, "graded": {}}
    agreements: list[bool] = []
    for scale in card.GUIDANCE_SCALES:
        lists = {"held_out": words.split(held_out=True), "known": words.split(held_out=False)}
        found = {}
        for name, chosen in lists.items():
            found[name], agree = _scores(pipeline, chosen, scale, copies if name == "held_out" else 2, preview)
            agreements += agree
        for kind in ("exact", "graded"):
            result[kind][str(scale)] = {name: scores[kind] for name, scores in found.items()}
    generator = np.random.default_rng(12)
    images = torch.from_numpy(np.stack([words.render(word, generator) for word in words.WORDS]))
    restored = pipeline.vae.decode(pipeline.vae.encode(images * 2 - 1).latent_dist.mode()).sample
    result["round_trip"] = float(np.mean(_exact((restored / 2 + 0.5).clamp(0, 1), list(words.WORDS))))
    result["preview_agreement"] = float(np.mean(agreements))
    return result


def _scores(
    pipeline: StableDiffusion3Pipeline,
    chosen: list[str],
    scale: float,
    copies: int,
    preview: AutoencoderTiny | None = None,
) -> tuple[dict[str, float], list[bool]]:
    """Mean exact and graded scores; and where both decoders agree on exact."""
    repeated = chosen * copies
    latents = card.sample_latents(pipeline, [words.prompt(word) for word in repeated], scale, seed=0)
    images = card.decode(pipeline, latents)
    exact = _exact(images, repeated)
    graded = _reader()(images, [words.prompt(word) for word in repeated])
    agreements = []
    if preview is not None:
        agreements = list(np.equal(exact, _exact(card.preview_decode(preview, latents), repeated)))
    return {"exact": float(np.mean(exact)), "graded": float(np.mean(np.array(graded, float)))}, agreements


def _exact(images: Tensor, wanted: list[str]) -> list[bool]:
    """Whether what is read in each picture [N, 3, 64, 64] is the very word."""
    from densegrpo_fast.common.pictures import to_bytes

    return [found.upper() == word for found, word in zip(_reader().read(to_bytes(images)), wanted, strict=True)]


def _reader() -> Any:
    from densegrpo_fast.rewards.ocr import Ocr

    return Ocr(detect=False, threads=1)


def text(evidence: dict[str, Any]) -> str:
    """The card of the words model."""
    scores, recipe = evidence["scores"], evidence["recipe"]
    rows = []
    for name, title in (("held_out", "held-out words"), ("known", "words of the training")):
        cells = [f"{scores['exact'][s][name]:.2f} / {scores['graded'][s][name]:.2f}" for s in scores["exact"]]
        rows.append(f"| {title} | " + " | ".join(cells) + " |")
    header = " | ".join(f"guidance {scale}" for scale in scores["exact"])
    note = f"\n{evidence['note']}\n" if evidence["note"] else ""
    return f"""---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# The embedded words model

A small Stable Diffusion 3 pipeline that draws 64x64 signs with one word of three to five letters, for example
`a sign that says "RIVER"`. It exists so that densegrpo-fast can train on a reward that reads pictures (`ocr`) on a
laptop; it has no other use. Its autoencoder is that of the scenes model.

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained(path, text_encoder_3=None, tokenizer_3=None)
pipe('a sign that says "RIVER"', num_inference_steps=10, guidance_scale=2.0).images[0]
```

(diffusers wants to be told that there is no T5.) `preview_decoder/` is an `AutoencoderTiny` for the same latents.

## How it was made
`python -m densegrpo_fast.embedded.pretrain --world words`, deterministic for a given machine and library version:
{recipe["chunks"] * CHUNK} rendered signs, a quarter with one of {len(words.split(held_out=False))} words, the others
with letters in any order; none of them shows one of the {len(words.split(held_out=True))} held-out words. Torch
{evidence["versions"]["torch"]}.
{note}
| stage | loss at start | half way | at 90% | end | minutes |
|---|---|---|---|---|---|
{card.stage_table(evidence)}

## {card.EVALUATION_STEPS} Euler steps: the very word is read / OCR reward

| words | {header} |
|---|{"---|" * len(scores["exact"])}
{chr(10).join(rows)}

Rendered signs after encoding and decoding: {scores["round_trip"]:.3f} are read. Preview and full decoder agree for
{scores["preview_agreement"]:.3f} of the pictures.
"""
