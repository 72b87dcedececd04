"""The CUDA sources, compiled for the GPUs they are meant for as an installation compiles them, where there is nvcc.

Their machine code is held to its limits and described in csrc/RESOURCES.md. tests/gpu/test_cuda_kernels.py runs them.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from emulator.on_cuda import find_nvcc

from densegrpo_fast.flow import native_cuda, shared_library

pytestmark = pytest.mark.ci

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
OPS = ("sde_step", "sde_log_prob", "sde_log_prob_backward")
TYPES = {
    "ff": "float32",
    "f6__half": "float32, float16 velocity",
    "f13__nv_bfloat16": "float32, bfloat16 velocity",
    "6__halfS": "float16",
    "13__nv_bfloat16S": "bfloat16",
}
"""Types of latents and velocity, as mangled names spell them (S repeats the first) and in words."""
TURN, TURNS = 4, 4
"""Elements that a thread takes at a time, and how many times."""


class Kernel(NamedTuple):
    """What ptxas says of a kernel; bytes and registers per thread."""

    stack: int
    spilled: int
    registers: int


class Build(NamedTuple):
    """The library, the compiler that made it, and its kernels by architecture and mangled name."""

    library: Path
    compiler: str
    kernels: dict[tuple[str, str], Kernel]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """The CUDA library, built by setup.py as an installation builds it."""
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("there is no nvcc, neither on the path nor as a package")
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    compiler = f"nvcc {re.search(r'release ([0-9.]+)', version)[1]}"
    folder = tmp_path_factory.mktemp("cuda")
    command = [
        sys.executable,
        "setup.py",
        "build_ext",
        "--build-lib",
        str(folder),
        "--build-temp",
        str(folder / "temp"),
    ]
    environment = {**os.environ, "DENSEGRPO_CUDA": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "was not built" not in result.stderr, result.stdout + result.stderr
    report = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, "
        r"(\d+) bytes spill loads.*?Used (\d+) registers",
        re.DOTALL,
    )
    kernels = {
        (architecture, name): Kernel(int(stack), int(stores) + int(loads), int(registers))
        for name, architecture, stack, stores, loads, registers in report.findall(result.stdout + result.stderr)
    }
    return Build(next((folder / "densegrpo_fast").glob("_native_cuda.*.so")), compiler, kernels)


@pytest.fixture
def installed(build: Build, monkeypatch: pytest.MonkeyPatch):
    """The library that was just built, in place of the installed one."""
    monkeypatch.setattr(shared_library, "PACKAGE", build.library.parent)
    native_cuda._load.cache_clear()
    yield
    native_cuda._load.cache_clear()


class Code(NamedTuple):
    """A kernel's instructions with their addresses, as cuobjdump lists them."""

    lines: list[tuple[int, str]]

    def count(self, pattern: str) -> int:
        """Instructions that match."""
        return sum(bool(re.search(pattern, text)) for _, text in self.lines)

    def per_element(self) -> float:
        """Instructions per element: of the loop over a thread's elements, or, if it is unrolled, of everything."""
        jumps = [(address, re.search(r"BRA 0x([0-9a-f]+)", text)) for address, text in self.lines]
        loops = [(int(jump[1], 16), address) for address, jump in jumps if jump and int(jump[1], 16) < address]
        if not loops:
            return len(self.lines) / (TURN * TURNS)
        ((start, end),) = loops
        return sum(start <= address <= end for address, _ in self.lines) / TURN


def mangled(op: str, types: str, *, aligned: bool = True) -> str:
    """What the mangled name of a kernel contains; aligned: the form for samples of a multiple of four elements."""
    return f"{op}_kernelILb{aligned:d}E{types}"


