"""The clipped policy loss: values and gradients by hand, metrics, and the KL term."""

from __future__ import annotations

import math

import pytest
import torch

from densegrpo_fast.objective.clip import METRICS, ppo_clip_loss


def losses(ratios, advantages, **options):
    log_prob = torch.tensor(ratios).log().requires_grad_()
    options = {"clip_range": 0.2} | options
    loss, metrics = ppo_clip_loss(log_prob, torch.zeros(len(ratios)), torch.tensor(advantages), **options)
    loss.backward()
    return loss.item(), log_prob.grad, metrics


def test_numbers_by_hand():
    # ratio 1.5, A=+1: clipped, -1.2, no gradient;   ratio 1.5, A=-1: max(1.5, 1.2) = 1.5, gradient +1.5
    # ratio 0.5, A=+1: max(-.5, -.8) = -.5, gradient -.5;   ratio 0.5, A=-2: clipped, 1.6, no gradient
    loss, gradient, metrics = losses([1.5, 1.5, 0.5, 0.5], [1.0, -1.0, 1.0, -2.0])
    assert loss == pytest.approx((-1.2 + 1.5 - 0.5 + 1.6) / 4)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 1.5, -0.5, 0.0]) / 4)
    assert set(metrics) == {*METRICS, *(f"clip_ratio/{name}_mean" for name in ("low", "high", "region"))}
    assert metrics["policy_loss"].item() == pytest.approx(loss)
    assert metrics["clip_fraction"].item() == 1.0
    # the first and the last are clipped for good, the others are driven back
    assert [metrics[f"clip_ratio/{name}_mean"].item() for name in ("low", "high", "region")] == [0.25, 0.25, 0.5]
    assert metrics["ratio_deviation"].item() == pytest.approx(0.5)
    # mean of ratio - 1 - log ratio: (.5 - log 1.5) and (-.5 + log 2), half each
    expected = (0.5 - math.log(1.5) - 0.5 + math.log(2.0)) / 2
    assert metrics["approx_kl"].item() == pytest.approx(expected, rel=1e-5)
    assert metrics["kl"].item() == 0.0
    assert all(value.ndim == 0 and not value.requires_grad for value in metrics.values())


def test_on_policy_the_gradient_is_minus_the_advantage():
    loss, gradient, metrics = losses([1.0, 1.0, 1.0], [2.0, 0.0, -1.0])
    assert loss == pytest.approx(-1 / 3)
    torch.testing.assert_close(gradient, torch.tensor([-2.0, 0.0, 1.0]) / 3)
    assert metrics["clip_fraction"].item() == 0.0 and metrics["ratio_deviation"].item() == 0.0


def test_weight_scales_each_pair():
    loss, gradient, _ = losses([1.0, 1.0], [1.0, 1.0], weight=torch.tensor([3.0, 0.0]))
    assert loss == pytest.approx(-1.5)
    torch.testing.assert_close(gradient, torch.tensor([-1.5, 0.0]))


def test_the_kl_term_is_a_mean_and_carries_gradient():
    kl = torch.tensor([0.1, 0.3], requires_grad=True)
    loss, metrics = ppo_clip_loss(
        torch.zeros(2), torch.zeros(2), torch.tensor([1.0, -1.0]), clip_range=0.2, kl=kl, kl_coef=0.5
    )
    loss.backward()
    assert loss.item() == pytest.approx(0.5 * 0.2)
    torch.testing.assert_close(kl.grad, torch.tensor([0.25, 0.25]))
    assert metrics["kl"].item() == pytest.approx(0.2) and metrics["policy_loss"].item() == pytest.approx(0.0)


def test_a_kl_weight_without_a_kl_is_refused():
    with pytest.raises(ValueError, match="kl_coef 0.1 needs kl, got None"):
        ppo_clip_loss(torch.zeros(2), torch.zeros(2), torch.zeros(2), clip_range=0.2, kl_coef=0.1)
