"""Binding of the compiled CPU library (csrc/*.cpp) through ctypes: no Python or torch ABI is involved.

The library is optional. It is looked for beside the package when first asked for, and its absence is a fact
to report (`why_not`), not an error. All ops take and give float32 CPU tensors, work on
`torch.get_num_threads()` threads, and compute the same bits on any number of them and in every variant.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
from torch import Tensor

from densegrpo_fast.flow import shared_library

ABI_VERSION = 4

_number = ctypes.c_double
_pointer, _integer, _size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_SHAPE_AND_THREADS = (_size, _size, _integer)
_SIGNATURES: dict[str, tuple[type | None, tuple[type, ...]]] = {
    "densegrpo_philox4x32": (None, (_pointer,) * 3),
    "densegrpo_box_muller": (None, (_pointer, _pointer, _size, _pointer, _pointer)),
    "densegrpo_variant_name": (ctypes.c_char_p, (_integer,)),
    "densegrpo_variant": (_integer, ()),
    "densegrpo_use_variant": (_integer, (_integer,)),
    "densegrpo_sde_step_f32": (_integer, (*(_pointer,) * 9, *(_integer,) * 2, *_SHAPE_AND_THREADS, *(_pointer,) * 4)),
    "densegrpo_sde_log_prob_f32": (_integer, (*(_pointer,) * 8, _integer, *_SHAPE_AND_THREADS, *(_pointer,) * 2)),
    "densegrpo_sde_log_prob_backward_f32": (
        _integer,
        (*(_pointer,) * 10, _integer, *_SHAPE_AND_THREADS, *(_pointer,) * 2),
    ),
    "densegrpo_euler_jump_f32": (_integer, (*(_pointer,) * 3, *_SHAPE_AND_THREADS, _pointer)),
    "densegrpo_grpo_loss_f32": (_integer, (*(_pointer,) * 7, *(_number,) * 2, *_SHAPE_AND_THREADS, *(_pointer,) * 3)),
}

_HALF = {None: 0, torch.float16: 1, torch.bfloat16: 2}
"""Numbers that the library has for the types of `model_input`."""


def available() -> bool:
    """Whether the compiled library was found, loaded and has the expected interface."""
    return _load()[0] is not None


def why_not() -> str:
    """Reason why the library is not available; empty when it is."""
    return _load()[1]


def sde_step(
    latents: Tensor,
    velocity: Tensor,
    uncond: Tensor | None,
    guidance_scale: Tensor | None,
    table: Tensor,
    step_index: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    iteration: Tensor,
    stream: int,
    input_dtype: torch.dtype | None = None,
    with_mean: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`ops.sde_step` and `ops.sde_step_outputs` on the CPU.

    Args:
        latents, velocity: [B, ...] float32.
        uncond: [B, ...] float32, and guidance_scale: [B] float32; None without guidance.
        table: [T, 6] float32.
        step_index, sample_index: [B] int64.
        seed, iteration: int64, one element.
        stream: 16-bit stream number.
        input_dtype: float16 or bfloat16; None for no model input.
        with_mean: whether to write the mean.

    Returns:
        next_latents, [B, ...] float32; log_prob, [B] float32; model_input, [B, ...], and mean, [B, ...] float32, empty
        unless asked for.

    Raises:
        IndexError: a step index outside the table.
        RuntimeError: the library is missing, or out of memory.
    """
    next_latents = torch.empty_like(latents, memory_format=torch.contiguous_format)
    log_prob = torch.empty(len(latents), dtype=torch.float32)
    model_input = torch.empty_like(next_latents if input_dtype else log_prob[:0], dtype=input_dtype)
    mean = torch.empty_like(next_latents if with_mean else log_prob[:0])
    rows = table.index_select(0, step_index)
    inputs = (latents, velocity, uncond, guidance_scale, rows, step_index, sample_index, seed, iteration)
    outputs = (next_latents, log_prob, model_input if input_dtype else None, mean if with_mean else None)
    _run("sde_step", inputs, outputs, latents, stream, _HALF[input_dtype])
    return next_latents, log_prob, model_input, mean


def sde_log_prob(
    latents: Tensor,
    velocity: Tensor,
    uncond: Tensor | None,
    guidance_scale: Tensor | None,
    reference: Tensor | None,
    reference_uncond: Tensor | None,
    next_latents: Tensor,
    table: Tensor,
    step_index: Tensor,
    kl_std: int,
) -> tuple[Tensor, Tensor]:
    """`ops.sde_log_prob` and `ops.sde_log_prob_kl` on the CPU.

    Of a transition that `sde_step` stored, log_prob is the very one that it returned.

    Args:
        latents, velocity, next_latents: [B, ...] float32.
        uncond: [B, ...] float32, and guidance_scale: [B] float32; None without guidance.
        reference, reference_uncond: as velocity and uncond; None without a divergence.
        table: [T, 6] float32.
        step_index: [B] int64.
        kl_std: column of the divergence's standard deviation.

    Returns:
        log_prob, [B] float32; kl, [B] float32, empty without a reference.

    Raises:
        IndexError: a step index outside the table.
        RuntimeError: the library is missing, or out of memory.
    """
    log_prob = torch.empty(len(latents), dtype=torch.float32)
    kl = torch.empty(0 if reference is None else len(latents), dtype=torch.float32)
    rows = table.index_select(0, step_index)
    inputs = (latents, velocity, uncond, guidance_scale, reference, reference_uncond, next_latents, rows)
    _run("sde_log_prob", inputs, (log_prob, None if reference is None else kl), latents, kl_std)
    return log_prob, kl


