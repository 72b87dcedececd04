"""Types of PTX as NumPy has them, rounding, and the approximate instructions with their documented error."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from emulator.errors import Unsupported

Array = NDArray[np.generic]
Error = Literal["none", "low", "high", "mixed"]

UNSIGNED = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
_SIGNED = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
_FLOAT = {32: np.float32, 64: np.float64}
_KINDS = {"b": UNSIGNED, "u": UNSIGNED, "s": _SIGNED, "f": _FLOAT}


class Type(NamedTuple):
    """A PTX type: kind (b, u, s, f, h = float16, g = bfloat16, pred), bits, and how many of it share a register."""

    kind: str
    bits: int
    lanes: int = 1

    @property
    def width(self) -> int:
        """Bits of the register."""
        return self.bits * self.lanes

    @property
    def dtype(self) -> type[np.generic]:
        """Of the array that holds one value per lane; 16-bit floats are held as their bits."""
        if self.kind == "pred":
            return np.bool_
        return _KINDS.get(self.kind, UNSIGNED)[self.bits]


PREDICATE, U32, F32 = Type("pred", 1), Type("u", 32), Type("f", 32)
_NAMED = {
    "pred": PREDICATE,
    "f16": Type("h", 16),
    "bf16": Type("g", 16),
    "f16x2": Type("h", 16, 2),
    "bf16x2": Type("g", 16, 2),
    "f32x2": Type("f", 32, 2),
}


def type_of(suffix: str) -> Type | None:
    """Type by its name without the dot; None if it is none."""
    if suffix in _NAMED:
        return _NAMED[suffix]
    known = suffix[:1] in _KINDS and suffix[1:].isdigit() and int(suffix[1:]) in _KINDS[suffix[0]]
    return Type(suffix[0], int(suffix[1:])) if known else None


def fused(x: Array, y: Array, z: Array) -> Array:
    """x * y + z with one rounding."""
    if x.dtype == np.float64:
        return _fused64(*np.broadcast_arrays(x, y, z))
    product, addend = np.multiply(x, y, dtype=np.float64), z.astype(np.float64)
    total = np.atleast_1d(product + addend)
    rest = total - product
    error = (product - (total - rest)) + (addend - rest)
    # The product is exact in float64. Rounded to odd, their sum rounds to float32 as the exact one does.
    bits = total.view(np.int64)
    odd = (error != 0) & ((bits & 1) == 0) & np.isfinite(total) & np.isfinite(error)
    toward = np.where((error > 0) == (total > 0), 1, -1)
    return np.where(odd, (bits + toward).view(np.float64), total).astype(np.float32)


def _fused64(x: Array, y: Array, z: Array) -> Array:
    """Exact rationals, one by one: there are few of them, one for each row of a batch."""
    total = np.atleast_1d(x * y + z)
    for at in np.flatnonzero(np.isfinite(total)):
        exact = Fraction(float(x.flat[at])) * Fraction(float(y.flat[at])) + Fraction(float(z.flat[at]))
        if exact:
            total.flat[at] = float(exact)
    return total


def to_bfloat16(x: Array) -> Array:
    """Bits of float32 values rounded to nearest even."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint32(0x7FFF), rounded).astype(np.uint16)


def to_float16(x: Array) -> Array:
    """Bits of float32 values rounded to nearest even."""
    return x.astype(np.float16).view(np.uint16)


def from_half(bits: Array, kind: str) -> Array:
    """float32 values of 16-bit floats given as bits: kind "h" float16, "g" bfloat16."""
    if kind == "h":
        return bits.view(np.float16).astype(np.float32)
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def flushed(x: Array) -> Array:
    """Subnormal float32 values as zeros of their sign (.ftz)."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


_ULPS = {("rcp", "approx"): 1, ("div", "full"): 2, ("div", "approx"): 2}
_RELATIVE = {
    ("sqrt", "approx"): 2.0**-23,
    ("rsqrt", "approx"): 2.0**-22.9,
    ("ex2", "approx"): 2.0**-22,
}
"""Largest error of float32 instructions, from the PTX ISA: in units in the last place, or relative."""


def documented_error(opcode: tuple[str, ...]) -> bool:
    """Whether the instruction is an approximate one.

    Raises:
        Unsupported: it is, and its error is not known here.
    """
    if not {"approx", "full"} & set(opcode):
        return False
    if opcode[:2] not in _ULPS and opcode[:2] not in _RELATIVE:
        raise Unsupported(f"the error of {'.'.join(opcode)}")
    return True


def disturbed(x: Array, opcode: tuple[str, ...], error: Error) -> Array:
    """Results of an approximate instruction, off by its documented error.

    Args:
        x: correctly rounded results, float32.
        opcode: of the instruction.
        error: "none"; "low" and "high", all results off in one direction, in magnitude; "mixed", by a hash of the
            result between the two, so that equal results stay equal.
    """
    if error == "none":
        return x
    bits = np.ascontiguousarray(x).view(np.int32)
    if error == "mixed":
        scatter = (bits.view(np.uint32) * np.uint32(2654435761)) >> np.uint32(16)
        share = scatter.astype(np.float64) / 32767.5 - 1.0
    else:
        share = 1.0 if error == "high" else -1.0
    if opcode[:2] in _ULPS:
        # exact cases too: the documentation promises nothing for them
        moved = (bits + np.rint(share * _ULPS[opcode[:2]]).astype(np.int32)).view(np.float32)
    else:
        moved = (x.astype(np.float64) * (1.0 + share * _RELATIVE[opcode[:2]])).astype(np.float32)
    normal = np.isfinite(x) & (np.abs(x) > 4 * np.finfo(np.float32).tiny) & np.isfinite(moved)
    return np.where(normal, moved, x)


def constant(value: int, kind: Type) -> Any:
    """A number as a value of a type, its low bits if it is wider."""
    if kind.kind == "pred":
        return np.bool_(value != 0)
    return UNSIGNED[kind.width](value % (1 << kind.width)).view(kind.dtype)


def as_bits(values: Any) -> Any:
    """Values as unsigned integers of their own width."""
    values = np.asarray(values)
    if values.dtype.kind in "fi":
        return np.ascontiguousarray(values).view(UNSIGNED[8 * values.dtype.itemsize])
    return values
