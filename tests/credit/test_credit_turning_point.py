"""TP-GRPO: which steps turn a trajectory, what they are paid, and the balance of replacements."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.credit.dense import reward_gains
from densegrpo_fast.credit.normalize import normalize_groups
from densegrpo_fast.credit.turning_point import turning_point_advantages, turning_point_rewards, turning_points

NAN = math.nan


def random_rewards(seed, prompts=2, group=5, steps=6):
    # eighths: sums and differences are exact, and ties and zeros do occur
    return torch.randint(-16, 17, (prompts, group, steps + 1), generator=torch.Generator().manual_seed(seed)) / 8.0


def test_turning_points_by_hand():
    # rewards 2 1 3 2 4, gains -1 +2 -1 +2, trend +2. Step 0 falls against the trend: none. Step 1 rises after a fall:
    # turning, and the rest 4 - 3 = +1 agrees. Step 2 falls: none. Step 3 rises after a fall: turning, but has no rest
    rewards = torch.tensor([[[2.0, 1.0, 3.0, 2.0, 4.0]]])
    assert turning_points(rewards, consistent=False).tolist() == [[[False, True, False, True]]]
    assert turning_points(rewards).tolist() == [[[False, True, False, False]]]
    # step 1 is paid 4 - 1 = 3 in place of 2; step 3 would be paid 4 - 2 = 2, its own gain
    for consistent in (False, True):
        paid = turning_point_rewards(rewards, consistent=consistent, balance=False)
        assert paid.tolist() == [[[-1.0, 3.0, -1.0, 2.0]]]


def test_the_constraint_by_hand():
    # rewards 0 -2 5 2, gains -2 +7 -3, trend +2. Step 1 turns, but what follows falls: 2 - 5 = -3. Without the
    # constraint it is paid 2 - -2 = 4 instead of 7
    rewards = torch.tensor([[[0.0, -2.0, 5.0, 2.0]]])
    assert turning_point_rewards(rewards, consistent=False, balance=False).tolist() == [[[-2.0, 4.0, -3.0]]]
    assert turning_point_rewards(rewards, consistent=True, balance=False).tolist() == [[[-2.0, 7.0, -3.0]]]


def test_the_first_step_needs_only_the_trend():
    # falling trend -3, first gain -2, rest -1: the first step is paid -3. In the second row the first gain is -4 and
    # the rest +1: a turning point only without the constraint, where it is paid -3 as well
    rewards = torch.tensor([[[3.0, 1.0, 0.0], [3.0, -1.0, 0.0]]])
    assert turning_points(rewards).tolist() == [[[True, False], [False, False]]]
    # in row 1, step 1 rises after a fall, against a falling trend: no turning point
    assert turning_points(rewards, consistent=False).tolist() == [[[True, False], [True, False]]]
    paid = turning_point_rewards(rewards, consistent=False, balance=False)
    assert paid.tolist() == [[[-3.0, -1.0], [-3.0, 1.0]]]


def test_balancing_by_hand():
    # first steps only: replacements +2 +6 +4 and -5; one of each side stays, the largest: +6 and -5
    rewards = torch.tensor([[[0.0, 1.0, 2.0], [0.0, 1.0, 6.0], [0.0, 1.0, 4.0], [0.0, -1.0, -5.0]]])
    assert turning_point_rewards(rewards, balance=False)[0, :, 0].tolist() == [2.0, 6.0, 4.0, -5.0]
    assert turning_point_rewards(rewards, balance=True)[0, :, 0].tolist() == [1.0, 6.0, 1.0, -5.0]
    # nothing on the other side: all stay
    assert turning_point_rewards(rewards[:, :3])[0, :, 0].tolist() == [2.0, 6.0, 4.0]
    assert turning_point_rewards(rewards[:, 3:])[0, :, 0].tolist() == [-5.0]


def test_advantages_by_hand():
    # step 0 is paid +6 and -5 (balanced): mean .5, std 5.5; step 1 keeps its gains 5 and -4: mean .5, std 4.5
    rewards = torch.tensor([[[0.0, 1.0, 6.0], [0.0, -1.0, -5.0]]])
    first, second = 5.5 / (5.5 + 1e-4), 4.5 / (4.5 + 1e-4)
    expected = torch.tensor([[[first, second], [-first, -second]]])
    torch.testing.assert_close(turning_point_advantages(rewards).values, expected)


def test_a_plateau_turns_nothing():
    # no trend; and a step after a gain of 0 has no opposite before it
    assert not turning_points(torch.tensor([[[1.0, 3.0, 1.0]]])).any()
    assert not turning_points(torch.tensor([[[1.0, 1.0, 2.0, 3.0]]]), consistent=False).any()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**20))
def test_definitions_literally(seed):
    """Loop over labels t = T..1 as the paper counts them: R_t is the reward with t steps left."""
    rewards = random_rewards(seed)
    steps = rewards.shape[-1] - 1
    for consistent in (False, True):
        turning = turning_points(rewards, consistent=consistent)
        for row, marks in zip(rewards.flatten(0, 1).tolist(), turning.flatten(0, 1).tolist(), strict=True):
            left = row[::-1]
            trend = left[0] - left[steps]
            for t in range(steps, 0, -1):
                gain = left[t - 1] - left[t]
                expected = gain * trend > 0
                if t < steps:
                    expected = expected and (left[t] - left[t + 1]) * trend < 0
                if consistent:
                    expected = expected and gain * (left[0] - left[t - 1]) > 0
                assert marks[steps - t] == expected


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**20))
def test_consistent_replacements_keep_the_sign_and_enlarge(seed):
    rewards = random_rewards(seed)
    turning = turning_points(rewards)
    gains, paid = reward_gains(rewards.double()), turning_point_rewards(rewards, balance=False)
    assert (paid[turning] * gains[turning] > 0).all()
    assert (paid[turning].abs() > gains[turning].abs()).all()
    assert torch.equal(paid[~turning], gains[~turning])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**20), consistent=st.booleans())
def test_balanced_replacements_are_equally_many_and_the_largest(seed, consistent):
    rewards = random_rewards(seed)
    turning = turning_points(rewards, consistent=consistent)
    everything = turning_point_rewards(rewards, consistent=consistent, balance=False)[turning]
    aggregated = (rewards[..., -1:] - rewards[..., :-1]).double()
    paid, gains = turning_point_rewards(rewards, consistent=consistent), reward_gains(rewards.double())
    share = ((paid - gains) / (aggregated - gains)).where(turning & (aggregated != gains), 0.0)
    count = min(int((everything > 0).sum()), int((everything < 0).sum()))
    if not count:  # of one sign, or none
        return
    for sign in (1, -1):
        values = aggregated[turning & (sign * aggregated > 0)].abs().sort(descending=True).values
        side = sign * aggregated > 0
        kept = aggregated[(share > 0) & side].abs()
        # without the constraint a replacement may equal the gain (the last step's does), so it is not seen as one
        made = share[side].sum().item()
        assert made == pytest.approx(count) if consistent else made <= count + 1e-9
        assert not len(kept) or kept.min() >= values[count - 1]
        # only the smallest that are kept may be so in part
        larger = turning & side & (aggregated != gains) & (aggregated.abs() > values[count - 1])
        assert (share[larger] == 1).all()


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**20), consistent=st.booleans(), sign=st.sampled_from([-1, 1]))
def test_replacements_of_one_sign_are_all_made(seed, consistent, sign):
    rewards = random_rewards(seed)
    aggregated = rewards[..., -1:] - rewards[..., :-1]
    against = (turning_points(rewards, consistent=consistent) & (sign * aggregated <= 0)).any(-1)
    rewards[against] = 0.0  # a trajectory that turns nowhere
    plain = turning_point_rewards(rewards, consistent=consistent, balance=False)
    assert torch.equal(turning_point_rewards(rewards, consistent=consistent), plain)


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**20), shift=st.integers(-40, 40), consistent=st.booleans())
def test_shift_permutation_and_dtype(seed, shift, consistent):
    rewards = random_rewards(seed)
    plain = turning_point_advantages(rewards, consistent=consistent).values
    assert torch.equal(turning_point_advantages(rewards + shift / 8, consistent=consistent).values, plain)
    assert torch.equal(turning_point_advantages(rewards.double(), consistent=consistent).values, plain)
    order = torch.randperm(5, generator=torch.Generator().manual_seed(seed + 1))
    permuted = turning_point_advantages(rewards[:, order], consistent=consistent).values
    torch.testing.assert_close(permuted, plain[:, order])


def test_equal_replacements_share_the_places_that_are_left():
    # L = 0 1 3, 0 1 3, 0 1 4 turn at step 0 for +3, +3, +4, and 0 -1 -5, 0 -1 -6 for -5, -6: two places on each side.
    # +4 takes one, both +3 get half of the other: 1 + (3 - 1) / 2 = 2 each, beside gains of 1
    rewards = torch.tensor([[[0.0, 1, 3], [0, 1, 3], [0, 1, 4], [0, -1, -5], [0, -1, -6]]])
    assert turning_point_rewards(rewards)[0, :, 0].tolist() == [2.0, 2.0, 4.0, -5.0, -6.0]
    # one place: only +4 and -6 are made, and what is tied below the cut is not
    assert turning_point_rewards(rewards[:, [0, 1, 2, 4]])[0, :, 0].tolist() == [1.0, 1.0, 4.0, -6.0]


@settings(deadline=None, max_examples=20)
@given(
    seed=st.integers(0, 2**20),
    member=st.integers(0, 4),
    consistent=st.booleans(),
    hole=st.sampled_from([NAN, math.inf]),
)
def test_dropping_a_sample_leaves_the_others_as_if_it_never_existed(seed, member, consistent, hole):
    rewards = random_rewards(seed)
    others = [g for g in range(5) if g != member]
    without = turning_point_advantages(rewards[:, others], consistent=consistent).values
    rewards[:, member] = hole
    with_gap = turning_point_advantages(rewards, consistent=consistent)
    torch.testing.assert_close(with_gap.values[:, others], without)
    assert with_gap.values[:, member].count_nonzero() == 0 and with_gap.missing == pytest.approx(1 / 5)


def test_without_a_final_reward_gains_stay_and_nothing_turns():
    rewards = torch.tensor([[[2.0, 1.0, 3.0, NAN]]])
    assert not turning_points(rewards, consistent=False).any()
    paid = turning_point_rewards(rewards, consistent=False, balance=False)
    assert paid[0, 0, :2].tolist() == [-1.0, 2.0] and paid[0, 0, 2].isnan()


def test_without_turning_points_it_is_dense_credit():
    rewards = torch.tensor([[[0.0, 1.0, 0.0], [0.0, -2.0, 0.0]]])
    expected = normalize_groups(reward_gains(rewards))
    assert torch.equal(turning_point_advantages(rewards).values, expected.values)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"lookahead_rewards must have shape \[P, G, T\+1\]"):
        turning_point_advantages(torch.zeros(2, 3, 1))
