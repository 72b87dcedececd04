"""The sampling loops of the hosts for SD3, stated plainly in eager float32: what the adapters are compared with.

It serves as the modules of a miniature host, too: `load` executes it anew under a host's module name.
"""

from __future__ import annotations

import importlib.util
import inspect
import math
import random
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

COMMON = (
    "prompt=None prompt_2=None prompt_3=None height=None width=None num_inference_steps=28 sigmas=None "
    "guidance_scale=7.0 negative_prompt=None negative_prompt_2=None negative_prompt_3=None num_images_per_prompt=1 "
    "generator=None latents=None prompt_embeds=None negative_prompt_embeds=None pooled_prompt_embeds=None "
    "negative_pooled_prompt_embeds=None output_type='pil' joint_attention_kwargs=None clip_skip=None "
    "callback_on_step_end_tensor_inputs=['latents'] max_sequence_length=256 skip_layer_guidance_scale=2.8 "
    "noise_level=0.7"
)
PLAIN = f"{COMMON} return_prev_sample_mean=False"
FAST = f"{COMMON} sde_window_size=0 sde_window_range=(0,5) sde_type='sde'"
ODE = (
    "prompt_embeds pooled_prompt_embeds negative_prompt_embeds negative_pooled_prompt_embeds num_inference_steps "
    "guidance_scale output_type height width generator sde_type"
)
ROUNDED = False
"""Whether the states are rounded to the prompts' dtype after scoring, as in TurningPoint-GRPO."""


def takes(first: str, text: str) -> inspect.Signature:
    """The signature `(first, name=default, ...)`."""
    parameters = [inspect.Parameter(first, inspect.Parameter.POSITIONAL_OR_KEYWORD)]
    for part in text.split():
        name, _, default = part.partition("=")
        value = eval(default) if default else inspect.Parameter.empty
        parameters.append(inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=value))
    return inspect.Signature(parameters)


