"""KL of a step: against torch.distributions, by hand, and on noise-free steps."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from densegrpo_fast.flow.dynamics import STD_DEV, A, B, C, coefficients
from densegrpo_fast.objective.kl import gaussian_kl

SIGMAS = torch.tensor([1.0, 0.9, 0.6, 0.25, 0.0])


@pytest.fixture
def velocities():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, 4, 3, 5, 5, generator=generator, dtype=torch.float64).unbind()


@pytest.mark.parametrize("family", ["flow_sde", "cps", "dance"])
def test_equals_the_divergence_of_the_two_gaussians(family, velocities):
    velocity, reference = velocities
    table = coefficients(SIGMAS, 0.7, family).table
    step_index = torch.tensor([0, 1, 2, 1])
    latents = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    rows = table.double()[step_index].T[..., None, None, None]
    policy, ref = (Normal(rows[A] * latents + rows[B] * v, rows[C]) for v in (velocity, reference))
    expected = kl_divergence(policy, ref).flatten(1).mean(1)
    torch.testing.assert_close(gaussian_kl(velocity, reference, table, step_index), expected, rtol=1e-6, atol=0)


def test_paper_and_code_scales_by_hand():
    # step .6 -> .25, noise_level .7: |dt| = .35, std_dev = .7 sqrt(.6 / .4), C = std_dev sqrt(.35),
    # B = -(1 + std_dev^2 (1 - .6) / (2 * .6)) .35; velocities differ by 2 everywhere
    table = coefficients(SIGMAS, 0.7, "flow_sde").table
    variance = 0.49 * 0.6 / 0.4
    squared_b = ((1 + variance * 0.4 / 1.2) * 0.35) ** 2
    velocity = torch.full((1, 2, 3), 1.0)
    step = torch.tensor([2])
    paper = gaussian_kl(velocity, velocity - 2, table, step)
    code = gaussian_kl(velocity, velocity - 2, table, step, scale="flow_grpo")
    assert paper.item() == pytest.approx(squared_b * 4 / (2 * variance * 0.35), rel=1e-5)
    assert code.item() == pytest.approx(squared_b * 4 / (2 * variance), rel=1e-5)
    assert table[2, STD_DEV].item() == pytest.approx(math.sqrt(variance), rel=1e-6)


@pytest.mark.parametrize("scale", ["paper", "flow_grpo"])
def test_noise_free_rows_give_zero_and_a_finite_gradient(scale, velocities):
    velocity, reference = velocities
    table = coefficients(SIGMAS, [0.7, 0.0, 0.7, 0.7], "flow_sde").table
    velocity = velocity.requires_grad_()
    kl = gaussian_kl(velocity, reference, table, torch.tensor([1, 0, 1, 2]), scale=scale)
    assert kl[0] == 0 and kl[2] == 0 and kl[1] > 0 and kl[3] > 0
    kl.sum().backward()
    assert velocity.grad.isfinite().all()
    assert velocity.grad[0].count_nonzero() == 0 and velocity.grad[1].count_nonzero() > 0


def test_the_gradient_pulls_towards_the_reference(velocities):
    velocity, reference = (v.clone() for v in velocities)
    table = coefficients(SIGMAS, 0.7, "flow_sde").table
    step_index = torch.tensor([0, 1, 2, 1])
    assert gaussian_kl(reference, reference, table, step_index).count_nonzero() == 0
    velocity.requires_grad_()
    gaussian_kl(velocity, reference, table, step_index).sum().backward()
    assert torch.equal(velocity.grad.sign(), (velocity - reference).sign())


def test_half_precision_velocities_are_compared_in_float32(velocities):
    velocity, reference = (v.bfloat16() for v in velocities)
    table = coefficients(SIGMAS, 0.7, "flow_sde").table
    step_index = torch.tensor([0, 1, 2, 1])
    kl = gaussian_kl(velocity, reference, table, step_index)
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl, gaussian_kl(velocity.float(), reference.float(), table, step_index))


def test_bad_input_is_refused(velocities):
    velocity, reference = velocities
    table = coefficients(SIGMAS, 0.7, "flow_sde").table
    with pytest.raises(ValueError, match=r"ref_velocity must have shape \[4, 3, 5, 5\] like velocity"):
        gaussian_kl(velocity, reference[:2], table, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"step_index must have shape \[4\], got \[3\]"):
        gaussian_kl(velocity, reference, table, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="scale must be 'paper' or 'flow_grpo', got 'code'"):
        gaussian_kl(velocity, reference, table, torch.zeros(4, dtype=torch.int64), scale="code")
