"""The emulator itself: arithmetic against exact numbers, and threads, barriers and memory on small kernels."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from emulator import ptx
from emulator.errors import BadLaunch, Divergence, OutOfBounds, Race, Unsupported
from emulator.machine import Program, launch
from emulator.memory import GlobalMemory, Region
from emulator.values import disturbed, fused, to_bfloat16
from hypothesis import given, settings
from hypothesis import strategies as st

FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)
WORD = 2**32 - 1


def kernel(body: str, shared: str = "") -> str:
    """A kernel of two pointers, with %at the index of a thread in the grid and %in, %out its addresses of 4 bytes."""
    return f"""
.version 8.0
.target sm_90
{shared}
.visible .entry test( .param .u64 source, .param .u64 target )
{{
    .reg .pred %p<8>; .reg .b32 %r<32>; .reg .f32 %f<8>; .reg .b64 %d<8>; .reg .b32 %at; .reg .b64 %in, %out;
    ld.param.u64 %d0, [source]; ld.param.u64 %d1, [target];
    mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x;
    mad.lo.s32 %at, %r1, %r2, %r0;
    mul.wide.u32 %d2, %at, 4; add.s64 %in, %d0, %d2; add.s64 %out, %d1, %d2;
    ld.global.u32 %r3, [%in];
    {body}
}}
"""


def run(text: str, source: np.ndarray, blocks: int = 1, threads: int = 32) -> np.ndarray:
    """Output of `kernel` for an input of one word a thread."""
    target = np.zeros_like(source)
    program = Program(ptx.kernels(text)["test"], "none")
    regions = [Region(array.ctypes.data, array.nbytes, name) for array, name in ((source, "in"), (target, "out"))]
    parameters = np.array([source.ctypes.data, target.ctypes.data], np.uint64).tobytes()
    launch(program, (blocks,), threads, parameters, GlobalMemory(regions, threads))
    return target


@given(FLOATS, FLOATS, FLOATS)
def test_a_fused_product_rounds_once(x: float, y: float, z: float) -> None:
    (found,) = fused(*(np.array([value], np.float32) for value in (x, y, z)))
    exact = Fraction(x) * Fraction(y) + Fraction(z)
    if abs(exact) < Fraction(float(np.finfo(np.float32).max)):
        below, above = (np.nextafter(found, np.float32(sign * math.inf)) for sign in (-1, 1))
        error = abs(Fraction(float(found)) - exact)
        assert all(error <= abs(Fraction(float(other)) - exact) for other in (below, above) if np.isfinite(other))


@given(FLOATS)
def test_bfloat16_rounds_to_even(x: float) -> None:
    import torch

    expected = torch.tensor([x]).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert (to_bfloat16(np.array([x], np.float32)) == expected).all()


@pytest.mark.parametrize(("opcode", "bound"), [(("rcp", "approx"), 2.0**-23), (("ex2", "approx"), 2.0**-22)])
def test_an_approximation_is_as_wrong_as_it_may_be(opcode: tuple[str, ...], bound: float) -> None:
    right = np.linspace(0.5, 2, 1001, dtype=np.float32)[1:-1]
    low, high, mixed = (disturbed(right, opcode, error) for error in ("low", "high", "mixed"))
    assert (low < right).all() and (right < high).all()
    assert 0.4 * bound < np.max(np.abs(high / right.astype(np.float64) - 1)) < 1.5 * bound
    assert (low <= mixed).all() and (mixed <= high).all() and 0.2 < (mixed < right).mean() < 0.6


@settings(max_examples=20, deadline=None)
@given(st.integers(0, WORD), st.integers(0, WORD), st.integers(0, 40))
def test_integer_instructions(x: int, y: int, count: int) -> None:
    signed = x - 2**32 if x >> 31 else x
    other = y - 2**32 if y >> 31 else y
    cases = {
        f"mul.hi.u32 %r9, %r3, {y};": x * y >> 32,
        f"mul.hi.s32 %r9, %r3, {other};": signed * other >> 32 & WORD,
        f"mad.lo.s32 %r9, %r3, {y}, 7;": x * y + 7 & WORD,
        f"shl.b32 %r9, %r3, {count};": x << count & WORD,
        f"shr.u32 %r9, %r3, {count};": x >> count,
        f"shr.s32 %r9, %r3, {count};": signed >> count & WORD,
        f"lop3.b32 %r9, %r3, {y}, {count}, 0x96;": x ^ y ^ count,
        "bfe.s32 %r9, %r3, 4, 6;": ((x >> 4 & 63) ^ 32) - 32 & WORD,
        f"prmt.b32 %r9, %r3, {y}, 0x7210;": x & 0xFFFFFF | y & 0xFF000000,
        f"setp.lt.s32 %p1, %r3, {other}; selp.b32 %r9, 1, 0, %p1;": int(signed < other),
        f"div.u32 %r9, %r3, {max(y, 1)};": x // max(y, 1),
        "cvt.rn.f32.s32 %f0, %r3; mov.b32 %r9, %f0;": int(np.float32(signed).view(np.uint32)),
    }
    source = np.full(32, x, np.uint32)
    for body, expected in cases.items():
        assert run(kernel(f"{body} st.global.u32 [%out], %r9; ret;"), source)[0] == expected, body


def test_threads_part_and_meet_again() -> None:
    # odd threads count down to zero, even ones return; those that are left shuffle with nobody missing
    text = kernel("""
        and.b32 %r4, %r0, 1; setp.eq.s32 %p1, %r4, 0; mov.b32 %r5, 0;
        @%p1 bra JOIN;
    LOOP:
        add.s32 %r5, %r5, 2; setp.lt.s32 %p2, %r5, %r3; @%p2 bra LOOP;
    JOIN:
        shfl.sync.bfly.b32 %r6, %r5, 1, 31, -1;
        st.global.u32 [%out], %r6; ret;""")
    found = run(text, np.arange(64, dtype=np.uint32), blocks=2)
    expected = np.where(np.arange(64) % 2, 0, np.arange(64) + 2)
    assert (found == expected).all()


def test_a_barrier_makes_what_was_written_visible_and_no_other_does() -> None:
    body = """
        mov.u32 %r4, shared; shl.b32 %r5, %r0, 2; add.s32 %r6, %r4, %r5; sub.s32 %r7, 252, %r5; add.s32 %r8, %r4, %r7;
        st.shared.u32 [%r6], %r3; {barrier} ld.shared.u32 %r9, [%r8]; st.global.u32 [%out], %r9; ret;"""
    shared = ".shared .align 4 .b8 shared[256];"
    source = np.arange(128, dtype=np.uint32)
    reversed_blocks = source.reshape(2, 64)[:, ::-1].ravel()
    found = run(kernel(body.format(barrier="bar.sync 0;"), shared), source, blocks=2, threads=64)
    assert (found == reversed_blocks).all()
    with pytest.raises(Race):
        run(kernel(body.format(barrier=""), shared), source, blocks=2, threads=64)


@pytest.mark.parametrize("order", ["load first", "store first"])
def test_nothing_orders_two_blocks(order: str) -> None:
    # every thread stores to its own place and loads that of its neighbour, in the same array
    source = np.arange(128, dtype=np.uint32)
    load, store = "ld.global.u32 %r9, [%in+4];", "st.global.u32 [%in], %r0;"
    guarded = f"setp.ge.u32 %p1, %at, 127; @%p1 ret; {load if order == 'load first' else store} bar.sync 0;"
    text = kernel(f"setp.eq.u32 %p1, %at, 127; @!%p1 {load} bar.sync 0; {store} ret;")
    if order == "store first":
        text = kernel(f"{store} bar.sync 0; setp.eq.u32 %p1, %at, 127; @!%p1 {load} ret;")
    with pytest.raises(Race):
        run(text, source, blocks=2, threads=64)
    with pytest.raises(Divergence):
        run(kernel(guarded + "ret;"), source, blocks=2, threads=64)


def test_what_is_not_known_is_refused_before_it_runs() -> None:
    for body in ("ex3.f32 %f0, %f1;", "add.rm.f32 %f0, %f1, %f2;", "lg2.approx.f32 %f0, %f1;", "bar.arrive 0, 64;"):
        with pytest.raises(Unsupported):
            run(kernel(body + " ret;"), np.zeros(32, np.uint32))


def test_a_launch_that_does_not_fit() -> None:
    text = kernel("ret;")
    with pytest.raises(BadLaunch, match="threads"):
        run(text, np.zeros(33, np.uint32), threads=33)
    with pytest.raises(OutOfBounds, match="byte 128 of in"):
        run(text, np.zeros(32, np.uint32), blocks=2)
    with pytest.raises(BadLaunch, match="16 bytes of parameters, got 8"):
        launch(Program(ptx.kernels(text)["test"]), (1,), 32, bytes(8), GlobalMemory([], 32))
