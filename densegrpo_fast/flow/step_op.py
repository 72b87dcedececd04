"""`ops.sde_step`: noise, affine step and log-probability as one `torch.library` op, plain or guided.

Where no fused implementation serves guidance or the further outputs, PyTorch combines, casts and averages around the
plain step, which gives the same numbers.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op

from densegrpo_fast.flow import backends, checks, noise, reference
from densegrpo_fast.flow.noise import Stream

INPUT_DTYPES = (torch.float16, torch.bfloat16)
"""In which a step can hand its state to a model."""


class StepOutputs(NamedTuple):
    """What a step leaves.

    Attributes:
        next_latents: [B, ...] in the dtype of the latents.
        log_prob: [B] float32 (float64 if an input is).
        model_input: `next_latents` in the model's dtype; None unless asked for.
        mean: [B, ...] float32 (float64 if an input is), `next_latents` without their noise; None unless asked for.
    """

    next_latents: Tensor
    log_prob: Tensor
    model_input: Tensor | None
    mean: Tensor | None


def sde_step(
    latents: Tensor,
    velocity: Tensor,
    table: Tensor,
    step_index: int | Tensor,
    *,
    seed: int | Tensor,
    sample_index: Tensor,
    iteration: int | Tensor,
    stream: int = Stream.STEP,
    uncond: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    implementation: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One step of the sampler, with its own noise, and the log-probability of the state it reached.

    Not differentiable: it belongs to the rollout. `sde_log_prob` scores the stored transition in training.

    Args:
        latents: states, [B, ...] float32/16, bfloat16 or float64.
        velocity: model output there (noise minus data), same shape, any of these dtypes; with `uncond`, that given the
            prompt.
        table: step coefficients, [T, 6] float32, from `dynamics.coefficients`.
        step_index: step of every row, in [0, T): one int, or [B] int64. It also names the noise to draw.
        seed: run seed in [0, 2^63), or int64 of one element.
        sample_index: global index of every row, [B] int64 in [0, 2^32).
        iteration: iteration in [0, 2^32), or int64 of one element.
        stream: purpose of the noise, a `Stream` or `branch_stream(k)`.
        uncond: model output without the prompt, same shape; the step is then taken with classifier-free guidance
            (arXiv 2207.12598), uncond + guidance_scale * (velocity - uncond), which is never written.
        guidance_scale: one number, or [B] float32; 1 without `uncond`.
        implementation: "auto" or a name of `backends.IMPLEMENTATIONS`.

    Returns:
        next_latents, [B, ...] in the dtype of `latents`, contiguous; log_prob, [B] float32 (float64 if an
        input is), natural log, mean over the elements of a sample, of `next_latents` as stored; 0 for
        noise-free rows.

    Raises:
        TypeError: a dtype that is not accepted.
        ValueError: a shape, device, number or implementation name that is not; a coefficient that is not finite or a
            step outside the table, seen on the CPU alone (elsewhere its rows become NaN).
        RuntimeError: the named implementation cannot serve the call.
    """
    counters = (seed, sample_index, iteration, stream)
    guidance = (uncond, guidance_scale)
    return _step("sde_step", latents, velocity, table, step_index, counters, guidance, None, False, implementation)[:2]


def sde_step_outputs(
    latents: Tensor,
    velocity: Tensor,
    table: Tensor,
    step_index: int | Tensor,
    *,
    seed: int | Tensor,
    sample_index: Tensor,
    iteration: int | Tensor,
    stream: int = Stream.STEP,
    uncond: Tensor | None = None,
    guidance_scale: float | Tensor = 1.0,
    input_dtype: torch.dtype | None = None,
    with_mean: bool = False,
    implementation: str = "auto",
) -> StepOutputs:
    """`sde_step` that also writes, in the same pass, what a model in half precision reads next, or the mean.

    Args:
        latents, velocity, ..., guidance_scale, implementation: as `sde_step`.
        input_dtype: float16 or bfloat16 for a copy of the next state in it; None for no copy.
        with_mean: whether to write the mean of the next state.

    Returns:
        as `StepOutputs` says; its first two are those of `sde_step`.

    Raises:
        TypeError, ValueError, RuntimeError: as `sde_step`.
    """
    op = "sde_step_outputs"
    if input_dtype is not None and input_dtype not in INPUT_DTYPES:
        raise ValueError(f"{op}: input_dtype must be torch.float16, torch.bfloat16 or None, got {input_dtype}")
    counters = (seed, sample_index, iteration, stream)
    guidance = (uncond, guidance_scale)
    options = (input_dtype, bool(with_mean), implementation)
    found = _step(op, latents, velocity, table, step_index, counters, guidance, *options)
    next_latents, log_prob, model_input, mean = found
    return StepOutputs(
        next_latents, log_prob, None if input_dtype is None else model_input, mean if with_mean else None
    )


