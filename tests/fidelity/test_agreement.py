"""Rank statistics against scipy, and agreement figures worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from densegrpo_fast.training import agreement

FEW_VALUES = st.lists(st.integers(-2, 2).map(float), min_size=2, max_size=12)


@settings(deadline=None, max_examples=50)
@given(FEW_VALUES)
def test_ranks_are_scipys_average_ranks(values: list[float]) -> None:
    assert agreement.average_ranks(torch.tensor(values)).tolist() == stats.rankdata(values).tolist()


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_spearman_is_scipys(data: st.DataObject) -> None:
    first = data.draw(FEW_VALUES)
    second = data.draw(st.lists(st.integers(-2, 2).map(float), min_size=len(first), max_size=len(first)))
    found = agreement.spearman(torch.tensor(first), torch.tensor(second)).item()
    if len(set(first)) == 1:
        assert math.isnan(found)
    elif len(set(second)) == 1:
        assert found == 0.0
    else:
        assert found == pytest.approx(stats.spearmanr(first, second).statistic, abs=1e-12)


def test_spearman_is_over_the_last_dimension_without_missing_samples() -> None:
    values = torch.randn(3, 4, 9)
    other = values + torch.randn(3, 4, 9)
    values[0, 1, 2] = other[0, 1, 5] = math.nan
    found = agreement.spearman(values, other)
    kept = [i for i in range(9) if i not in (2, 5)]
    assert found[0, 1].item() == pytest.approx(stats.spearmanr(values[0, 1, kept], other[0, 1, kept]).statistic)
    assert found[2, 3].item() == pytest.approx(stats.spearmanr(values[2, 3], other[2, 3]).statistic)


def test_a_large_offset_does_not_pass_for_variation() -> None:
    constant = torch.full((7,), 0.1, dtype=torch.float64)
    assert math.isnan(agreement.pearson(constant, torch.arange(7.0)).item())
    assert agreement.pearson(torch.arange(7.0), constant).item() == 0.0


def test_sign_agreement_by_hand() -> None:
    """Of five pairs, (0, 0) says nothing and NaN is missing; of the other three, (1, 2) alone agrees."""
    exact, cheap = torch.tensor([0.0, 1, -1, 0, math.nan]), torch.tensor([0.0, 2, 1, 3, 1])
    assert agreement.sign_agreement(exact, cheap) == pytest.approx(1 / 3)


def test_rewards_agree_with_themselves() -> None:
    rewards = torch.rand(5, 8, 6)
    found = agreement.compare(rewards, rewards)
    assert found.spearman_rewards_mean == found.spearman_gains_mean == pytest.approx(1.0)
    assert found.spearman_gains_worst_step == found.spearman_advantages == pytest.approx(1.0)
    assert found.sign_agreement == found.sign_agreement_advantages == found.remaining_gains == 1.0
    assert found.pooled_gains == pytest.approx(1.0)
    assert found.spearman_gains_error == pytest.approx(0.0, abs=1e-12)


def test_agreement_of_one_group_by_hand() -> None:
    """T = 2, G = 3: only state 0 and step 0 count.

    Rewards of state 0: exact 1, 2, 3 and cheap 1, 3, 2: ranks differ by 0, 1, 1, so rho = 1 - 6*2/(3*8) = .5.
    Gains of step 0: exact 4-1, 4-2, 4-3 = 3, 2, 1 and cheap 4-1, 4-3, 4-2 = 3, 1, 2: again .5, all of one sign.
    """
    exact = torch.tensor([[[1.0, 4, 9], [2, 4, 0], [3, 4, 5]]])
    cheap = torch.tensor([[[1.0, 4, 0], [3, 4, 9], [2, 4, 5]]])
    found = agreement.compare(exact, cheap)
    assert found.spearman_rewards == pytest.approx((0.5,))
    assert found.spearman_gains == pytest.approx((0.5,))
    assert found.sign_agreement == 1.0
    # advantages: exact 1, 0, -1 and cheap 1, -1, 0 (times a constant), so one sign of three is right
    assert found.sign_agreement_advantages == pytest.approx(1 / 3)
    assert math.isnan(found.spearman_gains_error)


def test_signs_are_counted_step_by_step() -> None:
    """T = 3, G = 3: states 0 and 1, steps 0 and 1.

    State 0: exact 1, 2, 6 and cheap 1, 4, 4 about their mean of 3: signs -, -, + and -, +, +, so 2 of 3 agree.
    State 1: exact 2, 2, 5 and cheap 9, 9, 9: signs -, -, + and 0, 0, 0, so none of 3. Together 2 of 6.
    Gains of step 0: exact 1, 0, -1 and cheap 8, 5, 5: 1 of 3. Step 1, to 3, 3, 3: exact 1, 1, -2 and cheap -6: 1 of 3.
    """
    exact = torch.tensor([[[1.0, 2, 3, 0], [2, 2, 3, 0], [6, 5, 3, 0]]])
    cheap = torch.tensor([[[1.0, 9, 3, 0], [4, 9, 3, 0], [4, 9, 3, 0]]])
    found = agreement.compare(exact, cheap)
    assert found.sign_agreement_rewards_steps == pytest.approx((2 / 3, 0))
    assert found.sign_agreement_rewards == pytest.approx(2 / 6)
    assert found.sign_agreement_steps == pytest.approx((1 / 3, 1 / 3))
    assert found.sign_agreement == pytest.approx(2 / 6)
    # in a window of step 1 alone, step 0 says nothing
    found = agreement.compare(exact, cheap, (False, True, False))
    assert math.isnan(found.sign_agreement_steps[0]) and math.isnan(found.sign_agreement_rewards_steps[0])
    assert (found.sign_agreement, found.sign_agreement_rewards) == (pytest.approx(1 / 3), 0)
    # among branches the sign of a gain is that of the reward about the mean
    found = agreement.compare_branches(exact[..., :2], cheap[..., :2], (True, True, False, False))
    assert found.sign_agreement_steps == found.sign_agreement_rewards_steps == pytest.approx((2 / 3, 0))


def test_branches_that_lead_to_the_last_states_are_shown_and_not_counted() -> None:
    """T = 4, branches at the steps 0, 2 and 3: of the states 1, 3 and 4 that they lead to, state 1 alone counts."""
    exact = torch.rand(3, 6, 3, generator=torch.Generator().manual_seed(0))
    cheap = exact.clone()
    cheap[..., 0] = torch.rand(3, 6, generator=torch.Generator().manual_seed(1))
    # the third group's branches of step 0 are all alike
    exact[2, :, 0] = 0.5
    noisy = (True, False, True, True)
    found = agreement.compare_branches(exact, cheap, noisy)
    by_hand = [stats.spearmanr(exact[p, :, 0], cheap[p, :, 0]).statistic for p in (0, 1)]
    assert found.spearman_gains == pytest.approx((sum(by_hand) / 2, 1, 1))
    for value in (found.spearman_rewards_mean, found.spearman_gains_mean, found.spearman_gains_worst_step):
        assert value == pytest.approx(sum(by_hand) / 2)
    assert found.sign_agreement == found.sign_agreement_steps[0] < 1 and found.sign_agreement_steps[1:] == (1, 1)
    assert (found.remaining_gains, found.excluded_gains) == (pytest.approx(2 / 3), 1)
    alone = agreement.compare_branches(exact[..., :1], cheap[..., :1], (True, False, False, False))
    for name in ("pooled_gains", "spearman_advantages", "sign_agreement_advantages", "spearman_rewards_error"):
        assert getattr(found, name) == pytest.approx(getattr(alone, name)), name
    # where nothing counts nothing is claimed
    last = agreement.compare_branches(exact[..., 1:], cheap[..., 1:], (False, False, True, True))
    assert math.isnan(last.spearman_gains_mean) and math.isnan(last.pooled_gains) and last.spearman_gains == (1, 1)
    with pytest.raises(ValueError, match=r"must both be \[P, G, 1\] with G >= 2, got \[3, 6, 3\]"):
        agreement.compare_branches(exact, cheap, (True, False))


@settings(deadline=None, max_examples=30)
@given(st.floats(-1e3, 1e3), st.integers(2, 9))
def test_a_groups_single_value_is_its_mean(value: float, group: int) -> None:
    rewards = torch.full((1, group, 1), value, dtype=torch.float64)
    assert not agreement.about_mean(rewards).any()
    rewards[0, 0, 0] = math.nan
    assert agreement.about_mean(rewards).isnan().sum() == 1 and not agreement.about_mean(rewards)[0, 1:].any()


def test_flat_groups_are_left_out_and_counted() -> None:
    exact, noise = torch.rand(4, 6, 5), torch.rand(4, 6, 5)
    exact[1, :, 0] = 0.3
    exact[2, :, :2] = 0.5
    found = agreement.compare(exact, noise)
    # of 4 groups x 3 states: group 1 at state 0, group 2 at states 0 and 1; of the gains group 2's at step 0
    assert (found.excluded_rewards, found.excluded_gains) == (3, 1)
    assert found.remaining_rewards == pytest.approx(9 / 12)
    kept = [stats.spearmanr(exact[p, :, 0], noise[p, :, 0]).statistic for p in (0, 3)]
    assert found.spearman_rewards[0] == pytest.approx(sum(kept) / 2)


def test_the_worst_step_is_the_lowest_mean_over_groups() -> None:
    exact = torch.rand(20, 8, 6)
    found = agreement.compare(exact, exact + 0.1 * torch.rand(20, 8, 6))
    assert found.spearman_gains_worst_step == min(found.spearman_gains)
    assert found.spearman_gains_mean == pytest.approx(sum(found.spearman_gains) / 4)


def test_missing_rewards_are_missing_on_both_sides() -> None:
    exact = torch.rand(2, 6, 5)
    cheap = exact.clone()
    cheap[0, 3, 1] = math.nan
    found = agreement.compare(exact, cheap)
    assert found.missing == pytest.approx(1 / 60)
    assert found.spearman_gains_mean == found.spearman_advantages == pytest.approx(1.0)
    assert found.sign_agreement_advantages == 1.0


def test_rewards_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must both be \[P, G, T\+1\] with G, T >= 2, got \[1, 3, 2\]"):
        agreement.compare(torch.zeros(1, 3, 2), torch.zeros(1, 3, 2))


def test_persistence_is_the_pooled_correlation_inside_groups() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64).cumsum(-1)
    exact += 10 * torch.arange(3.0)[:, None, None]  # between groups, which must not count
    exact[..., 3] = exact[..., 2]
    centred = exact - exact.mean(1, keepdim=True)
    found = agreement.persistence(exact)
    for step in range(3):
        expected = stats.pearsonr(centred[..., step].flatten(), centred[..., step + 1].flatten()).statistic
        assert found[step] == pytest.approx(expected)
    assert found[2] == pytest.approx(1.0)
    # a missing reward takes its sample out of its group's two pairs
    exact[1, 2, 1] = math.nan
    rest = exact[1, [0, 1, 3, 4]]
    pairs = [exact[0], rest, exact[2]]
    expected = stats.pearsonr(*(torch.cat([g[:, k] - g[:, k].mean() for g in pairs]) for k in (0, 1))).statistic
    assert agreement.persistence(exact)[0] == pytest.approx(expected)
    assert math.isnan(agreement.persistence(torch.ones(2, 3, 3))[0])


def test_states_that_share_a_completion_are_no_units() -> None:
    """T = 4 with noise in step 1 alone, G = 3: state 0 is completed as state 1 is, states 2 and 3 are the image.

    State 1: exact 1, 2, 3 and cheap 1, 3, 2, so rho = 1 - 6*2/(3*8) = .5, and Pearson's correlation is .5 too. With
    images of 5, 4.5, 6.5 the gains of step 1 are exact 4, 2.5, 3.5 (ranks 3, 1, 2) and cheap 4, 1.5, 4.5 (ranks 2, 1,
    3): again .5. The states after the window, equal by construction, would have made the rewards' mean 2/3.
    """
    image = torch.tensor([5.0, 4.5, 6.5])
    exact, cheap = (
        torch.stack([state, state, image, image, image], dim=-1)[None]
        for state in (torch.tensor([1.0, 2, 3]), torch.tensor([1.0, 3, 2]))
    )
    found = agreement.compare(exact, cheap, (False, True, False, False))
    assert found.spearman_rewards_mean == found.pooled_rewards == pytest.approx(0.5)
    assert found.spearman_gains_mean == found.spearman_gains_worst_step == pytest.approx(0.5)
    assert found.spearman_rewards[1] == pytest.approx(0.5) and len(found.spearman_rewards) == 3
    assert math.isnan(found.spearman_rewards[0]) and math.isnan(found.spearman_rewards[2])
    assert (found.remaining_rewards, found.excluded_rewards) == (found.remaining_gains, found.excluded_gains) == (1, 0)
    # advantages of the one step: all three gains are positive, centred they have the signs +, -, + and +, -, +
    assert found.spearman_advantages == pytest.approx(0.5)
    assert agreement.compare(exact, cheap).spearman_rewards_mean == pytest.approx(2 / 3)


def test_units_of_a_window_are_counted_group_by_group() -> None:
    generator = torch.Generator().manual_seed(1)
    exact = torch.randn(2, 4, 5, generator=generator)
    exact[..., 2:] = exact[..., 1:2]  # steps 1, 2 and 3 change nothing
    whole, noisy = agreement.compare(exact, exact), agreement.compare(exact, exact, (True, False, False, False))
    # of the steps 0..2 of 2 groups
    assert (whole.remaining_gains, whole.excluded_gains) == (pytest.approx(1 / 3), 4)
    assert (noisy.remaining_gains, noisy.excluded_gains) == (1.0, 0)
    assert (noisy.remaining_rewards, noisy.excluded_rewards) == (1.0, 0)
    assert noisy.spearman_gains_mean == whole.spearman_gains_mean == 1.0
    exact[1, :, 0] = exact[1, 0, 0]  # nothing to rank in one group's only state
    found = agreement.compare(exact, exact, (True, False, False, False))
    assert (found.remaining_rewards, found.excluded_rewards) == (0.5, 1)
    with pytest.raises(ValueError, match="noisy must have one entry for each of 4 steps, got 2"):
        agreement.compare(exact, exact, (True, False))
