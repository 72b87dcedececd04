"""Executes kernels: all threads of some blocks at once, each instruction as one operation on arrays.

Threads that are at different instructions take turns, those furthest behind first, so that structured branches join
again. A barrier waits for its block; a shuffle checks that its lanes are there.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np

from emulator.errors import BadLaunch, Divergence, Fault, Uninitialised, Unsupported
from emulator.memory import GlobalMemory, SharedMemory, Threads
from emulator.ptx import Immediate, Instruction, Kernel, Operand, Register, Symbol
from emulator.steps import CONTROL, HALVES, WARP, Step, Who, bound_step
from emulator.values import PREDICATE, UNSIGNED, Array, Error, Type, as_bits, constant

_THREADS_AT_ONCE = 8192
_MOST_TURNS = 50_000


def launch(
    program: Program, grid: tuple[int, ...], threads: int, parameters: bytes, memory: GlobalMemory, shared: int = 0
) -> Counter[str]:
    """Run a grid of blocks.

    Args:
        program: what to run.
        grid: blocks in up to three dimensions.
        threads: per block, in one dimension.
        parameters: as they lie in memory.
        memory: all that may be accessed.
        shared: bytes of shared memory that the launch adds.

    Returns:
        executed instructions by opcode, counted once for all threads of some blocks that executed one together.

    Raises:
        Fault: one of `errors`; it names the instruction.
    """
    kernel = program.kernel
    if kernel.exact_threads not in (None, threads) or threads > (kernel.most_threads or 1024) or threads % WARP:
        raise BadLaunch(f"{kernel.name} launched with {threads} threads, compiled for {kernel.exact_threads}")
    if len(parameters) != kernel.parameter_bytes:
        raise BadLaunch(f"{kernel.name} has {kernel.parameter_bytes} bytes of parameters, got {len(parameters)}")
    x, y, z = (*grid, 1, 1)[:3]
    if not (0 < x < 2**31 and 0 < y < 2**16 and 0 < z < 2**16):
        raise BadLaunch(f"{kernel.name} launched on a grid of {grid}")
    count, together = x * y * z, max(_THREADS_AT_ONCE // threads, 1)
    executed: Counter[str] = Counter()
    with np.errstate(all="ignore"):
        for first in range(0, count, together):
            blocks = range(first, min(first + together, count))
            executed += Blocks(program, blocks, (x, y, z), threads, parameters, memory, shared).run()
    return executed


class Program:
    """A kernel made ready to run.

    Args:
        kernel: parsed.
        error: of approximate instructions, as `values.disturbed`.

    Raises:
        Unsupported: an instruction that the machine does not know.
    """

    def __init__(self, kernel: Kernel, error: Error = "mixed"):
        self.kernel = kernel
        self.steps: list[Step | None] = []
        for instruction in kernel.code:
            try:
                self.steps.append(bound_step(instruction, kernel, error))
            except Unsupported as fault:
                raise _placed(fault, kernel, instruction) from None


class Blocks:
    """Some blocks of a launch while they run; arguments as of `launch`."""

    def __init__(
        self,
        program: Program,
        blocks: range,
        grid: tuple[int, int, int],
        threads: int,
        parameters: bytes,
        memory: GlobalMemory,
        shared: int,
    ):
        self.program, self.kernel, self.parameters, self.memory = program, program.kernel, parameters, memory
        self.threads, self.first, self.count = threads, blocks.start, len(blocks) * threads
        every = np.arange(self.count)
        self.block, self.thread = every // threads + blocks.start, every % threads
        self.lane = (every % WARP).astype(np.int64)
        self.phase = np.zeros(len(blocks), np.int32)
        self.shared = SharedMemory(len(blocks), self.kernel.shared_bytes + shared, threads)
        x, y, z = grid
        values = {
            **{"tid.x": self.thread, "tid.y": 0, "tid.z": 0, "ntid.x": threads, "ntid.y": 1, "ntid.z": 1},
            **{"ctaid.x": self.block % x, "ctaid.y": self.block // x % y, "ctaid.z": self.block // (x * y)},
            **{"nctaid.x": x, "nctaid.y": y, "nctaid.z": z, "laneid": self.lane, "warpid": self.thread // WARP},
        }
        self.special = {
            f"%{name}": np.broadcast_to(np.asarray(value, np.uint32), self.count) for name, value in values.items()
        }
        self.registers: dict[str, Array] = {}
        self.unwritten: dict[str, Array] = {}
        self.ready: dict[int, Who] = {0: slice(None)}
        self.waiting: dict[int, Who] = {}

    def run(self) -> Counter[str]:
        """Run all threads to their end; what was executed."""
        steps, code, end = self.program.steps, self.kernel.code, len(self.kernel.code)
        executed: Counter[str] = Counter()
        at, turns = 0, 0
        try:
            while self.ready or self.waiting:
                if not self.ready:
                    self._pass_barrier()
                at = min(self.ready)
                who = self.ready.pop(at)
                next_stop = min(self.ready, default=end)
                while at < end:
                    instruction = code[at]
                    turns += 1
                    executed[".".join(instruction.opcode)] += 1
                    if instruction.opcode[0] in CONTROL:
                        self._control(instruction, at, who)
                        break
                    active = who if instruction.predicate is None else self.chosen(instruction, who)
                    if active is not None:
                        steps[at](self, active)
                    at += 1
                    if at == next_stop:
                        self._at(at, who)
                        break
                if turns > _MOST_TURNS:
                    raise Divergence("the kernel does not end")
        except Fault as fault:
            raise _placed(fault, self.kernel, code[min(at, end - 1)]) from None
        return executed

    def indices(self, who: Who) -> Array:
        """Threads as indices."""
        return np.arange(self.count) if isinstance(who, slice) else who

    def chosen(self, instruction: Instruction, who: Who) -> Who:
        """Those of some threads that execute a predicated instruction; None for none."""
        predicate = Register(str(instruction.predicate))
        self.need((predicate,), who, "the predicate")
        value = self.read(predicate, PREDICATE, who)
        value = ~value if instruction.negated else value
        if value.all():
            return who
        return self.indices(who)[value] if value.any() else None

    def read(self, operand: Operand, kind: Type, who: Who) -> Any:
        """Values of an operand [m], or one value for all."""
        if isinstance(operand, Immediate):
            return constant(operand.value, kind)
        if isinstance(operand, Symbol):
            if operand.name in ("true", "false"):
                return np.bool_(operand.name == "true")
            return constant(self.kernel.shared[operand.name], kind)
        if not isinstance(operand, Register):
            raise Unsupported(f"operand {operand}")
        if operand.name in self.special:
            values = self.special[operand.name][who]
        else:
            values = self._register(operand.name)[who]
        if kind.kind == "pred":
            return values
        if values.dtype.itemsize * 8 != kind.width:
            values = values.astype(UNSIGNED[kind.width])
        return np.ascontiguousarray(values).view(kind.dtype)

    def write(self, operand: Operand, kind: Type, who: Who, values: Any, missing: Array | None = None) -> None:
        """Put values of a type into a register; signed ones keep their sign in a wider one.

        Args:
            missing: [m] of `HALVES`, what of them came of something that nobody has written; None = nothing did.
        """
        if not isinstance(operand, Register) or operand.name == "_":
            return
        register = self._register(operand.name)
        if kind.kind != "pred":
            if kind.kind == "s" and kind.bits < register.dtype.itemsize * 8:
                values = values.astype(f"i{register.dtype.itemsize}")
            values = as_bits(values).astype(register.dtype)
        register[who] = values
        if missing is not None:
            self.unwritten.setdefault(operand.name, np.zeros(self.count, np.uint8))[who] = missing
        elif operand.name in self.unwritten:
            known = self.unwritten[operand.name]
            known[who] = 0
            if not known.any():
                del self.unwritten[operand.name]

    def missing(self, operand: Operand, who: Who) -> Array | None:
        """What of an operand's values came of something that nobody has written, as bits; None = nothing did."""
        known = self.unwritten.get(operand.name) if isinstance(operand, Register) else None
        return None if known is None or not known[who].any() else known[who]

    def need(self, operands: tuple[Operand, ...], who: Who, what: str) -> None:
        """Refuse operands that came of something that nobody has written."""
        for operand in operands:
            if self.unwritten and self.missing(operand, who) is not None:
                raise Uninitialised(f"{what} depends on a register that was read before it was written")

    def by(self, who: Who) -> Threads:
        """Threads as memory knows them."""
        block = self.block[who]
        return Threads(self.indices(who) + self.first * self.threads, block, self.phase[block - self.first])

    def warp_masks(self, who: Who) -> Array:
        """For each of some threads the lanes of its warp that are among them, as bits."""
        own = self.indices(who)
        lanes = np.zeros(self.count // WARP, np.uint32)
        np.bitwise_or.at(lanes, own // WARP, np.uint32(1) << self.lane[own].astype(np.uint32))
        return lanes[own // WARP]

    def _register(self, name: str) -> Array:
        if name not in self.registers:
            bits = self.kernel.registers[name]
            self.registers[name] = np.zeros(self.count, np.bool_ if bits == 1 else UNSIGNED[bits])
            self.unwritten[name] = np.full(self.count, HALVES, np.uint8)
        return self.registers[name]

    def _at(self, at: int, who: Who) -> None:
        """Let threads go on at an instruction, together with those that are there."""
        if at in self.ready:
            both = np.union1d(self.indices(self.ready[at]), self.indices(who))
            who = slice(None) if len(both) == self.count else both
        self.ready[at] = who

    def _control(self, instruction: Instruction, at: int, who: Who) -> None:
        """Branches, returns and barriers."""
        name, active = instruction.opcode[0], who
        if instruction.predicate is not None:
            active = self.chosen(instruction, who)
            rest = who if active is None else np.setdiff1d(self.indices(who), self.indices(active), assume_unique=True)
            if active is None or len(rest):
                self._at(at + 1, rest)
            if active is None:
                return
        if name == "bra":
            (label,) = instruction.operands
            assert isinstance(label, Symbol)
            self._at(self.kernel.labels[label.name], active)
        elif name in ("bar", "barrier"):
            if instruction.opcode[1] != "sync" or instruction.operands != (Immediate(0),):
                raise Unsupported("a barrier of its own, or of a part of a block")
            self.waiting[at] = active

    def _pass_barrier(self) -> None:
        """All threads wait or have returned: let the blocks go on that are complete."""
        arrived = np.zeros(len(self.phase), np.int64)
        for who in self.waiting.values():
            here = np.bincount(self.block[who] - self.first, minlength=len(arrived))
            if np.any((here > 0) & (arrived > 0)):
                raise Divergence("threads of one block wait at different barriers")
            arrived += here
        if np.any((arrived > 0) & (arrived < self.threads)):
            raise Divergence("a barrier that some threads of a block never reach")
        self.phase[arrived > 0] += 1
        for at, who in self.waiting.items():
            self._at(at + 1, who)
        self.waiting.clear()


def _placed(fault: Fault, kernel: Kernel, instruction: Instruction) -> Fault:
    """A fault with the instruction that caused it."""
    return type(fault)(f"{kernel.name}, line {instruction.line}, {instruction.text}: {fault}")
