"""Dense rewards of the hosts' FLUX, Qwen-Image and Stable Diffusion loops, against completions of their own loops.

The loops are small restatements of `flow_grpo/diffusers_patch/flux_pipeline_with_logprob_fast.py`,
`qwenimage_pipeline_with_logprob.py` (Flow-GRPO, TurningPoint-GRPO) and DanceGRPO's
`fastvideo/models/stable_diffusion/pipeline_with_logprob.py`, on pipelines of the real classes.
"""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
from diffusers import DDIMScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift, retrieve_timesteps

from densegrpo_fast.compat.dense_rewards import dense_rewards
from densegrpo_fast.compat.flow_grpo import sde_step_with_logprob
from densegrpo_fast.compat.scored import DenseRewards
from densegrpo_fast.flow import ops
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.tiny import tiny_model

PAGE = Path(__file__).parents[2] / "docs" / "integrations" / "dense_rewards.md"
N, SCALE = 4, 3.0
PROMPTS = ["the moon", "a cat that sits on a mat", "the moon"]


class Flux:
    name, tokens, options = "FluxPipeline", 8, {"guidance_scale": SCALE}

    def __init__(self, pipeline: Any, height: int, width: int):
        self.pipeline, self.height, self.width = pipeline, height, width
        pipe, device = pipeline, torch.device("cpu")
        embeds, pooled, self.text_ids = pipe.encode_prompt(PROMPTS, None, device, max_sequence_length=self.tokens)
        self.text = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        channels = pipe.transformer.config.in_channels // 4
        noise = torch.Generator().manual_seed(1)
        self.noise, self.image_ids = pipe.prepare_latents(3, channels, height, width, embeds.dtype, device, noise)
        self.set_timesteps()

    def set_timesteps(self) -> None:
        scheduler = self.pipeline.scheduler
        config = scheduler.config
        shift = (config.base_image_seq_len, config.max_image_seq_len, config.base_shift, config.max_shift)
        mu = calculate_shift(self.noise.shape[1], *shift)
        retrieve_timesteps(scheduler, N, torch.device("cpu"), sigmas=numpy.linspace(1.0, 1 / N, N), mu=mu)

    def predict(self, latents: Tensor, t: Tensor) -> Tensor:
        return self.pipeline.transformer(
            hidden_states=latents,
            timestep=t.expand(len(latents)).to(latents.dtype) / 1000,
            guidance=torch.full([1], SCALE).expand(len(latents)),
            pooled_projections=self.text["pooled_prompt_embeds"],
            encoder_hidden_states=self.text["prompt_embeds"],
            txt_ids=self.text_ids,
            img_ids=self.image_ids,
            return_dict=False,
        )[0]

    def step(self, latents: Tensor, t: Tensor, level: float, generator: torch.Generator) -> Tensor:
        predicted, rows = self.predict(latents, t), t.unsqueeze(0).repeat(len(latents))
        scheduler = self.pipeline.scheduler
        return sde_step_with_logprob(scheduler, predicted, rows, latents, noise_level=level, generator=generator)[0]

    def images(self, latents: Tensor) -> Tensor:
        pipe = self.pipeline
        latents = pipe._unpack_latents(latents, self.height, self.width, pipe.vae_scale_factor)
        latents = latents / pipe.vae.config.scaling_factor + pipe.vae.config.shift_factor
        return pipe.image_processor.postprocess(pipe.vae.decode(latents, return_dict=False)[0], output_type="pt")


