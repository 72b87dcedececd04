"""Device functions for the noise layout of `flow/noise.py`: random words and the normals they make.

Integers equal that file's exactly, normals agree to atol = rtol = 1e-6 everywhere, also where the radius goes to 0.
The logarithm, sine and cosine are polynomials on arguments that were reduced on the integers, where reduction is
exact. Library functions would not do: the fast logarithm loses the digits near 1, and the exact sine reduces its
argument through a table in local memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

_ROUNDS = tl.constexpr(10)
_SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)
_WORD_BITS = tl.constexpr(24)
_ULP = tl.constexpr(2.0**-24)
_LN2_TIMES_MINUS_2 = tl.constexpr(-1.3862943611198906)


@triton.jit
def random_words(quad, step, stream, sample, iteration, seed):
    """Philox4x32-10 words of some quads of elements.

    Args:
        quad: element // 4, integer block.
        step, stream: 16-bit integers.
        sample, iteration: integers, the low 32 bits count.
        seed: 64-bit key.

    Returns:
        four uint32 blocks.
    """
    word1 = step.to(tl.uint32) | (tl.cast(stream, tl.uint32) << 16)
    return tl.philox(seed, quad.to(tl.uint32), word1, sample.to(tl.uint32), iteration.to(tl.uint32), _ROUNDS)


@triton.jit
def minus_two_log(word):
    """-2 ln u of u = ((word >> 8) + 1) * 2^-24, float32, to a relative error of about 1e-7 also near u = 1.

    u = m * 2^e with m in [sqrt(1/2), sqrt(2)); f = m - 1 is exact, and -2 ln(1 + f) = f * (-2 + f * P(f)) with a P
    fitted to the smallest relative error of the whole (3e-8).
    """
    scaled = ((word >> 8) + 1).to(tl.int32).to(tl.float32)
    bits = scaled.to(tl.int32, bitcast=True)
    exponent = (bits - _SQRT_HALF_BITS) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    p = tl.fma(f, -0.17469681799411774, 0.28615042567253113)
    p = tl.fma(f, p, -0.2983594834804535)
    p = tl.fma(f, p, 0.33141016960144043)
    p = tl.fma(f, p, -0.39924144744873047)
    p = tl.fma(f, p, 0.5000351071357727)
    p = tl.fma(f, p, -0.6666790246963501)
    p = tl.fma(f, p, 0.9999998211860657)
    logarithm = f * tl.fma(f, p, -2.0)
    return tl.fma((exponent - _WORD_BITS).to(tl.float32), _LN2_TIMES_MINUS_2, logarithm)


@triton.jit
def cosine_and_sine(word):
    """cos and sin of 2 pi turn, turn = (word >> 8) * 2^-24, float32.

    The nearest quarter turn is taken off the integer, which leaves t in [-1/8, 1/8]; polynomials in t^2, fitted to the
    smallest relative error (3e-8 and 3e-9), do the rest.
    """
    turn = (word >> 8).to(tl.int32)
    quarter = (turn + (1 << 21)) >> 22
    t = (turn - (quarter << 22)).to(tl.float32) * _ULP
    s = t * t
    sine = tl.fma(s, -75.40206909179688, 81.5925521850586)
    sine = tl.fma(s, sine, -41.3416633605957)
    sine = t * tl.fma(s, sine, 6.2831854820251465)
    cosine = tl.fma(s, -83.66592407226562, 64.92322540283203)
    cosine = tl.fma(s, cosine, -19.739168167114258)
    cosine = tl.fma(s, cosine, 1.0)
    odd = (quarter & 1) == 1
    turned_cosine = tl.where(odd, sine, cosine)
    turned_sine = tl.where(odd, cosine, sine)
    turned_cosine = tl.where(((quarter + 1) & 2) == 2, -turned_cosine, turned_cosine)
    turned_sine = tl.where((quarter & 2) == 2, -turned_sine, turned_sine)
    return turned_cosine, turned_sine


@triton.jit
def box_muller(radius_word, turn_word):
    """Two blocks of standard normals from two blocks of words: the cosine's and the sine's."""
    radius = tl.sqrt(minus_two_log(radius_word))
    cosine, sine = cosine_and_sine(turn_word)
    return radius * cosine, radius * sine


@triton.jit
def gaussian(block, step, stream, sample, iteration, seed, BLOCK: tl.constexpr):
    """Normals of elements [block * BLOCK, (block + 1) * BLOCK) of one sample, [BLOCK] float32, in order.

    Args:
        block: index of the block of elements.
        step, stream, sample, iteration, seed: as `random_words`.
        BLOCK: elements, a power of 2, at least 4.
    """
    quad = block * (BLOCK // 4) + tl.arange(0, BLOCK // 4)
    word0, word1, word2, word3 = random_words(quad, step, stream, sample, iteration, seed)
    normal0, normal1 = box_muller(word0, word1)
    normal2, normal3 = box_muller(word2, word3)
    # [quad, pair, member of the pair]: row-major order is the order of the elements.
    return tl.join(tl.join(normal0, normal2), tl.join(normal1, normal3)).reshape(BLOCK)
