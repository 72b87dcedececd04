"""Triton's launchers on CPU tensors: Triton compiles as for a GPU, and the machine runs what it compiled."""

from __future__ import annotations

import inspect
import struct
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from emulator import ptx
from emulator.machine import Program, launch
from emulator.memory import GlobalMemory, Region
from emulator.tensors import FreshTensors, watched
from emulator.values import Error

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


_programs: dict[tuple[str, Error], Program] = {}


@contextmanager
def on_cpu(capability: int, error: Error = "mixed", edit: Callable[[str], str] | None = None) -> Iterator[None]:
    """Launches inside run in the machine, compiled for a capability (80, 90, ...).

    Tensors that the modules of the kernels allocate count as unwritten until a kernel writes them.

    Args:
        error: of approximate instructions, as `values.disturbed`.
        edit: changes the PTX before it runs.
    """
    run = JITFunction.run

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

    with watched("densegrpo_fast.kernels") as fresh, pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", CompilingDriver(capability))
        patch.setattr(JITFunction, "run", emulate)
        yield


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
