"""Gains that the steps of a chunk share, by hand."""

from __future__ import annotations

import pytest
import torch

from benches.iteration.chunk_gains import evaluations, shared_gains, study


def test_the_steps_of_a_chunk_share_its_gain() -> None:
    rewards = torch.tensor([0.0, 5.0, 2.0, 9.0, 8.0, 3.0])
    torch.testing.assert_close(shared_gains(rewards, 1), rewards)
    # 0 -> 2 -> 8 in two steps each, then the last one by itself
    torch.testing.assert_close(shared_gains(rewards, 2), torch.tensor([0.0, 1.0, 2.0, 5.0, 8.0, 3.0]))
    # 0 -> 9 in three, 9 -> 3 in the two that are left
    torch.testing.assert_close(shared_gains(rewards, 3), torch.tensor([0.0, 3.0, 6.0, 9.0, 6.0, 3.0]))
    torch.testing.assert_close(shared_gains(rewards, 9)[[0, -1]], rewards[[0, -1]])


@pytest.mark.parametrize(("size", "count"), [(1, 36), (2, 8 + 6 + 4 + 2), (3, 8 + 5 + 2), (5, 8 + 3)])
def test_evaluations_of_ten_steps(size: int, count: int) -> None:
    """State j evaluates at j+1 .. 8: 8 - j of them."""
    assert evaluations(10, size) == count


def test_agreement_by_chunk_size() -> None:
    rewards = torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(0))
    found = study(rewards, [1, 3])
    assert found["1"]["spearman_gains_mean"] == pytest.approx(1.0)
    assert found["1"]["evaluations"] == 4 + 3 + 2 + 1 and found["3"]["evaluations"] == 4 + 1
    # independent rewards: the gain of three steps says something of its first and last only
    assert found["3"]["spearman_gains_mean"] < 0.7
    assert len(found["3"]["spearman_gains"]) == 5
