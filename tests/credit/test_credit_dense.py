"""Dense credit: gains telescope, and advantages compare a step with the same step of the group."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.credit.dense import dense_advantages, reward_gains
from densegrpo_fast.credit.sparse import sparse_advantages

NAN = math.nan


def random_rewards(seed, prompts=2, group=5, steps=4):
    return torch.randn(prompts, group, steps + 1, generator=torch.Generator().manual_seed(seed)).double()


def test_numbers_by_hand():
    # gains of sample 0: +1, -1; of sample 1: +3, 0
    rewards = torch.tensor([[[0.0, 1.0, 0.0], [1.0, 4.0, 4.0]]])
    assert reward_gains(rewards).tolist() == [[[1.0, -1.0], [3.0, 0.0]]]
    # step 0: mean 2, std 1; step 1: mean -0.5, std 0.5
    first, second = 1 / (1 + 1e-4), 0.5 / (0.5 + 1e-4)
    torch.testing.assert_close(dense_advantages(rewards).values, torch.tensor([[[-first, -second], [first, second]]]))
    # jointly: the gains 1 -1 3 0 have mean 0.75 and squared deviations .0625 3.0625 5.0625 .5625, variance
    # 2.1875
    scale = 1 / (math.sqrt(2.1875) + 1e-4)
    torch.testing.assert_close(
        dense_advantages(rewards, normalize="joint").values,
        torch.tensor([[[0.25 * scale, -1.75 * scale], [2.25 * scale, -0.75 * scale]]]),
    )


def test_global_std_is_taken_per_step_over_all_groups():
    # gains of step 0: 0 2 | 0 4, mean 1.5, squared deviations 2.25 .25 2.25 6.25, variance 2.75; of step 1:
    # all 1
    rewards = torch.tensor([[[0.0, 0.0, 1.0], [0.0, 2.0, 3.0]], [[0.0, 0.0, 1.0], [0.0, 4.0, 5.0]]])
    advantages = dense_advantages(rewards, std="global")
    scale = 1 / (math.sqrt(2.75) + 1e-4)
    expected = torch.tensor([[-scale, scale], [-2 * scale, 2 * scale]])
    torch.testing.assert_close(advantages.values[..., 0], expected)
    assert advantages.values[..., 1].count_nonzero() == 0
    assert advantages.zero_spread == 0.5


def test_one_step_of_dense_is_sparse_on_the_gain():
    rewards = random_rewards(3, steps=1)
    expected = sparse_advantages(rewards[..., 1] - rewards[..., 0], 1).values
    torch.testing.assert_close(dense_advantages(rewards).values, expected)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**20))
def test_gains_sum_to_the_final_minus_the_noise_free_reward(seed):
    rewards = random_rewards(seed)
    torch.testing.assert_close(reward_gains(rewards).sum(-1), rewards[..., -1] - rewards[..., 0])


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**20),
    member=st.integers(0, 4),
    normalize=st.sampled_from(["step", "joint"]),
    std=st.sampled_from(["group", "global"]),
)
def test_dropping_a_sample_leaves_the_others_as_if_it_never_existed(seed, member, normalize, std):
    rewards = random_rewards(seed, prompts=1)
    others = [g for g in range(5) if g != member]
    dropped = rewards.clone()
    dropped[:, member] = NAN
    with_gap = dense_advantages(dropped, normalize=normalize, std=std)
    without = dense_advantages(rewards[:, others], normalize=normalize, std=std)
    torch.testing.assert_close(with_gap.values[:, others], without.values, atol=1e-6, rtol=1e-6)
    assert with_gap.values[:, member].count_nonzero() == 0
    assert with_gap.missing == pytest.approx(1 / 5)


def test_a_missing_lookahead_reward_costs_only_the_two_gains_that_touch_it():
    rewards = random_rewards(0, prompts=1)
    whole = dense_advantages(rewards)
    rewards[0, 1, 2] = NAN
    partly = dense_advantages(rewards)
    assert partly.values[0, 1, 1] == 0 and partly.values[0, 1, 2] == 0
    assert partly.missing == pytest.approx(2 / 20)
    # steps 0 and 3 do not touch state 2, so nobody's advantage changes there
    torch.testing.assert_close(partly.values[..., [0, 3]], whole.values[..., [0, 3]])
    others = dense_advantages(rewards[:, [0, 2, 3, 4]]).values
    torch.testing.assert_close(partly.values[:, [0, 2, 3, 4], 1:3], others[..., 1:3], atol=1e-6, rtol=1e-6)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**20), normalize=st.sampled_from(["step", "joint"]))
def test_permutation_and_affine_invariance(seed, normalize):
    rewards = random_rewards(seed)
    plain = dense_advantages(rewards, normalize=normalize, epsilon=0.0).values
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed + 1))
    permuted = dense_advantages(rewards[:, order], normalize=normalize, epsilon=0.0).values
    torch.testing.assert_close(permuted, plain[:, order])
    moved = dense_advantages(7.0 - 100.0 + 30.0 * rewards, normalize=normalize, epsilon=0.0).values
    torch.testing.assert_close(moved, plain)


def test_a_reward_offset_of_one_image_does_not_move_any_gain():
    rewards = random_rewards(1)
    offset = torch.randn(2, 5, 1, generator=torch.Generator().manual_seed(2)).double()
    torch.testing.assert_close(dense_advantages(rewards + offset).values, dense_advantages(rewards).values)


def test_per_step_groups_below_the_floor_are_flat_but_joint_ones_are_judged_together():
    # step 0 differs by 1 between the samples, step 1 by 1e-4
    rewards = torch.tensor([[[0.0, 0.0, 0.0], [0.0, 1.0, 1.0001]]], dtype=torch.float64)
    per_step = dense_advantages(rewards, spread_floor=1e-3)
    assert per_step.values[..., 1].count_nonzero() == 0 and per_step.values[..., 0].count_nonzero() == 2
    assert per_step.zero_spread == 0.5
    joint = dense_advantages(rewards, normalize="joint", spread_floor=1e-3)
    assert joint.values.count_nonzero() == 4 and joint.zero_spread == 0.0


def test_small_gains_survive_large_rewards_in_float32():
    # gains of 2^-12 on rewards near 1000, both exact in float32
    gain = 2.0**-12
    rewards = torch.tensor([[[1000.0, 1000.0 + gain], [1000.0, 1000.0 - gain]]])
    torch.testing.assert_close(
        dense_advantages(rewards, epsilon=0.0).values, torch.tensor([[[1.0], [-1.0]]]), rtol=1e-6, atol=0
    )


def test_wrong_shapes_are_refused():
    for shape in ((2, 3), (2, 3, 1)):
        with pytest.raises(ValueError, match=r"lookahead_rewards must have shape \[P, G, T\+1\] with T >= 1"):
            dense_advantages(torch.zeros(shape))
