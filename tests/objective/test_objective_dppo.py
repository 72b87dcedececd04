"""Flow-DPPO: which pairs are dropped, and the loss of the rest."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.objective.clip import METRICS, ppo_clip_loss
from densegrpo_fast.objective.dppo import dppo_keep, dppo_loss
from densegrpo_fast.objective.kl import gaussian_kl


def test_which_pairs_stay_by_hand():
    # rows: ratio above 1 with advantage +, -, 0; ratio below 1 with +, -; ratio 1 with +
    log_ratio = torch.tensor([0.1, 0.1, 0.1, -0.1, -0.1, 0.0])
    advantages = torch.tensor([1.0, -1.0, 0.0, 1.0, -1.0, 1.0])
    far = dppo_keep(log_ratio, advantages, torch.full((6,), 1e-5))
    assert far.tolist() == [False, True, True, True, False, True]
    near = dppo_keep(log_ratio, advantages, torch.full((6,), 0.99e-5))
    assert near.all()


def test_numbers_by_hand():
    # ratio 1.5, A = 1, far: dropped;   ratio 1.5, A = -1, far: +1.5, gradient +1.5
    # ratio .5, A = 2, far: -1, gradient -1;   ratio 1.5, A = 1, near: -1.5 unclipped, gradient -1.5
    log_prob = torch.tensor([1.5, 1.5, 0.5, 1.5]).log().requires_grad_()
    advantages, divergence = torch.tensor([1.0, -1.0, 2.0, 1.0]), torch.tensor([0.3, 0.3, 0.3, 0.1])
    loss, metrics = dppo_loss(log_prob, torch.zeros(4), advantages, divergence, threshold=0.2)
    loss.backward()
    assert loss.item() == pytest.approx((1.5 - 1.0 - 1.5) / 4)
    torch.testing.assert_close(log_prob.grad, torch.tensor([0.0, 1.5, -1.0, -1.5]) / 4)
    assert set(metrics) >= set(METRICS) and metrics["clip_fraction"].item() == 0.25
    # the dropped one has a positive advantage
    assert [metrics[f"clip_ratio/{name}_mean"].item() for name in ("low", "high", "region")] == [0.0, 0.25, 0.25]
    assert metrics["ratio_deviation"].item() == pytest.approx(0.5)
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20))
def test_on_policy_it_is_ppo_and_dtypes_agree(seed):
    log_prob, advantages = torch.randn(2, 8, generator=torch.Generator().manual_seed(seed)).unbind()
    on_policy = dppo_loss(log_prob, log_prob, advantages, torch.zeros(8))[0]
    torch.testing.assert_close(on_policy, ppo_clip_loss(log_prob, log_prob, advantages, clip_range=0.2)[0])
    old, divergence = log_prob - 0.1 * advantages, log_prob.square()
    single = dppo_loss(log_prob, old, advantages, divergence, threshold=0.5)[0]
    double = dppo_loss(*(value.double() for value in (log_prob, old, advantages, divergence)), threshold=0.5)[0]
    torch.testing.assert_close(single.double(), double, atol=1e-6, rtol=1e-5)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 2**20))
def test_rows_may_come_in_any_order_and_advantage_zero_adds_nothing(seed):
    generator = torch.Generator().manual_seed(seed)
    log_prob, old, advantages, divergence = torch.randn(4, 8, generator=generator).double().unbind()
    advantages[3] = 0.0
    rows = (log_prob, old, advantages, divergence.abs())
    loss = dppo_loss(*rows, threshold=0.5)[0]
    order = torch.randperm(8, generator=generator)
    torch.testing.assert_close(dppo_loss(*(row[order] for row in rows), threshold=0.5)[0], loss)
    others = [row for row in range(8) if row != 3]
    torch.testing.assert_close(dppo_loss(*(row[others] for row in rows), threshold=0.5)[0] * 7 / 8, loss)


def test_the_divergence_is_the_steps_kl_to_the_old_policy():
    # flow_sde .6 -> .25 at noise level .7: std_dev^2 = .735, |dt| = .35, B = -(1 + .735 * .4 / 1.2) * .35 = -.43575;
    # velocities .1 apart: (.043575)^2 / (2 * .735 * .35) = .0036905
    table = coefficients(torch.tensor([1.0, 0.9, 0.6, 0.25, 0.0]), 0.7, "flow_sde").table
    velocity = torch.full((2, 3), 1.0, requires_grad=True)
    divergence = gaussian_kl(velocity, torch.full((2, 3), 1.1), table, torch.tensor([2, 2]))
    torch.testing.assert_close(divergence.detach(), torch.full((2,), 0.0036905), rtol=1e-4, atol=0)
    log_ratio, advantages = torch.tensor([0.1, 0.1]), torch.tensor([1.0, 1.0])
    assert dppo_keep(log_ratio, advantages, divergence, threshold=0.0037).all()
    assert not dppo_keep(log_ratio, advantages, divergence, threshold=0.0036).any()
    # the mask takes no gradient from it
    log_prob = torch.tensor([0.1, 0.1], requires_grad=True)
    dppo_loss(log_prob, torch.zeros(2), -advantages, divergence, threshold=0.0036)[0].backward()
    assert velocity.grad is None and log_prob.grad.count_nonzero() == 2


def test_weight_and_kl_are_passed_on():
    rows = torch.tensor([0.1, 0.2]), torch.zeros(2), torch.tensor([1.0, -1.0]), torch.zeros(2)
    plain = dppo_loss(*rows)[0]
    torch.testing.assert_close(dppo_loss(*rows, weight=torch.full((2,), 3.0))[0], 3 * plain)
    # with divergence 0 at threshold 0 row 0 is dropped, whatever its weight
    dropped = dppo_loss(*rows, threshold=0.0, weight=torch.tensor([3.0, 2.0]))[0]
    assert dropped.item() == pytest.approx(2 * math.exp(0.2) / 2)
    torch.testing.assert_close(dppo_loss(*rows, kl=torch.tensor([1.0, 3.0]), kl_coef=0.5)[0], plain + 1.0)


@pytest.mark.parametrize("threshold", [-1.0, math.nan, math.inf])
def test_a_threshold_out_of_range_is_refused(threshold):
    with pytest.raises(ValueError, match="threshold must be finite and at least 0"):
        dppo_keep(torch.zeros(1), torch.zeros(1), torch.zeros(1), threshold)


def test_shapes_that_disagree_are_refused():
    with pytest.raises(ValueError, match=r"must have shape \[2\] like log_prob, got \[2\] and \[3\]"):
        dppo_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match=r"kl_coef 0\.1 needs kl"):
        dppo_loss(*[torch.zeros(2)] * 4, kl_coef=0.1)
