"""Intervals over prompts, by hand, and the comparison of several models prompt by prompt."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from densegrpo_fast.run_files.statistics import compare, mean_interval, paired_interval, tables

HARD = np.array([[0.0], [1.0], [2.0], [3.0]])
NAN = math.nan


def test_numbers_by_hand():
    # values 1 2 3: mean 2, sample std 1, error 1/sqrt(3); t with 2 degrees of freedom at 97.5% is 4.302653
    mean, low, high = mean_interval([1.0, 2.0, 3.0])
    reach = 4.302653 / math.sqrt(3)
    assert (mean, low, high) == (2.0, pytest.approx(2 - reach, rel=1e-6), pytest.approx(2 + reach, rel=1e-6))


def test_samples_of_one_prompt_count_once():
    clustered = mean_interval([[0.0, 2.0], [1.0, 3.0], [2.0, 4.0]])
    assert clustered == mean_interval([1.0, 2.0, 3.0])
    repeated = np.repeat([[1.0], [2.0], [3.0]], 50, axis=1)
    assert mean_interval(repeated) == clustered, "copies of a sample add no evidence"


def test_missing_values_are_left_out():
    nan = math.nan
    assert mean_interval([[1.0, nan], [2.0, 2.0], [nan, 3.0], [nan, nan]]) == mean_interval([1.0, 2.0, 3.0])
    assert paired_interval([1.0, nan, 1.0, 5.0], [2.0, 3.0, 4.0, nan]) == mean_interval([1.0, 3.0])


def test_pairing_removes_what_prompts_have_in_common():
    difficulty = np.linspace(0, 10, 20)
    gain = np.where(np.arange(20) % 2, 0.1, 0.2)
    change = paired_interval(difficulty, difficulty + gain)
    assert change.mean == pytest.approx(0.15) and change.low > 0.1 and change.high < 0.2
    unpaired = mean_interval(difficulty)
    assert unpaired.high - unpaired.low > 10 * (change.high - change.low)


@pytest.mark.parametrize("confidence", [0.5, 0.95])
def test_the_interval_covers_the_true_mean_as_often_as_it_says(confidence):
    samples = np.random.default_rng(0).normal(3.0, 2.0, size=(1500, 8))
    intervals = [mean_interval(row, confidence) for row in samples]
    covered = np.mean([low <= 3.0 <= high for _, low, high in intervals])
    assert covered == pytest.approx(confidence, abs=0.04)


def test_one_prompt_has_a_mean_but_no_interval():
    mean, low, high = mean_interval([[0.5, 0.7]])
    assert mean == pytest.approx(0.6) and math.isnan(low) and math.isnan(high)


def test_an_interval_stays_within_the_bounds_of_its_values():
    values = [0.0, 1.0]
    mean, low, high = mean_interval(values)
    assert low < -5 and high > 5 and mean_interval(values, bounds=(0, 1)) == (mean, 0, 1)
    assert paired_interval(values, [1.0, 0.0], bounds=(0, 1)) == (0, -1, 1)
    scores = {"reward": [[value] for value in values]}
    found = compare({"a": scores, "b": scores}, {"reward": (0, 1)})
    assert (found["subjects"]["a"]["reward"]["low"], found["subjects"]["a"]["reward"]["high"]) == (0, 1)


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one value that is not missing"):
        mean_interval([math.nan])
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\), got 95"):
        mean_interval([1.0, 2.0], confidence=95)
    with pytest.raises(ValueError, match=r"shape \[N\] or \[N, S\], got \[1, 1, 1\]"):
        mean_interval([[[1.0]]])
    with pytest.raises(ValueError, match="must cover the same prompts, got 2 and 3"):
        paired_interval([1.0, 2.0], [1.0, 2.0, 3.0])


def test_prompts_are_compared_with_themselves() -> None:
    found = compare({"a": {"reward": HARD}, "b": {"reward": HARD + [[0.1], [0.2], [0.1], [0.2]]}})
    a, b = (found["subjects"][name]["reward"] for name in "ab")
    assert (a["mean"], b["mean"]) == (1.5, pytest.approx(1.65))
    # alone the intervals overlap widely; of the differences .1 .2 .1 .2 the mean is .15, their standard deviation
    # sqrt(4 * .05^2 / 3), and Student's t for 3 degrees of freedom 3.182446
    assert a["high"] > b["low"]
    (difference,) = found["differences"]
    reach = 3.182446 * math.sqrt(4 * 0.05**2 / 3) / math.sqrt(4)
    assert difference["mean"] == pytest.approx(0.15)
    assert (difference["low"], difference["high"]) == (
        pytest.approx(0.15 - reach, abs=1e-6),
        pytest.approx(0.15 + reach, abs=1e-6),
    )
    assert difference["verdict"] == "better"


def test_every_two_are_compared_the_later_with_the_earlier() -> None:
    found = compare({"base": {"r": HARD}, "a": {"r": HARD - [[1.0], [1.1], [1.0], [1.1]]}, "b": {"r": HARD}})
    pairs = [(item["second"], item["first"], item["verdict"]) for item in found["differences"]]
    assert pairs == [("a", "base", "worse"), ("b", "base", "no difference shown"), ("b", "a", "better")]


def test_missing_scores_are_counted_and_left_out() -> None:
    first = np.array([[1.0, NAN], [2.0, 2.0], [NAN, NAN]])
    second = np.array([[2.0, 2.0], [2.0, 2.0], [9.0, 9.0]])
    found = compare({"a": {"r": first}, "b": {"r": second}})
    assert found["subjects"]["a"]["r"]["missing"] == pytest.approx(0.5)
    assert found["subjects"]["a"]["r"]["mean"] == pytest.approx(1.5)
    # prompts 0 and 1 have scores on both sides: changes 1 and 0
    assert found["differences"][0]["mean"] == pytest.approx(0.5)


def test_what_cannot_be_said_is_none_and_a_dash() -> None:
    found = compare({"a": {"r": np.array([[NAN]])}, "b": {"r": np.array([[1.0]])}})
    assert found["subjects"]["a"]["r"] == {"mean": None, "low": None, "high": None, "missing": 1.0}
    assert found["subjects"]["b"]["r"]["low"] is None, "one prompt allows no interval"
    assert found["differences"][0]["verdict"] == "no difference shown"
    json.dumps(found, allow_nan=False)
    assert "nan" not in tables(found)


def test_the_tables_line_up() -> None:
    lines = tables(compare({"base": {"r": HARD}, "longer": {"r": HARD + 1}})).splitlines()
    assert lines[0].split() == ["subject", "reward", "mean", "95%", "interval", "missing"]
    assert lines[2].index("1.5000") == lines[3].index("2.5000") == lines[0].index("mean")
    assert lines[-1].split()[:5] == ["longer", "-", "base", "r", "+1.0000"] and lines[-1].endswith("better")
    assert len(tables(compare({"base": {"r": HARD}})).splitlines()) == 3, "alone there is nothing to compare"
