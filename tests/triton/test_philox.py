from __future__ import annotations

import math

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from densegrpo_fast.flow.noise import philox4x32
from densegrpo_fast.kernels import philox

WORD = 2**32 - 1


@triton.jit
def words_kernel(fields_ptr, stream, words_ptr, COUNT: tl.constexpr):
    """Words of COUNT counters; fields are quad, step, sample, iteration and seed, [5, COUNT] int64, one by one."""
    index = tl.program_id(0)
    quad = tl.load(fields_ptr + index) + tl.arange(0, 4)
    step = tl.load(fields_ptr + COUNT + index)
    sample = tl.load(fields_ptr + 2 * COUNT + index)
    iteration = tl.load(fields_ptr + 3 * COUNT + index)
    seed = tl.load(fields_ptr + 4 * COUNT + index)
    word0, word1, word2, word3 = philox.random_words(quad, step, stream, sample, iteration, seed)
    offset = index * 16 + tl.arange(0, 4)
    tl.store(words_ptr + offset, word0.to(tl.int64))
    tl.store(words_ptr + offset + 4, word1.to(tl.int64))
    tl.store(words_ptr + offset + 8, word2.to(tl.int64))
    tl.store(words_ptr + offset + 12, word3.to(tl.int64))


@triton.jit
def normals_kernel(radius_word_ptr, turn_word_ptr, out_ptr, BLOCK: tl.constexpr):
    """-2 ln u, the cosine's normal and the sine's, [3, BLOCK] float32, of words held in int64."""
    index = tl.arange(0, BLOCK)
    radius_word = tl.load(radius_word_ptr + index).to(tl.uint32)
    cosine, sine = philox.box_muller(radius_word, tl.load(turn_word_ptr + index).to(tl.uint32))
    tl.store(out_ptr + index, philox.minus_two_log(radius_word))
    tl.store(out_ptr + BLOCK + index, cosine)
    tl.store(out_ptr + 2 * BLOCK + index, sine)


def words(fields: list[tuple[int, ...]], stream: int, device: torch.device) -> Tensor:
    """Words of four neighbouring quads per counter, [counters, 4 words, 4 quads]."""
    out = torch.empty(len(fields), 4, 4, dtype=torch.int64, device=device)
    columns = torch.tensor(fields, device=device).T.contiguous()
    words_kernel[(len(fields),)](columns, stream, out, COUNT=len(fields))
    return out.cpu()


@pytest.mark.capabilities(80, 100)
def test_known_answers(device: torch.device) -> None:
    # Random123's vectors, their counter words split into the fields of the layout; the seed -1 is the key of all ones.
    assert words([(0, 0, 0, 0, 0)], 0, device)[0, :, 0].tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    ones = words([(WORD, 0xFFFF, WORD, WORD, -1)], 0xFFFF, device)[0, :, 0]
    assert ones.tolist() == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]
    seed = (0x299F31D0 << 32) + 0xA4093822
    pi = words([(0x243F6A88, 0x08D3, 0x13198A2E, 0x03707344, seed)], 0x85A3, device)[0, :, 0]
    assert pi.tolist() == [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]


@pytest.mark.parametrize("stream", [0, 1, 0x8000, 0xFFFF])
def test_words_equal_the_layout(device: torch.device, stream: int) -> None:
    generator = torch.Generator().manual_seed(stream)
    limits = (WORD - 4, 0xFFFF, WORD, WORD, 2**63 - 1)
    fields = [tuple(int(torch.randint(limit, (), generator=generator)) for limit in limits) for _ in range(12)]
    fields += [tuple(limits), (0, 0, 0, 0, 0)]
    quad, step, sample, iteration, seed = torch.tensor(fields).T[..., None]
    counter = (quad + torch.arange(4), step | stream << 16, sample, iteration)
    expected = torch.stack(philox4x32(counter, (seed & WORD, seed >> 32)), dim=1)
    assert torch.equal(words(fields, stream, device), expected)


def test_normals_are_accurate_at_every_edge(device: torch.device) -> None:
    # u at and just below 1, at its smallest, around the powers of 2 and of sqrt(2) where the reduction turns over;
    # turns at and beside every multiple of 1/8.
    largest = 2**24 - 1
    radius = [largest - k for k in range(9)] + [0, 1, 2]
    radius += [2**k - 1 + d for k in range(2, 24) for d in (-1, 0, 1)]
    radius += [int(2 ** (k + 0.5)) - 1 + d for k in range(2, 24) for d in (-1, 0, 1, 2)]
    turns = [(k * 2**21 + d) % 2**24 for k in range(8) for d in (-2, -1, 0, 1, 2)]
    pairs = torch.cartesian_prod(torch.tensor(radius), torch.tensor(turns))
    pairs = torch.cat([pairs, torch.randint(2**24, (2**14 - len(pairs), 2))])
    # The low 8 bits of a word do not count.
    shifted = (pairs << 8) + torch.randint(256, pairs.shape)
    out = torch.empty(3, len(pairs), device=device)
    for part in range(0, len(pairs), 1024):
        radius_word, turn_word = shifted[part : part + 1024].T.contiguous().to(device)
        piece = torch.empty(3, 1024, device=device)
        normals_kernel[(1,)](radius_word, turn_word, piece, BLOCK=1024)
        out[:, part : part + 1024] = piece
    logarithm = -2 * ((pairs[:, 0] + 1).double() / 2**24).log()
    turn = pairs[:, 1].double() * (2 * math.pi / 2**24)
    expected = torch.stack([logarithm, logarithm.sqrt() * turn.cos(), logarithm.sqrt() * turn.sin()])
    torch.testing.assert_close(out.cpu().double()[0], expected[0], rtol=4e-7, atol=0)
    torch.testing.assert_close(out.cpu().double()[1:], expected[1:], rtol=1e-6, atol=1e-14)
