"""Confidence intervals: by hand, coverage, clustering by prompt, pairing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from densegrpo_fast.run_files.intervals import mean_interval, paired_interval


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


def test_bad_input_is_refused():
    with pytest.raises(ValueError, match="at least one value that is not missing"):
        mean_interval([math.nan])
    with pytest.raises(ValueError, match=r"confidence must lie in \(0, 1\), got 95"):
        mean_interval([1.0, 2.0], confidence=95)
    with pytest.raises(ValueError, match=r"shape \[N\] or \[N, S\], got \[1, 1, 1\]"):
        mean_interval([[[1.0]]])
    with pytest.raises(ValueError, match="must cover the same prompts, got 2 and 3"):
        paired_interval([1.0, 2.0], [1.0, 2.0, 3.0])
