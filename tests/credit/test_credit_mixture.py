"""Mixed credit: the image's advantage plus the step's, each normalised on its own."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.credit.dense import dense_advantages, reward_gains
from densegrpo_fast.credit.mixture import lookahead_mixture_advantages, mixed_advantages
from densegrpo_fast.credit.return_to_go import returns_to_go
from densegrpo_fast.credit.sparse import sparse_advantages
from densegrpo_fast.credit.value import state_rewards

NAN = math.nan


def random_rewards(seed, prompts=2, group=5, steps=4):
    return torch.randn(prompts, group, steps + 1, generator=torch.Generator().manual_seed(seed)).double()


def mixed(lookahead_rewards, **options):
    return mixed_advantages(lookahead_rewards[..., -1], reward_gains(lookahead_rewards), **options)


def test_numbers_by_hand():
    # images 0 and 4: advantages -1, 1. Step values 3 1 | 5 7: step 0 mean 4 std 1, step 1 mean 4 std 3: -1 -1 | 1 1,
    # jointly mean 4, squared deviations 1 9 1 9, variance 5: -1 -3 | 1 3, over sqrt(5)
    rewards, values = torch.tensor([[0.0, 4.0]]), torch.tensor([[[3.0, 1.0], [5.0, 7.0]]])
    exact = {"terminal_coef": 2.0, "dense_coef": 0.5, "epsilon": 0.0}
    assert mixed_advantages(rewards, values, **exact).values.tolist() == [[[-2.5, -2.5], [2.5, 2.5]]]
    joint = mixed_advantages(rewards, values, normalize="joint", **exact).values
    small, large = 2 + 0.5 / math.sqrt(5), 2 + 1.5 / math.sqrt(5)
    torch.testing.assert_close(joint, torch.tensor([[[-small, -large], [small, large]]]))


def test_clip_bounds_the_sum():
    advantages = mixed_advantages(
        torch.tensor([[0.0, 4.0]]), torch.tensor([[[3.0], [5.0]]]), terminal_coef=4.0, clip=1.5, epsilon=0.0
    )
    assert advantages.values.tolist() == [[[-1.5], [1.5]]]


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20), normalize=st.sampled_from(["step", "joint"]))
def test_either_coefficient_alone_is_that_method(seed, normalize):
    rewards = random_rewards(seed)
    dense = mixed(rewards, terminal_coef=0.0, normalize=normalize).values
    torch.testing.assert_close(dense, dense_advantages(rewards, normalize=normalize).values)
    terminal = mixed(rewards, dense_coef=0.0, normalize=normalize).values
    torch.testing.assert_close(terminal, sparse_advantages(rewards[..., -1], 4).values)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20), member=st.integers(0, 4), normalize=st.sampled_from(["step", "joint"]))
def test_shift_permutation_dtype_and_missing(seed, member, normalize):
    rewards = random_rewards(seed)
    plain = mixed(rewards, normalize=normalize).values
    torch.testing.assert_close(mixed(rewards + 11.0, normalize=normalize).values, plain)
    torch.testing.assert_close(mixed(rewards.float(), normalize=normalize).values, plain, atol=1e-4, rtol=1e-4)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(mixed(rewards[:, order], normalize=normalize).values, plain[:, order])
    others = [g for g in range(5) if g != member]
    dropped = rewards.clone()
    dropped[:, member] = NAN
    with_gap = mixed(dropped, normalize=normalize)
    torch.testing.assert_close(with_gap.values[:, others], mixed(rewards[:, others], normalize=normalize).values)
    assert with_gap.values[:, member].count_nonzero() == 0 and with_gap.missing == pytest.approx(1 / 5)


@pytest.mark.parametrize("step_value", ["gain", "value", "return_to_go"])
def test_the_image_is_judged_by_its_own_reward(step_value):
    """The final reward may be another decoder's than that of the steps' values, and then is missing by itself."""
    lookahead, rewards = random_rewards(3), random_rewards(4)[..., 0]
    rewards[1, 2] = NAN
    options = {"step_value": step_value, "normalize": "joint"}
    found = lookahead_mixture_advantages(rewards, lookahead, **options)
    values = {"gain": reward_gains, "value": state_rewards, "return_to_go": returns_to_go}[step_value](lookahead)
    assert torch.equal(found.values, mixed_advantages(rewards, values, normalize="joint").values)
    assert found.values[1, 2].count_nonzero() == 0 and found.values[1, 1].all()
    own = lookahead_mixture_advantages(lookahead[..., -1], lookahead, **options)
    assert not torch.equal(own.values, found.values)


def test_half_a_sum_is_missing():
    # sample 2 has no image reward, sample 0 no value at step 1: neither half may be used, nor move the others
    rewards = torch.tensor([[0.0, 4.0, NAN]])
    values = torch.tensor([[[3.0, NAN], [5.0, 7.0], [100.0, 100.0]]])
    advantages = mixed_advantages(rewards, values, epsilon=0.0)
    assert advantages.values.tolist() == [[[-2.0, 0.0], [2.0, 0.0], [0.0, 0.0]]]
    assert advantages.missing == pytest.approx(3 / 6)


def test_zero_spread_weighs_the_terms_by_their_coefficients():
    # the images are equal (every unit of the first term flat), the steps are not
    flat = mixed_advantages(torch.ones(1, 2), torch.tensor([[[0.0], [1.0]]]), terminal_coef=3.0, dense_coef=1.0)
    assert flat.zero_spread == 0.75


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"terminal_coef": -1.0}, "terminal_coef must be finite and at least 0, got -1.0"),
        ({"dense_coef": NAN}, "dense_coef must be finite and at least 0, got nan"),
        ({"terminal_coef": 0.0, "dense_coef": 0.0}, "must be above 0, got 0 and 0"),
        ({"clip": 0.0}, "clip must be above 0 or None"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        mixed_advantages(torch.zeros(1, 2), torch.zeros(1, 2, 3), **options)


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"must agree, got \[1, 3\] and \[1, 2, 3\]"):
        mixed_advantages(torch.zeros(1, 3), torch.zeros(1, 2, 3))
