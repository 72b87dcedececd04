from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from densegrpo_fast.flow.analytic import GaussianMixtureFlow
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.flow.ops import euler_jump
from densegrpo_fast.flow.schedule import dance_sigmas

MEANS = torch.tensor([[2.0, 0.0], [-1.0, 1.5], [0.0, -2.0]], dtype=torch.float64)
MIXTURE = GaussianMixtureFlow(MEANS, 0.4, [1.0, 2.0, 1.0])


def integrate(flow: GaussianMixtureFlow, latents: Tensor, num_steps: int, first: float, last: float) -> Tensor:
    """Classic Runge-Kutta of fourth order between two noise levels."""
    grid = torch.linspace(first, last, num_steps + 1, dtype=torch.float64)
    for sigma, next_sigma in zip(grid[:-1].tolist(), grid[1:].tolist(), strict=True):
        dt = next_sigma - sigma
        k1 = flow.velocity(latents, sigma)
        k2 = flow.velocity(latents + dt / 2 * k1, sigma + dt / 2)
        k3 = flow.velocity(latents + dt / 2 * k2, sigma + dt / 2)
        k4 = flow.velocity(latents + dt * k3, next_sigma)
        latents = latents + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return latents


def test_one_gaussian_moves_along_its_closed_form_path() -> None:
    # x_sigma = (1-sigma) m + tau(sigma) z with tau^2 = (1-sigma)^2 s^2 + sigma^2 for a fixed z: the velocity
    # is the derivative -m + tau' z with tau' = (sigma - (1-sigma) s^2) / tau.
    mean, std = MEANS[:1], 0.4
    flow = GaussianMixtureFlow(mean, std)
    z = torch.randn(5, 2, dtype=torch.float64)
    sigma = torch.tensor([1.0, 0.8, 0.5, 0.1, 0.0], dtype=torch.float64)
    tau = ((1 - sigma) ** 2 * std**2 + sigma**2).sqrt()
    latents = (1 - sigma)[:, None] * mean + tau[:, None] * z
    derivative = -mean + ((sigma - (1 - sigma) * std**2) / tau)[:, None] * z
    torch.testing.assert_close(flow.velocity(latents, sigma), derivative, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=25)
@given(sigma=st.floats(0.05, 0.99), seed=st.integers(0, 1000))
def test_velocity_and_score_agree(sigma: float, seed: int) -> None:
    # For x = (1-s) data + s noise the score is -(x + (1-s) v)/s; here it comes from differentiating the
    # density.
    latents = torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2
    latents.requires_grad_()
    (score,) = torch.autograd.grad(MIXTURE.log_density(latents, sigma).sum(), latents)
    expected = -(latents + (1 - sigma) * MIXTURE.velocity(latents, sigma)) / sigma
    torch.testing.assert_close(score, expected.detach(), rtol=1e-9, atol=1e-9)


def test_density_integrates_to_one() -> None:
    axis = torch.linspace(-6, 6, 241, dtype=torch.float64)
    points = torch.cartesian_prod(axis, axis)
    for sigma in (0.0, 0.5, 1.0):
        mass = MIXTURE.log_density(points, sigma).exp().sum() * (axis[1] - axis[0]) ** 2
        assert mass.item() == pytest.approx(1, abs=1e-6)


def test_the_ode_transports_noise_to_the_data() -> None:
    latents = torch.randn(20000, 2, dtype=torch.float64)
    data = integrate(MIXTURE, latents, 40, 1.0, 0.0)
    weights = torch.tensor([0.25, 0.5, 0.25], dtype=torch.float64)
    mean = weights @ MEANS
    centred = MEANS - mean
    covariance = 0.4**2 * torch.eye(2, dtype=torch.float64) + (centred.T * weights) @ centred
    # Five standard errors; the largest variance is about 2.
    torch.testing.assert_close(data.mean(0), mean, atol=5 * math.sqrt(2 / 20000), rtol=0)
    torch.testing.assert_close(torch.cov(data.T), covariance, atol=5 * math.sqrt(8 / 20000), rtol=0)
    share = torch.cdist(data, MEANS).argmin(1).bincount(minlength=3) / 20000
    torch.testing.assert_close(share.double(), weights, atol=0.02, rtol=0)