def signed(first: str, text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: the function is called with all arguments of a signature by name."""
    signature = takes(first, text)

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @torch.no_grad()
        def call(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            return function(*bound.arguments.values())

        call.__wrapped__.__signature__ = signature  # type: ignore[attr-defined]
        return call

    return decorate


def sde_step_with_logprob(
    self: Any,
    model_output: Tensor,
    timestep: Tensor,
    sample: Tensor,
    noise_level: float = 0.7,
    prev_sample: Tensor | None = None,
    generator: torch.Generator | None = None,
    sde_type: str = "sde",
) -> tuple[Tensor, ...]:
    """Flow-GRPO, equation 9, and Flow-CPS, with the index looked up and one draw per step."""
    index = [self.index_for_timestep(t) for t in timestep]
    shape = (-1, *[1] * (sample.ndim - 1))
    s, r = (self.sigmas[[i + k for i in index]].view(shape) for k in (0, 1))
    if sde_type == "cps":
        std = r * math.sin(noise_level * math.pi / 2)
        data, noise = sample - s * model_output, sample + (1 - s) * model_output
        mean, injected = data * (1 - r) + noise * (r**2 - std**2).sqrt(), std
    else:
        std = noise_level * (s / (1 - torch.where(s == 1, self.sigmas[1], s))).sqrt()
        drift, injected = std**2 / (2 * s), std * (s - r).sqrt()
        mean = sample * (1 - drift * (s - r)) - model_output * (1 + drift * (1 - s)) * (s - r)
    if prev_sample is None:
        prev_sample = mean + injected * torch.randn(model_output.shape, generator=generator)
    error = (prev_sample.detach() - mean) ** 2
    if sde_type == "cps":
        density = -error
    else:
        density = -error / (2 * injected**2) - injected.log() - math.log(math.sqrt(2 * math.pi))
    return prev_sample, density.flatten(1).mean(1), mean, std


def guided(pipeline: Any, latents: Tensor, t: Tensor, prompts: tuple[Tensor, ...], scale: float) -> Tensor:
    """Velocity at a state as the hosts compute it: both halves in one forward, the empty prompt first."""
    embeds, pooled, negative, negative_pooled = prompts
    both = scale > 1
    rows = torch.cat([latents, latents]) if both else latents
    velocity = pipeline.transformer(
        hidden_states=rows,
        timestep=t.expand(len(rows)).to(rows.dtype),
        encoder_hidden_states=torch.cat([negative, embeds]) if both else embeds,
        pooled_projections=torch.cat([negative_pooled, pooled]) if both else pooled,
        return_dict=False,
    )[0]
    if both:
        uncond, cond = velocity.chunk(2)
        velocity = uncond + scale * (cond - uncond)
    return velocity


def images_of(pipeline: Any, latents: Tensor, output_type: str = "pt") -> Any:
    scaled = latents / pipeline.vae.config.scaling_factor + pipeline.vae.config.shift_factor
    decoded = pipeline.vae.decode(scaled.to(pipeline.vae.dtype), return_dict=False)[0]
    return pipeline.image_processor.postprocess(decoded, output_type=output_type)


def start(pipeline: Any, o: dict[str, Any]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Initial latents and prompts; sets the grid."""
    pipeline._guidance_scale = o["guidance_scale"]
    prompts = tuple(
        o[name]
        for name in ("prompt_embeds", "pooled_prompt_embeds", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
    )
    size = pipeline.default_sample_size * pipeline.vae_scale_factor
    latents = pipeline.prepare_latents(
        len(prompts[0]),
        pipeline.transformer.config.in_channels,
        o["height"] or size,
        o["width"] or size,
        prompts[0].dtype,
        pipeline._execution_device,
        o["generator"],
        o["latents"],
    )
    pipeline.scheduler.set_timesteps(o["num_inference_steps"], device=pipeline._execution_device)
    return latents if ROUNDED else latents.float(), prompts


def loop(
    pipeline: Any,
    latents: Tensor,
    prompts: tuple[Tensor, ...],
    scale: float,
    levels: list[float],
    first: int = 0,
    **kind: str,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """States, log-probabilities and means of the steps from `first` on."""
    states, log_probs, means = [latents], [], []
    for t, level in zip(pipeline.scheduler.timesteps[first:], levels, strict=True):
        velocity = guided(pipeline, states[-1], t, prompts, scale).float()
        step = sde_step_with_logprob(
            pipeline.scheduler, velocity, t.unsqueeze(0), states[-1].float(), noise_level=level, **kind
        )
        states.append(step[0].to(latents.dtype))
        log_probs.append(step[1])
        means.append(step[2])
    return states, log_probs, means


@signed("self", PLAIN)
def pipeline_with_logprob(self: Any, *arguments: Any) -> Any:
    o = dict(zip(list(takes("self", PLAIN).parameters)[1:], arguments, strict=True))
    latents, prompts = start(self, o)
    levels = [o["noise_level"]] * o["num_inference_steps"]
    states, log_probs, means = loop(self, latents, prompts, o["guidance_scale"], levels)
    image = images_of(self, states[-1], o["output_type"])
    return (image, states, log_probs, means) if o["return_prev_sample_mean"] else (image, states, log_probs)


def window_of(o: dict[str, Any]) -> tuple[int, int]:
    if not o["sde_window_size"]:
        return 0, o["num_inference_steps"] - 1
    first = random.randint(o["sde_window_range"][0], o["sde_window_range"][1] - o["sde_window_size"])
    return first, first + o["sde_window_size"]


@signed("self", FAST)
def fast_pipeline_with_logprob(self: Any, *arguments: Any) -> Any:
    o = dict(zip(list(takes("self", FAST).parameters)[1:], arguments, strict=True))
    latents, prompts = start(self, o)
    first, end = window_of(o)
    levels = [o["noise_level"] if first <= i < end else 0 for i in range(o["num_inference_steps"])]
    states, log_probs, _ = loop(self, latents, prompts, o["guidance_scale"], levels, sde_type=o["sde_type"])
    image = images_of(self, states[-1], o["output_type"])
    return image, states[first : end + 1], log_probs[first:end], list(self.scheduler.timesteps[first:end])


@signed("pipeline", FAST)
def pipeline_mixed_sampling_with_intermediate_ode(pipeline: Any, *arguments: Any) -> Any:
    o = dict(zip(list(takes("pipeline", FAST).parameters)[1:], arguments, strict=True))
    latents, prompts = start(pipeline, o)
    first, end = window_of(o)
    levels = [o["noise_level"] if first <= i < end else 0 for i in range(o["num_inference_steps"])]
    scale, kind = o["guidance_scale"], {"sde_type": o["sde_type"]}
    states, log_probs, _ = loop(pipeline, latents, prompts, scale, levels, **kind)
    later = []
    for i in range(first, end - 1):
        rest = [0.0] * (o["num_inference_steps"] - i - 1)
        completed, _, _ = loop(pipeline, states[i + 1], prompts, scale, rest, i + 1, **kind)
        images = images_of(pipeline, completed[-1], o["output_type"])
        later.append({"sde_steps_count": i + 1 - first, "images": images, "specific_sde_start": i})
    image = images_of(pipeline, states[-1], o["output_type"])
    later.append({"sde_steps_count": end - first, "images": image, "specific_sde_start": end - 1})
    main = {
        "images": image,
        "latents": states[first:end],
        "next_latents": states[first + 1 : end + 1],
        "log_probs": log_probs[first:end],
        "timesteps": list(pipeline.scheduler.timesteps[first:end]),
    }
    return main, later


@signed("pipeline", ODE)
def pipeline_ode_sampling(pipeline: Any, *arguments: Any) -> Any:
    o = dict(zip(ODE.split(), arguments, strict=True))
    return fast_pipeline_with_logprob(pipeline, **o, noise_level=0, sde_window_size=0)[0]


def load(name: str, **bindings: Any) -> ModuleType:
    """This file as another module, with some of its names bound anew."""
    spec = importlib.util.spec_from_file_location(name, __file__)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    vars(module).update(bindings)
    sys.modules[name] = module
    return module
