"""Steps drawn with known probabilities: what the draws promise, and that dividing by them leaves the mean gradient."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from densegrpo_fast.sampling.step_draws import draw_steps, inclusion_probabilities

SIZES = st.lists(st.floats(0, 1e6, allow_subnormal=False), min_size=1, max_size=12)


@given(SIZES, st.integers(1, 12), st.floats(0, 1, exclude_max=True))
def test_as_many_as_asked_for_are_drawn_and_none_without_size(sizes, count, start):
    assume(sum(size > 0 for size in sizes) >= count)
    probabilities = inclusion_probabilities(sizes, count)
    assert sum(probabilities) == count
    assert all(0 <= p <= 1 for p in probabilities)
    drawn = draw_steps(probabilities, start)
    assert len(drawn) == count and drawn == sorted(set(drawn))
    assert all(sizes[index] > 0 for index in drawn)


@given(SIZES, st.integers(1, 12))
def test_probabilities_are_in_proportion_to_the_sizes_below_one(sizes, count):
    assume(sum(size > 0 for size in sizes) >= count)
    probabilities = inclusion_probabilities(sizes, count)
    shares = {p / Fraction(size) for p, size in zip(probabilities, sizes, strict=True) if size and p < 1}
    assert len(shares) <= 1
    # what is certain would have a probability of 1 or more in the others' proportion
    certain = [Fraction(size) for size, p in zip(sizes, probabilities, strict=True) if p == 1]
    assert all(size * share >= 1 for size in certain for share in shares)


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 8))
def test_each_is_drawn_with_its_own_probability(sizes, count):
    assume(len(sizes) >= count)
    probabilities = inclusion_probabilities(sizes, count)
    cells = 1
    for p in probabilities:
        cells = math.lcm(cells, p.denominator)
    assume(cells <= 400)
    # between two neighbouring multiples of 1 / cells every start draws the same
    hits = [draw_steps(probabilities, (cell + 0.5) / cells) for cell in range(cells)]
    assert [Fraction(sum(index in drawn for drawn in hits), cells) for index in range(len(sizes))] == probabilities


def test_too_few_candidates_are_refused():
    with pytest.raises(ValueError, match="at least 2 positive sizes"):
        inclusion_probabilities([1.0, 0.0, 0.0], 2)