def test_sampled_data_have_the_same_moments() -> None:
    # Weights 1/4, 1/2, 1/4. Means: x = 2/4 - 1/2 = 0, y = 1.5/2 - 2/4 = 1/4. Variances: x = 4/4 + 1/2 + .16 =
    # 1.66, y = 2.25/2 + 4/4 - 1/16 + .16 = 2.2225.
    data = MIXTURE.sample_data(20000, torch.Generator().manual_seed(3))
    torch.testing.assert_close(data.mean(0), torch.tensor([0, 0.25]).double(), atol=0.05, rtol=0)
    torch.testing.assert_close(data.var(0), torch.tensor([1.66, 2.2225]).double(), atol=0.1, rtol=0)


def test_the_sde_keeps_the_marginals() -> None:
    # Fine steps of flow_sde from noise reach the same distribution as the ODE.
    num_steps = 100
    sigmas = dance_sigmas(num_steps)
    table = coefficients(sigmas, 0.5, "flow_sde").table.double()
    latents = torch.randn(8000, 2, dtype=torch.float64)
    for step in range(num_steps):
        a, b, c = table[step, :3].tolist()
        velocity = MIXTURE.velocity(latents, float(sigmas[step]))
        latents = a * latents + b * velocity + c * torch.randn_like(latents)
    share = torch.cdist(latents, MEANS).argmin(1).bincount(minlength=3) / 8000
    torch.testing.assert_close(share, torch.tensor([0.25, 0.5, 0.25]), atol=0.03, rtol=0)


def test_euler_steps_converge_to_the_flow() -> None:
    latents = torch.randn(64, 2, dtype=torch.float64)
    exact = integrate(MIXTURE, latents, 200, 1.0, 0.0)
    errors = []
    for num_steps in (50, 100):
        state, sigmas = latents, dance_sigmas(num_steps, shift=1.0)
        for sigma, next_sigma in zip(sigmas[:-1], sigmas[1:], strict=True):
            state = euler_jump(state, MIXTURE.velocity(state, sigma), sigma, next_sigma)
        errors.append((state - exact).norm() / exact.norm())
    # First order: half the step, about half the error.
    assert errors[1] < 0.65 * errors[0]
    assert errors[1] < 0.03


def test_condition_and_guidance() -> None:
    latents = torch.randn(4, 2, dtype=torch.float64)
    conditional = MIXTURE.condition([1, 2])
    torch.testing.assert_close(conditional.weights, torch.tensor([2 / 3, 1 / 3], dtype=torch.float64))
    u, v = MIXTURE.velocity(latents, 0.6), conditional.velocity(latents, 0.6)
    torch.testing.assert_close(MIXTURE.guided_velocity(latents, 0.6, [1, 2], 1.0), v)
    torch.testing.assert_close(MIXTURE.guided_velocity(latents, 0.6, [1, 2], 0.0), u)
    torch.testing.assert_close(MIXTURE.guided_velocity(latents, 0.6, [1, 2], 4.5), u + 4.5 * (v - u))


def test_latent_shapes_and_rows_of_their_own_sigma() -> None:
    flow = GaussianMixtureFlow(torch.randn(3, 12), 0.5)
    latents = torch.randn(5, 3, 2, 2)
    sigma = torch.linspace(0, 1, 5)
    velocity = flow.velocity(latents, sigma)
    assert (velocity.shape, velocity.dtype) == (latents.shape, torch.float32)
    for row in range(5):
        torch.testing.assert_close(velocity[row], flow.velocity(latents[row : row + 1], float(sigma[row]))[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianMixtureFlow(torch.zeros(3), 1.0), r"means must be floating with shape \[K, D\]"),
        (lambda: GaussianMixtureFlow(MEANS, 0.0), "std must be positive, got 0.0"),
        (lambda: GaussianMixtureFlow(MEANS, 1.0, [1.0, 1.0]), "weights must be 3 positive values"),
        (lambda: GaussianMixtureFlow(MEANS, 1.0, [1.0, 1.0, 0.0]), "weights must be 3 positive values"),
        (lambda: MIXTURE.velocity(torch.zeros(4, 3), 0.5), "latents must have 2 elements per row"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
