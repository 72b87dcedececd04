"""Return-to-go: discounted sums of gains, which telescope at discount 1."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.credit.dense import dense_advantages, reward_gains
from densegrpo_fast.credit.return_to_go import discounted_sums, return_advantages, returns_to_go

NAN = math.nan


def random_rewards(seed, prompts=2, group=5, steps=4):
    return torch.randn(prompts, group, steps + 1, generator=torch.Generator().manual_seed(seed)).double()


def test_numbers_by_hand():
    # rewards 1 3 2 6: gains 2 -1 4; discount 1/2: 4, -1 + 4/2 = 1, 2 + 1/2 = 2.5; discount 1: 6-1, 6-3, 6-2
    rewards = torch.tensor([[[1.0, 3.0, 2.0, 6.0]]])
    assert returns_to_go(rewards, 0.0).tolist() == [[[2.0, -1.0, 4.0]]]
    assert returns_to_go(rewards, 0.5).tolist() == [[[2.5, 1.0, 4.0]]]
    assert returns_to_go(rewards, 1.0).tolist() == [[[5.0, 3.0, 4.0]]]


def test_advantages_by_hand():
    # returns of step 0: 2 and 4, mean 3, std 1; of step 1: 1 and 0 (from 3 to 3), mean .5, std .5
    rewards = torch.tensor([[[0.0, 1.0, 2.0], [-1.0, 3.0, 3.0]]])
    first, second = 1 / (1 + 1e-4), 0.5 / (0.5 + 1e-4)
    expected = torch.tensor([[[-first, second], [first, -second]]])
    torch.testing.assert_close(return_advantages(rewards).values, expected)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20), discount=st.floats(0, 1), normalize=st.sampled_from(["step", "joint"]))
def test_shift_permutation_and_dtype(seed, discount, normalize):
    rewards = random_rewards(seed).float()
    options = {"discount": discount, "normalize": normalize}
    plain = return_advantages(rewards, **options).values
    assert torch.equal(return_advantages(rewards.double(), **options).values, plain)
    torch.testing.assert_close(return_advantages(rewards.double() + 17.0, **options).values, plain)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(return_advantages(rewards[:, order], **options).values, plain[:, order])


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20), discount=st.sampled_from([0.0, 0.9, 1.0]), member=st.integers(0, 4))
def test_dropping_a_sample_leaves_the_others_as_if_it_never_existed(seed, discount, member):
    rewards = random_rewards(seed)
    others = [g for g in range(5) if g != member]
    dropped = rewards.clone()
    dropped[:, member] = NAN
    with_gap = return_advantages(dropped, discount=discount).values
    torch.testing.assert_close(with_gap[:, others], return_advantages(rewards[:, others], discount=discount).values)
    assert with_gap[:, member].count_nonzero() == 0


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20))
def test_discount_zero_is_dense_credit_and_one_is_its_limit(seed):
    rewards = random_rewards(seed)
    assert torch.equal(return_advantages(rewards, discount=0.0).values, dense_advantages(rewards).values)
    almost = discounted_sums(reward_gains(rewards), 1 - 1e-12)
    torch.testing.assert_close(returns_to_go(rewards, 1.0), almost, atol=1e-9, rtol=0)


def test_a_missing_reward_reaches_only_the_sums_that_need_it():
    rewards = torch.tensor([[[0.0, 1.0, NAN, 3.0, 5.0]]])
    assert returns_to_go(rewards, 0.0).isnan().tolist() == [[[False, True, True, False]]]
    assert returns_to_go(rewards, 0.5).isnan().tolist() == [[[True, True, True, False]]]
    assert returns_to_go(rewards, 1.0).isnan().tolist() == [[[False, False, True, False]]]


@pytest.mark.parametrize("discount", [-0.1, 1.1, NAN])
def test_a_discount_out_of_range_is_refused(discount):
    with pytest.raises(ValueError, match=r"discount must be in \[0, 1\]"):
        return_advantages(torch.zeros(1, 2, 3), discount=discount)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"lookahead_rewards must have shape \[P, G, T\+1\]"):
        returns_to_go(torch.zeros(2, 3))