class QwenImage(Flux):
    name, tokens = "QwenImagePipeline", 300

    def __init__(self, pipeline: Any, height: int, width: int):
        self.pipeline, self.height, self.width = pipeline, height, width
        both = [*PROMPTS, *[" "] * 3]
        embeds, mask = pipeline.encode_prompt(both, device=torch.device("cpu"), max_sequence_length=self.tokens)
        assert not mask.bool().all()
        (own, negative), (own_mask, negative_mask) = embeds.chunk(2), mask.chunk(2)
        self.text = {"prompt_embeds": own, "prompt_embeds_mask": own_mask}
        self.text |= {"negative_prompt_embeds": negative, "negative_prompt_embeds_mask": negative_mask}
        channels = pipeline.transformer.config.in_channels // 4
        noise = torch.Generator().manual_seed(1)
        self.noise = pipeline.prepare_latents(3, channels, height, width, embeds.dtype, torch.device("cpu"), noise)
        self.shapes = [[(1, height // pipeline.vae_scale_factor // 2, width // pipeline.vae_scale_factor // 2)]] * 3
        self.set_timesteps()

    def predict(self, latents: Tensor, t: Tensor) -> Tensor:
        text = self.text
        both = self.pipeline.transformer(
            hidden_states=torch.cat([latents, latents]),
            timestep=t.expand(2 * len(latents)).to(latents.dtype) / 1000,
            guidance=None,
            encoder_hidden_states_mask=torch.cat([text["prompt_embeds_mask"], text["negative_prompt_embeds_mask"]]),
            encoder_hidden_states=torch.cat([text["prompt_embeds"], text["negative_prompt_embeds"]]),
            img_shapes=self.shapes * 2,
            return_dict=False,
        )[0]
        cond, uncond = both.chunk(2)
        guided = uncond + SCALE * (cond - uncond)
        return guided * (cond.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def images(self, latents: Tensor) -> Tensor:
        pipe, config = self.pipeline, self.pipeline.vae.config
        latents = pipe._unpack_latents(latents, self.height, self.width, pipe.vae_scale_factor)
        mean = torch.tensor(config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(config.latents_std).view(1, -1, 1, 1, 1)
        image = pipe.vae.decode(latents * std + mean, return_dict=False)[0][:, :, 0]
        return pipe.image_processor.postprocess(image, output_type="pt")


class StableDiffusion(Flux):
    name = "StableDiffusionPipeline"

    def __init__(self, pipeline: Any, height: int, width: int):
        self.pipeline = pipeline
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        device = torch.device("cpu")
        own, negative = pipeline.encode_prompt(PROMPTS, device, 1, True, [""] * 3)
        self.text = {"prompt_embeds": own, "negative_prompt_embeds": negative}
        channels = pipeline.unet.config.in_channels
        shape = (3, channels, height // pipeline.vae_scale_factor, width // pipeline.vae_scale_factor)
        self.noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        pipeline.scheduler.set_timesteps(N)

    def predict(self, latents: Tensor, t: Tensor) -> Tensor:
        text = torch.cat([self.text["negative_prompt_embeds"], self.text["prompt_embeds"]])
        both = self.pipeline.unet(torch.cat([latents] * 2), t, encoder_hidden_states=text, return_dict=False)[0]
        uncond, cond = both.chunk(2)
        return uncond + SCALE * (cond - uncond)

    def step(self, latents: Tensor, t: Tensor, level: float, generator: torch.Generator) -> Tensor:
        # the host's ddim_step_with_logprob draws by the formula of diffusers' own step
        predicted, eta = self.predict(latents, t), 1.0 if level else 0.0
        return self.pipeline.scheduler.step(predicted, t, latents, eta=eta, generator=generator).prev_sample

    def images(self, latents: Tensor) -> Tensor:
        pipe = self.pipeline
        image = pipe.vae.decode(latents / pipe.vae.config.scaling_factor, return_dict=False)[0]
        return pipe.image_processor.postprocess(image, output_type="pt")


LOOPS: tuple[type[Flux], ...] = (Flux, QwenImage, StableDiffusion)


def reward_fn(
    images: Tensor, prompts: list[str], metadata: list[Any], only_strict: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    red = images[:, 0].double().mean(dim=(1, 2)) + torch.tensor([len(prompt) for prompt in prompts])
    return {"avg": (red + images[:, 2].double().square().mean(dim=(1, 2))).tolist()}, {}


def rewards_of(images: Tensor) -> Tensor:
    return torch.tensor(reward_fn(images, PROMPTS, [])[0]["avg"])


def loop_of(kind: type[Flux], size: tuple[int, int] = (64, 64)) -> Flux:
    with torch.no_grad():
        return kind(tiny_model(kind.name).pipeline, *size)


@torch.no_grad()
def sampled(loop: Flux, first: int, steps: int) -> list[Tensor]:
    """The states of a window, as the hosts' loops keep them, and the end."""
    latents, generator, kept = loop.noise, torch.Generator().manual_seed(2), []
    for step, t in enumerate(loop.pipeline.scheduler.timesteps):
        if step == first:
            kept.append(latents)
        latents = loop.step(latents, t, 0.7 if first <= step < first + steps else 0.0, generator)
        if first <= step < first + steps:
            kept.append(latents)
    return [*kept, latents]


@torch.no_grad()
def completed(loop: Flux, latents: Tensor, index: int) -> Tensor:
    """The image that a state would end in, by the rest of the host's own loop without noise."""
    for t in loop.pipeline.scheduler.timesteps[index:]:
        latents = loop.step(latents, t, 0.0, torch.Generator())
    return loop.images(latents)


def by_the_page(loop: Flux, states: list[Tensor], end: Tensor) -> DenseRewards:
    """What the page's lines for this host give in place of the script's own call of its reward function."""
    section = PAGE.read_text(encoding="utf-8").split("## The changed lines: FLUX.1")[1].split("## Options")[0]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[LOOPS.index(type(loop))]
    with ThreadPoolExecutor(1) as executor:
        script = {
            **loop.text,
            "dense_rewards": dense_rewards,
            "partial": partial,
            "autocast": nullcontext,
            "pipeline": loop.pipeline,
            "reward_fn": reward_fn,
            "prompts": PROMPTS,
            "current_batch": PROMPTS,
            "prompt_metadata": [{}] * 3,
            "latents": torch.stack(states, dim=1),
            "timesteps": loop.pipeline.scheduler.timesteps.repeat(3, 1),
            "images": loop.images(end),
            "collected_data": loop.text,
            "sample_neg_prompt_embeds": loop.text.get("negative_prompt_embeds"),
            "config": SimpleNamespace(resolution=64, sample=SimpleNamespace(guidance_scale=SCALE)),
            "executor": executor,
        }
        exec(code, script)
        rewards: DenseRewards = script["rewards"]
        assert set(rewards.result()[0]) == {"avg", "gains"}
    return rewards


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(("first", "steps"), [(0, N), (1, 2)], ids=["whole", "window"])
@pytest.mark.parametrize("kind", LOOPS, ids=lambda kind: kind.name)
def test_exact_is_the_serial_completion_of_the_hosts_loop(kind: type[Flux], first: int, steps: int) -> None:
    size = (64, 32) if kind is Flux and first else (64, 64)
    loop = loop_of(kind, size)
    *states, end = sampled(loop, first, steps)
    timesteps = loop.pipeline.scheduler.timesteps
    dense = dense_rewards(
        loop.pipeline,
        reward_fn,
        PROMPTS,
        latents=torch.stack(states, dim=1),
        timesteps=timesteps[first : first + steps].repeat(3, 1),
        height=size[0],
        width=size[1],
        **loop.text,
        **loop.options,
    )
    expected = [completed(loop, state, first + done) for done, state in enumerate(states[:-1])]
    close(dense.rewards, torch.stack([*map(rewards_of, expected), rewards_of(loop.images(end))], dim=1))
    assert dense.gains.shape == (3, steps) and dense.gains.abs().max() > 1e-5
    assert loop.pipeline.scheduler.timesteps is timesteps


@pytest.mark.parametrize("kind", LOOPS, ids=lambda kind: kind.name)
def test_it_is_the_packages_own_model_step_by_step(kind: type[Flux]) -> None:
    """The same samples completed by what `Trainer` trains: its prompts, its grid, its velocities, Euler's steps.

    The call is the page's, run in what the host's script has there.
    """
    loop = loop_of(kind)
    *states, end = sampled(loop, 0, N)
    dense = by_the_page(loop, states, end)
    model = DiffusersModel(loop.pipeline, max_sequence_length=kind.tokens, height=64, width=64)
    grid, prompts = model.sigmas(N), model.encode(PROMPTS)
    for index, state in enumerate(states):
        latents = state
        if model.family.scales_input:
            # x = z / sqrt((1 - t)^2 + t^2)
            latents = state * ((1 - grid[index]).square() + grid[index].square()).sqrt()
        with torch.no_grad():
            for here in range(index, N):
                sigma, after = (grid[place].expand(3) for place in (here, here + 1))
                latents = ops.euler_jump(
                    latents, model.velocity(latents, sigma, prompts, SCALE).combined(), sigma, after
                )
        close(dense.rewards[:, index], rewards_of(model.decode(latents)))


def test_a_decoder_is_given_latents_as_the_autoencoder_has_them() -> None:
    loop = loop_of(Flux, (64, 32))
    *states, _ = sampled(loop, 0, N)
    shapes = []

    def decoder(latents: Tensor) -> Tensor:
        shapes.append(tuple(latents.shape))
        return torch.zeros(len(latents), 3, 8, 8)

    options = {**loop.text, **loop.options, "height": 64, "width": 32, "plan": "one_step"}
    dense_rewards(loop.pipeline, reward_fn, PROMPTS, latents=states, decoder=decoder, **options)
    scale = loop.pipeline.vae_scale_factor
    assert set(shapes) == {(3, 4, 64 // scale, 32 // scale)}


def test_what_is_not_served_is_refused_by_name() -> None:
    loop = loop_of(Flux)
    *states, _ = sampled(loop, 0, N)

    def refused(pipeline: Any, message: str, **change: Any) -> None:
        options = {"latents": states, **loop.text, **loop.options, **change}
        with pytest.raises(ValueError, match=message):
            dense_rewards(pipeline, reward_fn, PROMPTS, **options)

    class FluxKontextPipeline: ...

    refused(FluxKontextPipeline(), "dense_rewards serves StableDiffusion3Pipeline, FluxPipeline, .*FluxKontextPipeline")
    refused(loop.pipeline, "FluxPipeline with guidance_scale 3.0 needs pooled_prompt_embeds", pooled_prompt_embeds=None)
    refused(loop.pipeline, "FluxPipeline takes no prompt_embeds_mask", prompt_embeds_mask=torch.ones(3, 8))
    refused(loop.pipeline, "FluxPipeline for images of 64 x 32 pixels", height=64, width=32)

    loop = loop_of(StableDiffusion)
    *states, _ = sampled(loop, 0, N)
    pipeline = loop.pipeline
    refused(pipeline, "StableDiffusionPipeline with .* needs negative_prompt_embeds", negative_prompt_embeds=None)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, set_alpha_to_one=True)
    pipeline.scheduler.set_timesteps(N)
    refused(pipeline, "set_alpha_to_one must be false")
    pipeline.scheduler = tiny_model("StableDiffusionPipeline").pipeline.scheduler
    refused(pipeline, "served with a DDIMScheduler, got a PNDMScheduler")
