"""The trained embedded pipeline: that it loads as any SD3 pipeline does, and what it can draw."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import Tensor

from densegrpo_fast.embedded import WEIGHTS, card, scenes
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.loading import load_pipeline
from densegrpo_fast.rewards.scenes import ScenesReward
from densegrpo_fast.sampling.rollout import sample_ode

pytestmark = [
    pytest.mark.ci,
    pytest.mark.skipif(
        not WEIGHTS.joinpath("model_index.json").is_file(), reason="the embedded weights are not in this checkout"
    ),
]
REWARD = ScenesReward()


@pytest.fixture(scope="module")
def model() -> DiffusersModel:
    return load_pipeline("embedded", device=torch.device("cpu"), dtype=torch.float32, max_sequence_length=0)


@torch.no_grad()
def draw(model: DiffusersModel, prompts: list[str], num_steps: int, guidance_scale: float = 1.0) -> Tensor:
    """Clean latents of one picture per prompt, always from the same noise."""
    noise = torch.randn(len(prompts), *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return sample_ode(model, noise, model.encode(prompts), model.sigmas(num_steps), guidance_scale=guidance_scale)


def strict(images: Tensor, prompts: list[str]) -> np.ndarray:
    return np.array(REWARD.both(images, prompts)[1])


def test_plain_diffusers_loads_it() -> None:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(WEIGHTS, text_encoder_3=None, tokenizer_3=None)
    parameters = sum(p.numel() for p in pipeline.transformer.parameters())
    assert 3_000_000 <= parameters <= 5_000_000
    assert pipeline.scheduler.config.shift == 3.0
    assert pipeline.tokenizer.model_max_length <= 32
    pipeline.set_progress_bar_config(disable=True)
    (image,) = pipeline("a red circle", num_inference_steps=2, guidance_scale=1.0).images
    assert image.size == (64, 64)


def test_the_weights_are_small_half_precision_safetensors() -> None:
    from safetensors import safe_open

    files = [path for path in WEIGHTS.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * 10**6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md"}
    for path in files:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as tensors:
                dtypes = {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
            assert dtypes <= {"F16", "I64"}, path
    assert {"README.md", "pretraining.json"} <= {path.name for path in WEIGHTS.iterdir()}


def test_our_short_path_draws_what_plain_diffusers_draws(model: DiffusersModel) -> None:
    # diffusers puts 256 zero tokens where T5's would be; we leave them out
    prompts = scenes.prompts(held_out=True, count=40)
    pipeline = model.pipeline
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(len(prompts), *model.latent_shape, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        prompts, latents=noise, num_inference_steps=4, guidance_scale=1.0, max_sequence_length=256, output_type="pt"
    ).images
    ours = model.decode(draw(model, prompts, num_steps=4))
    assert (ours - theirs).abs().mean() <= 0.02
    assert (strict(ours, prompts) == strict(theirs, prompts)).mean() >= 0.9


def test_single_objects_are_drawn(model: DiffusersModel) -> None:
    prompts = [scene.prompt for scene in scenes.split(held_out=True)["single"]]
    prompts = prompts * (-(-40 // len(prompts)))
    # these weights are at nine tenths, and two standard errors of 40 pictures are 9 points
    assert strict(model.decode(draw(model, prompts, num_steps=10, guidance_scale=4.5)), prompts).mean() >= 0.8


def test_it_can_draw_and_can_improve(model: DiffusersModel) -> None:
    prompts = scenes.prompts(held_out=True, count=90)
    share = strict(model.decode(draw(model, prompts, num_steps=10)), prompts).mean()
    assert 0.55 <= share <= 0.9


def test_guidance_works(model: DiffusersModel) -> None:
    prompts = scenes.prompts(held_out=True, count=60)
    scores = [
        np.mean(REWARD(model.decode(draw(model, prompts, num_steps=6, guidance_scale=scale)), prompts))
        for scale in (1.0, 3.0)
    ]
    assert scores[1] >= scores[0] - 0.02


@torch.no_grad()
def test_pictures_survive_the_autoencoder(model: DiffusersModel) -> None:
    generator = np.random.default_rng(5)
    drawn = scenes.sample_scenes(200, generator, held_out=True)
    images = torch.from_numpy(scenes.render_batch(drawn, generator))
    vae = model.pipeline.vae
    config = vae.config
    latents = (vae.encode(images * 2 - 1).latent_dist.mode() - config.shift_factor) * config.scaling_factor
    # the flow was trained on latents of about unit size
    assert abs(latents.mean().item()) < 0.1
    assert latents.std().item() == pytest.approx(1.0, abs=0.1)
    prompts = [scene.prompt for scene in drawn]
    assert strict(model.decode(latents), prompts).mean() >= 0.97
    assert (model.decode(latents) - images).abs().mean() < 0.02


def test_the_preview_decoder_agrees_with_the_full_one(model: DiffusersModel) -> None:
    prompts = scenes.prompts(held_out=True, count=90)
    latents = draw(model, prompts, num_steps=10)
    full, preview = model.decode(latents), model.decode(latents, "preview")
    # these weights are at 99%; two standard errors of 90 pictures are 2 points
    assert (strict(full, prompts) == strict(preview, prompts)).mean() >= 0.95
    graded = [np.array(REWARD(images, prompts)) for images in (full, preview)]
    assert np.corrcoef(*graded)[0, 1] >= 0.95


def test_the_card_reports_what_is_drawn(model: DiffusersModel) -> None:
    text = (WEIGHTS / "README.md").read_text()
    assert all(f"| {category} |" in text for category in scenes.CATEGORIES)
    evidence = json.loads((WEIGHTS / "pretraining.json").read_text())
    singles = [scene.prompt for scene in scenes.split(held_out=True)["single"]] * 4
    latents = card.sample_latents(model.pipeline, singles, guidance_scale=1.0, seed=0)
    measured = strict(card.decode(model.pipeline, latents), singles).mean()
    assert measured == pytest.approx(evidence["scores"]["strict"]["1.0"]["single"], abs=0.15)
