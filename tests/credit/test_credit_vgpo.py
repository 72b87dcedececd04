"""VGPO: discounted values, temporal weights and the dual advantage."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.credit import registry
from densegrpo_fast.credit.inputs import CreditInputs
from densegrpo_fast.credit.normalize import normalize_groups
from densegrpo_fast.credit.value import value_advantages
from densegrpo_fast.credit.vgpo import temporal_weights, vgpo_advantages

NAN = math.nan
OPTIONS = {"discount": 0.9, "absolute_coef": 0.5}


def random_rewards(seed, prompts=2, group=5, steps=6):
    return 0.2 + torch.rand(prompts, group, steps + 1, generator=torch.Generator().manual_seed(seed)).double()


def test_numbers_by_hand():
    # instant rewards 1 2 | 3 6 (the first entry is not used), discount 1/2: Q = 2 2 | 6 6, weights 1 1 | 1 1.
    # Both steps: mean 4, std 2, relative -1 and 1; k = .1 on the first step only: +.2 and +.6
    rewards = torch.tensor([[[99.0, 1.0, 2.0], [-99.0, 3.0, 6.0]]])
    advantages = vgpo_advantages(rewards, discount=0.5, absolute_coef=0.1, absolute_steps=1, epsilon=0.0)
    torch.testing.assert_close(advantages.values, torch.tensor([[[-0.8, -1.0], [1.6, 1.0]]]))


def test_weights_by_hand():
    # discount 1: Q = 3 2 | 9 3, means 2.5 and 6, weights 1.2 .8 | 1.5 .5; per step mean 6 std 3, mean 2.5 std .5
    rewards = torch.tensor([[[0.0, 1.0, 2.0], [0.0, 6.0, 3.0]]])
    advantages = vgpo_advantages(rewards, discount=1.0, absolute_coef=0.0, epsilon=0.0)
    torch.testing.assert_close(advantages.values, torch.tensor([[[-1.2, -0.8], [1.5, 0.5]]]))
    assert temporal_weights(torch.tensor([3.0, 2.0])).tolist() == pytest.approx([1.2, 0.8])


def test_the_absolute_term_is_the_dual_advantage_with_alpha_proportional_to_the_std():
    # (1 + alpha) Q - mean, over std, with alpha = k std, all written out
    rewards = random_rewards(0, prompts=1)
    value = rewards[..., 1:].clone()
    for step in range(4, -1, -1):
        value[..., step] += 0.9 * value[..., step + 1]
    mean, std = value.mean(1, keepdim=True), value.std(1, correction=0, keepdim=True)
    dual = ((1 + 0.5 * std) * value - mean) / std
    dual[..., 5:] = ((value - mean) / std)[..., 5:]
    expected = value / value.mean(-1, keepdim=True) * dual
    values = vgpo_advantages(rewards, clip=None, epsilon=0.0, **OPTIONS).values
    torch.testing.assert_close(values, expected.float())


def test_the_absolute_term_is_for_the_first_sampling_steps_whatever_is_judged():
    # equal samples: relative 0; discount 0: Q = 2, weights 1; k Q = .25 * 2 in the steps before 5
    rewards = torch.full((1, 2, 4), 2.0)
    found = {
        first: vgpo_advantages(rewards, steps=range(first, first + 3), discount=0.0, absolute_coef=0.25).values[0, 0]
        for first in (0, 3, 8)
    }
    assert {first: values.tolist() for first, values in found.items()} == {
        0: [0.5, 0.5, 0.5],
        3: [0.5, 0.5, 0.0],
        8: [0.0, 0.0, 0.0],
    }
    with pytest.raises(ValueError, match="steps must name the 3 judged ones"):
        vgpo_advantages(rewards, steps=[0, 1], discount=0.0, absolute_coef=0.25)


def test_a_window_that_begins_late_has_no_absolute_term():
    """As training asks for it: noise in the steps 3..5 of 8, of which the first 5 sampling steps hold 3 and 4."""
    rewards = torch.full((1, 2, 4), 2.0)
    evidence = CreditInputs(
        rewards=rewards[..., -1],
        noisy=(False,) * 3 + (True,) * 3 + (False,) * 2,
        latents=torch.zeros(9, 2, 1),
        velocities=torch.zeros(8, 2, 1),
        sigmas=torch.linspace(1, 0, 9),
        lookahead_rewards=rewards,
    )
    options = {"discount": 0.0, "absolute_coef": 0.25, "absolute_steps": 5}
    common = {"std": "group", "spread_floor": 0.0, "clip": 5.0}
    values = registry.advantages("vgpo", evidence, common | options).values
    assert values[0, 0].tolist() == [0, 0, 0, 0.5, 0.5, 0, 0, 0]


def test_a_flat_group_keeps_the_absolute_term():
    # Q = 4 4: weights 1; relative 0, absolute k * 4
    rewards = torch.full((1, 3, 3), 2.0)
    advantages = vgpo_advantages(rewards, discount=0.0, absolute_coef=0.25)
    assert advantages.values.tolist() == [[[0.5, 0.5]] * 3]
    assert advantages.zero_spread == 1.0
    assert vgpo_advantages(rewards, discount=0.0, absolute_coef=0.0).values.count_nonzero() == 0


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20), scale=st.floats(0.1, 10))
def test_permutation_scale_and_dtype(seed, scale):
    rewards = random_rewards(seed)
    plain = vgpo_advantages(rewards, epsilon=0.0, **OPTIONS).values
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed))
    permuted = vgpo_advantages(rewards[:, order], epsilon=0.0, **OPTIONS).values
    torch.testing.assert_close(permuted, plain[:, order])
    in_float32 = vgpo_advantages(rewards.float(), epsilon=0.0, **OPTIONS).values
    torch.testing.assert_close(in_float32, plain, atol=1e-4, rtol=1e-4)
    # k Q grows with the rewards, so k takes the scale back
    scaled = vgpo_advantages(scale * rewards, epsilon=0.0, discount=0.9, absolute_coef=0.5 / scale).values
    torch.testing.assert_close(scaled, plain)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20), shift=st.floats(0, 5))
def test_the_relative_term_ignores_a_shift_once_the_weights_are_taken_out(seed, shift):
    rewards = random_rewards(seed)
    moved = vgpo_advantages(rewards + shift, discount=0.0, absolute_coef=0.0, clip=None)
    weights = temporal_weights(rewards[..., 1:] + shift).float()
    torch.testing.assert_close(
        moved.values, weights * value_advantages(rewards, clip=None).values, atol=1e-5, rtol=1e-4
    )


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20), member=st.integers(0, 4), hole=st.sampled_from([NAN, math.inf]))
def test_dropping_a_sample_leaves_the_others_as_if_it_never_existed(seed, member, hole):
    rewards = random_rewards(seed)
    others = [g for g in range(5) if g != member]
    without = vgpo_advantages(rewards[:, others], **OPTIONS).values
    rewards[:, member] = hole
    with_gap = vgpo_advantages(rewards, **OPTIONS)
    torch.testing.assert_close(with_gap.values[:, others], without)
    assert with_gap.values[:, member].count_nonzero() == 0 and with_gap.missing == pytest.approx(1 / 5)


def test_a_missing_instant_reward_costs_the_steps_before_it():
    rewards = random_rewards(1, prompts=1)
    rewards[0, 1, 3] = NAN
    values = vgpo_advantages(rewards, **OPTIONS).values
    assert values[0, 1, :3].count_nonzero() == 0 and values[0, 1, 3:].count_nonzero() == 3
    # the weights of the steps that are left average 1 over them: 3 / 2 and 1 / 2
    weights = temporal_weights(torch.tensor([NAN, 3.0, 1.0]))
    assert weights[0].isnan() and weights[1:].tolist() == [1.5, 0.5]
    rewards[0, 1, 3] = math.inf
    assert torch.equal(vgpo_advantages(rewards, **OPTIONS).values, values), "infinite is missing too"


def test_values_that_are_no_weights_weigh_one():
    negative = -random_rewards(2)
    assert torch.equal(temporal_weights(negative), torch.ones_like(negative))
    advantages = vgpo_advantages(negative, discount=0.0, absolute_coef=0.0)
    assert torch.equal(advantages.values, normalize_groups(negative[..., 1:]).values)
    # a mean above 0 is not enough: -1 / 1 would turn the first step's advantage around
    mixed = torch.tensor([[-1.0, 3.0], [0.0, 2.0], [0.0, 0.0]])
    assert temporal_weights(mixed).tolist() == [[1.0, 1.0], [0.0, 2.0], [1.0, 1.0]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"discount": 1.5}, r"discount must be in \[0, 1\]"),
        ({"absolute_coef": -1.0}, "absolute_coef must be finite and at least 0"),
        ({"absolute_steps": -1}, "absolute_steps must be at least 0"),
        ({"clip": 0.0}, "clip must be above 0 or None"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        vgpo_advantages(torch.zeros(1, 2, 3), **(OPTIONS | options))
