"""Granular credit: a branch's advantages by several completions, summed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.credit.branch import branch_advantages
from densegrpo_fast.credit.granular import granular_advantages
from densegrpo_fast.credit.normalize import Advantages


def granular(rewards: torch.Tensor, **options: Any) -> Advantages:
    return granular_advantages(rewards, granularities=range(rewards.shape[-1]), **options)


def test_numbers_by_hand() -> None:
    # Four branches. By the coarse completion 0 2 2 4: mean 2, variance (4 + 0 + 0 + 4)/3, so -r 0 0 r with
    # r = 2/sqrt(8/3) = sqrt(3/2). By the fine one 1 3 1 3: mean 2, variance 4/3, so -s s -s s with s = sqrt(3/4). The
    # sum is -r-s, s, -s, r+s; the epsilon of 1e-8 is below float32's resolution.
    rewards = torch.tensor([[0.0, 1], [2, 3], [2, 1], [4, 3]])[None, None, :, None]
    found = granular(rewards)
    r, s = math.sqrt(3 / 2), math.sqrt(3 / 4)
    torch.testing.assert_close(found.values.flatten(), torch.tensor([-r - s, s, -s, r + s]))
    # clamped after the sum, not before
    torch.testing.assert_close(granular(rewards, clip=2.0).values.flatten(), torch.tensor([-2.0, s, -s, 2]))
    assert (found.zero_spread, found.missing) == (0.0, 0.0)


def test_completions_that_disagree_cancel() -> None:
    rising = torch.tensor([1.0, 2.0, 3.0])[None, None, :, None]
    found = granular(torch.stack([rising, 10 - 5 * rising], dim=-1))
    torch.testing.assert_close(found.values, torch.zeros(1, 3, 1), rtol=0, atol=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**20), scales=st.lists(st.floats(0.1, 10), min_size=3, max_size=3))
def test_every_completion_has_the_same_say_whatever_its_scale(seed: int, scales: list[float]) -> None:
    drawn = torch.randn(2, 2, 4, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = granular(drawn * torch.tensor(scales) + 7)
    torch.testing.assert_close(found.values, granular(drawn).values, rtol=1e-4, atol=1e-5)
    # and the sum over the branches of each trunk is 0
    sums = found.values.unflatten(1, (2, 4)).sum(2)
    torch.testing.assert_close(sums, torch.zeros_like(sums), rtol=0, atol=1e-5)


def test_one_granularity_is_branch_credit_by_the_unbiased_std() -> None:
    drawn = torch.randn(2, 2, 4, 3, 1, generator=torch.Generator().manual_seed(1))
    expected = branch_advantages(drawn, epsilon=0.0).values * math.sqrt(3 / 4)
    torch.testing.assert_close(granular(drawn, epsilon=0.0).values, expected)


def test_a_branch_without_one_of_its_rewards_is_as_if_never_drawn() -> None:
    # coarse: only 0 and 4 count, mean 2, variance (4 + 4)/1; fine: these two are equal, which says nothing
    rewards = torch.tensor([[0.0, 1], [math.nan, 9], [4, 1]])[None, None, :, None]
    found = granular(rewards)
    torch.testing.assert_close(found.values.flatten(), torch.tensor([-1.0, 0, 1]) / math.sqrt(2))
    assert torch.equal(found.values[:, [0, 2]], granular(rewards[:, :, [0, 2]]).values)
    # of the two units one is flat, of the three branches one is missing
    assert found.zero_spread == pytest.approx(1 / 2) and found.missing == pytest.approx(1 / 3)


def test_what_does_not_fit_is_refused() -> None:
    rewards = torch.randn(1, 1, 4, 2, 2)
    with pytest.raises(ValueError, match=r"granularities \[1, 2, 3\] are not those of rewards of shape"):
        granular_advantages(rewards, granularities=[1, 2, 3])
    with pytest.raises(ValueError, match="clip must be above 0 or None, got 0"):
        granular(rewards, clip=0)
