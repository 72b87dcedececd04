"""TurningPoint-GRPO (TP-GRPO, arXiv 2602.06422), SD3: its samplers with the lookahead of this package.

    import densegrpo_fast.compat.turning_point as fast
    fast.install()          # before or after the script's own imports

or `python -m densegrpo_fast.launch --host turning_point scripts/my_train_sd3_fast_with_op3.py ...`. The codebase
carries Flow-GRPO's `flow_grpo` package, whose step and pipelines are replaced, too.

`pipeline_mixed_sampling_with_intermediate_ode` samples with noise in a window [s, e) of the steps, then completes every
state s+1..e-1 without noise. The host completes them one after another and computes the first velocity of each anew;
here it is the rollout's own, and all completions that stand at one sigma are evaluated together. Arguments and results:

    pipeline, then the arguments of Flow-GRPO's fast pipeline
    -> main: dict of images, latents [w], next_latents [w], log_probs [w], timesteps [w] (lists of [B, ...] per step)
       completions: list of w dicts of sde_steps_count (1..w), images, specific_sde_start (the step that was taken); the
       last one is the main image itself

`pipeline_ode_sampling(pipeline, prompt_embeds, ..., sde_type) -> images` samples without noise. The paper compares the
trajectory with the noise-free one *from the same initial noise*; the host's call draws another. With the fix
"shared_noise" it completes the initial noise of the mixed call before it, whose first velocity is known.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat import flow_grpo
from densegrpo_fast.compat.flow_grpo.pipelines import (
    has_form,
    left,
    pipeline_with_logprob_fast,
    sample,
    states_of,
    step_of,
    window_levels,
    window_of,
)
from densegrpo_fast.compat.flow_grpo.schedule import schedule_of
from densegrpo_fast.compat.flow_grpo.sd3 import Rollout, Run, Step, decode, prepare
from densegrpo_fast.compat.flow_grpo.step import step_function
from densegrpo_fast.compat.hosts import HOSTS, MIXED, ODE, signature_of
from densegrpo_fast.compat.patch import Build, CompatError, Patch, install_host, uninstall_host
from densegrpo_fast.compat.pipeline_model import PipelineModel, conditioning_of, plan_from, trajectory_from
from densegrpo_fast.compat.rng import host_noise, make_noise
from densegrpo_fast.compat.steps import as_host
from densegrpo_fast.sampling.lookahead import Lookahead

__all__ = [
    "FIXES",
    "CompatError",
    "install",
    "make_samplers",
    "pipeline_mixed_sampling_with_intermediate_ode",
    "pipeline_ode_sampling",
    "uninstall",
]

_SAME = list(signature_of(ODE).parameters)[1:7]
"""What a noise-free call and the mixed call before it must agree in to share the initial noise."""

_step = step_function("V3")
Sampler = Callable[..., Any]


def make_samplers(
    *,
    step: Callable[[], Step] | None = None,
    pipeline: Callable[[], Sampler] | None = None,
    float32: bool = False,
    rng: str = "host",
    shared_noise: bool = False,
    chunk: int | None = None,
    signature: inspect.Signature | None = None,
) -> tuple[Sampler, Sampler]:
    """Make the two samplers.

    Args:
        step: gives the step function; default: ours of generation V3.
        pipeline: gives Flow-GRPO's fast pipeline for noise-free sampling; default: ours.
        float32: keep the states in float32, where the host rounds each to the prompts' dtype after scoring it.
        rng: "host" draws, for every noise-free step, the noise that the host draws and throws away.
        shared_noise: noise-free sampling starts from the noise of the mixed call before it.
        chunk: rows per forward of the completions; None is the batch of the call.
        signature: of the mixed sampler.

    Raises:
        ValueError: `rng` is unknown, or `chunk` below 1.
    """
    make_noise(rng, None)
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 row, got {chunk}")
    step = step or (lambda: _step)
    pipeline = pipeline or (lambda: pipeline_with_logprob_fast)
    last: dict[str, Any] = {}

    @torch.no_grad()
    def mixed(host: Any, **options: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        run = prepare(host, options, float32=float32)
        num_steps = len(run.timesteps)
        window = first, end = window_of(options, num_steps)
        levels = window_levels(window, options["noise_level"], num_steps)
        done = sample(run, step(), levels, options.get("sde_type"), progress=False)
        if rng == "host":
            for state in range(first + 1, min(end, num_steps)):
                for _ in range(num_steps - state):
                    host_noise(done.velocities[0], None)
        clean = _completions(run, done, levels, first + (not shared_noise), chunk)
        form = options["output_type"]
        image = decode(host, done.latents[-1], form)
        if shared_noise:
            last.update(call={name: options[name] for name in _SAME}, images=decode(host, clean.pop(first), form))
        steps = list(range(num_steps))[first:end]
        later = [
            {
                "sde_steps_count": number,
                "images": image if index == steps[-1] else decode(host, clean[index + 1], form),
                "specific_sde_start": index,
            }
            for number, index in enumerate(steps, 1)
        ]
        host.maybe_free_model_hooks()
        main = {
            "images": image,
            "latents": [done.latents[index] for index in steps],
            "next_latents": [done.latents[index + 1] for index in steps],
            "log_probs": [done.log_probs[index] for index in steps],
            "timesteps": [run.timesteps[index] for index in steps],
        }
        return main, later

    @torch.no_grad()
    def ode(host: Any, **options: Any) -> Any:
        if not shared_noise:
            return pipeline()(host, **options, noise_level=0, sde_window_size=0)[0]
        call = last.pop("call", None)
        if call is None or not all(_same(call[name], options[name]) for name in _SAME):
            raise ValueError(
                f"shared_noise: {ODE} completes the initial noise of the {MIXED} call before it, once, and needs the "
                f"same {', '.join(_SAME)}; call it right after, or leave shared_noise off"
            )
        return last.pop("images")

    return as_host(mixed, MIXED, signature or signature_of(MIXED)), as_host(ode, ODE, signature_of(ODE))


def _completions(run: Run, done: Rollout, levels: list[float], start: int, chunk: int | None) -> dict[int, Tensor]:
    """Clean latents of the states from grid index `start` on, by index."""
    num_steps, batch = len(run.timesteps), len(run.latents)
    noisy = [level != 0 for level in levels[start:]]
    if not any(noisy):
        return dict.fromkeys(range(start, num_steps + 1), done.latents[-1])
    trajectory = trajectory_from(
        start,
        schedule_of(run.pipeline.scheduler).sigmas,
        noisy,
        torch.stack(done.latents[start:]),
        torch.stack(done.velocities[start:]),
        None,
        conditioning_of(run.prompts),
        run.guidance_scale,
    )
    model = PipelineModel(run.pipeline, dtype=run.latents.dtype)
    lookahead = Lookahead(model, plan_from(start, num_steps, "exact"), chunk=batch if chunk is None else chunk)
    clean = lookahead.complete(trajectory)
    return {start + place: latents for place, latents in enumerate(clean)}


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one is other or (one.shape == other.shape and torch.equal(one, other))
    return one is other or bool(one == other)


pipeline_mixed_sampling_with_intermediate_ode, pipeline_ode_sampling = make_samplers()


FIXES = HOSTS["turning_point"].fixes
"""Flaws of the host that `install(fixes=...)` takes away, one by one; all are kept unless named."""


def install(
    *,
    version: str | None = None,
    rng: str = "host",
    seed: int | None = None,
    tracker: bool = False,
    chunk: int | None = None,
    fixes: Collection[str] = (),
    say: Callable[[str], None] | None = None,
) -> Patch:
    """Replace the functions of TurningPoint-GRPO by ours, those of its `flow_grpo` package included.

    Args:
        version, rng, seed, tracker, say: as in `compat.flow_grpo.install`.
        chunk: as in `make_samplers`.
        fixes: names of `FIXES`.

    Returns:
        the patch, as `compat.flow_grpo.install`.

    Raises:
        CompatError: the host is not installed, or its step is not one that is known here.
        ValueError: an option is wrong.
    """
    options = {"version": version, "tracker": tracker, "chunk": chunk}
    return install_host("turning_point", _replacements, say, rng=rng, seed=seed, fixes=fixes, **options)


def uninstall() -> None:
    """Put the host's own functions back; nothing happens if nothing is replaced."""
    uninstall_host("turning_point")


