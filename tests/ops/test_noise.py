from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from densegrpo_fast.flow.noise import Stream, _box_muller, branch_stream, gaussian, philox4x32

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
    seed, index, step, stream, iteration = (3 << 40) + 5, 11, 6, int(Stream.CALIBRATION), 9
    r = philox_by_hand((2, step | stream << 16, index, iteration), (seed % 2**32, seed >> 32))
    expected = []
    for even, odd in ((r[0], r[1]), (r[2], r[3])):
        radius = math.sqrt(-2 * math.log(((even >> 8) + 1) / 2**24))
        angle = 2 * math.pi * (odd >> 8) / 2**24
        expected += [radius * math.cos(angle), radius * math.sin(angle)]
    noise = gaussian(
        (3, 4), seed=seed, sample_index=torch.tensor([index]), step=step, stream=stream, iteration=iteration
    )
    torch.testing.assert_close(noise[0, 2], torch.tensor(expected), rtol=2e-7, atol=0)


MILLION = 2**20


@pytest.fixture(scope="module")
def million() -> Tensor:
    """2^20 normals of 16 samples."""
    return draw((16, 64, 64), batch=16)


def test_distribution_is_standard_normal(million: Tensor) -> None:
    noise = million.flatten().double()
    # Five standard errors of each moment of a normal sample.
    assert abs(noise.mean()) < 5 / math.sqrt(MILLION)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / MILLION)
    assert abs((noise**3).mean()) < 5 * math.sqrt(15 / MILLION)
    assert abs((noise**4).mean() - 3) < 5 * math.sqrt(96 / MILLION)
    assert stats.kstest(noise.numpy(), "norm").pvalue > 0.01
    # Beyond 4.5 lie 6.8e-6 of a normal distribution: 7.1 are expected, and at most 18 with probability .9998.
    assert 1 <= (noise.abs() > 4.5).sum() <= 18


def test_each_of_the_four_normals_of_a_counter_is_standard(million: Tensor) -> None:
    # Cosine and sine of either pair of words: each alone, so that a fault of one is not diluted by the others.
    for normals in million.reshape(-1, 4).unbind(1):
        assert stats.kstest(normals.numpy(), "norm").pvalue > 0.01


def assert_independent(one: Tensor, other: Tensor) -> None:
    """Neither values nor sizes of two sets of normals go together: correlations within five standard errors of 0."""
    one, other = one.flatten().double(), other.flatten().double()
    bound = 5 / math.sqrt(one.numel())
    assert abs((one * other).mean()) < bound
    # (x^2 - 1) / sqrt(2) has mean 0 and variance 1
    assert abs(((one**2 - 1) * (other**2 - 1)).mean() / 2) < bound


@pytest.mark.parametrize("lag", [1, 2, 3, 4, 7, 64, 4096])
def test_elements_of_a_sample_are_independent(million: Tensor, lag: int) -> None:
    rows = million.flatten(1)
    assert_independent(rows[:, :-lag], rows[:, lag:])


@pytest.mark.parametrize("shift", [1, 2, 8])
def test_samples_are_independent(million: Tensor, shift: int) -> None:
    assert_independent(million, million.roll(shift, 0))


@pytest.mark.parametrize(
    "other",
    [
        {"step": 1},
        {"step": 9},
        {"stream": Stream.STEP},
        {"stream": Stream.EVALUATION},
        {"stream": branch_stream(0)},
        {"iteration": 1},
        {"seed": 8},
        {"seed": 7 + (1 << 32)},
        {"sample_index": torch.arange(16) + 16},
    ],
    ids=str,
)
def test_steps_streams_epochs_and_seeds_are_independent(million: Tensor, other: dict) -> None:
    assert_independent(million, draw((16, 64, 64), batch=16, **other))


def test_the_check_of_independence_can_fail(million: Tensor) -> None:
    mixed = (million + 0.01 * million.roll(1, 0)) / math.sqrt(1 + 0.01**2)
    for dependent in (million, mixed, million * draw((16, 64, 64), batch=16, step=1).sign()):
        with pytest.raises(AssertionError):
            assert_independent(dependent, million.roll(1, 0) if dependent is mixed else million)


def test_the_radius_keeps_its_digits_near_1() -> None:
    # u = 1 - k*2^-24: -ln u = k*2^-24 + ..., of which log1p knows every digit.
    distance = torch.arange(1, 4097)
    words = (2**24 - 1 - distance) << 8
    cosine, sine = _box_muller(words, torch.zeros_like(words))
    expected = torch.sqrt(-2 * torch.log1p(-distance.double() * 2.0**-24))
    torch.testing.assert_close(cosine.double(), expected, rtol=1e-7, atol=0)
    assert (sine == 0).all()
    assert _box_muller(torch.tensor([2**32 - 1]), torch.tensor([0]))[0] == 0


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
    mixed = draw(step=steps, seed=torch.tensor([7]), iteration=torch.tensor(5))
    for row, step in enumerate(steps.tolist()):
        assert torch.equal(mixed[row], draw(step=step, iteration=5)[row])


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
        ({"iteration": 1 << 32}, ValueError, r"iteration must be in \[0, 2\^32\)"),
        ({"iteration": torch.zeros(1)}, TypeError, "iteration must be int64, got torch.float32"),
        ({"stream": 1 << 16}, ValueError, r"stream must be in \[0, 65535\]"),
    ],
)
def test_bad_arguments_are_named(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        draw(**options)
