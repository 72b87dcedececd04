"""csrc/*.cu on CPU tensors: the host code that nvcc compiles, on a runtime without a device, and nvcc's PTX.

What the library's functions do before a launch (dispatch, alignment, packing of arguments) is the very code that would
run; only the runtime under it is `cudart.cpp`, which hands each launch to the machine.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch

from densegrpo_fast.flow import native_cuda
from emulator import ptx
from emulator.machine import Program, launch
from emulator.memory import GlobalMemory, Region
from emulator.tensors import watched
from emulator.values import Error

_HERE = Path(__file__).resolve().parent
_SOURCES = _HERE.parent.parent.parent / "csrc"
_RUNTIME = "libcudart_emulated.so"
_LAUNCH_FAILED = 719


def find_nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, on the path, or of the package nvidia-cuda-nvcc; None if there is none."""
    packages = [str(Path(folder, "nvidia", "cu13", "bin")) for folder in sys.path]
    homes = [str(Path(os.environ["CUDA_HOME"], "bin"))] if "CUDA_HOME" in os.environ else []
    return shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", ""), *packages]))


class Build(NamedTuple):
    """The library without device code that nvcc compiled, the runtime under it, and its kernels as PTX."""

    library: Path
    runtime: ctypes.CDLL
    texts: tuple[str, ...]


class _Dim3(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint) for name in "xyz"]


_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    _Dim3,
    _Dim3,
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.c_size_t,
    ctypes.c_void_p,
)


def build(folder: Path, capability: int, *host_options: str) -> Build:
    """Compile csrc/*.cu for a capability, and the runtime.

    Args:
        folder: an empty one.
        host_options: further options of the host compiler, as -fsanitize=undefined.
    """
    runtime, library = folder / _RUNTIME, folder / f"_native_cuda.sm_{capability}.so"
    compiler = os.environ.get("CXX", "g++")
    _call([compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-o", runtime, _HERE / "cudart.cpp"], folder)
    options = ["-std=c++17", "-O3", "-shared", "-cudart", "none", "--keep", "--keep-dir", folder]
    host = ",".join(("-fPIC", "-fvisibility=hidden", *host_options))
    target = f"arch=compute_{capability},code=compute_{capability}"
    sources = sorted(_SOURCES.glob("*.cu"))
    _call([find_nvcc() or "nvcc", *options, "-Xcompiler", host, "-gencode", target, "-o", library, *sources], folder)
    return load(folder)


def load(folder: Path) -> Build:
    """What `build` left in a folder."""
    (library,) = folder.glob("_native_cuda.*.so")
    runtime = ctypes.CDLL(str(folder / _RUNTIME), mode=ctypes.RTLD_GLOBAL)
    return Build(library, runtime, tuple(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.ptx"))))


def _call(command: list[Any], folder: Path) -> None:
    done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


@cache
def _program(texts: tuple[str, ...], name: str, error: Error) -> Program:
    # a static kernel of a header is in every module, alike
    text = next(text for text in texts if f".entry {name}(" in text)
    return Program(ptx.kernels(text, name)[name], error)


@contextmanager
def on_cpu(built: Build, error: Error = "mixed", edit: Callable[[str], str] | None = None) -> Iterator[ctypes.CDLL]:
    """Within, implementation "cuda" serves CPU tensors by a build, whose library is returned.

    Args:
        error: of approximate instructions, as `values.disturbed`.
        edit: changes the PTX before it runs.
    """
    texts = built.texts if edit is None else tuple(map(edit, built.texts))
    regions: list[Region] = []
    faults: list[Exception] = []

    def on_launch(name: bytes, grid: Any, block: Any, arguments: Any, shared: int, stream: Any) -> int:
        try:
            program = _program(texts, name.decode(), error)
            kernel = program.kernel
            raw = bytearray(kernel.parameter_bytes)
            for value, parameter in zip(arguments, kernel.parameters.values(), strict=False):
                raw[parameter.offset : parameter.offset + parameter.size] = ctypes.string_at(value, parameter.size)
            memory = GlobalMemory(regions, block.x)
            launch(program, (grid.x, grid.y, grid.z), block.x, bytes(raw), memory, shared)
        except Exception as fault:  # ctypes would swallow it
            faults.append(fault)
            return _LAUNCH_FAILED
        return 0

    callback, run = _CALLBACK(on_launch), native_cuda._run
    built.runtime.emulator_on_launch(callback)
    with watched("densegrpo_fast.flow.native_cuda") as fresh, pytest.MonkeyPatch.context() as patch:

        def checked(op: str, inputs: tuple[Any, ...], outputs: tuple[Any, ...], *rest: Any) -> None:
            inputs = tuple(tensor.contiguous() for tensor in inputs)
            regions[:] = [fresh.region(tensor, f"input {k} of {op}") for k, tensor in enumerate(inputs)]
            regions.extend(fresh.region(tensor, f"output {k} of {op}") for k, tensor in enumerate(outputs))
            try:
                run(op, inputs, outputs, *rest)
            except RuntimeError:
                if faults:
                    raise faults.pop() from None
                raise

        library = ctypes.CDLL(str(built.library))
        for name, (result, types) in native_cuda._SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, types
        patch.setattr(native_cuda, "_run", checked)
        patch.setattr(native_cuda, "_library", lambda: library)
        patch.setattr(native_cuda, "why_not", lambda *tensors: "")
        patch.setattr(torch.cuda, "device", lambda device: nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        yield library
