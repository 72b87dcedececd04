"""Ahead-of-time gates: every Triton kernel compiled for the GPUs it is meant for, and read as machine code.

The launchers themselves run, with tensors on the CPU and a driver that only compiles, so what is read is what they
would launch. No GPU is needed: Triton's package brings the assembler and the disassembler. The figures go to
kernels/RESOURCES.md.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels cannot be compiled", allow_module_level=True)

import triton
import triton.language as tl
from emulator.on_triton import CompilingDriver
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from densegrpo_fast.flow.dynamics import C
from densegrpo_fast.kernels import _affine, euler_jump, grpo_loss, sde_log_prob, sde_step
from densegrpo_fast.kernels._launch import BLOCK, OPTIONS

pytestmark = pytest.mark.ci

ROOT = Path(__file__).resolve().parents[2]
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
CAPABILITIES = (80, 90)
VERSION = ".".join(triton.__version__.split(".")[:2])
TABLE_VERSION = "3.7"
"""The Triton whose code kernels/RESOURCES.md describes."""
MORE_REGISTERS = {"3.6": {"sde_step guided, and both, bf16": 72}}
"""Where an older Triton needs more than a case allows."""
THREADS = 32 * OPTIONS["num_warps"]

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@contextmanager
def compiling(capability: int) -> Iterator[list[tuple[JITFunction, Any]]]:
    """Launches inside compile and do not run; the list fills with (kernel, what was compiled)."""
    launched: list[tuple[JITFunction, Any]] = []
    run = JITFunction.run

    def compile_only(self: JITFunction, *arguments: Any, warmup: bool, **options: Any) -> None:
        launched.append((self, run(self, *arguments, warmup=True, **options)))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "_active", CompilingDriver(capability))
        patch.setattr(JITFunction, "run", compile_only)
        yield launched


@dataclass(frozen=True)
class Inputs:
    """Arguments of every launcher.

    Attributes:
        latents, velocity: dtypes.
        batch, elements, steps: sizes.
        spread: whether one step serves all rows, as when the caller passes an int.
    """

    latents: torch.dtype = F32
    velocity: torch.dtype = F32
    batch: int = 3
    elements: int = 4096
    steps: int = 10
    spread: bool = False

    def states(self) -> tuple[Tensor, Tensor]:
        shape = (self.batch, self.elements)
        return torch.zeros(shape, dtype=self.latents), torch.zeros(shape, dtype=self.velocity)

    def table(self) -> tuple[Tensor, Tensor]:
        index = torch.zeros(1 if self.spread else self.batch, dtype=torch.int64)
        return torch.zeros(self.steps, 6), index.expand(self.batch)

    def words(self) -> tuple[Tensor, Tensor, Tensor, int]:
        one = torch.zeros(1, dtype=torch.int64)
        return one, torch.zeros(self.batch, dtype=torch.int64), one, 1

    def rows(self) -> Tensor:
        return torch.zeros(self.batch)


def step(given: Inputs, guided: bool = False, input_dtype: torch.dtype | None = None, mean: bool = False) -> None:
    latents, velocity = given.states()
    guidance = (velocity, given.rows()) if guided else (None, None)
    sde_step.sde_step(latents, velocity, *guidance, *given.table(), *given.words(), input_dtype, mean)


def score(given: Inputs, guided: bool = False, kl: bool = False) -> None:
    latents, velocity = given.states()
    guidance = (velocity, given.rows()) if guided else (None, None)
    references = (velocity if kl else None, velocity if kl and guided else None)
    sde_log_prob.sde_log_prob(latents, velocity, *guidance, *references, latents, *given.table(), C)


def backward(given: Inputs, guided: bool = False, kl: bool = False, with_uncond: bool = False) -> None:
    latents, velocity = given.states()
    guidance = (velocity, given.rows()) if guided else (None, None)
    references = (velocity if kl else None, velocity if kl and guided else None)
    grads = (given.rows(), given.rows() if kl else None)
    rest = (latents, *given.table(), C, with_uncond)
    sde_log_prob.sde_log_prob_backward(*grads, latents, velocity, *guidance, *references, *rest)


guided_step = partial(step, guided=True)
step_with_input = partial(step, input_dtype=BF16)
step_with_mean = partial(step, mean=True)
guided_step_with_both = partial(step, guided=True, input_dtype=BF16, mean=True)
guided_score = partial(score, guided=True)
score_kl = partial(score, kl=True)
guided_score_kl = partial(score, guided=True, kl=True)
guided_backward = partial(backward, guided=True, with_uncond=True)
backward_kl = partial(backward, kl=True)
guided_backward_kl = partial(backward, guided=True, kl=True, with_uncond=True)


def jump(given: Inputs) -> None:
    euler_jump.euler_jump(*given.states(), given.rows(), given.rows())


def second_stage(given: Inputs, kl: bool = False) -> None:
    partial_sums = torch.zeros(given.batch, given.elements)
    _affine.log_prob(partial_sums, *given.table(), given.elements, partial_sums if kl else None)


def loss(given: Inputs) -> None:
    grpo_loss.grpo_loss(*[given.rows()] * 7, 1e-4, 0.04)


@dataclass(frozen=True)
class Case:
    """A launch, and what its machine code may cost.

    Attributes:
        name: for the table.
        launch, inputs: what to run.
        instructions: ceiling per element; None where a kernel works on rows.
        loads, stores: bytes per element that must move in accesses of 128 bits, each once; None for no claim.
        registers: ceiling per thread.
        fused: multiply-adds per element that the kernel asks for; None for no claim.
    """

    name: str
    launch: Callable[[Inputs], None]
    inputs: Inputs
    instructions: float | None = None
    loads: int | None = None
    stores: int | None = None
    registers: int = 64
    fused: float | None = 0.0


HALF_VELOCITY = Inputs(velocity=BF16)
ODD = Inputs(elements=4099)
# Two logarithms of 9 and two sine-cosine pairs of 6 make four normals.
NOISE = (2 * 9 + 2 * 6) / 4

CASES = [
    Case("sde_step", step, Inputs(), 70, 8, 4, fused=NOISE),
    Case("sde_step, bf16 velocity", step, HALF_VELOCITY, 70, 6, 4, fused=NOISE),
    Case("sde_step, bf16 latents and velocity", step, Inputs(BF16, BF16), 70, 4, 2, fused=NOISE),
    Case("sde_step guided, bf16 velocities", guided_step, HALF_VELOCITY, 75, 8, 4, fused=NOISE),
    Case("sde_step, and bf16 model input", step_with_input, HALF_VELOCITY, 75, 6, 6, fused=NOISE),
    Case("sde_step, and mean", step_with_mean, HALF_VELOCITY, 75, 6, 8, fused=NOISE),
    Case("sde_step guided, and both, bf16", guided_step_with_both, HALF_VELOCITY, 80, 8, 10, fused=NOISE),
    Case("sde_step, odd size", step, ODD, 75, registers=96, fused=NOISE),
    Case("sde_log_prob", score, Inputs(), 16, 12, 0),
    Case("sde_log_prob, bf16 velocity", score, HALF_VELOCITY, 16, 10, 0),
    Case("sde_log_prob guided, bf16 velocities", guided_score, HALF_VELOCITY, 22, 12, 0),
    Case("sde_log_prob and KL", score_kl, Inputs(), 24, 16, 0),
    Case("sde_log_prob and KL, bf16 velocities", score_kl, HALF_VELOCITY, 24, 12, 0),
    Case("sde_log_prob and KL guided, bf16", guided_score_kl, HALF_VELOCITY, 36, 16, 0),
    Case("sde_log_prob, odd size", score, ODD, 25),
    Case("sde_log_prob backward", backward, Inputs(), 16, 12, 4),
    Case("sde_log_prob backward, bf16 velocity", backward, HALF_VELOCITY, 16, 10, 2),
    Case("sde_log_prob backward guided, bf16", guided_backward, HALF_VELOCITY, 24, 12, 4),
    Case("sde_log_prob backward and KL", backward_kl, Inputs(), 20, 16, 4),
    Case("sde_log_prob backward and KL, bf16", backward_kl, HALF_VELOCITY, 22, 12, 2),
    Case("sde_log_prob backward and KL guided, bf16", guided_backward_kl, HALF_VELOCITY, 36, 16, 4),
    Case("euler_jump", jump, Inputs(), 16, 8, 4),
    Case("euler_jump, bf16 velocity", jump, HALF_VELOCITY, 16, 6, 4),
    Case("log_prob, second stage", second_stage, Inputs(elements=32)),
    Case("log_prob and KL, second stage", partial(second_stage, kl=True), Inputs(elements=32)),
    Case("grpo_loss", loss, Inputs(batch=36), fused=None),
]


@dataclass(frozen=True)
class Code:
    """What a compiled kernel consists of.

    Attributes:
        registers, stack, shared: per thread; bytes per thread; bytes per block.
        opcodes: instructions by name with modifiers, padding left out.
    """

    registers: int
    stack: int
    shared: int
    opcodes: Counter[str]

    def count(self, *prefixes: str) -> int:
        """Instructions whose name starts with one of these."""
        return sum(number for name, number in self.opcodes.items() if name.startswith(prefixes))

    @property
    def instructions(self) -> float:
        """Per element."""
        return self.opcodes.total() * THREADS / BLOCK


def read(binary: bytes, path: Path) -> Code:
    path.write_bytes(binary)
    usage, text = (
        subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True, timeout=60).stdout
        for option in ("--dump-resource-usage", "--dump-sass")
    )
    found = dict(re.findall(r"(REG|STACK|SHARED):(\d+)", usage))
    names = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", text, re.MULTILINE)
    opcodes = Counter(name for name in names if name != "NOP")
    return Code(int(found["REG"]), int(found["STACK"]), int(found["SHARED"]), opcodes)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], tuple[JITFunction, Code]]:
    """Every case for every capability: the first kernel that it launches."""
    folder, result = tmp_path_factory.mktemp("cubins"), {}
    for capability in CAPABILITIES:
        for number, case in enumerate(CASES):
            with compiling(capability) as launched:
                case.launch(case.inputs)
            kernel, binary = launched[0]
            result[case.name, capability] = kernel, read(binary.asm["cubin"], folder / f"{number}-{capability}.cubin")
    return result


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_machine_code(compiled, case: Case, capability: int) -> None:
    _, code = compiled[case.name, capability]
    assert code.stack == 0
    assert code.count("LDL", "STL") == 0, "a spill, or an array in local memory"
    assert code.registers <= MORE_REGISTERS.get(VERSION, {}).get(case.name, case.registers)
    assert code.count("LDG") > 0
    if case.instructions is not None:
        assert code.instructions <= case.instructions
    # Bytes per element times elements per thread, in accesses of 16 bytes: every element moves once.
    for opcode, size in (("LDG.E.128", case.loads), ("STG.E.128", case.stores)):
        if size is not None:
            assert code.count(opcode) == size * BLOCK // THREADS // 16, opcode
    if case.fused is not None:
        # Divisions of a row's numbers expand to a few more, but to less than one per element.
        extra = code.count("FFMA") - case.fused * BLOCK / THREADS
        assert 0 <= extra < BLOCK / THREADS, "products fused into sums round otherwise than elsewhere"


@pytest.mark.parametrize(
    "given",
    [
        Inputs(batch=1, elements=1, steps=1),
        Inputs(F16, F32, batch=64, elements=2049, spread=True),
        Inputs(BF16, F16, batch=16, elements=2**18, steps=1),
    ],
    ids=["ones", "spread", "large"],
)
def test_what_triton_makes_of_special_integers_compiles(given: Inputs) -> None:
    # Triton compiles anew for integers that are 1 or multiples of 16, and where 1 is then a constant, code can fail.
    staged = (step, guided_step_with_both, score, guided_score, score_kl, guided_score_kl)
    launches = (*staged, backward, guided_backward, backward_kl, guided_backward_kl, jump, loss)
    with compiling(90) as launched:
        for launch in launches:
            launch(given)
        guided_backward(given, with_uncond=False)
    assert all(binary.asm["cubin"] for _, binary in launched)
    assert len(launched) == len(launches) + 1 + len(staged), "a step and a score have a second stage"


def test_the_reader_sees_local_memory(tmp_path: Path) -> None:
    # The library's sine reduces large arguments through an array in local memory: what the gates are there to refuse.
    with compiling(80) as launched:
        sine_kernel[(1,)](torch.zeros(256), BLOCK=256)
    code = read(launched[0][1].asm["cubin"], tmp_path / "sine.cubin")
    assert code.stack > 0
    assert code.count("LDL", "STL") > 0


@triton.jit
def sine_kernel(out_ptr, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr + index, tl.sin(tl.load(out_ptr + index)))


def test_every_kernel_is_here(compiled) -> None:
    modules = (_affine, euler_jump, grpo_loss, sde_log_prob, sde_step)
    kernels = {getattr(module, name) for module in modules for name in dir(module) if name.endswith("_kernel")}
    assert kernels == {kernel for kernel, _ in compiled.values()}
    stems = {module.__name__.rpartition(".")[2] for module in modules}
    assert {path.stem for path in (ROOT / "kernels").glob("*.py")} == {*stems, "_launch", "philox"}


@pytest.mark.skipif(VERSION != TABLE_VERSION, reason=f"the table is of Triton {TABLE_VERSION}, this is {VERSION}")
def test_the_table_is_written(compiled) -> None:
    lines = [
        "# Resources of the compiled kernels",
        "",
        f"Written by tests/ops/test_kernel_resources.py with Triton {triton.__version__}; do not edit. Code for blocks",
        f"of {BLOCK} elements on {THREADS} threads, of samples whose size is a multiple of 16 unless marked odd.",
        "Compiled, never run on a GPU. Instructions are per element, accesses of 128 bits per thread.",
        "",
        "| kernel | sm | registers | stack bytes | shared bytes | instructions | loads | stores |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for case in CASES:
        for capability in CAPABILITIES:
            _, code = compiled[case.name, capability]
            cells = [case.name, capability, code.registers, code.stack, code.shared]
            cells += ["" if case.instructions is None else f"{code.instructions:.1f}"]
            cells += [code.count("LDG.E.128"), code.count("STG.E.128")]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    path = ROOT / "kernels" / "RESOURCES.md"
    text = "\n".join(lines) + "\n"
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")
    assert path.read_text(encoding="utf-8").count("\n| ") == len(CASES) * len(CAPABILITIES) + 2
