"""Means and paired differences of several subjects, checked by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from densegrpo_fast.run_files.comparison import compare, tables

HARD = np.array([[0.0], [1.0], [2.0], [3.0]])
NAN = math.nan


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
