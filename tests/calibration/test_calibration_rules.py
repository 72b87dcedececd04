"""The rules on sign counts: the printed one to the letter, and the staircase on gains whose optimum is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.calibration.rules import Limits, PrintedRule, Signs, Staircase, calibrate

NORMAL = NormalDist()
Gains = Callable[[tuple[float, ...], int], list[list[float]]]


def second_order(biases: list[float], samples: int = 401, coupling: float = 0.0) -> Gains:
    """Gains level * z - bias * level^2 of a step, z standing at the quantiles of a normal distribution.

    A gain is positive for z > bias * level, so the imbalance is 1 - 2 * Phi(bias * level), Phi being the normal
    distribution's. With a coupling, the levels of earlier steps add to the bias.
    """
    quantiles = [NORMAL.inv_cdf((number + 0.5) / samples) for number in range(samples)]

    def measure(levels: tuple[float, ...], draw: int) -> list[list[float]]:
        found = []
        for step, (level, bias) in enumerate(zip(levels, biases, strict=True)):
            felt = bias + coupling * sum(levels[:step])
            found.append([level * z - felt * level**2 for z in quantiles])
        return found

    return measure


def climbing(*arguments: Any, **options: Any) -> Staircase:
    """A staircase whose steps are all balanced at the lowest level, in its two rounds there."""
    rule = Staircase(*arguments, **options)
    for _ in range(2):
        assert set(rule.levels) <= {0.0, rule.limits.lowest}
        rule.update([Signs(50, 50)] * len(rule.levels))
    assert rule.draw == 0 and not rule.unbalanceable
    return rule


def test_signs_are_counted_apart() -> None:
    signs = Signs.of([0.5, -0.1, 0.0, math.nan, 2.0, -0.0])
    assert signs == Signs(positive=2, negative=1, ties=2, missing=1)
    assert (signs.decided, signs.excess) == (3, 1)
    assert signs.imbalance == pytest.approx(1 / 3)
    assert math.isnan(Signs.of([0.0]).imbalance)


def test_the_printed_rule_to_the_letter() -> None:
    rule = PrintedRule([0.7] * 5, Limits(0.0, 3.0))
    # |5-4| = 1 < 2: up.  |6-4| = 2: down.  |0-9| = 9: down.  No signs at all, |0-0| < 2: up.  |9-0| = 9: down.
    rule.update([Signs(5, 4), Signs(6, 4), Signs(0, 9), Signs(0, 0, ties=9), Signs(9, 0)])
    assert rule.levels == pytest.approx((0.71, 0.69, 0.69, 0.71, 0.69), abs=1e-12)
    assert rule.result == rule.levels and not rule.settled


def test_the_printed_rule_stays_in_the_samplers_range() -> None:
    # what starts without noise is an ODE step, whose gains of 0 would count as balanced
    ode = PrintedRule([0.0, 0.7], Limits(0.0, 3.0))
    ode.update([Signs(0, 0, 24), Signs(12, 12)])
    assert ode.levels == (0.0, 0.71)
    rule = PrintedRule([0.015, 0.995], Limits(0.0, 1.0))
    for _ in range(3):
        rule.update([Signs(0, 9), Signs(4, 4)])
    assert rule.levels == (0.0, 1.0)


@pytest.mark.parametrize(("samples", "raised"), [(2, 0.5), (7, 0.546875), (8, 0.2734375), (64, 0.0993468)])
def test_the_printed_rule_drifts_with_fair_signs(samples: int, raised: float) -> None:
    """P(|excess| < 2) for fair signs: C(N, N/2) / 2^N for even N, 2 C(N, (N-1)/2) / 2^N for odd N."""
    expected = 0.0
    for positive in range(samples + 1):
        rule = PrintedRule([0.7], Limits(0.0, 3.0))
        rule.update([Signs(positive, samples - positive)])
        expected += math.comb(samples, positive) / 2**samples * (rule.levels[0] - 0.7)
    # up by .01 with that probability, down by .01 otherwise: a drift down unless it is above one half
    assert expected == pytest.approx(0.01 * (2 * raised - 1), abs=1e-8)


@settings(deadline=None, max_examples=40)
@given(
    biases=st.lists(st.floats(0.1, 2.0), min_size=1, max_size=4),
    start=st.floats(0.1, 1.0),
    resolution=st.sampled_from([0.01, 0.02, 0.05]),
)
def test_the_staircase_finds_the_highest_balanced_level(biases: list[float], start: float, resolution: float) -> None:
    limits, share = Limits(0.1, 1.0), 0.3
    rule = Staircase([start] * len(biases), limits, share=share, first=0.16, resolution=resolution)
    calibrate(rule, second_order(biases), 60)
    assert rule.settled
    for bias, level in zip(biases, rule.result, strict=True):
        # imbalance 2 Phi(bias level) - 1 = share; 401 samples leave 1/401 of play in it
        best = NORMAL.inv_cdf((1 + share) / 2) / bias
        play = 0.01 / bias
        assert limits.clamp(best - resolution - play) - 1e-6 <= level <= limits.clamp(best + play) + 1e-6


def test_a_bias_that_earlier_steps_add_to() -> None:
    measure = second_order([0.8, 0.2, 0.1], coupling=0.5)
    rule = Staircase([0.7] * 3, Limits(0.05, 1.0), share=0.3)
    calibrate(rule, measure, 60)
    assert rule.settled
    for gains in measure(rule.result, 0):
        assert abs(Signs.of(gains).imbalance) <= 0.3 + 0.02
    for step, gains in enumerate(measure(tuple(level + 0.04 for level in rule.result), 0)):
        assert abs(Signs.of(gains).imbalance) > 0.3, step


@pytest.mark.parametrize("sign", [1, -1])
def test_any_imbalance_lowers_a_level(sign: int) -> None:
    rule = climbing([0.7], Limits(0.1, 1.0))
    rule.update([Signs(9, 91) if sign < 0 else Signs(91, 9)])
    assert rule.levels == pytest.approx((0.54,))


def test_levels_stop_at_the_limits() -> None:
    """Signs are fair in the first step, and in the second below .25 alone, which the search steps over."""

    def measure(levels: tuple[float, ...], draw: int) -> list[list[float]]:
        return [[1.0, -1.0] * 20, [-1.0, 1.0] * 20 if levels[1] == 0.2 else [-1.0] * 40]

    rule = Staircase([0.7, 0.7], Limits(0.2, 0.9), resolution=0.16)
    rounds = calibrate(rule, measure, 30)
    assert rule.settled and rule.result == (0.9, 0.2) and rule.unbalanceable == ()
    assert [measured.levels for measured in rounds] == [
        (0.2, 0.2), (0.2, 0.2), (0.7, 0.7), (0.86, 0.54), (0.9, 0.38), (0.9, 0.22), (0.9, 0.2), (0.9, 0.2)
    ]  # fmt: skip


def test_a_step_that_no_level_balances_keeps_its_start() -> None:
    rule = Staircase([0.7, 0.7], Limits(0.2, 0.7))
    rounds = calibrate(rule, lambda levels, draw: [[1.0, -1.0] * 20, [-1.0] * 40], 30)
    assert rule.settled and rule.result == (0.7, 0.7) and rule.unbalanceable == (1,)
    # two draws at the lowest level; the first step is held by the highest; and the confirmation
    assert [measured.levels for measured in rounds] == [(0.2, 0.2)] * 2 + [(0.7, 0.7)] * 2


def test_a_step_is_unbalanceable_by_two_draws_together() -> None:
    rule = Staircase([0.5, 0.5], Limits(0.1, 1.0), share=0.1, deviations=1.0)
    # of 200 signs an excess of 20 does not matter: 24 - 6 = 18, but 12 + 12 = 24
    rule.update([Signs(62, 38), Signs(56, 44)])
    assert rule.draw == 1
    rule.update([Signs(47, 53), Signs(56, 44)])
    assert rule.unbalanceable == (1,) and rule.draw == 0 and rule.levels == (0.5, 0.5)


def test_a_level_that_was_lucky_is_refuted_by_the_next_draw() -> None:
    """One step, 100 signs: above .4 truly 62 negative ones, which the first draw hides; up to .4 there are 52."""
    draws: list[int] = []

    def measure(levels: tuple[float, ...], draw: int) -> list[list[float]]:
        draws.append(draw)
        negative = 52 if levels[0] <= 0.4 else 54 if draw == 0 else 62
        return [[-1.0] * negative + [1.0] * (100 - negative)]

    rule = Staircase([0.5], Limits(0.1, 0.6), share=0.1, deviations=1.0, first=0.1, resolution=0.05)
    rounds = calibrate(rule, measure, 30)
    # 100 signs allow an excess of 10, 200 of 20. At .1, .5 and .6 it is 4 or 8; with the second draw's 24 at .6 it is
    # 32: on with the lower half, up to .35. That is balanced and held there, and the third draw confirms it, 4 + 4.
    assert [measured.levels[0] for measured in rounds] == [0.1, 0.1, 0.5, 0.6, 0.6, 0.35, 0.35]
    assert draws == [0, 1, 0, 0, 1, 1, 2]
    assert rule.settled and rule.result == (0.35,) and rule.unbalanceable == ()


def test_the_tolerance_follows_the_number_of_samples() -> None:
    rule = Staircase([0.7], Limits(0.1, 1.0), share=0.1, deviations=2.0)
    # 2 sqrt(64) = 16 > 6.4;  2 sqrt(400) = 40 = .1 * 400;  2 sqrt(2500) = 100 < 250
    assert [rule.allowed(n) for n in (64, 400, 2500)] == [16.0, 40.0, 250.0]


def test_ties_move_nothing() -> None:
    only_ties, none, few = Signs(0, 0, ties=64), Signs(0, 0, missing=64), Signs(0, 3, ties=61)
    rule = Staircase([0.7, 0.6, 0.5], Limits(0.1, 1.0))
    for _ in range(3):
        rule.update([only_ties, none, few])
    assert rule.levels == rule.result == (0.7, 0.6, 0.5) and rule.settled and not rule.unbalanceable


@given(
    positive=st.integers(0, 40),
    negative=st.integers(0, 40),
    ties=st.integers(0, 1000),
)
def test_ties_do_not_change_a_decision(positive: int, negative: int, ties: int) -> None:
    plain, tied = (climbing([0.5], Limits(0.1, 1.0)) for _ in range(2))
    plain.update([Signs(positive, negative)])
    tied.update([Signs(positive, negative, ties=ties)])
    assert plain.levels == tied.levels


def test_steps_without_noise_stay_without() -> None:
    rule = Staircase([0.0, 0.7], Limits(0.1, 1.0))
    calibrate(rule, second_order([0.5, 0.5]), 30)
    assert rule.result[0] == 0.0 and rule.result[1] > 0.1


def test_a_level_that_is_no_longer_balanced_is_not_the_result() -> None:
    rule = climbing([0.5, 0.5], Limits(0.1, 1.0), first=0.1, resolution=0.1)
    balanced, biased = Signs(20, 20), Signs(0, 40)
    # at .5, at .6, at .5 again, while the other step goes up
    for signs in (balanced, biased, biased):
        rule.update([signs, balanced])
    assert rule.levels == (0.4, 0.8) and rule.result == (0.4, 0.7)


def test_draws_and_the_end() -> None:
    draws: list[tuple[str, int]] = []

    def measure(levels: tuple[float, ...], draw: int) -> list[list[float]]:
        draws.append((rule.name, draw))
        return second_order([1.0])(levels, draw)

    rule: Staircase | PrintedRule = Staircase([0.7], Limits(0.1, 1.0))
    rounds = calibrate(rule, measure, 50)
    assert rule.settled and len(rounds) < 18
    # two draws below, common random numbers until all steps have ended, then a draw that confirms
    assert [draw for _, draw in draws] == [0, 1] + [0] * (len(rounds) - 3) + [1]
    assert rounds[-1].levels == rule.result
    # the levels at which a round was measured are those that the rule asked for before it
    assert rounds[2].levels == (0.7,) and rounds[3].levels != (0.7,)

    draws.clear()
    rule = PrintedRule([0.7], Limits(0.0, 3.0))
    assert len(calibrate(rule, measure, 4)) == 4
    assert [draw for _, draw in draws] == [0, 1, 2, 3]


def test_the_rounds_end_an_unsettled_staircase() -> None:
    rule = Staircase([0.7], Limits(0.1, 1.0))
    assert len(calibrate(rule, second_order([1.0]), 4)) == 4
    assert not rule.settled
    # nothing was balanced at .7 and .54: where it has come to
    assert rule.result == rule.levels == pytest.approx((0.38,))


def test_the_order_of_the_samples_does_not_matter() -> None:
    measure = second_order([1.0, 0.4])
    results = []
    for order in (1, -1):
        rule = Staircase([0.7, 0.7], Limits(0.1, 1.0))
        rounds = calibrate(rule, lambda levels, draw, o=order: [step[::o] for step in measure(levels, draw)], 40)
        results.append((rule.result, [measured.levels for measured in rounds]))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"share": 1.0}, "share"),
        ({"deviations": -1.0}, "deviations"),
        ({"first": 0.01, "resolution": 0.02}, "resolution"),
        ({"resolution": 0.0}, "resolution"),
    ],
)
def test_refused_parameters(arguments: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Staircase([0.7], Limits(0.1, 1.0), **arguments)


def test_refused_limits_and_rounds() -> None:
    for lowest, highest in ((-0.1, 1.0), (0.5, 0.4), (0.0, math.inf)):
        with pytest.raises(ValueError, match="noise levels"):
            Limits(lowest, highest)
    with pytest.raises(ValueError, match="rounds"):
        calibrate(PrintedRule([0.7], Limits(0, 1)), second_order([1.0]), 0)
