"""`pipeline_with_logprob` for SD3 against the host's loop, stated plainly in `host_sd3`, on a tiny random pipeline."""

from __future__ import annotations

import inspect
import random
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))

import host_sd3  # noqa: E402

from densegrpo_fast.compat.flow_grpo import (  # noqa: E402
    keep_velocities,
    philox_samples,
    pipeline_with_logprob,
    pipeline_with_logprob_fast,
    sde_step_with_logprob,
    step_function,
)
from densegrpo_fast.compat.flow_grpo.pipelines import make_pipeline, window_of  # noqa: E402
from densegrpo_fast.models.tiny import tiny_sd3  # noqa: E402

PROMPTS = ["a photo of a cat", "the moon"]
N = 5


@pytest.fixture(scope="module")
def pipeline() -> Any:
    pipeline = tiny_sd3().pipeline
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture
def arguments(pipeline: Any) -> dict[str, Any]:
    """What a training script passes."""
    with torch.no_grad():
        embeds, negative, pooled, negative_pooled = pipeline.encode_prompt(PROMPTS, None, None, max_sequence_length=8)
    return {
        "prompt_embeds": embeds,
        "pooled_prompt_embeds": pooled,
        "negative_prompt_embeds": negative,
        "negative_pooled_prompt_embeds": negative_pooled,
        "num_inference_steps": N,
        "guidance_scale": 4.5,
        "output_type": "pt",
    }


def close(actual: Any, expected: Any, scale: float = 1.0) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5 * scale, atol=1e-5 * scale, equal_nan=True)


def seeded(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, Tensor, Any]:
    """Results, and the states of torch's and Python's generators afterwards."""
    torch.manual_seed(7)
    random.seed(7)
    return function(*args, **kwargs), torch.get_rng_state(), random.getstate()


@pytest.mark.parametrize(
    ("ours", "host"),
    [
        (pipeline_with_logprob, host_sd3.pipeline_with_logprob),
        (pipeline_with_logprob_fast, host_sd3.fast_pipeline_with_logprob),
    ],
)
def test_signatures_are_the_hosts(ours: Any, host: Any) -> None:
    assert inspect.signature(ours) == inspect.signature(host)
    with pytest.raises(TypeError, match="unexpected keyword argument 'noise'"):
        ours(None, noise=1)
    with pytest.raises(TypeError, match="missing a required argument: 'self'"):
        ours()


@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_plain_is_the_hosts_loop(pipeline: Any, arguments: dict[str, Any], scale: float) -> None:
    options = {**arguments, "guidance_scale": scale, "return_prev_sample_mean": True, "noise_level": 0.6}
    theirs, state, _ = seeded(host_sd3.pipeline_with_logprob, pipeline, **options)
    ours, our_state, _ = seeded(pipeline_with_logprob, pipeline, **options)
    assert torch.equal(our_state, state)
    assert [len(part) for part in ours] == [2, N + 1, N, N]
    close(ours[0], theirs[0])
    for actual, expected in zip(ours[1:], theirs[1:], strict=True):
        close(actual, expected)
    assert all(latents.dtype == torch.float32 for latents in ours[1])
    # the trajectory moved, and by more than the tolerance
    assert (ours[1][0] - ours[1][-1]).abs().max() > 0.5
    assert len(pipeline_with_logprob(pipeline, **arguments)) == 3


@pytest.mark.parametrize("kind", ["sde", "cps"])
@pytest.mark.parametrize("window", [{}, {"sde_window_size": 2, "sde_window_range": (1, 4)}], ids=["all", "window"])
def test_fast_is_the_hosts_loop(pipeline: Any, arguments: dict[str, Any], kind: str, window: dict[str, Any]) -> None:
    options = {**arguments, "sde_type": kind, **window}
    theirs, state, python = seeded(host_sd3.fast_pipeline_with_logprob, pipeline, **options)
    ours, our_state, our_python = seeded(pipeline_with_logprob_fast, pipeline, **options)
    assert torch.equal(our_state, state) and our_python == python
    steps = 2 if window else N - 1
    assert [len(part) for part in ours[1:]] == [steps + 1, steps, steps]
    for actual, expected in zip(ours, theirs, strict=True):
        close(actual, expected)
    # a script stacks the lists
    assert torch.stack(ours[1], dim=1).shape == (2, steps + 1, 16, 8, 8)
    assert torch.stack(ours[2], dim=1).shape == (2, steps)
    assert torch.stack(ours[3]).unsqueeze(0).repeat(2, 1).shape == (2, steps)


def test_training_finds_the_schedule_and_the_very_log_probs(pipeline: Any, arguments: dict[str, Any]) -> None:
    """The importance ratio of the first update is 1: a script's replay, with timesteps [B], repeats the rollout."""
    pipeline.scheduler.set_timesteps(9)
    _, latents, log_probs = pipeline_with_logprob(pipeline, **arguments)
    assert len(pipeline.scheduler.timesteps) == N and len(pipeline.scheduler.sigmas) == N + 1
    prompts = tuple(arguments[name] for name in list(arguments)[:4])
    for step, t in enumerate(pipeline.scheduler.timesteps):
        with torch.no_grad():
            velocity = host_sd3.guided(pipeline, latents[step], t, prompts, 4.5)
        again = sde_step_with_logprob(
            pipeline.scheduler, velocity, t.repeat(2), latents[step], 0.7, prev_sample=latents[step + 1]
        )
        assert torch.equal(again[1], log_probs[step])


