"""Executes kernels: all threads of some blocks at once, each instruction as one operation on arrays.

Threads that are at different instructions take turns, those furthest behind first, so that structured branches join
again. A barrier waits for its block; a shuffle checks that its lanes are there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from emulator.alu import operation
from emulator.errors import BadLaunch, Divergence, Fault, OutOfBounds, Uninitialised, Unsupported
from emulator.memory import GlobalMemory, SharedMemory, Threads
from emulator.ptx import Address, Immediate, Instruction, Kernel, Operand, Register, Symbol, Vector
from emulator.values import PREDICATE, U32, UNSIGNED, Array, Error, Type, type_of

WARP = 32
_THREADS_AT_ONCE = 8192
_MOST_TURNS = 50_000

_HALVES = np.uint8(3)
"""Both halves of a register, as bits: two 32-bit values may share one, and be written one by one."""

Who = Any
"""Threads of the blocks in work: all of them, slice(None), or their indices in order."""

Step = Callable[["Blocks", Who], None]


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
        self.kernel, self.steps = kernel, []
        for instruction in kernel.code:
            try:
                self.steps.append(_step(instruction, kernel, error))
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
                    if instruction.opcode[0] in _CONTROL:
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
            return _constant(operand.value, kind)
        if isinstance(operand, Symbol):
            if operand.name in ("true", "false"):
                return np.bool_(operand.name == "true")
            return _constant(self.kernel.shared[operand.name], kind)
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
            missing: [m] of `_HALVES`, what of them came of something that nobody has written; None = nothing did.
        """
        if not isinstance(operand, Register) or operand.name == "_":
            return
        register = self._register(operand.name)
        if kind.kind != "pred":
            if kind.kind == "s" and kind.bits < register.dtype.itemsize * 8:
                values = values.astype(f"i{register.dtype.itemsize}")
            values = _bits(values).astype(register.dtype)
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
            self.unwritten[name] = np.full(self.count, _HALVES, np.uint8)
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


_CONTROL = {"bra", "ret", "exit", "bar", "barrier"}


def _constant(value: int, kind: Type) -> Any:
    if kind.kind == "pred":
        return np.bool_(value != 0)
    return UNSIGNED[kind.width](value % (1 << kind.width)).view(kind.dtype)


def _bits(values: Any) -> Any:
    """Values as unsigned integers of their own width."""
    values = np.asarray(values)
    if values.dtype.kind in "fi":
        return np.ascontiguousarray(values).view(UNSIGNED[8 * values.dtype.itemsize])
    return values


def _step(instruction: Instruction, kernel: Kernel, error: Error) -> Step | None:
    """What executing an instruction does, its operands bound; None for branches and barriers."""
    name = instruction.opcode[0]
    if name in _CONTROL:
        return None
    if name in ("ld", "st"):
        return _access(instruction, kernel)
    if name == "shfl":
        return _shuffle(instruction)
    if name == "redux":
        return _reduction(instruction)
    if name == "mov" and any(isinstance(operand, Vector) for operand in instruction.operands):
        return _packing(instruction)
    done = operation(instruction.opcode, len(instruction.operands) - 1, error)
    target, *sources = instruction.operands
    bound = tuple(zip(sources, done.sources, strict=True))
    lanes = done.result.lanes
    # each half of such a result comes of the same half of the sources
    exact = lanes == 2 or name in ("mov", "selp")

    def step(blocks: Blocks, who: Who) -> None:
        values = [blocks.read(source, kind, who) for source, kind in bound]
        missing = None
        if blocks.unwritten:
            missing = _spread(blocks, sources, who, exact, values[2] if name == "selp" else None)
        result = done.compute(*values)
        if lanes == 2 and done.result.kind == "f":
            # a constant serves all threads
            result = np.broadcast_to(result, 2 * len(blocks.lane[who]))
            result = np.ascontiguousarray(result).view(UNSIGNED[done.result.width])
        blocks.write(target, done.result if lanes == 1 else Type("b", done.result.width), who, result, missing)

    return step


