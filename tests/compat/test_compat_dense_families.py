"""Dense rewards of the hosts' FLUX.1, Qwen-Image and Stable Diffusion loops, against serial completions in those loops.

The loops are restated as flow_grpo (train_flux.py, train_qwenimage.py) and DanceGRPO (train_grpo_sd.py) have them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))

import host_sd3  # noqa: E402
from diffusers import DDIMScheduler, EulerDiscreteScheduler  # noqa: E402
from diffusers.pipelines.flux.pipeline_flux import calculate_shift  # noqa: E402

from densegrpo_fast.compat.dense_rewards import dense_rewards  # noqa: E402
from densegrpo_fast.models.tiny import tiny_model  # noqa: E402

N = 4
PROMPTS = ["the moon", "a cat in the rain", "the moon"]


@dataclass
class Host:
    """A host's loop on a tiny pipeline.

    Attributes:
        pipeline: with its scheduler set.
        latents: [B, ...] noise.
        velocity: (state, timestep) -> the network's combined output.
        step: (state, output, timestep, noisy) -> next state.
        images: of final states.
        arguments: of `dense_rewards`.
    """

    pipeline: Any
    latents: Tensor
    velocity: Callable[[Tensor, Tensor], Tensor]
    step: Callable[[Tensor, Tensor, Tensor, bool], Tensor]
    images: Callable[[Tensor], Tensor]
    arguments: dict[str, Any]

    @torch.no_grad()
    def sampled(self, first: int = 0, last: int = N) -> tuple[Tensor, Tensor, Tensor]:
        """States of the window [B, T+1, ...], end images, timesteps [B, T]."""
        state, kept, timesteps = self.latents, [], self.pipeline.scheduler.timesteps
        for index, t in enumerate(timesteps):
            kept += [state] if index == first else []
            state = self.step(state, self.velocity(state, t), t, first <= index < last)
            kept += [state] if first <= index < last else []
        return torch.stack(kept, dim=1), self.images(state), timesteps[first:last].repeat(len(state), 1)

    @torch.no_grad()
    def completed(self, states: Tensor, first: int) -> list[Tensor]:
        """Images of every state but the last, by the noise-free rest of the loop."""
        found = []
        for index in range(states.shape[1] - 1):
            state = states[:, index]
            for t in self.pipeline.scheduler.timesteps[first + index :]:
                state = self.step(state, self.velocity(state, t), t, False)
            found.append(self.images(state))
        return found


def flow_step(pipeline: Any) -> Callable[[Tensor, Tensor, Tensor, bool], Tensor]:
    def step(state: Tensor, output: Tensor, t: Tensor, noisy: bool) -> Tensor:
        scheduler, times = pipeline.scheduler, t.unsqueeze(0).repeat(len(state))
        generator = torch.Generator().manual_seed(int(t))
        if noisy:
            return host_sd3.sde_step_with_logprob(scheduler, output.float(), times, state, 0.7, None, generator)[0]
        index = scheduler.index_for_timestep(t)
        return state + (scheduler.sigmas[index + 1] - scheduler.sigmas[index]) * output

    return step


def set_grid(pipeline: Any, tokens: int) -> None:
    config = pipeline.scheduler.config
    usual = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
    mu = calculate_shift(tokens, *(config.get(name, value) for name, value in usual.items()))
    pipeline.scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / N, N), mu=mu)
    pipeline.scheduler.set_begin_index(0)


def flux(height: int = 64, width: int = 64) -> Host:
    pipeline = tiny_model("FluxPipeline").pipeline
    embeds, pooled, text_ids = pipeline.encode_prompt(PROMPTS, None, max_sequence_length=8)
    channels = pipeline.transformer.config.in_channels // 4
    latents, image_ids = pipeline.prepare_latents(
        len(PROMPTS), channels, height, width, embeds.dtype, "cpu", torch.Generator().manual_seed(0), None
    )
    set_grid(pipeline, latents.shape[1])

    def velocity(state: Tensor, t: Tensor) -> Tensor:
        return pipeline.transformer(
            hidden_states=state,
            timestep=t.expand(len(state)).to(state.dtype) / 1000,
            guidance=torch.full([1], 3.5).expand(len(state)),
            pooled_projections=pooled,
            encoder_hidden_states=embeds,
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]

    def images(state: Tensor) -> Tensor:
        grid = pipeline._unpack_latents(state, height, width, pipeline.vae_scale_factor)
        grid = grid / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
        return pipeline.image_processor.postprocess(pipeline.vae.decode(grid, return_dict=False)[0], "pt")

    arguments = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "guidance_scale": 3.5}
    arguments |= {} if height == width else {"height": height, "width": width}
    return Host(pipeline, latents, velocity, flow_step(pipeline), images, arguments)


def qwen() -> Host:
    pipeline = tiny_model("QwenImagePipeline").pipeline
    both, masks = pipeline.encode_prompt(PROMPTS + [" "] * len(PROMPTS), max_sequence_length=300)
    masks = torch.ones(both.shape[:2], dtype=torch.long) if masks is None else masks
    (embeds, negative), (mask, negative_mask) = both.chunk(2), masks.chunk(2)
    assert not mask.all(), "texts of different lengths"
    latents = torch.randn(len(PROMPTS), 16, pipeline.transformer.config.in_channels)
    set_grid(pipeline, latents.shape[1])
    scale = 4.0

    def velocity(state: Tensor, t: Tensor) -> Tensor:
        time = t.expand(len(state)).to(state.dtype)
        output = pipeline.transformer(
            hidden_states=torch.cat([state, state]),
            timestep=torch.cat([time, time]) / 1000,
            guidance=None,
            encoder_hidden_states_mask=torch.cat([mask, negative_mask]),
            encoder_hidden_states=torch.cat([embeds, negative]),
            img_shapes=[[(1, 4, 4)]] * (2 * len(state)),
        )[0]
        cond, uncond = output.chunk(2)
        combined = uncond + scale * (cond - uncond)
        return combined * (cond.norm(dim=-1, keepdim=True) / combined.norm(dim=-1, keepdim=True))

    def images(state: Tensor) -> Tensor:
        config = pipeline.vae.config
        grid = pipeline._unpack_latents(state, 64, 64, pipeline.vae_scale_factor)
        mean, std = (torch.tensor(v).view(1, config.z_dim, 1, 1, 1) for v in (config.latents_mean, config.latents_std))
        image = pipeline.vae.decode(grid / (1.0 / std) + mean, return_dict=False)[0][:, :, 0]
        return pipeline.image_processor.postprocess(image, "pt")

    arguments = {"prompt_embeds": embeds, "prompt_embeds_mask": mask, "guidance_scale": scale}
    arguments |= {"negative_prompt_embeds": negative, "negative_prompt_embeds_mask": negative_mask}
    return Host(pipeline, latents, velocity, flow_step(pipeline), images, arguments)


def stable_diffusion() -> Host:
    pipeline = tiny_model("StableDiffusionPipeline").pipeline
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    embeds, _ = pipeline.encode_prompt(PROMPTS, "cpu", 1, False)
    negative, _ = pipeline.encode_prompt([""], "cpu", 1, False)
    pipeline.scheduler.set_timesteps(N)
    side, scale = 64 // pipeline.vae_scale_factor, 5.0
    latents = torch.randn(len(PROMPTS), 4, side, side)

    def velocity(state: Tensor, t: Tensor) -> Tensor:
        text = torch.cat([negative.expand_as(embeds), embeds])
        uncond, cond = pipeline.unet(torch.cat([state] * 2), t, encoder_hidden_states=text).sample.chunk(2)
        return uncond + scale * (cond - uncond)

    def step(state: Tensor, output: Tensor, t: Tensor, noisy: bool) -> Tensor:
        generator = torch.Generator().manual_seed(int(t))
        return pipeline.scheduler.step(output, t, state, eta=float(noisy), generator=generator).prev_sample

    def images(state: Tensor) -> Tensor:
        decoded = pipeline.vae.decode(state / pipeline.vae.config.scaling_factor, return_dict=False)[0]
        return pipeline.image_processor.postprocess(decoded, "pt")

    arguments = {"prompt_embeds": embeds, "negative_prompt_embeds": negative, "guidance_scale": scale}
    return Host(pipeline, latents, velocity, step, images, arguments)


PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "dense_rewards.md"
HOSTS = {"flux": flux, "flux, wide": lambda: flux(64, 96), "qwen_image": qwen, "stable_diffusion": stable_diffusion}


def reward_fn(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> tuple[dict[str, Any], dict]:
    return {"avg": (images[:, 0] - images[:, 2].square()).double().mean(dim=(1, 2))}, {}


@pytest.mark.ci
@pytest.mark.parametrize("window", [(0, N), (1, 3)])
@pytest.mark.parametrize("name", HOSTS)
def test_exact_is_the_serial_completion_in_the_host_s_loop(name: str, window: tuple[int, int]) -> None:
    torch.manual_seed(0)
    host = HOSTS[name]()
    states, images, timesteps = host.sampled(*window)
    expected = [reward_fn(one, [], [])[0]["avg"] for one in (*host.completed(states, window[0]), images)]
    given = {} if window == (0, N) else {"timesteps": timesteps}
    for end in ({"images": images}, {}):
        dense = dense_rewards(host.pipeline, reward_fn, PROMPTS, latents=states, **host.arguments, **given, **end)
        torch.testing.assert_close(dense.rewards.double(), torch.stack(expected, 1), rtol=2e-5, atol=2e-5)
        assert dense.gains.shape == (len(PROMPTS), window[1] - window[0]) and dense.gains.abs().max() > 1e-4
    cheap = dense_rewards(host.pipeline, reward_fn, PROMPTS, latents=states, plan="one_step", **host.arguments, **given)
    assert cheap.evaluations < dense.evaluations and not torch.equal(cheap.rewards, dense.rewards)


@pytest.mark.ci
@pytest.mark.parametrize("name", ["qwen_image", "stable_diffusion"])
def test_the_pages_lines_give_the_same(name: str) -> None:
    """Run among the names that the host's script has there."""
    torch.manual_seed(0)
    host = HOSTS[name]()
    states, images, timesteps = host.sampled()
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    mark = {"qwen_image": "collected_data", "stable_diffusion": "current_batch"}[name]
    (code,) = [block for block in blocks if mark in block]
    script = {
        "torch": torch,
        "dense_rewards": dense_rewards,
        "partial": lambda function, only_strict: function,
        "autocast": nullcontext,
        "pipeline": host.pipeline,
        "reward_fn": reward_fn,
        "prompts": PROMPTS,
        "current_batch": PROMPTS,
        "prompt_metadata": None,
        "latents": states,
        "timesteps": timesteps,
        "images": images,
        "collected_data": host.arguments,
        "prompt_embeds": host.arguments["prompt_embeds"],
        "sample_neg_prompt_embeds": host.arguments["negative_prompt_embeds"],
        "config": SimpleNamespace(sample=SimpleNamespace(guidance_scale=host.arguments["guidance_scale"])),
        "accelerator": SimpleNamespace(device="cpu"),
        "executor": None,
        "all_gains": [],
    }
    exec(code, script)
    expected = dense_rewards(host.pipeline, reward_fn, PROMPTS, latents=states, images=images, **host.arguments).gains
    gains = script["all_gains"][0] if script["all_gains"] else script["rewards"].gains
    torch.testing.assert_close(gains, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.ci
def test_what_does_not_belong_to_the_pipeline_is_refused() -> None:
    host = flux(64, 96)
    states = torch.stack([host.latents] * (N + 1), dim=1)

    def refused(message: str, pipeline: Any = host.pipeline, **changes: Any) -> None:
        with pytest.raises(ValueError, match=message):
            dense_rewards(pipeline, reward_fn, PROMPTS, **({"latents": states} | host.arguments | changes))

    refused(r"latents of \[24, 16\] are not those of 64 x 64 pixels, \[16, 16\]: give height and width", width=64)
    refused("FluxPipeline is guided within the network: expected guidance full", guidance="cond_only")
    refused("FluxPipeline: kept velocities, and guidance reuse", guidance="reuse")
    refused("dense_rewards knows StableDiffusion3Pipeline, .* got a WanPipeline", tiny_model("WanPipeline").pipeline)
    other = stable_diffusion()
    other.pipeline.scheduler.timesteps = other.pipeline.scheduler.timesteps + 1
    states = torch.stack([other.latents] * (N + 1), dim=1)
    refused("are not those of its configuration", other.pipeline, height=0, width=0, **other.arguments)
    config = other.pipeline.scheduler.config
    for scheduler, message in (
        (EulerDiscreteScheduler.from_config(config), "with a DDIMScheduler, got a EulerDiscreteScheduler"),
        (DDIMScheduler.from_config(config, set_alpha_to_one=True), "set_alpha_to_one of DDIMScheduler must be false"),
    ):
        scheduler.set_timesteps(N)
        other.pipeline.scheduler = scheduler
        refused(message, other.pipeline, height=0, width=0, **other.arguments)
