"""Triton's launchers on CPU tensors: Triton compiles as for a GPU, and the machine runs what it compiled."""

from __future__ import annotations

import inspect
import struct
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from emulator import ptx
from emulator.machine import Program, launch
from emulator.memory import GlobalMemory, Region
from emulator.values import Array, Error

_FORMATS = {"fp16": "e", "fp32": "f", "fp64": "d", "i1": "?"}


class CompilingDriver:
    """A driver without a device. The capability is the device's number, since Triton keeps compiled code by device."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


class FreshTensors:
    """Which bytes of tensors that launchers made by `empty` hold no value yet, by the address of their storage."""

    def __init__(self) -> None:
        self._defined: dict[int, Array] = {}

    def note(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self._defined[storage.data_ptr()] = np.zeros(storage.nbytes(), np.bool_)
            weakref.finalize(storage, self._defined.pop, storage.data_ptr(), None)
        return tensor

    def region(self, tensor: Tensor, name: str) -> Region:
        """The bytes from a tensor's first element to its last."""
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        size = span * tensor.element_size() if tensor.numel() else 0
        defined = self._defined.get(tensor.untyped_storage().data_ptr())
        if defined is not None:
            start = tensor.storage_offset() * tensor.element_size()
            defined = defined[start : start + size]
        return Region(tensor.data_ptr(), size, name, defined)


_programs: dict[tuple[str, Error], Program] = {}


@contextmanager
def on_cpu(capability: int, error: Error = "mixed", edit: Callable[[str], str] | None = None) -> Iterator[None]:
    """Launches inside run in the machine, compiled for a capability (80, 90, ...).

    Tensors that the modules of the kernels allocate count as unwritten until a kernel writes them.

    Args:
        error: of approximate instructions, as `values.disturbed`.
        edit: changes the PTX before it runs.
    """
    run, fresh = JITFunction.run, FreshTensors()

    def emulate(self: JITFunction, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        binary = run(self, *arguments, grid=grid, warmup=True, **options)
        parameters = inspect.signature(self.fn).parameters
        named = {name: value for name, value in options.items() if name in parameters}
        bound = inspect.signature(self.fn).bind(*arguments, **named)
        bound.apply_defaults()
        text = binary.asm["ptx"] if edit is None else edit(binary.asm["ptx"])
        if (text, error) not in _programs:
            (kernel,) = ptx.kernels(text).values()
            _programs[text, error] = Program(kernel, error)
        program = _programs[text, error]
        raw, regions = _packed(program.kernel, bound.arguments, binary.src.signature, fresh)
        threads = 32 * binary.metadata.num_warps
        shape = grid(bound.arguments) if callable(grid) else grid
        launch(program, tuple(shape), threads, raw, GlobalMemory(regions, threads), binary.metadata.shared)
        return binary

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", CompilingDriver(capability))
        patch.setattr(JITFunction, "run", emulate)
        for owner, name in ((Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
            patch.setattr(owner, name, _noting(getattr(owner, name), fresh))
        yield


def _noting(make: Any, fresh: FreshTensors) -> Any:
    def empty(*arguments: Any, **options: Any) -> Tensor:
        tensor = make(*arguments, **options)
        by_kernel = sys._getframe(1).f_globals["__name__"].startswith("densegrpo_fast.kernels")
        return fresh.note(tensor) if by_kernel and tensor.device.type == "cpu" else tensor

    return empty


def _packed(
    kernel: ptx.Kernel, arguments: dict[str, Any], signature: dict[str, str], fresh: FreshTensors
) -> tuple[bytes, list[Region]]:
    """Parameters as they lie in memory, and the tensors among them. Triton adds two pointers, here null."""
    raw, regions = bytearray(kernel.parameter_bytes), []
    passed = [(name, value) for name, value in arguments.items() if signature[name] != "constexpr"]
    for (name, value), parameter in zip(passed, kernel.parameters.values(), strict=False):
        if isinstance(value, Tensor):
            regions.append(fresh.region(value, name))
            packed = struct.pack("<Q", value.data_ptr())
        elif signature[name] in _FORMATS:
            packed = struct.pack("<" + _FORMATS[signature[name]], value)
        else:
            packed = (int(value) % 2 ** (8 * parameter.size)).to_bytes(parameter.size, "little")
        raw[parameter.offset : parameter.offset + parameter.size] = packed
    return bytes(raw), regions