def _spread(
    blocks: Blocks, sources: Sequence[Operand], who: Who, exact: bool = False, chosen: Array | None = None
) -> Array | None:
    """What of a result comes of something that nobody has written; a selection looks at what it chooses."""
    found = [blocks.missing(source, who) for source in sources]
    if all(each is None for each in found):
        return None
    masks = [np.zeros(len(blocks.lane[who]), np.uint8) if each is None else each for each in found]
    if chosen is not None:
        return np.where(chosen, masks[0], masks[1]) | masks[2]
    result = np.bitwise_or.reduce(masks)
    return result if exact else _whole(result)


def _whole(missing: Array) -> Array:
    """All of a value, where some of it is missing."""
    return np.where(missing, _HALVES, np.uint8(0))


def _packing(instruction: Instruction) -> Step:
    """mov between a register and a vector of its parts."""
    kind = type_of(instruction.opcode[-1])
    assert kind is not None
    target, source = instruction.operands
    if isinstance(target, Vector):
        bits = kind.bits // len(target.parts)

        def unpack(blocks: Blocks, who: Who) -> None:
            whole, missing = blocks.read(source, Type("u", kind.bits), who), blocks.missing(source, who)
            for k, part in enumerate(target.parts):
                values = (whole >> whole.dtype.type(k * bits)).astype(UNSIGNED[bits])
                of_part = missing if missing is None or bits != 32 else _whole(missing >> k & 1)
                blocks.write(part, Type("u", bits), who, values, of_part)

        return unpack
    assert isinstance(source, Vector)
    bits = kind.bits // len(source.parts)

    def pack(blocks: Blocks, who: Who) -> None:
        unsigned, whole = UNSIGNED[kind.bits], UNSIGNED[kind.bits](0)
        for k, part in enumerate(source.parts):
            whole = whole | blocks.read(part, Type("u", bits), who).astype(unsigned) << unsigned(k * bits)
        missing = _spread(blocks, source.parts, who) if blocks.unwritten else None
        if missing is not None and bits == 32:
            halves = [_spread(blocks, (part,), who) for part in source.parts]
            missing = np.bitwise_or.reduce([half & (1 << k) for k, half in enumerate(halves) if half is not None])
        blocks.write(target, Type("u", kind.bits), who, whole, missing)

    return pack


_MODES = {"global", "shared", "nc", "v2", "v4", "v8", "volatile", "relaxed", "cta", "gpu", "sys", "weak"}


def _access(instruction: Instruction, kernel: Kernel) -> Step:
    """Loads and stores."""
    opcode, kind = instruction.opcode, type_of(instruction.opcode[-1])
    loads = opcode[0] == "ld"
    data, where = instruction.operands if loads else reversed(instruction.operands)
    if kind is None or not isinstance(where, Address):
        raise Unsupported(instruction.text)
    if "param" in opcode:
        return _parameter(instruction, kernel, kind)
    hints = [mode for mode in opcode[1:-1] if mode not in _MODES and not mode.startswith(("L1", "L2", "evict", "cta"))]
    space = next((mode for mode in ("global", "shared") if mode in opcode), None)
    if hints or space is None:
        raise Unsupported(instruction.text)
    parts = data.parts if isinstance(data, Vector) else (data,)
    step, shared = kind.bits // 8, space == "shared"

    def address(blocks: Blocks, who: Who) -> Array:
        blocks.need((Register(where.base),), who, "an address")
        if where.base.startswith("%"):
            base = blocks.read(Register(where.base), Type("u", kernel.registers[where.base]), who).astype(np.uint64)
        else:
            base = np.full(len(blocks.lane[who]), kernel.shared[where.base], np.uint64)
        return base + np.uint64(where.offset % 2**64)

    def load(blocks: Blocks, who: Who) -> None:
        places, by = address(blocks, who), blocks.by(who)
        if shared:
            words = blocks.shared.load(places, step, len(parts), by, blocks.first)
        else:
            words = blocks.memory.load(places, step, len(parts), by)
        for part, word in zip(parts, words, strict=True):
            blocks.write(part, kind, who, word.view(kind.dtype))

    def store(blocks: Blocks, who: Who) -> None:
        blocks.need(parts, who, "a stored value")
        values = [_bits(blocks.read(part, kind, who)) for part in parts]
        places, by = address(blocks, who), blocks.by(who)
        if shared:
            blocks.shared.store(places, step, values, by, blocks.first)
        else:
            blocks.memory.store(places, step, values, by)

    return load if loads else store


