"""The board's arithmetic: marks, crossings and intervals of runs that are known."""

from __future__ import annotations

import pytest

from benches.learning.marks import board


def run(method: str, seed: int, values: list[float], operations: float) -> dict:
    """A run evaluated every two iterations of `operations` TFLOP and ten forwards each."""
    return {
        "variant": method,
        "seed": seed,
        "points": [
            {
                "iteration": 2 * index,
                "operations": 2 * index * operations,
                "nfe": {"rollout": 20.0 * index},
                "held_out": {"reward": value},
            }
            for index, value in enumerate(values)
        ],
    }


SECONDS = {"sparse": 3.0, "other": 5.0}


def test_marks_are_of_sparses_gain_and_crossings_are_linear():
    runs = [run("sparse", seed, [0.5, 0.6, 0.7], 1.0) for seed in (1, 2)]
    runs += [run("other", seed, [0.5, 0.7, 0.65], 3.0) for seed in (1, 2)]
    found = board({"runs": runs}, SECONDS, "sparse")
    assert found["marks"] == pytest.approx([0.6, 0.7])
    assert found["methods"]["sparse"]["operations_to_mark"] == pytest.approx([2.0, 4.0])
    # half of the gain after half of the first two iterations, all of it at their end
    other = found["methods"]["other"]
    assert other["operations_to_mark"] == pytest.approx([3.0, 6.0])
    assert other["iterations_to_mark"] == pytest.approx([1.0, 2.0])
    assert other["seconds_to_mark"] == pytest.approx([5.0, 10.0])
    assert other["forwards_to_mark"] == pytest.approx([10.0, 20.0])
    assert other["ratio_to_sparse"] == pytest.approx([1.5, 1.5])
    # equal seeds leave nothing to vary
    assert other["interval"] == [pytest.approx([1.5, 1.5]), pytest.approx([1.5, 1.5])]


def test_a_mark_that_is_not_reached_has_no_number():
    runs = [run("sparse", 1, [0.5, 0.7], 1.0), run("other", 1, [0.5, 0.62], 1.0)]
    other = board({"runs": runs}, SECONDS, "sparse")["methods"]["other"]
    assert other["operations_to_mark"][0] is not None
    assert other["operations_to_mark"][1] is other["seconds_to_mark"][1] is other["ratio_to_sparse"][1] is None
    assert other["interval"][1] == [None, None]


def test_the_interval_holds_what_seeds_differ_by():
    runs = [run("sparse", seed, [0.5, 0.7], 1.0) for seed in (1, 2, 3)]
    runs += [run("other", seed, [0.5, end], 1.0) for seed, end in ((1, 0.7), (2, 0.9), (3, 0.75))]
    found = board({"runs": runs}, SECONDS, "sparse")["methods"]["other"]
    low, high = found["interval"][1]
    assert low < found["ratio_to_sparse"][1] < high
    # seed 2 alone is there after half of sparse's operations, seed 1 alone after all of them
    assert low == pytest.approx(0.5, abs=0.06) and high == pytest.approx(1.0, abs=0.06)


def test_only_seeds_that_every_method_has_count():
    runs = [run("sparse", seed, [0.5, 0.7], 1.0) for seed in (1, 2)] + [run("other", 1, [0.5, 0.8], 1.0)]
    assert board({"runs": runs}, SECONDS, "sparse")["seeds"] == [1]
    with pytest.raises(ValueError, match="no seed was run by every method"):
        board({"runs": runs[1:]}, SECONDS, "sparse")