def test_without_noise_it_is_the_diffusers_pipeline(pipeline: Any, arguments: dict[str, Any]) -> None:
    noise = torch.randn(2, 16, 8, 8)
    expected = pipeline(**arguments, latents=noise).images
    close(pipeline_with_logprob(pipeline, **arguments, latents=noise, noise_level=0)[0], expected, 10)
    close(pipeline_with_logprob_fast(pipeline, **arguments, latents=noise, noise_level=0)[0], expected, 10)
    grid = {"sigmas": [1.0, 0.6, 0.2]}
    expected = pipeline(**arguments, latents=noise, **grid).images
    close(pipeline_with_logprob(pipeline, **arguments, latents=noise, noise_level=0, **grid)[0], expected, 10)


def test_prompts_sizes_and_generators_are_the_pipelines(pipeline: Any, arguments: dict[str, Any]) -> None:
    text = {"prompt": PROMPTS, "max_sequence_length": 8, "num_inference_steps": 2, "guidance_scale": 4.5}
    options = {"num_images_per_prompt": 2, "height": 32, "width": 48, "noise_level": 0.0}
    generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
    images, latents, _ = pipeline_with_logprob(pipeline, **text, **options, generator=generators)
    assert latents[0].shape == (4, 16, 4, 6)
    assert [image.size for image in images] == [(48, 32)] * 4
    again = [torch.Generator().manual_seed(seed) for seed in range(4)]
    del options["noise_level"]
    expected = pipeline(**text, **options, generator=again, output_type="latent").images
    close(latents[-1], expected, 10)
    one = pipeline_with_logprob(pipeline, prompt="the moon", max_sequence_length=8, num_inference_steps=1)
    assert len(one[0]) == 1


def test_an_interrupt_stops_stepping(pipeline: Any, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    forward = pipeline.transformer.forward

    def interrupting(*args: Any, **kwargs: Any) -> Any:
        pipeline._interrupt = True
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipeline.transformer, "forward", interrupting)
    _, latents, log_probs = pipeline_with_logprob(pipeline, **arguments)
    assert len(latents) == 2 and len(log_probs) == 1


def test_philox_noise_does_not_depend_on_the_batch(pipeline: Any, arguments: dict[str, Any]) -> None:
    step = step_function("V3", rng="philox", seed=3)
    sampler = make_pipeline("plain", lambda: step)
    noise = torch.randn(2, 16, 8, 8)
    before = torch.get_rng_state()
    with philox_samples(torch.tensor([5, 9]), epoch=1):
        together = sampler(pipeline, **arguments, latents=noise)[1]
    assert torch.equal(torch.get_rng_state(), before)
    row = {name: value[1:] if isinstance(value, Tensor) else value for name, value in arguments.items()}
    with philox_samples(torch.tensor([9]), epoch=1):
        alone = sampler(pipeline, **row, latents=noise[1:])[1]
    for whole, part in zip(together, alone, strict=True):
        close(part, whole[1:])
    assert (together[1] - noise).abs().max() > 0.1


def test_kept_velocities_are_those_of_the_states(pipeline: Any, arguments: dict[str, Any]) -> None:
    window = {"sde_window_size": 2, "sde_window_range": (1, 4)}
    random.seed(0)
    with keep_velocities() as kept:
        _, latents, _, timesteps = pipeline_with_logprob_fast(pipeline, **arguments, **window)
    (one,) = kept
    assert one.velocities.shape == (N, 2, 16, 8, 8) and one.clean.shape == (2, 16, 8, 8)
    first = pipeline.scheduler.timesteps.tolist().index(timesteps[0].item())
    prompts = tuple(arguments[name] for name in list(arguments)[:4])
    with torch.no_grad():
        for step in (0, 1):
            guided, plain = (host_sd3.guided(pipeline, latents[step], timesteps[step], prompts, s) for s in (4.5, 1.0))
            close(one.velocities[first + step], guided)
            close(one.guidance_terms[first + step], guided - plain, 10)
    pipeline_with_logprob(pipeline, **arguments)
    assert len(kept) == 1


def test_a_window_must_fit_its_range(pipeline: Any, arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"sde_window_size 4 does not fit into sde_window_range \(1, 4\)"):
        pipeline_with_logprob_fast(pipeline, **arguments, sde_window_size=4, sde_window_range=(1, 4))


def test_windows_are_drawn_as_published() -> None:
    # The host's Qwen-Image pipeline seeds Python's generator with the rank before it draws its window: of 2 steps in
    # (0, 5) rank 0 gets (3, 5) every time, and of 4 steps ranks 0..7 start at these.
    def window(seed: int, size: int) -> tuple[int, int]:
        random.seed(seed)
        return window_of({"sde_window_size": size, "sde_window_range": (0, 5)}, num_steps=10)

    assert window(0, 2) == (3, 5)
    assert [window(rank, 4)[0] for rank in range(8)] == [1, 0, 0, 0, 0, 1, 0, 1]
