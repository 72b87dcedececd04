"""Binding of the compiled CUDA library (csrc/*.cu) through ctypes: no torch ABI is involved.

It is for GPUs without Triton, and optional like the CPU library. Kernels run on torch's current stream of the
tensors' device, read step indices, seeds and counters there, and return without waiting, so the ops may be
captured in a CUDA graph. A step index outside the table, which the host cannot see, makes its row NaN.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache

import torch
from torch import Tensor

from densegrpo_fast.flow import shared_library

ABI_VERSION = 1

MINIMUM_CAPABILITY = (8, 0)
"""Oldest CUDA compute capability that the library is compiled for."""

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""Storage types, with the numbers that the library has for them."""

_pointer, _integer, _size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
_WHERE_AND_DTYPES, _SHAPE = (_integer, _pointer, _integer, _integer), (_size, _size, _size)
_SIGNATURES: dict[str, tuple[type, tuple[type, ...]]] = {
    "densegrpo_cuda_error": (ctypes.c_char_p, (_integer,)),
    "densegrpo_cuda_block": (_size, ()),
    "densegrpo_cuda_sde_step": (
        _integer,
        (*_WHERE_AND_DTYPES, *(_pointer,) * 7, _integer, *_SHAPE, *(_pointer,) * 3),
    ),
    "densegrpo_cuda_sde_log_prob": (_integer, (*_WHERE_AND_DTYPES, *(_pointer,) * 5, *_SHAPE, *(_pointer,) * 2)),
    "densegrpo_cuda_sde_log_prob_backward": (_integer, (*_WHERE_AND_DTYPES, *(_pointer,) * 6, *_SHAPE, _pointer)),
}


def why_not(*tensors: Tensor) -> str:
    """Reason why the library cannot serve a call; empty when it can.

    Args:
        tensors: latents, velocity and, where the op has them, next latents; none asks about the installation.

    Returns:
        one clause, or "".
    """
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"it needs tensors on a CUDA device, got {tensor.device}"
        if tensor.numel() == 0:
            return f"it needs at least one element, got shape {list(tensor.shape)}"
    if len(tensors) > 1:
        latents, velocity, *following = tensors
        if not _served(latents.dtype, velocity.dtype):
            return (
                "it needs float32 latents with a float32, float16 or bfloat16 velocity, or both float16 or both "
                f"bfloat16, got {latents.dtype} and {velocity.dtype}"
            )
        if any(tensor.dtype != latents.dtype for tensor in following):
            return f"it needs next_latents in the dtype of latents, {latents.dtype}, got {following[0].dtype}"
    if reason := _load()[1]:
        return reason
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    capability = torch.cuda.get_device_capability(tensors[0].device if tensors else None)
    if capability < MINIMUM_CAPABILITY:
        needed, found = (".".join(map(str, version)) for version in (MINIMUM_CAPABILITY, capability))
        return f"it needs compute capability {needed} or newer, got {found}"
    return ""


def sde_step(
    latents: Tensor,
    velocity: Tensor,
    table: Tensor,
    step_index: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    iteration: Tensor,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """`ops.sde_step` on a CUDA device.

    Args:
        latents, velocity: [B, ...] in dtypes that `why_not` accepts.
        table: [T, 6] float32.
        step_index, sample_index: [B] int64.
        seed, iteration: int64, one element.
        stream: 16-bit stream number.

    Returns:
        next_latents, [B, ...] in the dtype of `latents`; log_prob, [B] float32.

    Raises:
        RuntimeError: the library is missing, or a launch failed.
    """
    next_latents = torch.empty_like(latents, memory_format=torch.contiguous_format)
    log_prob = latents.new_empty(len(latents), dtype=torch.float32)
    inputs = (latents, velocity, table, step_index, seed, sample_index, iteration)
    outputs = (next_latents, _partial(latents), log_prob)
    _run("sde_step", inputs, outputs, latents, velocity, len(table), stream)
    return next_latents, log_prob


def sde_log_prob(latents: Tensor, velocity: Tensor, next_latents: Tensor, table: Tensor, step_index: Tensor) -> Tensor:
    """`ops.sde_log_prob` on a CUDA device.

    Args:
        latents, velocity, next_latents: [B, ...] in dtypes that `why_not` accepts.
        table: [T, 6] float32.
        step_index: [B] int64.

    Returns:
        log_prob, [B] float32.

    Raises:
        RuntimeError: the library is missing, or a launch failed.
    """
    log_prob = latents.new_empty(len(latents), dtype=torch.float32)
    inputs = (latents, velocity, next_latents, table, step_index)
    _run("sde_log_prob", inputs, (_partial(latents), log_prob), latents, velocity, len(table))
    return log_prob


def sde_log_prob_backward(
    grad: Tensor, latents: Tensor, velocity: Tensor, next_latents: Tensor, table: Tensor, step_index: Tensor
) -> Tensor:
    """Gradient of `sde_log_prob` with respect to `velocity`.

    Args:
        grad: gradient arriving at log_prob, [B].
        latents, velocity, next_latents, table, step_index: as there.

    Returns:
        gradient, shape and dtype of `velocity`.

    Raises:
        RuntimeError: as there.
    """
    grad_velocity = torch.empty_like(velocity, memory_format=torch.contiguous_format)
    inputs = (grad.float(), latents, velocity, next_latents, table, step_index)
    _run("sde_log_prob_backward", inputs, (grad_velocity,), latents, velocity, len(table))
    return grad_velocity


def _partial(latents: Tensor) -> Tensor:
    """Scratch for the sums of the thread blocks, [B, blocks] float64."""
    blocks = -(-latents[0].numel() // _library().densegrpo_cuda_block())
    return latents.new_empty(len(latents), blocks, dtype=torch.float64)


def _run(
    op: str,
    inputs: tuple[Tensor, ...],
    outputs: tuple[Tensor, ...],
    latents: Tensor,
    velocity: Tensor,
    steps: int,
    *options: int,
) -> None:
    """Call densegrpo_cuda_<op>(device, queue, dtypes, inputs, options, steps, batch, elements, outputs)."""
    # Named until the launch. The caching allocator gives their memory to later work of the same stream only.
    packed = [tensor.contiguous() for tensor in inputs]
    arguments = (
        DTYPES[latents.dtype],
        DTYPES[velocity.dtype],
        *(tensor.data_ptr() for tensor in packed),
        *options,
        steps,
        len(latents),
        latents[0].numel(),
        *(tensor.data_ptr() for tensor in outputs),
    )
    library = _library()
    with torch.cuda.device(latents.device):
        queue = torch.cuda.current_stream(latents.device).cuda_stream
        code = getattr(library, f"densegrpo_cuda_{op}")(latents.device.index or 0, queue, *arguments)
    if code:
        raise RuntimeError(f"{op}: the compiled CUDA library failed: {library.densegrpo_cuda_error(code).decode()}")


def _served(latents: torch.dtype, velocity: torch.dtype) -> bool:
    return velocity in DTYPES and latents in (torch.float32, velocity)


def _library() -> ctypes.CDLL:
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"the compiled CUDA library is not available: {reason}")
    return library


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    remedy = "install the CUDA toolkit and run pip install again with DENSEGRPO_CUDA=1"
    return shared_library.load("_native_cuda", "densegrpo_cuda_abi_version", ABI_VERSION, _SIGNATURES, remedy)