def _step(op, latents, velocity, table, step_index, counters, guidance, input_dtype, with_mean, implementation):
    seed, sample_index, iteration, stream = counters
    uncond, scale = guidance
    checks.check_latents(op, latents, velocity=velocity, **({} if uncond is None else {"uncond": uncond}))
    checks.check_table(op, table, latents)
    noise.check_stream(stream)
    batch, device = len(latents), latents.device
    scale = checks.guidance_rows(op, scale, uncond, latents)
    step_index = checks.step_rows(op, step_index, latents)
    sample_index = noise.integer_tensor(f"{op}: sample_index", sample_index, 32, (batch,), device)
    seed = noise.integer_tensor(f"{op}: seed", seed, 63, (1,), device)
    iteration = noise.integer_tensor(f"{op}: iteration", iteration, 32, (1,), device)
    backends.check_name(implementation)
    words = (step_index, seed, sample_index, iteration, int(stream))
    return _sde_step(latents, velocity, uncond, scale, table, *words, input_dtype, with_mean, implementation)


@custom_op(
    "densegrpo_fast::sde_step",
    mutates_args=(),
    schema="(Tensor latents, Tensor velocity, Tensor? uncond, Tensor? guidance_scale, Tensor table, "
    "Tensor step_index, Tensor seed, Tensor sample_index, Tensor iteration, int stream, ScalarType? input_dtype, "
    "bool with_mean, str implementation) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _sde_step(
    latents,
    velocity,
    uncond,
    scale,
    table,
    step_index,
    seed,
    sample_index,
    iteration,
    stream,
    input_dtype,
    with_mean,
    implementation,
):
    op = _form(uncond, input_dtype is not None or with_mean)
    chosen = backends.choose(op, implementation, *_given(latents, velocity, uncond))
    checks.check_finite(op, table)
    if chosen != "triton":  # which in its interpreter does as it does on a device
        checks.check_steps(op, step_index, table)
    words = (step_index, seed, sample_index, iteration, stream)
    if chosen in ("triton", "cpu"):
        launch = backends.compiled(chosen, "sde_step")
        return launch(latents, velocity, uncond, scale, table, *words, input_dtype, with_mean)
    if uncond is not None:
        velocity = reference.guided_velocity_ref(velocity, uncond, scale)
    next_latents, log_prob = _plain_step(op, implementation, chosen, latents, velocity, table, *words)
    model_input = latents.new_empty(0) if input_dtype is None else next_latents.to(input_dtype, copy=True)
    mean = reference.sde_mean_ref(latents, velocity, table, step_index) if with_mean else latents.new_empty(0)
    return next_latents, log_prob, model_input, mean.contiguous()


def _plain_step(
    op, implementation, chosen, latents, velocity, table, step_index, seed, sample_index, iteration, stream
):
    """Next states and log_prob of the plain step; what was not named may fit it better than it fits the whole call."""
    if implementation == "auto" and op != "sde_step":
        chosen = backends.choose("sde_step", implementation, latents, velocity)
    if chosen == "cuda":
        launch = backends.compiled(chosen, "sde_step")
        return launch(latents, velocity, table, step_index, seed, sample_index, iteration, stream)
    if chosen != "reference":
        words = (step_index, seed, sample_index, iteration, stream)
        return backends.compiled(chosen, "sde_step")(latents, velocity, None, None, table, *words)[:2]
    shape = latents.shape[1:]
    draw = noise.gaussian(
        shape, seed=seed, sample_index=sample_index, step=step_index, stream=stream, iteration=iteration
    )
    next_latents, log_prob = reference.sde_step_ref(latents, velocity, table, step_index, draw)
    return next_latents.contiguous(), log_prob


@_sde_step.register_fake
def _(
    latents,
    velocity,
    uncond,
    scale,
    table,
    step_index,
    seed,
    sample_index,
    iteration,
    stream,
    input_dtype,
    with_mean,
    implementation,
):
    def like(dtype, wanted=True):
        if not wanted:
            return latents.new_empty(0)
        return torch.empty_like(latents, dtype=dtype, memory_format=torch.contiguous_format)

    dtype = reference.compute_dtype(*_given(latents, velocity, uncond))
    log_prob = latents.new_empty(latents.shape[0], dtype=dtype)
    return like(latents.dtype), log_prob, like(input_dtype, input_dtype is not None), like(dtype, with_mean)


def _form(uncond: Tensor | None, more: bool) -> str:
    """Name in `backends.OPS` of what a call asks for."""
    return "guided_sde_step" if uncond is not None else "sde_step_outputs" if more else "sde_step"


def _given(*tensors: Tensor | None) -> list[Tensor]:
    return [tensor for tensor in tensors if tensor is not None]