def _replacements(*, rng: str, chunk: int | None, fixes: frozenset[str], **others: Any) -> Mapping[str, Build]:
    shared_noise, float32 = "shared_noise" in fixes, "float32_states" in fixes
    make = partial(make_samplers, rng=rng, shared_noise=shared_noise, chunk=chunk)
    make()
    samplers: list[Sampler] = []

    def replace_mixed(host: Sampler) -> tuple[Sampler, str]:
        signature, step, globals_ = inspect.signature(host), step_of(host), inspect.unwrap(host).__globals__
        if not has_form(signature, "fast"):
            return host, left("its arguments are not known", host)
        # the host also rounds inside the completions, to bfloat16 in this comparison
        kept, reason = states_of(
            host, lambda keep: make_samplers(step=step, float32=keep, signature=signature)[0], rounded_tolerance=0.05
        )
        if kept is None:
            return host, left(reason, host)
        samplers[:] = make(
            step=step,
            pipeline=lambda: globals_["pipeline_with_logprob"],
            float32=kept or float32,
            signature=signature,
        )
        return samplers[0], f"lookahead, rng {rng}{', shared noise' * shared_noise}"

    def replace_ode(host: Sampler) -> tuple[Sampler, str]:
        if not samplers or list(inspect.signature(host).parameters)[1:] != list(signature_of(ODE).parameters)[1:]:
            return host, f"left as it is: {'its arguments are not known' if samplers else 'the mixed sampler is, too'}"
        return samplers[1], "shared noise" if shared_noise else "noise of its own, as in the host"

    return {**flow_grpo.replacements(rng=rng, fixes=fixes, **others), MIXED: replace_mixed, ODE: replace_ode}
