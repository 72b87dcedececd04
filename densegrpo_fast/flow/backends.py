"""Which implementation serves an op, and why.

    reference  plain PyTorch, any device, any floating dtype
    cpu        compiled C++ (csrc/), float32 on the CPU
    triton     kernels/, on a CUDA device; in Triton's interpreter (TRITON_INTERPRET=1) also on the CPU, if named
    cuda       compiled CUDA (csrc/), on a CUDA device

The choice is the op's `implementation` argument; when that is "auto", the environment variable
DENSEGRPO_IMPLEMENTATION; when that is "auto" or unset, the fastest that can serve the call; never the
interpreter, which is for tests. A named implementation that cannot serve the call is an error, never a silent
substitute.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.flow import native, native_cuda

IMPLEMENTATIONS = ("reference", "cpu", "triton", "cuda")

OPS: dict[str, tuple[str, ...]] = {
    "sde_step": ("triton", "cuda", "cpu", "reference"),
    "sde_log_prob": ("triton", "cuda", "cpu", "reference"),
    "euler_jump": ("triton", "cpu", "reference"),
    "grpo_loss": ("triton", "cpu", "reference"),
    "guided_sde_step": ("triton", "cpu", "reference"),
    "sde_step_outputs": ("triton", "cpu", "reference"),
    "guided_sde_log_prob": ("triton", "cpu", "reference"),
    "sde_log_prob_kl": ("triton", "cpu", "reference"),
}
"""Implementations that exist for an op, or for a form of it, fastest first."""

ENVIRONMENT_VARIABLE = "DENSEGRPO_IMPLEMENTATION"

MINIMUM_CAPABILITY = (8, 0)
"""Oldest CUDA compute capability that the Triton kernels are compiled and checked for."""

choices: dict[tuple[object, ...], str] = {}
"""What "auto" stands for, by op, devices, dtypes and emptiness; to be cleared when what is installed has changed."""

_logger = logging.getLogger(__name__)


def check_name(implementation: str, source: str = "implementation") -> None:
    """Refuse an unknown implementation name.

    Args:
        implementation: candidate name, "auto" included.
        source: what to call it in the message.

    Raises:
        ValueError: not one of the known names.
    """
    if implementation not in ("auto", *IMPLEMENTATIONS):
        raise ValueError(f"{source} must be one of auto, {', '.join(IMPLEMENTATIONS)}, got {implementation!r}")


def choose(op: str, implementation: str, *tensors: Tensor) -> str:
    """Name the implementation that serves this call.

    Args:
        op: key of `OPS`.
        implementation: "auto" or a name.
        tensors: the call's floating point inputs; their device and dtype decide.

    Returns:
        a name from `IMPLEMENTATIONS`.

    Raises:
        ValueError: unknown name, in the argument or in the environment.
        RuntimeError: the named implementation cannot serve the call.
    """
    check_name(implementation)
    if implementation == "auto":
        implementation = os.environ.get(ENVIRONMENT_VARIABLE, "auto")
        check_name(implementation, ENVIRONMENT_VARIABLE)
    if implementation == "auto":
        call = (op, interpreted(), *((tensor.device, tensor.dtype, tensor.numel() == 0) for tensor in tensors))
        if call not in choices:
            candidates = [name for name in OPS[op] if name != "triton" or not interpreted()]
            choices[call] = next(name for name in candidates if not why_not(op, name, *tensors))
            _log_choice(op, choices[call], tensors[0].device.type)
        return choices[call]
    reason = why_not(op, implementation, *tensors)
    if reason:
        usable = [name for name in OPS[op] if not why_not(op, name, *tensors)]
        raise RuntimeError(
            f"{op}: implementation {implementation!r} cannot serve this call: {reason}. "
            f"Use 'auto' or one of: {', '.join(usable)}."
        )
    return implementation


def why_not(op: str, implementation: str, *tensors: Tensor) -> str:
    """Reason why an implementation cannot serve a call; empty when it can.

    Args:
        op: key of `OPS`.
        implementation: name from `IMPLEMENTATIONS`.
        tensors: the call's floating point inputs; none asks about the installation alone.

    Returns:
        one clause, or "".
    """
    if implementation not in OPS[op]:
        return f"it does not exist for {op}"
    if implementation == "cpu":
        for tensor in tensors:
            if tensor.device.type != "cpu" or tensor.dtype != torch.float32:
                return f"it needs float32 tensors on the CPU, got {tensor.dtype} on {tensor.device}"
        return native.why_not()
    if implementation == "cuda":
        return native_cuda.why_not(*tensors)
    if implementation == "triton":
        return _why_not_triton(tensors)
    return ""


def interpreted() -> bool:
    """Whether Triton kernels run in Triton's interpreter, on the CPU. Fixed when Triton is first imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _why_not_triton(tensors: tuple[Tensor, ...]) -> str:
    if not _triton_installed():
        return "Triton is not installed; run pip install triton"
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return f"it computes in float32, got {tensor.dtype}"
        if interpreted() and tensor.device.type in ("cpu", "cuda"):
            continue
        if tensor.device.type != "cuda":
            return f"it needs tensors on a CUDA device, got {tensor.device}"
        capability = torch.cuda.get_device_capability(tensor.device)
        if capability < MINIMUM_CAPABILITY:
            needed, found = (".".join(map(str, version)) for version in (MINIMUM_CAPABILITY, capability))
            return f"it needs compute capability {needed} or newer, got {found}"
    if not tensors and not interpreted() and not torch.cuda.is_available():
        return "there is no CUDA device"
    return ""


def compiled(implementation: str, function: str) -> Callable[..., Any]:
    """The function behind an op in a compiled implementation; kernels/ is imported on its first use.

    Args:
        implementation: "triton", "cuda" or "cpu", as `choose` named it.
        function: op, or op_backward; one function serves all forms of an op.

    Returns:
        a function with the arguments and results of the registered op, without `implementation`.
    """
    if implementation in ("cpu", "cuda"):
        return getattr(native if implementation == "cpu" else native_cuda, function)
    stem = function.removesuffix("_backward")
    return getattr(import_module(f"densegrpo_fast.kernels.{stem}"), function)


def describe() -> dict[str, Any]:
    """What is installed and what would be used, for the doctor command and bug reports.

    Returns:
        plain values only: torch version, CUDA device or None, the state of the compiled library, whether
            Triton is
        installed, the environment override, and for every op the reason per implementation ("" = usable).
    """
    return {
        "torch": torch.__version__,
        "cuda_device": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "native_library": native.why_not() or "available",
        "triton": _triton_installed(),
        "override": os.environ.get(ENVIRONMENT_VARIABLE, "auto"),
        "ops": {op: {name: why_not(op, name) for name in IMPLEMENTATIONS} for op in OPS},
    }


@cache
def _triton_installed() -> bool:
    return find_spec("triton") is not None


@cache
def _log_choice(op: str, chosen: str, device_type: str) -> None:
    """Say it once: the cache swallows every later call with the same arguments."""
    _logger.info("%s on %s: implementation %s", op, device_type, chosen)
    if device_type == "cpu" and "cpu" in OPS[op] and not native.available():
        _logger.info("%s: %s", op, native.why_not())
