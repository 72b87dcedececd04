from __future__ import annotations

import math

import pytest
import torch

from densegrpo_fast.flow.dynamics import B, C, coefficients
from densegrpo_fast.flow.schedule import sd3_sigmas
from densegrpo_fast.objective.weights import step_weights

SIGMAS = sd3_sigmas(10)
SAMPLER = coefficients(SIGMAS, 0.7, "flow_sde")


def test_none_is_one_for_every_step():
    assert step_weights(SAMPLER, range(9), "none").tolist() == [1.0] * 10


def test_noise_aware_has_mean_one_over_the_trained_steps():
    weights = step_weights(SAMPLER, range(9), "noise_aware")
    assert weights[:9].mean().item() == pytest.approx(1.0, rel=1e-6)


def test_noise_aware_equals_the_published_constant_on_sd3s_grid():
    # TempFlow's code multiplies by 2.25 * step_std at T = 10, a = 0.7: 2.25 = 1 / mean of the nine steps' std (.444)
    weights = step_weights(SAMPLER, range(9), "noise_aware")
    torch.testing.assert_close(weights, 2.25 * SAMPLER.table[:, C], rtol=2e-3, atol=0)


def test_noise_aware_follows_the_trained_steps():
    assert step_weights(SAMPLER, [3], "noise_aware")[3].item() == 1.0


def test_flash_by_hand():
    # noise level .5, .8 -> .5: |dt| = .3, std = .5 sqrt(.8/.2) = 1, c = sqrt(.3) + sqrt(.3) .2 / 1.6 = 1.125 sqrt(.3);
    # .5 -> .2: std = .5, c = 2 sqrt(.3) + .5 sqrt(.3) .5 / 1 = 2.25 sqrt(.3). 1/c is as 2 to 1: 4/3 and 2/3
    sampler = coefficients(torch.tensor([0.8, 0.5, 0.2]), 0.5, "flow_sde")
    torch.testing.assert_close(step_weights(sampler, [0, 1], "flash"), torch.tensor([4 / 3, 2 / 3]))
    # relative to step 1 alone: 2 and 1
    torch.testing.assert_close(step_weights(sampler, [1], "flash"), torch.tensor([2.0, 1.0]))


def test_flash_undoes_the_growth_of_the_gradient_on_sd3s_grid():
    # size of d log_prob / d velocity per unit of noise at T = 10, a = 0.7, to three digits
    gain = torch.tensor([0.057, 0.078, 0.129, 0.188, 0.264, 0.371, 0.536, 0.825, 1.487, 1.771])
    product = step_weights(SAMPLER, range(9), "flash") * gain
    torch.testing.assert_close(product, product[:1].expand(10), rtol=1.5e-2, atol=0)


@pytest.mark.parametrize("family", ["flow_sde", "dance", "cps", "precise"])
@pytest.mark.parametrize("kind", ["flash", "proportionate"])
def test_what_is_left_of_the_gradient(family, kind):
    """Of log_prob as it is written, differentiated: |z| alone (flash), or |dt| z (proportionate)."""
    sampler = coefficients(SIGMAS[:-1], 0.7, family)
    table = sampler.table.double()
    velocity, noise = torch.zeros(9, dtype=torch.float64, requires_grad=True), 0.3
    residual = table[:, C] * noise - table[:, B] * velocity
    (-(table[:, 4] * residual.square())).sum().backward()
    left = velocity.grad.abs() * step_weights(sampler, range(9), kind).double()
    if kind == "proportionate":
        left = left / sampler.sigmas.diff().abs().double()
    torch.testing.assert_close(left, left[:1].expand(9), rtol=1e-5, atol=0)


def test_proportionate_by_hand():
    # .8 -> .5 -> .3: |dt| = .3 and .2; c = 1.125 sqrt(.3) as above, and sqrt(.2)/.5 + .5 sqrt(.2)/2 = 2.25 sqrt(.2);
    # |dt|/c = sqrt(.3)/1.125 and sqrt(.2)/2.25, as 2 sqrt(1.5) to 1
    sampler = coefficients(torch.tensor([0.8, 0.5, 0.3]), 0.5, "flow_sde")
    weights = step_weights(sampler, [0, 1], "proportionate")
    ratio = 2 * math.sqrt(1.5)
    torch.testing.assert_close(weights, torch.tensor([2 * ratio, 2.0]) / (1 + ratio))


@pytest.mark.parametrize("kind", ["flash", "proportionate"])
def test_noise_free_steps_weigh_nothing_and_disturb_nothing(kind):
    levels = [0.7] * 3 + [0.0] * 7
    sampler = coefficients(SIGMAS, levels, "flow_sde")
    weights = step_weights(sampler, [0, 1, 2], kind)
    assert weights[3:].count_nonzero() == 0
    torch.testing.assert_close(weights[:3], step_weights(SAMPLER, [0, 1, 2], kind)[:3])


@pytest.mark.parametrize(
    ("steps", "kind", "message"),
    [
        ([], "none", "at least one trained step"),
        ([], "flash", "at least one trained step"),
        ([0], "loud", r"unknown step weight 'loud' \(known: none, noise_aware"),
    ],
)
def test_bad_arguments_are_refused(steps, kind, message):
    with pytest.raises(ValueError, match=message):
        step_weights(SAMPLER, steps, kind)
