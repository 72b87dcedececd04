"""The SD3 adapter does what the diffusers pipeline does, on a tiny random pipeline of SD3.5's classes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.tiny import tiny_sd3
from densegrpo_fast.sampling.rollout import sample_ode

PROMPTS = ["a photo of a cat", "the moon", "a photo of a cat"]


@pytest.fixture
def model() -> DiffusersModel:
    return tiny_sd3()


def test_every_different_prompt_is_encoded_once(model: DiffusersModel, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[list[str]] = []
    original = model.pipeline.encode_prompt

    def counting(prompt: list[str], **options: object) -> object:
        encoded.append(prompt)
        return original(prompt=prompt, **options)

    monkeypatch.setattr(model.pipeline, "encode_prompt", counting)
    conditioning = model.encode(PROMPTS)
    assert encoded == [["a photo of a cat", "the moon"], [""]]
    model.encode(["the moon"])
    # the empty prompt is remembered
    assert encoded[2:] == [["the moon"]]
    assert len(conditioning) == 3
    assert conditioning.rows.tolist() == [0, 1, 0]
    # 16 CLIP tokens and 8 of the T5 block
    assert conditioning.prompts["embeds"].shape == (2, 24, 128)
    assert conditioning.negative["embeds"].shape == (1, 24, 128)
    for row, prompt in zip(conditioning.rows, PROMPTS, strict=True):
        alone = model.encode([prompt])
        torch.testing.assert_close(conditioning.prompts["embeds"][row], alone.prompts["embeds"][0])
        torch.testing.assert_close(conditioning.prompts["pooled"][row], alone.prompts["pooled"][0])
    assert not torch.allclose(conditioning.prompts["pooled"][0], conditioning.prompts["pooled"][1])


def test_conditioning_rows_are_selected_and_repeated(model: DiffusersModel) -> None:
    conditioning = model.encode(PROMPTS)
    assert conditioning.select(slice(1, 3)).rows.tolist() == [1, 0]
    assert conditioning.repeat(2).rows.tolist() == [0, 1, 0, 0, 1, 0]
    assert conditioning.select(torch.tensor([2])).prompts["embeds"] is conditioning.prompts["embeds"]


@torch.no_grad()
def test_guidance_mixes_two_velocities(model: DiffusersModel) -> None:
    latents, sigma = torch.randn(3, *model.latent_shape), torch.tensor([0.9, 0.5, 0.2])
    cond = model.velocity(latents, sigma, model.encode(PROMPTS))
    uncond = model.velocity(latents, sigma, model.encode([""] * 3))
    guided = model.velocity(latents, sigma, model.encode(PROMPTS), 3.5)
    assert cond.uncond is None
    torch.testing.assert_close(guided.cond, cond.combined(), rtol=1e-5, atol=1e-5)
    assert guided.uncond is not None
    torch.testing.assert_close(guided.uncond, uncond.combined(), rtol=1e-5, atol=1e-5)
    expected = uncond.combined() + 3.5 * (cond.combined() - uncond.combined())
    torch.testing.assert_close(guided.combined(), expected, rtol=1e-4, atol=1e-4)
    assert (guided.combined() - cond.combined()).abs().max() > 1e-3
    assert (model.forwards(1.0), model.forwards(3.5)) == (1, 2)


def test_the_scheduler_has_our_grid_to_the_bit(model: DiffusersModel) -> None:
    scheduler = model.pipeline.scheduler
    for num_steps in (1, 4, 10, 28, 40):
        scheduler.set_timesteps(num_steps)
        sigmas = model.sigmas(num_steps)
        assert torch.equal(sigmas, scheduler.sigmas)
        # and the transformer sees the same time
        assert torch.equal(1000.0 * sigmas[:-1], scheduler.timesteps)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@torch.no_grad()
def test_sampling_is_the_pipeline_s(model: DiffusersModel, guidance_scale: float) -> None:
    noise = torch.randn(3, *model.latent_shape)
    model.pipeline.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 4, "guidance_scale": guidance_scale, "latents": noise, "max_sequence_length": 8}
    theirs = model.pipeline(PROMPTS, output_type="latent", **options).images
    ours = sample_ode(model, noise, model.encode(PROMPTS), model.sigmas(4), guidance_scale=guidance_scale)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-5)
    assert (ours - noise).abs().max() > 0.1

    pictures = model.pipeline(PROMPTS, output_type="pt", **options).images
    torch.testing.assert_close(model.decode(ours), pictures, rtol=1e-5, atol=2e-5)


def test_pictures(model: DiffusersModel) -> None:
    latents = torch.randn(2, *model.latent_shape)
    full, preview = model.decode(latents), model.decode(latents, "preview")
    for images in (full, preview):
        assert images.shape == (2, 3, 64, 64)
        assert images.dtype == torch.float32
        assert images.min() >= 0 and images.max() <= 1
        assert not images.requires_grad
    assert not torch.allclose(full, preview)


def test_a_preview_needs_its_decoder(model: DiffusersModel) -> None:
    model.preview_decoder = None
    with pytest.raises(ValueError, match="no preview decoder: set lookahead.decoder to full"):
        model.decode(torch.zeros(1, *model.latent_shape), "preview")


def test_sizes(model: DiffusersModel) -> None:
    pipeline = model.pipeline
    assert DiffusersModel(pipeline).latent_shape == (16, 8, 8)
    assert DiffusersModel(pipeline, height=32, width=48).latent_shape == (16, 4, 6)
    # 8x autoencoder and patches of 2
    with pytest.raises(UsageError, match="model.height: expected a multiple of 16 for this model, got 40"):
        DiffusersModel(pipeline, height=40, width=48)
    with pytest.raises(UsageError, match="model.width: expected a multiple of 16"):
        DiffusersModel(pipeline, height=48, width=40)


@pytest.mark.parametrize("setting", ["invert_sigmas", "stochastic_sampling"])
def test_a_schedule_that_is_not_computed_is_refused(model: DiffusersModel, setting: str) -> None:
    model.pipeline.scheduler.register_to_config(**{setting: True})
    with pytest.raises(ValueError, match=f"scheduler: {setting} of FlowMatchEulerDiscreteScheduler is not supported"):
        DiffusersModel(model.pipeline)


def test_the_tiny_model_is_the_same_every_time() -> None:
    before = torch.get_rng_state()
    one, two, other = tiny_sd3(), tiny_sd3(), tiny_sd3(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [next(model.network.parameters()) for model in (one, two, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert one.trainable_parameters() == {}


@pytest.mark.ci
def test_a_compiled_forward_is_the_same_with_and_without_gradient(tiny_policy: Callable[..., DiffusersModel]) -> None:
    # traced and differentiated as torch.compile does it, without the minutes that its compiler takes
    model = tiny_policy(spread=0.1)
    conditioning, sigma = model.encode(PROMPTS[:2]), torch.tensor([0.7, 0.3])
    latents, parameters = torch.randn(2, *model.latent_shape), list(model.trainable_parameters().values())

    def velocity() -> torch.Tensor:
        return model.velocity(latents, sigma, conditioning).cond

    eager = velocity()
    gradients = torch.autograd.grad(eager.square().mean(), parameters)
    model.compile(None, backend="aot_eager")
    with torch.no_grad():
        sampled = velocity()
    assert not sampled.requires_grad
    replayed = velocity()
    assert torch.equal(sampled, replayed)
    torch.testing.assert_close(replayed, eager, rtol=1e-5, atol=1e-6)
    for found, expected in zip(torch.autograd.grad(replayed.square().mean(), parameters), gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
