"""MixGRPO's `run_sample_step`: a trajectory that is noisy inside a window and deterministic outside it.

    run_sample_step(args, z, progress_bar, sigma_schedule, transformer, encoder_hidden_states, pooled_prompt_embeds,
                    text_ids, image_ids, grpo_sample, determistic)
        -> last state, latents to decode, states [B, S+1, ...], log_probs [B, S]

    args            flow_grpo_sampling, eta, drop_last_sample, dpm_algorithm_type ("null" turns the solver off); with a
                    solver, dpm_solver_order, dpm_solver_type and dpm_apply_strategy: "all" steps, or those after the
                    window, "post", which takes sample_strategy "progressive", shift and dpm_post_compress_ratio; V2's
                    sde_type and noise_level if there are any
    z               initial state, [B, N, D]
    sigma_schedule  grid, [S+1]
    transformer     a FLUX transformer; it is called with the host's arguments, under bfloat16 autocast on a GPU
    determistic     one flag per step

The model sees int(sigma * 1000) / 1000 as its time, as in the host, whose training step does likewise. The grid is read
once; no step waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat.host_values import host_tensor
from densegrpo_fast.compat.hosts import signature_of
from densegrpo_fast.compat.mix_grpo.dpm import DPMState
from densegrpo_fast.compat.mix_grpo.step import StepFunction, check_version
from densegrpo_fast.compat.steps import as_host
from densegrpo_fast.flow.schedule import shift_sigmas

GUIDANCE = 3.5
"""Guidance that the host embeds into FLUX."""

Trajectory = tuple[Tensor, Tensor, Tensor, Tensor]


def sampling_function(
    version: str,
    flow_grpo_step: StepFunction,
    dance_grpo_step: StepFunction,
    dpm_step: StepFunction,
    *,
    independent_noise: bool = False,
    reach_zero: bool = False,
) -> Callable[..., Trajectory]:
    """Make a `run_sample_step`.

    Args:
        version: "V1" or "V2", which passes sde_type and noise_level on.
        flow_grpo_step, dance_grpo_step, dpm_step: the steps.
        independent_noise: strategy "all" draws from torch's global generator, not from a fresh one at every step.
        reach_zero: a window near the end does not leave the trajectory above sigma 0.

    Raises:
        ValueError: an unknown version.
    """
    check_version(version)

    def run_sample_step(
        args: Any,
        z: Tensor,
        progress_bar: Iterable[int],
        sigma_schedule: Tensor,
        transformer: Any,
        encoder_hidden_states: Tensor,
        pooled_prompt_embeds: Tensor,
        text_ids: Tensor,
        image_ids: Tensor,
        grpo_sample: bool,
        determistic: Sequence[bool],
    ) -> Trajectory:
        if not grpo_sample:
            raise ValueError("run_sample_step: grpo_sample must be true, as the host's own function needs it to be")
        solver = args.dpm_algorithm_type != "null"
        if solver and "dpmsolver" not in args.dpm_algorithm_type:
            raise ValueError(f"dpm_algorithm_type must be null or a dpmsolver, got {args.dpm_algorithm_type!r}")
        if solver and args.dpm_apply_strategy not in ("all", "post"):
            raise ValueError(f"dpm_apply_strategy must be all or post, got {args.dpm_apply_strategy!r}")
        grid, last_noisy = sigma_schedule, len(sigma_schedule)
        if solver and args.dpm_apply_strategy == "post":
            grid, last_noisy = _compressed(args, grid, determistic, reach_zero)
            progress_bar = _progress(len(grid) - 1)
        extra: dict[str, Any] = {}
        if version == "V2":
            extra = {"sde_type": getattr(args, "sde_type", "sde"), "noise_level": getattr(args, "noise_level", None)}
        state = DPMState(order=args.dpm_solver_order) if solver else None
        times = [int(value) for value in (host_tensor(grid) * 1000).tolist()]
        rows = len(encoder_hidden_states)
        guidance = torch.full((1,), GUIDANCE, device=z.device, dtype=torch.bfloat16)
        txt_ids = text_ids.repeat(encoder_hidden_states.shape[1], 1)
        # Without a GPU the host's autocast is off, and warns at every step.
        autocast = torch.autocast("cuda", torch.bfloat16) if torch.cuda.is_available() else nullcontext()
        transformer.eval()

        def step(latents: Tensor, velocity: Tensor, index: int) -> tuple[Tensor, ...]:
            if solver and (args.dpm_apply_strategy == "all" or index > last_noisy):
                options: dict[str, Any] = {"sde_solver": False}
                if args.dpm_apply_strategy == "all":
                    fresh = None if independent_noise else torch.Generator(device=z.device)
                    options = {"sde_solver": not determistic[index], "generator": fresh}
                return dpm_step(args, velocity, latents, index, grid[:-1], sigmas=grid, dpm_state=state, **options)
            if args.flow_grpo_sampling:
                done = flow_grpo_step(
                    velocity, latents, args.eta, grid, index, None, determistic=determistic[index], **extra
                )
                if state is not None:
                    state.update(done[1])
                    state.update_lower_order()
                return done
            noisy = not determistic[index]
            return dance_grpo_step(velocity, latents, args.eta, grid, index, None, True, noisy, **extra)

        states, log_probs = [z], []
        for index in progress_bar:
            timestep = torch.full((rows,), times[index], device=z.device, dtype=torch.long) / 1000
            with autocast:
                velocity = transformer(
                    hidden_states=z,
                    encoder_hidden_states=encoder_hidden_states,
                    timestep=timestep,
                    guidance=guidance,
                    txt_ids=txt_ids,
                    pooled_projections=pooled_prompt_embeds,
                    img_ids=image_ids,
                    joint_attention_kwargs=None,
                    return_dict=False,
                )[0]
            z, data, log_prob, *_ = step(z.float(), velocity, index)
            states.append(z)
            log_probs.append(log_prob)
        latents = data if args.drop_last_sample else z.to(data.dtype)
        return z, latents, torch.stack(states, dim=1), torch.stack(log_probs, dim=1)

    return as_host(run_sample_step, "run_sample_step", signature_of("run_sample_step"))


def _compressed(args: Any, grid: Tensor, determistic: Sequence[bool], reach_zero: bool) -> tuple[Tensor, int]:
    """Grid with fewer steps after the last noisy one, and that one's place."""
    if args.sample_strategy != "progressive":
        raise ValueError(f'dpm_apply_strategy post needs sample_strategy progressive, got "{args.sample_strategy}"')
    noisy = [index for index, flag in enumerate(determistic) if not flag]
    if not noisy:
        raise ValueError("dpm_apply_strategy post needs a noisy step to come after, but all are deterministic")
    last = noisy[-1]
    count = int(max((len(grid) - 1 - last) * args.dpm_post_compress_ratio, 1))
    if reach_zero:
        count = max(count, 2)
    start = torch.linspace(1, 0, len(grid))[last + 1].item()
    rest = shift_sigmas(torch.linspace(start, 0, count).to(grid.device), args.shift)
    return torch.cat([grid[: last + 1], rest]), last


def _progress(num_steps: int) -> Iterable[int]:
    """The host's progress bar, on the first rank of a distributed run."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() != 0:
        return range(num_steps)
    from tqdm import tqdm

    return tqdm(range(num_steps), desc="Sampling steps")
