"""What the launchers share: block size, compile options, layout of a batch, choice of device."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton
from torch import Tensor

BLOCK = 2048
"""Elements that one program handles. Part of the results: it fixes the shape of every reduction."""

OPTIONS: dict[str, Any] = {"num_warps": 4, "enable_fp_fusion": False}
"""Compile options of every kernel. Without fusion a product and a sum round as they do in PyTorch, and one expression
gives one value in every kernel; where a kernel wants a fused multiply-add, it says tl.fma."""


def blocks_of(tensor: Tensor) -> tuple[int, int, int]:
    """Batch, elements per sample, and programs per sample (at least 1) of [B, ...]."""
    batch = tensor.shape[0]
    elements = tensor.numel() // batch if batch else 0
    return batch, elements, max(triton.cdiv(elements, BLOCK), 1)


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Context in which Triton launches on the tensor's device and not on the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def packed(*tensors: Any) -> tuple[Any, ...]:
    """Row-major tensors; None stays None. Typed loosely, so that each result keeps the type of its argument."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def row_stride(values: Tensor | None) -> int:
    """Distance between the values of neighbouring rows of [B]; 0 when one value serves them all, or there is none."""
    return 0 if values is None else values.stride(0)