@pytest.fixture(scope="module")
def code(build: Build) -> dict[tuple[str, str], Code]:
    """The machine code of every kernel, by architecture and mangled name."""
    spec = find_spec("triton")
    of_triton = Path(spec.origin).parent / "backends" / "nvidia" / "bin" if spec and spec.origin else None
    folders = [of_triton, *map(Path, os.environ.get("PATH", "").split(os.pathsep))]
    tools = [folder / "cuobjdump" for folder in folders if folder and (folder / "nvdisasm").is_file()]
    tool = next((tool for tool in tools if tool.is_file()), None)
    if tool is None:
        pytest.skip("there is no cuobjdump with nvdisasm, neither on the path nor in Triton")
    found = {}
    for architecture in ARCHITECTURES:
        command = [str(tool), "--dump-sass", str(build.library), "-arch", architecture]
        listing = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
        for section in listing.split("Function : ")[1:]:
            name, _, body = section.partition("\n")
            lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", body, re.MULTILINE)
            kept = [(int(address, 16), text) for address, text in lines if not text.startswith("NOP")]
            # what follows the last instruction is a jump to itself
            found[architecture, name.strip()] = Code(kept[:-1])
    return found


def only(table: dict, architecture: str, part: str):
    """The one entry whose mangled name contains a part."""
    (found,) = [value for (built_for, name), value in table.items() if built_for == architecture and part in name]
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_compiled_without_local_memory(build: Build, architecture: str) -> None:
    kernels = {name: kernel for (built_for, name), kernel in build.kernels.items() if built_for == architecture}
    names = [mangled(op, types, aligned=aligned) for op in OPS for types in TYPES for aligned in (True, False)]
    for part in (*names, "finish_log_prob"):
        assert any(part in name for name in kernels), part
    for name, kernel in kernels.items():
        assert kernel.stack == kernel.spilled == 0, name
        # 64 registers leave half of the threads that a multiprocessor can hold
        assert kernel.registers <= 64, name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_float32_kernels_move_128_bits_in_few_instructions(code, architecture: str) -> None:
    for body in code.values():
        assert body.count(r"\b(LDL|STL)\b") == 0
    for op, loads, stores, ceiling in (
        ("sde_step", 2, 1, 70),
        ("sde_log_prob", 3 * TURNS, 0, 16),
        ("sde_log_prob_backward", 3 * TURNS, TURNS, 16),
    ):
        body = only(code, architecture, mangled(op, "ff"))
        assert (body.count(r"LDG\.E\.128"), body.count(r"STG\.E\.128")) == (loads, stores)
        assert body.per_element() <= ceiling


def test_the_table_is_written(build: Build, code) -> None:
    lines = [
        "# Resources of the compiled CUDA kernels",
        "",
        f"Written by tests/ops/test_csrc_cuda.py with {build.compiler}; do not edit. Compiled, never run on a GPU.",
        "Samples have a multiple of four elements unless marked odd. Instructions are per element, accesses of 128 and",
        "64 bits in the code as it stands.",
        "",
        "| kernel | sm | registers | stack bytes | spilled bytes | instructions | 128-bit | 64-bit |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for op in OPS:
        cases = [(words, mangled(op, types)) for types, words in TYPES.items()]
        for words, part in (*cases, ("float32, odd size", mangled(op, "ff", aligned=False))):
            for architecture in ARCHITECTURES:
                kernel, body = only(build.kernels, architecture, part), only(code, architecture, part)
                cells = [f"{op}, {words}", architecture[3:], kernel.registers, kernel.stack, kernel.spilled]
                cells += [f"{body.per_element():.1f}", body.count(r"(LDG|STG)\.E\.128")]
                cells += [body.count(r"(LDG|STG)\.E\.64")]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    path = ROOT / "csrc" / "RESOURCES.md"
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8").count("\n| ") == len(OPS) * (len(TYPES) + 1) * len(ARCHITECTURES) + 2


@pytest.mark.usefixtures("installed")
def test_the_built_library_has_the_interface_that_is_bound() -> None:
    library, reason = native_cuda._load()
    assert reason == ""
    assert library.densegrpo_cuda_block() % 1024 == 0
    assert native_cuda.why_not() == ("" if torch.cuda.is_available() else "there is no CUDA device")