def sde_log_prob_backward(
    grad: Tensor,
    grad_kl: Tensor | None,
    latents: Tensor,
    velocity: Tensor,
    uncond: Tensor | None,
    guidance_scale: Tensor | None,
    reference: Tensor | None,
    reference_uncond: Tensor | None,
    next_latents: Tensor,
    table: Tensor,
    step_index: Tensor,
    kl_std: int,
    with_uncond: bool,
) -> tuple[Tensor, Tensor]:
    """Gradient of `sde_log_prob` with respect to `velocity` and `uncond`.

    Args:
        grad, grad_kl: gradients arriving at log_prob and kl, [B] float32; grad_kl None without a reference.
        latents, velocity, ..., kl_std: as there.
        with_uncond: whether to write the gradient of `uncond`.

    Returns:
        gradients of velocity and of uncond, their shapes, float32; the second empty unless asked for.

    Raises:
        IndexError, RuntimeError: as there.
    """
    grad_velocity = torch.empty_like(velocity, memory_format=torch.contiguous_format)
    grad_uncond = torch.empty_like(grad_velocity if with_uncond else grad_velocity.new_empty(0))
    rows = table.index_select(0, step_index)
    upstream = (grad.float(), None if grad_kl is None else grad_kl.float())
    velocities = (velocity, uncond, guidance_scale, reference, reference_uncond)
    outputs = (grad_velocity, grad_uncond if with_uncond else None)
    _run("sde_log_prob_backward", (*upstream, latents, *velocities, next_latents, rows), outputs, latents, kl_std)
    return grad_velocity, grad_uncond


def euler_jump(latents: Tensor, velocity: Tensor, sigma: Tensor, next_sigma: Tensor) -> Tensor:
    """`ops.euler_jump` on the CPU.

    Args:
        latents, velocity: [B, ...] float32.
        sigma, next_sigma: [B] floating.

    Returns:
        states at `next_sigma`, [B, ...] float32.

    Raises:
        RuntimeError: the library is missing, or out of memory.
    """
    next_latents = torch.empty_like(latents, memory_format=torch.contiguous_format)
    _run("euler_jump", (latents, velocity, (next_sigma - sigma).float()), (next_latents,), latents)
    return next_latents


def grpo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    kl: Tensor | None,
    scale: Tensor | None,
    bias: Tensor | None,
    weight: Tensor | None,
    clip_range: float,
    kl_coef: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ops.grpo_loss` on the CPU, summed in double precision.

    Args:
        log_prob, old_log_prob, advantages: [B] float32.
        kl, scale, bias, weight: [B] float32; None for 0, 1, 0 and 1.
        clip_range: half width of the trusted interval around ratio 1.
        kl_coef: weight of mean(kl).

    Returns:
        loss, scalar; metrics, [5]; gradient of the loss with respect to `log_prob`, [B]; float32.

    Raises:
        RuntimeError: the library is missing.
    """
    loss, metrics, grad = log_prob.new_empty(()), log_prob.new_empty(5), log_prob.new_empty(len(log_prob))
    rows = (log_prob, old_log_prob, advantages, kl, scale, bias, weight)
    _run("grpo_loss", rows, (loss, metrics, grad), log_prob, clip_range, kl_coef)
    return loss, metrics, grad


def variants() -> tuple[str, ...]:
    """Instruction sets for which the library has code that runs here, narrowest first; the last is the default.

    Raises:
        RuntimeError: the library is missing.
    """
    names = map(library().densegrpo_variant_name, range(8))
    return tuple(name.decode() for name in names if name is not None)


@contextmanager
def using_variant(name: str) -> Iterator[None]:
    """Make all threads use one instruction set, for tests and benches.

    Args:
        name: one of `variants()`.

    Raises:
        RuntimeError: the library is missing.
        ValueError: not one of them.
    """
    functions = library()
    numbers = {functions.densegrpo_variant_name(number): number for number in range(8)}
    if name.encode() not in numbers:
        raise ValueError(f"variant must be one of {', '.join(variants())}, got {name!r}")
    before = functions.densegrpo_variant()
    functions.densegrpo_use_variant(numbers[name.encode()])
    try:
        yield
    finally:
        functions.densegrpo_use_variant(before)


def _run(
    op: str,
    inputs: tuple[Tensor | None, ...],
    outputs: tuple[Tensor | None, ...],
    latents: Tensor,
    *options: int | float,
) -> None:
    """Call densegrpo_<op>_f32(inputs, options, batch, elements, threads, outputs); None is a null pointer."""
    # Named, so that the contiguous copies outlive the call that holds only their addresses.
    packed = [None if tensor is None else tensor.contiguous() for tensor in inputs]
    failed = getattr(library(), f"densegrpo_{op}_f32")(
        *(None if tensor is None else tensor.data_ptr() for tensor in packed),
        *options,
        len(latents),
        latents.numel() // max(len(latents), 1),
        torch.get_num_threads(),
        *(None if tensor is None else tensor.data_ptr() for tensor in outputs),
    )
    if failed:
        raise RuntimeError(f"{op}: the compiled CPU library could not allocate memory")


def library() -> ctypes.CDLL:
    """The loaded library, its functions declared.

    Raises:
        RuntimeError: there is none.
    """
    found, reason = _load()
    if found is None:
        raise RuntimeError(f"the compiled CPU library is not available: {reason}")
    return found


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    remedy = "install a C++ compiler and run pip install again"
    return shared_library.load("_native", "densegrpo_abi_version", ABI_VERSION, _SIGNATURES, remedy)