def _parameter(instruction: Instruction, kernel: Kernel, kind: Type) -> Step:
    data, where = instruction.operands
    assert isinstance(where, Address)
    known = kernel.parameters.get(where.base)
    if known is None or isinstance(data, Vector):
        raise Unsupported(instruction.text)
    start, size = known.offset + where.offset, kind.bits // 8
    if where.offset + size > known.size:
        raise OutOfBounds(f"{instruction.text}: past the end of the parameter")

    def load(blocks: Blocks, who: Who) -> None:
        raw = blocks.parameters[start : start + size]
        blocks.write(data, kind, who, np.frombuffer(raw, kind.dtype)[0])

    return load


def _shuffle(instruction: Instruction) -> Step:
    """shfl.sync: every lane that the mask names has to be there, and only those may be read from."""
    *targets, source, distance, clamp, mask = instruction.operands
    mode = instruction.opcode[2]

    def step(blocks: Blocks, who: Who) -> None:
        own, lane = blocks.indices(who), blocks.lane[who]
        named = np.broadcast_to(blocks.read(mask, U32, who), len(own))
        _need_lanes(blocks, who, named)
        by = blocks.read(distance, U32, who).astype(np.int64)
        control = blocks.read(clamp, U32, who).astype(np.int64)
        segment = control >> 8 & 31
        low, high = lane & segment, lane & segment | control & 31 & ~segment
        wanted = {"up": lane - by, "down": lane + by, "bfly": lane ^ by, "idx": low | by & ~segment}[mode]
        inside = wanted >= high if mode == "up" else wanted <= high
        wanted = np.where(inside, wanted, lane)
        if np.any(named >> wanted.astype(np.uint32) & np.uint32(1) == 0):
            raise Divergence("a shuffle from a lane that its mask does not name")
        values = np.zeros(blocks.count, np.uint32)
        values[own] = blocks.read(source, U32, who)
        missing, known = None, blocks.missing(source, who)
        if known is not None:
            masks = np.zeros(blocks.count, np.uint8)
            masks[own] = known
            missing = masks[own - lane + wanted]
        blocks.write(targets[0], U32, who, values[own - lane + wanted], missing)
        for predicate in targets[1:]:
            blocks.write(predicate, PREDICATE, who, inside)

    return step


def _reduction(instruction: Instruction) -> Step:
    """redux.sync of maxima and minima over the lanes of a warp."""
    target, source, mask = instruction.operands
    kind, how = type_of(instruction.opcode[-1]), instruction.opcode[2]
    reduce = {"max": np.fmax, "min": np.fmin, "add": np.add}.get(how)
    if kind is None or reduce is None or len(instruction.opcode) != 4 or (how == "add" and kind.kind == "f"):
        raise Unsupported(instruction.text)

    def step(blocks: Blocks, who: Who) -> None:
        named = np.broadcast_to(blocks.read(mask, U32, who), blocks.lane[who].shape)
        _need_lanes(blocks, who, named)
        if np.any(named != np.uint32(0xFFFFFFFF)):
            raise Unsupported("redux of a part of a warp")
        blocks.need((source,), who, "a reduced value")
        values = np.broadcast_to(blocks.read(source, kind, who), named.shape)
        reduced = reduce.reduce(values.reshape(-1, WARP), axis=1)
        blocks.write(target, kind, who, np.repeat(reduced, WARP))

    return step


def _need_lanes(blocks: Blocks, who: Who, named: Array) -> None:
    """Refuse a warp's common instruction at which lanes are missing that its mask names."""
    present = blocks.warp_masks(who)
    if np.any(named & ~present):
        raise Divergence("a shuffle that some lanes named by its mask never reach together with the others")
    if np.any(named >> blocks.lane[who].astype(np.uint32) & np.uint32(1) == 0):
        raise Divergence("a shuffle by a lane that its mask does not name")
