"""Flow-GRPO's sampling loop on a diffusers SD3 pipeline: what all its pipelines for SD3 have in common.

The pipeline is duck-typed: whatever has the parts of `StableDiffusion3Pipeline` that are used here. What a host's
script relies on without saying so is kept:

    scheduler     holds the grid of the call afterwards; training looks its sigmas up there
    guidance      one forward of 2B rows, the empty prompt first, combined in the network's own dtype; on above scale 1
    time          the scheduler's timestep in float32, one per row
    states        float32, or (TurningPoint-GRPO) rounded to the prompts' dtype after the step was scored
    pipeline      `check_inputs`, `progress_bar`, `interrupt` and `maybe_free_model_hooks` are honoured
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

Step = Callable[..., tuple[Tensor, ...]]
"""A `sde_step_with_logprob` of generation V2 or later."""

_PROMPTS = ("prompt", "prompt_2", "prompt_3")
_NEGATIVES = ("negative_prompt", "negative_prompt_2", "negative_prompt_3")
_EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


def forward(pipeline: Any, latents: Tensor, timestep: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
    """Output of the transformer for rows [n, ...] at timesteps [n], which it sees in the dtype of the states."""
    (output, *_) = pipeline.transformer(
        hidden_states=latents,
        timestep=timestep if latents.dtype == torch.float32 else timestep.to(latents.dtype),
        encoder_hidden_states=embeds,
        pooled_projections=pooled,
        # a pipeline has them from its first call on
        joint_attention_kwargs=getattr(pipeline, "joint_attention_kwargs", None),
        return_dict=False,
    )
    return output


@dataclass(frozen=True)
class Prompts:
    """Encoded prompts of B rows.

    Attributes:
        embeds: [B, L, D].
        pooled: [B, D'].
        negative_embeds, negative_pooled: of the empty (or negative) prompts, the same shapes; None without guidance.
    """

    embeds: Tensor
    pooled: Tensor
    negative_embeds: Tensor | None = None
    negative_pooled: Tensor | None = None


@dataclass(frozen=True)
class Run:
    """A pipeline that is ready to sample.

    Attributes:
        pipeline: the pipeline, its scheduler set to the grid.
        latents: initial noise [B, C, H, W]; its dtype is that of all states.
        timesteps: the scheduler's own, [N].
        prompts: of the B rows.
        guidance_scale: 1 without guidance.
    """

    pipeline: Any
    latents: Tensor
    timesteps: Tensor
    prompts: Prompts
    guidance_scale: float

    @cached_property
    def _inputs(self) -> tuple[Tensor, Tensor]:
        prompts = self.prompts
        if prompts.negative_embeds is None or prompts.negative_pooled is None:
            return prompts.embeds, prompts.pooled
        embeds = torch.cat([prompts.negative_embeds, prompts.embeds])
        return embeds, torch.cat([prompts.negative_pooled, prompts.pooled])

    def velocity(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor | None]:
        """Guided velocity [B, ...] at a state, and the conditional one if there is guidance; the network's dtype."""
        guided = self.guidance_scale != 1.0
        rows = torch.cat([latents, latents]) if guided else latents
        output = forward(self.pipeline, rows, timestep.expand(len(rows)), *self._inputs)
        if not guided:
            return output, None
        uncond, cond = output.chunk(2)
        return uncond + self.guidance_scale * (cond - uncond), cond


@dataclass(frozen=True)
class Rollout:
    """What a rollout went through; N steps.

    Attributes:
        latents: N+1 states [B, ...].
        log_probs: N tensors [B] float32.
        means: N means of the next state [B, ...] float32.
        velocities: N guided velocities [B, ...] float32.
        guidance_terms: N tensors, each velocity minus its conditional one, if they were to be kept.
    """

    latents: list[Tensor]
    log_probs: list[Tensor] = field(default_factory=list)
    means: list[Tensor] = field(default_factory=list)
    velocities: list[Tensor] = field(default_factory=list)
    guidance_terms: list[Tensor] = field(default_factory=list)


def prepare(pipeline: Any, options: Mapping[str, Any], *, float32: bool = True) -> Run:
    """Check a call's arguments, encode its prompts, draw its initial noise and set its grid.

    Args:
        pipeline: the SD3 pipeline.
        options: the arguments of the call by name, at least those that all SD3 pipelines in `hosts.SIGNATURES` take.
        float32: keep the states in float32; otherwise in the prompts' dtype.
    """
    size = pipeline.default_sample_size * pipeline.vae_scale_factor
    height, width = options["height"] or size, options["width"] or size
    pipeline.check_inputs(
        *(options[name] for name in _PROMPTS),
        height,
        width,
        **{name: options[name] for name in (*_NEGATIVES, *_EMBEDS)},
        callback_on_step_end_tensor_inputs=options["callback_on_step_end_tensor_inputs"],
        max_sequence_length=options["max_sequence_length"],
    )
    # diffusers' properties (guidance_scale, clip_skip, interrupt, ...) read these.
    pipeline._guidance_scale = options["guidance_scale"]
    pipeline._skip_layer_guidance_scale = options["skip_layer_guidance_scale"]
    pipeline._clip_skip = options["clip_skip"]
    pipeline._joint_attention_kwargs = options["joint_attention_kwargs"]
    pipeline._interrupt = False
    guided = pipeline.do_classifier_free_guidance
    device = pipeline._execution_device
    embeds, negative_embeds, pooled, negative_pooled = pipeline.encode_prompt(
        **{name: options[name] for name in (*_PROMPTS, *_NEGATIVES, *_EMBEDS)},
        do_classifier_free_guidance=guided,
        device=device,
        clip_skip=options["clip_skip"],
        num_images_per_prompt=options["num_images_per_prompt"],
        max_sequence_length=options["max_sequence_length"],
        lora_scale=(options["joint_attention_kwargs"] or {}).get("scale"),
    )
    prompts = options["prompt"] if options["prompt"] is not None else options["prompt_embeds"]
    latents = pipeline.prepare_latents(
        (1 if isinstance(prompts, str) else len(prompts)) * options["num_images_per_prompt"],
        pipeline.transformer.config.in_channels,
        height,
        width,
        embeds.dtype,
        device,
        options["generator"],
        options["latents"],
    )
    if options["sigmas"] is None:
        pipeline.scheduler.set_timesteps(options["num_inference_steps"], device=device)
    else:
        pipeline.scheduler.set_timesteps(sigmas=options["sigmas"], device=device)
    timesteps = pipeline.scheduler.timesteps
    pipeline._num_timesteps = len(timesteps)
    encoded = Prompts(embeds, pooled, *((negative_embeds, negative_pooled) if guided else ()))
    scale = float(options["guidance_scale"]) if guided else 1.0
    return Run(pipeline, latents.float() if float32 else latents, timesteps, encoded, scale)


def roll_out(
    run: Run,
    step: Step,
    levels: Sequence[float],
    *,
    sde_type: str | None = None,
    keep_guidance: bool = False,
    progress: bool = True,
) -> Rollout:
    """Sample from the run's initial noise to the image.

    Args:
        run: the prepared pipeline.
        step: the host's step function, or ours.
        levels: noise level of each of the N steps.
        sde_type: passed on to `step`; None leaves it out.
        keep_guidance: also keep the guidance terms.
        progress: show the pipeline's progress bar, and stop stepping once `pipeline.interrupt` is set.
    """
    pipeline, kind = run.pipeline, {} if sde_type is None else {"sde_type": sde_type}
    done = Rollout([run.latents])
    with pipeline.progress_bar(total=len(run.timesteps)) if progress else nullcontext() as bar:
        for level, timestep in zip(levels, run.timesteps, strict=True):
            if progress and pipeline.interrupt:
                break
            latents = done.latents[-1]
            velocity, cond = run.velocity(latents, timestep)
            velocity = velocity.float()
            # a view of the grid: our step knows which one without asking the device
            reached, log_prob, mean, *_ = step(
                pipeline.scheduler, velocity, timestep.unsqueeze(0), latents.float(), noise_level=level, **kind
            )
            done.latents.append(reached.to(latents.dtype))
            done.log_probs.append(log_prob)
            done.means.append(mean)
            done.velocities.append(velocity)
            if keep_guidance:
                done.guidance_terms.append(torch.zeros_like(velocity) if cond is None else velocity - cond.float())
            if bar is not None:
                bar.update()
    return done


def decode(pipeline: Any, latents: Tensor, output_type: str = "pt") -> Any:
    """Images of clean latents [B, ...] by the pipeline's autoencoder, in the form that `output_type` asks for."""
    vae = pipeline.vae
    scaled = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    decoded = vae.decode(scaled.to(dtype=vae.dtype), return_dict=False)[0]
    return pipeline.image_processor.postprocess(decoded, output_type=output_type)
