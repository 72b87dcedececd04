"""What each instruction of a kernel does to some threads: registers, memory, shuffles and reductions of a warp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from emulator.alu import operation
from emulator.errors import Divergence, OutOfBounds, Unsupported
from emulator.ptx import Address, Instruction, Kernel, Operand, Register, Vector
from emulator.values import PREDICATE, U32, UNSIGNED, Array, Error, Type, as_bits, type_of

if TYPE_CHECKING:
    from emulator.machine import Blocks

WARP = 32
HALVES = np.uint8(3)
"""Both halves of a register, as bits: two 32-bit values may share one, and be written one by one."""

Who = Any
"""Threads of the blocks in work: all of them, slice(None), or their indices in order."""

Step = Callable[["Blocks", Who], None]

CONTROL = {"bra", "ret", "exit", "bar", "barrier"}
"""Instructions that `machine.Blocks` executes itself."""


def bound_step(instruction: Instruction, kernel: Kernel, error: Error) -> Step | None:
    """What executing an instruction does, its operands bound; None for branches and barriers."""
    name = instruction.opcode[0]
    if name in CONTROL:
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
    return np.where(missing, HALVES, np.uint8(0))


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
        values = [as_bits(blocks.read(part, kind, who)) for part in parts]
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
