"""Value credit: the ablation's baseline, and where it differs from gains."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.credit.sparse import sparse_advantages
from densegrpo_fast.credit.value import state_rewards, value_advantages


def random_rewards(seed, prompts=2, group=5, steps=4):
    return torch.randn(prompts, group, steps + 1, generator=torch.Generator().manual_seed(seed))


def test_numbers_by_hand():
    # the states after step 0 are worth 1 and 4: mean 2.5, std 1.5; after step 1: 0 and 4, mean 2, std 2
    rewards = torch.tensor([[[9.0, 1.0, 0.0], [-9.0, 4.0, 4.0]]])
    assert state_rewards(rewards).tolist() == [[[1.0, 0.0], [4.0, 4.0]]]
    first, second = 1.5 / (1.5 + 1e-4), 2 / (2 + 1e-4)
    torch.testing.assert_close(value_advantages(rewards).values, torch.tensor([[[-first, -second], [first, second]]]))


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20), shift=st.floats(-50, 50))
def test_last_step_is_sparse_credit_and_shifts_change_nothing(seed, shift):
    rewards = random_rewards(seed)
    plain = value_advantages(rewards)
    torch.testing.assert_close(plain.values[..., -1:], sparse_advantages(rewards[..., -1], 1).values)
    torch.testing.assert_close(value_advantages(rewards.double() + shift).values, plain.values)
    assert torch.equal(value_advantages(rewards.double()).values, plain.values)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20), member=st.integers(0, 4))
def test_permutation_and_missing(seed, member):
    rewards = random_rewards(seed)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(value_advantages(rewards[:, order]).values, value_advantages(rewards).values[:, order])
    others = [g for g in range(5) if g != member]
    dropped = rewards.clone()
    dropped[:, member] = math.nan
    with_gap = value_advantages(dropped)
    torch.testing.assert_close(with_gap.values[:, others], value_advantages(rewards[:, others]).values)
    assert with_gap.values[:, member].count_nonzero() == 0 and with_gap.missing == pytest.approx(1 / 5)


def test_early_luck_stays_in_every_later_value():
    # after a lucky first step, sample 1 adds nothing more: gains would be 0 from then on, values are not
    rewards = torch.tensor([[[0.0, 0.0, 0.0, 0.0], [0.0, 2.0, 2.0, 2.0]]])
    assert value_advantages(rewards, epsilon=0.0).values[0, 1].tolist() == [1.0, 1.0, 1.0]


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"state_rewards: lookahead_rewards must have shape \[P, G, T\+1\]"):
        value_advantages(torch.zeros(2, 3, 1))
