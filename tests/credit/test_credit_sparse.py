"""Sparse advantages and the normalisation that all credit methods share."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.credit.normalize import normalize_groups
from densegrpo_fast.credit.sparse import sparse_advantages

NAN = math.nan


def random_rewards(seed, prompts=3, group=6):
    return torch.randn(prompts, group, generator=torch.Generator().manual_seed(seed))


def test_numbers_by_hand():
    # group 0: mean 2, deviations -1 0 1, population variance 2/3; group 1: mean 4, deviations -2 0 2,
    # variance 8/3
    rewards = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    own = 1 / (math.sqrt(2 / 3) + 1e-4)
    other = 2 / (math.sqrt(8 / 3) + 1e-4)
    advantages = sparse_advantages(rewards, num_steps=2)
    assert advantages.values.shape == (2, 3, 2) and advantages.values.dtype == torch.float32
    torch.testing.assert_close(advantages.values[..., 0], torch.tensor([[-own, 0, own], [-other, 0, other]]))
    assert torch.equal(advantages.values[..., 0], advantages.values[..., 1])
    assert advantages.zero_spread == 0.0 and advantages.missing == 0.0


def test_global_std_is_that_of_the_whole_batch_around_its_own_mean():
    # all six: mean 3, deviations -2 -1 0 -1 1 3, sum of squares 16, variance 16/6; means stay those of the
    # groups
    rewards = torch.tensor([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    scale = 1 / (math.sqrt(16 / 6) + 1e-4)
    advantages = sparse_advantages(rewards, num_steps=1, std="global")
    expected = torch.tensor([[-scale, 0, scale], [-2 * scale, 0, 2 * scale]])
    torch.testing.assert_close(advantages.values[..., 0], expected)


def test_a_missing_reward_is_not_a_zero():
    # the present two: mean 3, deviations -1 and 1, std 1
    advantages = sparse_advantages(torch.tensor([[2.0, NAN, 4.0], [NAN, NAN, NAN]]), num_steps=1)
    one = 1 / (1 + 1e-4)
    torch.testing.assert_close(advantages.values[..., 0], torch.tensor([[-one, 0.0, one], [0.0, 0.0, 0.0]]))
    assert advantages.missing == pytest.approx(4 / 6)
    assert advantages.zero_spread == 0.0, "a group without any reward is missing, not flat"


def test_flat_groups_get_zero_and_are_counted():
    rewards = torch.tensor([[0.1] * 7, [0.3, 0.3001] * 3 + [NAN], [0.0, 1.0] * 3 + [0.5], [NAN] * 6 + [2.0]])
    exact = sparse_advantages(rewards, num_steps=1, epsilon=0.0)
    assert exact.values[0].count_nonzero() == 0 and exact.values[3].count_nonzero() == 0
    assert exact.values[1].abs().max() == pytest.approx(1.0, rel=1e-3), "noise of 1e-4 is blown up without a floor"
    assert exact.zero_spread == pytest.approx(2 / 4)
    floored = sparse_advantages(rewards, num_steps=1, spread_floor=1e-3)
    assert floored.values[[0, 1, 3]].count_nonzero() == 0 and floored.values[2].count_nonzero() == 6
    assert floored.zero_spread == pytest.approx(3 / 4)


def test_the_floor_looks_at_the_group_even_when_the_std_is_global():
    rewards = torch.tensor([[0.5, 0.5001], [0.0, 1.0]])
    advantages = sparse_advantages(rewards, num_steps=1, std="global", spread_floor=1e-3)
    assert advantages.values[0].count_nonzero() == 0 and advantages.values[1].count_nonzero() == 2


def test_clip_bounds_the_magnitude():
    rewards = torch.tensor([[0.0] * 99 + [1.0]])
    # mean .01, variance .01 * .99: the last one lies .99 / .0995 = 9.95 standard deviations above
    assert sparse_advantages(rewards, 1, clip=None).values.max() == pytest.approx(9.95, rel=2e-3)
    assert sparse_advantages(rewards, 1, clip=5.0).values.max() == 5.0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20), member=st.integers(0, 5))
def test_dropping_a_sample_leaves_the_others_as_if_it_never_existed(seed, member):
    rewards = random_rewards(seed, prompts=1)
    others = [g for g in range(6) if g != member]
    dropped = rewards.clone()
    dropped[0, member] = NAN
    for std in ("group", "global"):
        with_gap = sparse_advantages(dropped, 3, std=std).values
        without = sparse_advantages(rewards[:, others], 3, std=std).values
        torch.testing.assert_close(with_gap[:, others], without, atol=1e-6, rtol=1e-6)
        assert with_gap[0, member].count_nonzero() == 0


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20), std=st.sampled_from(["group", "global"]))
def test_permuting_a_group_permutes_its_advantages(seed, std):
    rewards = random_rewards(seed)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed + 1))
    expected = sparse_advantages(rewards, 1, std=std).values[:, order]
    torch.testing.assert_close(sparse_advantages(rewards[:, order], 1, std=std).values, expected)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20), shift=st.floats(-100, 100), scale=st.floats(0.01, 100))
def test_shifting_and_scaling_rewards_changes_nothing(seed, shift, scale):
    rewards = random_rewards(seed).double()
    plain = sparse_advantages(rewards, 1, epsilon=0.0).values
    torch.testing.assert_close(sparse_advantages(shift + scale * rewards, 1, epsilon=0.0).values, plain)
    # each group may be shifted on its own: only comparisons within a group count
    shifts = torch.tensor([[0.0], [shift], [-shift]], dtype=torch.float64)
    torch.testing.assert_close(sparse_advantages(rewards + shifts, 1, epsilon=0.0).values, plain)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 2**20), std=st.sampled_from(["group", "global"]))
def test_agrees_with_numpy(seed, std):
    rewards = random_rewards(seed, prompts=4, group=5).double().numpy()
    spread = rewards.std(1, keepdims=True) if std == "group" else rewards.std()
    expected = np.clip((rewards - rewards.mean(1, keepdims=True)) / (spread + 1e-4), -5, 5)
    values = sparse_advantages(torch.from_numpy(rewards), 1, std=std).values[..., 0]
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"normalize": "batch"}, "normalize must be 'step' or 'joint', got 'batch'"),
        ({"std": "local"}, "std must be 'group' or 'global', got 'local'"),
        ({"spread_floor": -1.0}, "spread_floor must be finite and at least 0"),
        ({"epsilon": NAN}, "epsilon must be finite and at least 0"),
        ({"clip": 0.0}, "clip must be above 0 or None"),
    ],
)
def test_options_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        normalize_groups(torch.zeros(1, 2, 3), **arguments)


def test_wrong_shapes_and_types_are_refused():
    with pytest.raises(ValueError, match=r"rewards must have shape \[P, G\], got \[4\]"):
        sparse_advantages(torch.zeros(4), 1)
    with pytest.raises(ValueError, match="num_steps must be at least 1, got 0"):
        sparse_advantages(torch.zeros(1, 4), 0)
    with pytest.raises(ValueError, match=r"values must have shape \[P, G, T\]"):
        normalize_groups(torch.zeros(1, 4))
    with pytest.raises(TypeError, match="floating point, got torch.int64"):
        normalize_groups(torch.zeros(1, 2, 3, dtype=torch.int64))
