"""What arithmetic instructions compute: types of their sources and of their result, and the function between."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from emulator.errors import Unsupported
from emulator.values import (
    F32,
    PREDICATE,
    U32,
    UNSIGNED,
    Array,
    Error,
    Type,
    disturbed,
    documented_error,
    flushed,
    from_half,
    fused,
    to_bfloat16,
    to_float16,
    type_of,
)


class Operation(NamedTuple):
    """An arithmetic instruction without its operands.

    Attributes:
        sources: types that the operands are read as.
        result: type of what `compute` returns.
        compute: arrays (scalars for constants) to an array.
    """

    sources: tuple[Type, ...]
    result: Type
    compute: Callable[..., Any]


def operation(opcode: tuple[str, ...], operands: int, error: Error) -> Operation:
    """The operation behind an opcode.

    Args:
        opcode: dotted parts.
        operands: how many sources there are.
        error: of approximate instructions, as `values.disturbed`.

    Raises:
        Unsupported: it is not known.
    """
    name, kind = opcode[0], type_of(opcode[-1])
    if kind is None:
        raise Unsupported(".".join(opcode))
    if name == "cvt":
        return _conversion(opcode, operands)
    if name == "setp":
        return _comparison(opcode, kind, operands)
    if name == "selp":
        return Operation((kind, kind, PREDICATE), kind, lambda one, other, chosen: np.where(chosen, one, other))
    if name in ("mov", "cvta"):
        return Operation((kind,), kind, lambda value: value)
    table = _LOGIC if kind.kind == "pred" else _FLOATING if kind.kind in "fhg" else _INTEGER
    make = table.get(name)
    if make is None:
        raise Unsupported(".".join(opcode))
    return make(opcode, kind, error) if table is _FLOATING else make(opcode, kind)


def _same(count: int, compute: Callable[..., Any]) -> Callable[..., Operation]:
    """Operations whose sources and result have one type."""
    return lambda opcode, kind, *_: Operation((kind,) * count, kind, compute)


# comparisons


_ORDERED = {
    "eq": np.equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_JOINS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(opcode: tuple[str, ...], kind: Type, operands: int) -> Operation:
    modes = opcode[1:-1]
    if set(modes) - {"ftz", *_JOINS} - {modes[0]} or kind.kind in "hg":
        raise Unsupported(".".join(opcode))
    compare = partial(_compare, modes[0], kind.kind == "f")
    joins = [_JOINS[mode] for mode in modes if mode in _JOINS]
    if joins:
        return Operation((kind, kind, PREDICATE), PREDICATE, lambda x, y, other: joins[0](compare(x, y), other))
    return Operation((kind, kind), PREDICATE, compare)


def _compare(mode: str, floating: bool, x: Array, y: Array) -> Array:
    if not floating:
        return np.not_equal(x, y) if mode == "ne" else _ORDERED[mode](x, y)
    nan = np.isnan(x) | np.isnan(y)
    if mode in ("nan", "num"):
        return nan if mode == "nan" else ~nan
    if mode == "ne":
        return np.not_equal(x, y) & ~nan
    if mode == "neu":
        return np.not_equal(x, y)
    if mode.endswith("u"):
        return _ORDERED[mode[:-1]](x, y) | nan
    return _ORDERED[mode](x, y)


# predicates


_LOGIC: dict[str, Callable[..., Operation]] = {
    "and": _same(2, np.logical_and),
    "or": _same(2, np.logical_or),
    "xor": _same(2, np.logical_xor),
    "not": _same(1, np.logical_not),
}


# floating point


def _floating(count: int, compute: Callable[..., Any]) -> Callable[..., Operation]:
    """An instruction that rounds to nearest, or is approximate."""

    def make(opcode: tuple[str, ...], kind: Type, error: Error) -> Operation:
        modes = opcode[1:-1]
        if set(modes) - {"rn", "ftz", "approx", "full", "f32", "NaN"}:
            raise Unsupported(".".join(opcode))
        function = compute
        if kind.kind in "hg":
            # add.rn.f32.bf16: a 16-bit first source in a float32 sum
            if "f32" not in modes or kind.lanes > 1:
                raise Unsupported(".".join(opcode))
            mixed = (kind,) * (count - 1) + (F32,)

            def widened(*values: Array) -> Array:
                return function(*(from_half(each, kind.kind) for each in values[:-1]), values[-1])

            return Operation(mixed, F32, widened)
        if documented_error(opcode):
            function = _approximate(function, opcode, error)
        if "ftz" in modes:
            function = _flushing(function)
        return Operation((kind,) * count, kind, function)

    return make


def _approximate(function: Callable[..., Any], opcode: tuple[str, ...], error: Error) -> Callable[..., Any]:
    return lambda *values: disturbed(function(*values), opcode, error)


def _flushing(function: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *values: flushed(function(*map(flushed, values)))


def _extreme(compute: Callable[..., Any], strict: Callable[..., Any]) -> Callable[..., Operation]:
    """min and max: of a number and a NaN the number, unless .NaN says otherwise."""
    return lambda opcode, kind, error: _floating(2, strict if "NaN" in opcode else compute)(opcode, kind, error)


_FLOATING: dict[str, Callable[..., Operation]] = {
    "add": _floating(2, np.add),
    "sub": _floating(2, np.subtract),
    "mul": _floating(2, np.multiply),
    "div": _floating(2, np.divide),
    "fma": _floating(3, fused),
    "mad": _floating(3, fused),
    "neg": _floating(1, np.negative),
    "abs": _floating(1, np.abs),
    "sqrt": _floating(1, np.sqrt),
    "rcp": _floating(1, lambda x: np.divide(x.dtype.type(1), x)),
    "rsqrt": _floating(1, lambda x: np.divide(1.0, np.sqrt(x, dtype=np.float64)).astype(x.dtype)),
    "ex2": _floating(1, lambda x: np.exp2(x, dtype=np.float64).astype(x.dtype)),
    "min": _extreme(np.fmin, np.minimum),
    "max": _extreme(np.fmax, np.maximum),
}


# integers


def _multiply(opcode: tuple[str, ...], kind: Type) -> Operation:
    how = opcode[1]
    if how == "lo":
        return Operation((kind, kind), kind, np.multiply)
    if kind.bits != 32:
        raise Unsupported(".".join(opcode))
    wide = Type(kind.kind, 64)
    if how == "wide":
        return Operation((kind, kind), wide, lambda x, y: x.astype(wide.dtype) * y.astype(wide.dtype))
    if how == "hi":
        return Operation((kind, kind), kind, lambda x, y: _high(x, y, wide))
    raise Unsupported(".".join(opcode))


def _high(x: Array, y: Array, wide: Type) -> Array:
    return ((x.astype(wide.dtype) * y.astype(wide.dtype)) >> wide.dtype(32)).astype(x.dtype)


def _multiply_add(opcode: tuple[str, ...], kind: Type) -> Operation:
    product = _multiply(opcode, kind)
    return Operation((*product.sources, product.result), product.result, lambda x, y, z: product.compute(x, y) + z)


def _quotient(opcode: tuple[str, ...], kind: Type) -> Operation:
    """Division towards zero; dividing by zero gives what no kernel should use, here all ones."""

    def divide(x: Array, y: Array) -> Array:
        safe = np.where(y == 0, y.dtype.type(1), y)
        rest = np.fmod(x, safe)
        return np.where(y == 0, ~y.dtype.type(0), rest if opcode[0] == "rem" else (x - rest) // safe)

    return Operation((kind, kind), kind, divide)


def _shift(opcode: tuple[str, ...], kind: Type) -> Operation:
    """Shifts by the width or more leave zeros, or the sign."""
    left = opcode[0] == "shl"

    def shift(x: Array, count: Array) -> Array:
        inside = np.minimum(count, np.uint32(kind.bits - 1)).astype(x.dtype)
        moved = x << inside if left else x >> inside
        if kind.kind == "s" and not left:
            return moved
        return np.where(count < kind.bits, moved, x.dtype.type(0))

    return Operation((kind, U32), kind, shift)


def _extract_bits(opcode: tuple[str, ...], kind: Type) -> Operation:
    def extract(x: Array, position: Array, length: Array) -> Array:
        unsigned = UNSIGNED[kind.bits]
        top = (unsigned(kind.bits) - position - length).astype(unsigned)
        aligned = (x.view(unsigned) << top).view(x.dtype)
        return np.where(length == 0, x.dtype.type(0), aligned >> (unsigned(kind.bits) - length).astype(x.dtype))

    return Operation((kind, U32, U32), kind, extract)


def _look_up(opcode: tuple[str, ...], kind: Type) -> Operation:
    def logic(x: Array, y: Array, z: Array, table: Array) -> Array:
        result = np.zeros_like(x | y | z)
        for case in range(8):
            if int(table) >> case & 1:
                result |= (x if case & 4 else ~x) & (y if case & 2 else ~y) & (z if case & 1 else ~z)
        return result

    return Operation((kind,) * 3 + (U32,), kind, logic)


def _permute(opcode: tuple[str, ...], kind: Type) -> Operation:
    """Four bytes out of eight. Selectors that repeat a sign are not known."""

    def permute(x: Array, y: Array, selector: Array) -> Array:
        if np.any(selector & np.uint32(0x8888)):
            raise Unsupported("prmt of signs")
        both = x.astype(np.uint64) | y.astype(np.uint64) << np.uint64(32)
        result = np.zeros_like(x | y | selector)
        for byte in range(4):
            source = ((selector >> np.uint32(4 * byte)) & np.uint32(7)).astype(np.uint64) * np.uint64(8)
            result |= ((both >> source) & np.uint64(255)).astype(np.uint32) << np.uint32(8 * byte)
        return result

    return Operation((kind, kind, U32), kind, permute)


_INTEGER: dict[str, Callable[..., Operation]] = {
    "add": _same(2, np.add),
    "sub": _same(2, np.subtract),
    "mul": _multiply,
    "mad": _multiply_add,
    "div": _quotient,
    "rem": _quotient,
    "neg": _same(1, np.negative),
    "abs": _same(1, np.abs),
    "min": _same(2, np.minimum),
    "max": _same(2, np.maximum),
    "and": _same(2, np.bitwise_and),
    "or": _same(2, np.bitwise_or),
    "xor": _same(2, np.bitwise_xor),
    "not": _same(1, np.invert),
    "shl": _shift,
    "shr": _shift,
    "bfe": _extract_bits,
    "lop3": _look_up,
    "prmt": _permute,
}


# conversions


def _conversion(opcode: tuple[str, ...], operands: int) -> Operation:
    target, source = type_of(opcode[-2]), type_of(opcode[-1])
    if target is None or source is None or set(opcode[1:-2]) - {"rn", "rzi", "ftz"}:
        raise Unsupported(".".join(opcode))
    if target.lanes == 2 and source == F32 and operands == 2:
        narrow = _narrow(target.kind)

        def pack(high: Array, low: Array) -> Array:
            return narrow(low).astype(np.uint32) | narrow(high).astype(np.uint32) << np.uint32(16)

        return Operation((F32, F32), Type("b", 32), pack)
    if source.kind in "hg" and target == F32:
        return Operation((source,), F32, lambda bits: from_half(bits, source.kind))
    if target.kind in "hg" and source == F32:
        return Operation((F32,), target, _narrow(target.kind))
    if source.kind == "f" and target.kind in "us" and "rzi" in opcode:
        limits = np.iinfo(target.dtype)
        return Operation(
            (source,),
            target,
            lambda x: np.clip(np.trunc(np.nan_to_num(x)), limits.min, limits.max).astype(target.dtype),
        )
    if source.kind in "usf" and target.kind == "f" or source.kind in "usb" and target.kind in "usb":
        return Operation((source,), target, lambda x: x.astype(target.dtype))
    raise Unsupported(".".join(opcode))


def _narrow(kind: str) -> Callable[[Array], Array]:
    return to_float16 if kind == "h" else to_bfloat16
