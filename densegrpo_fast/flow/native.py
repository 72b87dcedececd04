"""Binding of the compiled CPU library (csrc/) through ctypes: no Python or torch ABI is involved.

The library is optional. It is looked for beside the package when first asked for, and its absence is a fact
to report (`why_not`), not an error.
"""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

ABI_VERSION = 1

_PACKAGE = Path(__file__).resolve().parent.parent


def available() -> bool:
    """Whether the compiled library was found, loaded and has the expected interface."""
    return _load()[0] is not None


def why_not() -> str:
    """Reason why the library is not available; empty when it is."""
    return _load()[1]


def sde_step(
    latents: Tensor,
    velocity: Tensor,
    table: Tensor,
    step_index: Tensor,
    seed: Tensor,
    sample_index: Tensor,
    epoch: Tensor,
    stream: int,
) -> tuple[Tensor, Tensor]:
    """`ops.sde_step` on float32 CPU tensors, on `torch.get_num_threads()` threads.

    Args:
        latents, velocity: [B, ...] float32.
        table: [T, 6] float32.
        step_index, sample_index: [B] int64.
        seed, epoch: int64, one element.
        stream: 16-bit stream number.

    Returns:
        next_latents, [B, ...] float32; log_prob, [B] float32.

    Raises:
        IndexError: a step index outside the table.
        RuntimeError: the library is missing, or out of memory.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"the compiled CPU library is not available: {reason}")
    rows = table.index_select(0, step_index)
    latents, velocity = latents.contiguous(), velocity.contiguous()
    # Named, so that the contiguous copies outlive the call that holds only their addresses.
    integers = [tensor.contiguous() for tensor in (step_index, sample_index, seed, epoch)]
    batch = latents.shape[0]
    next_latents = torch.empty_like(latents)
    log_prob = torch.empty(batch, dtype=torch.float32)
    failed = library.densegrpo_sde_step_f32(
        latents.data_ptr(),
        velocity.data_ptr(),
        rows.data_ptr(),
        *(tensor.data_ptr() for tensor in integers),
        stream,
        batch,
        latents[0].numel() if batch else 0,
        torch.get_num_threads(),
        next_latents.data_ptr(),
        log_prob.data_ptr(),
    )
    if failed:
        raise RuntimeError("sde_step: the compiled CPU library could not allocate memory")
    return next_latents, log_prob


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """The library's own random words, for the known-answer tests.

    Args:
        counter: four words in [0, 2^32).
        key: two words in [0, 2^32).

    Returns:
        four words in [0, 2^32).

    Raises:
        RuntimeError: the library is missing.
    """
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"the compiled CPU library is not available: {reason}")
    out = (ctypes.c_uint32 * 4)()
    library.densegrpo_philox4x32((ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), out)
    return out[0], out[1], out[2], out[3]


@lru_cache(maxsize=1)
def _load() -> tuple[ctypes.CDLL | None, str]:
    candidates = sorted(_PACKAGE.glob("_native*.so"))
    if not candidates:
        return (
            None,
            "densegrpo_fast/_native*.so was not built; install a C++ compiler and run pip install again",
        )
    try:
        library = ctypes.CDLL(str(candidates[-1]))
        version = library.densegrpo_abi_version()
    except (OSError, AttributeError) as error:
        return None, f"{candidates[-1].name} cannot be loaded: {error}"
    if version != ABI_VERSION:
        return (
            None,
            f"{candidates[-1].name} has interface {version}, expected {ABI_VERSION}; run pip install again",
        )
    pointer, integer, size = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
    library.densegrpo_sde_step_f32.argtypes = [*[pointer] * 7, integer, size, size, integer, pointer, pointer]
    library.densegrpo_sde_step_f32.restype = integer
    library.densegrpo_philox4x32.restype = None
    return library, ""
