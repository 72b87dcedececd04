from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from densegrpo_fast.flow.noise import Stream, branch_stream, gaussian, philox4x32

# Known answers of the Random123 distribution for philox4x32-10: counter, key, output.
KNOWN_ANSWERS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    (
        (0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0xFFFFFFFF),
        (0xFFFFFFFF, 0xFFFFFFFF),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def draw(shape: tuple[int, ...] = (1024,), batch: int = 4, **options) -> Tensor:
    options = {"seed": 7, "sample_index": torch.arange(batch), "step": 0, **options}
    return gaussian(shape, **options)


def philox_by_hand(counter: tuple[int, ...], key: tuple[int, ...]) -> tuple[int, ...]:
    """The generator in Python's unbounded integers."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN_ANSWERS)
def test_philox_known_answers(counter, key, expected) -> None:
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(word) for word in words) == expected


WORD = st.integers(0, 2**32 - 1)


@settings(deadline=None, max_examples=50)
@given(counter=st.tuples(WORD, WORD, WORD, WORD), key=st.tuples(WORD, WORD))
def test_philox_equals_unbounded_arithmetic(counter, key) -> None:
    words = philox4x32(tuple(torch.tensor([c]) for c in counter), tuple(torch.tensor([k]) for k in key))
    assert tuple(int(word) for word in words) == philox_by_hand(counter, key)


def test_layout_is_the_documented_one() -> None:
    # Every counter field gets another value; elements 8 ... 11 (counter word 0 = 2) are rebuilt by hand.
    seed, index, step, stream, epoch = (3 << 40) + 5, 11, 6, int(Stream.CALIBRATION), 9
    r = philox_by_hand((2, step | stream << 16, index, epoch), (seed % 2**32, seed >> 32))
    expected = []
    for even, odd in ((r[0], r[1]), (r[2], r[3])):
        radius = math.sqrt(-2 * math.log(((even >> 8) + 1) / 2**24))
        angle = 2 * math.pi * (odd >> 8) / 2**24
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    noise = gaussian((3, 4), seed=seed, sample_index=torch.tensor([index]), step=step, stream=stream, epoch=epoch)
    torch.testing.assert_close(noise[0, 2], torch.tensor(expected), rtol=2e-7, atol=0)


def test_distribution_is_standard_normal() -> None:
    noise = draw((16, 32, 32), batch=16).flatten()
    count = noise.numel()
    # Five standard errors of each moment of a normal sample.
    assert abs(noise.mean()) < 5 / math.sqrt(count)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / count)
    assert abs((noise**3).mean()) < 5 * math.sqrt(15 / count)
    assert abs((noise**4).mean() - 3) < 5 * math.sqrt(96 / count)
    assert stats.kstest(noise.numpy(), "norm").pvalue > 0.01


def test_neighbouring_draws_are_uncorrelated() -> None:
    base = {"seed": 7, "step": 3, "stream": Stream.STEP, "epoch": 2}
    others = [
        {"seed": 8},
        {"step": 4},
        {"stream": Stream.EVALUATION},
        {"epoch": 3},
        {"stream": branch_stream(0)},
    ]
    draws = [draw((8192,), batch=2, **{**base, **other}) for other in [{}, *others]]
    rows = torch.cat(draws)
    correlation = torch.corrcoef(rows) - torch.eye(len(rows))
    assert correlation.abs().max() < 5 / math.sqrt(8192)
    lagged = torch.corrcoef(torch.stack([draws[0][0, shift : 8000 + shift] for shift in range(6)])) - torch.eye(6)
    assert lagged.abs().max() < 5 / math.sqrt(8000)


@settings(deadline=None, max_examples=20)
@given(order=st.permutations(range(6)), split=st.integers(1, 5), elements=st.sampled_from([1, 2, 3, 5, 8, 1021]))
def test_noise_does_not_depend_on_the_batch(order: list[int], split: int, elements: int) -> None:
    whole = draw((elements,), batch=6)
    index = torch.tensor(order)
    parts = [draw((elements,), sample_index=part) for part in (index[:split], index[split:])]
    assert torch.equal(torch.cat(parts), whole[index])


def test_noise_does_not_depend_on_the_shape() -> None:
    assert torch.equal(draw((4, 5, 3)).flatten(1), draw((60,)))
    assert torch.equal(draw((60,)), draw((64,))[:, :60])


def test_tensor_arguments_equal_integers() -> None:
    steps = torch.tensor([0, 3, 3, 9])
    mixed = draw(step=steps, seed=torch.tensor([7]), epoch=torch.tensor(5))
    for row, step in enumerate(steps.tolist()):
        assert torch.equal(mixed[row], draw(step=step, epoch=5)[row])


def test_all_64_bits_of_the_seed_count() -> None:
    assert not torch.equal(draw(seed=7), draw(seed=7 + (1 << 33)))


def test_empty_samples() -> None:
    assert draw((0,)).shape == (4, 0)
    assert draw((5,), sample_index=torch.zeros(0, dtype=torch.int64)).shape == (0, 5)


def test_streams_are_distinct_and_fit() -> None:
    streams = [*map(int, Stream), branch_stream(1), branch_stream(65279)]
    assert len(set(streams)) == len(streams)
    assert all(0 <= stream < 2**16 for stream in streams)
    with pytest.raises(ValueError, match="branch must be in"):
        branch_stream(65280)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"sample_index": torch.arange(4).float()}, TypeError, "sample_index must be an int64 tensor"),
        ({"sample_index": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"shape \[B\], got \[2, 2\]"),
        ({"seed": -1}, ValueError, r"seed must be in \[0, 2\^63\), got -1"),
        ({"seed": 1.5}, TypeError, "seed must be an int or an int64 tensor, got float"),
        ({"step": 1 << 16}, ValueError, r"step must be in \[0, 2\^16\)"),
        (
            {"step": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"step must have shape \[1\] or \[4\], got \[3\]",
        ),
        ({"epoch": 1 << 32}, ValueError, r"epoch must be in \[0, 2\^32\)"),
        ({"epoch": torch.zeros(1)}, TypeError, "epoch must be int64, got torch.float32"),
        ({"stream": 1 << 16}, ValueError, r"stream must be in \[0, 65535\]"),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        draw(**options)
