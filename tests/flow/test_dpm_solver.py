"""DPM-Solver++ against its defining integral, diffusers' implementation and the exact flow of a Gaussian mixture."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from densegrpo_fast.flow.analytic import GaussianMixtureFlow
from densegrpo_fast.flow.dpm_solver import SOLVER_TYPES, DPMSolver, combine, solver_step
from densegrpo_fast.flow.dynamics import LOG_PROB_CONST, LOG_PROB_SCALE, STD_DEV, A, B, C
from densegrpo_fast.flow.schedule import dance_sigmas, sd3_sigmas

GRID = [0.9, 0.6, 0.35, 0.1]


def half_log_snr(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)


def exact(grid: list[float], step: int, x: float, value: float, slope: float, stochastic: bool) -> float:
    """The solver's integral for data value + slope * (lambda - lambda_s), by Simpson's rule on 2000 intervals.

    ODE: next = sigma'/sigma * x + sigma' * integral of e^lambda m. SDE: next = sigma'/sigma * e^(-h) * x + 2 sigma' *
    e^(-lambda') * integral of e^(2 lambda) m (Lu et al. 2022, propositions 4.1 and A.3 with alpha = sigma * e^lambda).
    """
    s, t = grid[step], grid[step + 1]
    start, end = half_log_snr(s), half_log_snr(t)
    power = 2 if stochastic else 1
    nodes = torch.linspace(start, end, 2001, dtype=torch.float64)
    values = torch.exp(power * nodes) * (value + slope * (nodes - start))
    weights = torch.ones(2001, dtype=torch.float64)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    integral = ((end - start) / 2000 / 3 * (weights * values).sum()).item()
    if stochastic:
        return t / s * math.exp(start - end) * x + 2 * t * math.exp(-end) * integral
    return t / s * x + t * integral


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("step", [1, 2])
def test_exact_where_the_prediction_is_constant_or_linear(step: int, stochastic: bool) -> None:
    x, value, slope = 0.8, -0.4, 0.7
    first = solver_step(GRID, step, order=1, stochastic=stochastic)
    found = first.latents_weight * x + first.data_weights[0] * value
    assert found == pytest.approx(exact(GRID, step, x, value, 0, stochastic), rel=1e-10)
    heun = solver_step(GRID, step, order=2, solver_type="heun", stochastic=stochastic)
    before = value + slope * (half_log_snr(GRID[step - 1]) - half_log_snr(GRID[step]))
    found = heun.latents_weight * x + heun.data_weights[0] * value + heun.data_weights[1] * before
    assert found == pytest.approx(exact(GRID, step, x, value, slope, stochastic), rel=1e-10)


def test_weights_by_hand() -> None:
    # sigma 0.5 -> 0.2, lambda 0 -> ln 4: h = ln 4, e^-h = 1/4. Order 1: 0.4 x + 0.8 * 3/4 m.
    ode = solver_step([0.8, 0.5, 0.2], 1, order=1)
    assert (ode.latents_weight, *ode.data_weights, ode.std) == pytest.approx((0.4, 0.6, 0.0))
    # SDE: 0.4/4 x + 0.8 * 15/16 m, std 0.2 * sqrt(15/16).
    sde = solver_step([0.8, 0.5, 0.2], 1, order=1, stochastic=True)
    assert (sde.latents_weight, *sde.data_weights) == pytest.approx((0.1, 0.75))
    assert sde.std == pytest.approx(0.2 * math.sqrt(15 / 16))
    # Order 2 from sigma 0.8, lambda -ln 4: h/h_1 = 1, so half of 0.6 is added to m_0 and taken from m_1.
    assert solver_step([0.8, 0.5, 0.2], 1).data_weights == pytest.approx((0.9, -0.3))
    # As a row: data = x - 0.5 v, so A = 0.1 + 0.75 and B = -0.75 * 0.5; the density is that of a normal.
    row = sde.row()
    assert (row[A], row[B], row[C], row[STD_DEV]) == pytest.approx((0.85, -0.375, sde.std, sde.std))
    assert row[LOG_PROB_SCALE] == pytest.approx(0.5 / sde.std**2)
    assert row[LOG_PROB_CONST] == pytest.approx(-math.log(sde.std) - 0.5 * math.log(2 * math.pi))
    assert ode.row()[C:] == [0.0, 0.0, 0.0, 0.0]


@given(
    st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.sampled_from(SOLVER_TYPES), st.sampled_from([1, 2]), st.booleans()
)
@settings(max_examples=40, deadline=None)
def test_a_known_image_is_reached_along_the_straight_line(
    first: float, second: float, kind: str, order: int, stochastic: bool
) -> None:
    # If every prediction is the image d, the state (1 - s) d + s z goes to (1 - t) d + (what is left of z).
    grid = [1.0, max(first, second) + 0.01, min(first, second), 0.0]
    for step in range(order - 1, 3):
        weights = solver_step(grid, step, order=order, solver_type=kind, stochastic=stochastic)
        s, t = grid[step], grid[step + 1]
        kept = weights.latents_weight * s
        assert weights.latents_weight * (1 - s) + sum(weights.data_weights) == pytest.approx(1 - t, abs=1e-9)
        # The noise of both kinds together has the level of the grid.
        assert math.hypot(kept, weights.std) == pytest.approx(t, abs=1e-9)


@pytest.mark.ci
@pytest.mark.parametrize("solver_type", SOLVER_TYPES)
def test_diffusers_takes_the_same_steps(solver_type: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver++",
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=3.0,
        solver_order=2,
        solver_type=solver_type,
        final_sigmas_type="zero",
    )
    theirs.set_timesteps(8)
    ours = DPMSolver(theirs.sigmas, solver_type=solver_type)
    x = torch.randn(2, 4, 8, 8)
    expected = found = x
    for index, t in enumerate(theirs.timesteps):
        velocity = expected.sin()
        found = ours.step(found, found.sin(), index)
        expected = theirs.step(velocity, t, expected).prev_sample
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def completion_error(flow: GaussianMixtureFlow, start: Tensor, num_steps: int, order: int, kind: str) -> float:
    """Largest error at sigma 0.05 from sigma 0.95, against 200 steps of the midpoint rule."""

    truth = start
    fine = torch.linspace(0.95, 0.05, 201, dtype=torch.float64)
    for s, t in zip(fine[:-1], fine[1:], strict=True):
        middle = truth + (t - s) / 2 * flow.velocity(truth, s)
        truth = truth + (t - s) * flow.velocity(middle, (s + t) / 2)

    grid = torch.linspace(0.95, 0.05, num_steps + 1)
    solver, x = DPMSolver(grid, order=order, solver_type=kind), start
    for index, sigma in enumerate(grid[:-1].double()):
        x = solver.step(x, flow.velocity(x, sigma), index)
    return (x - truth).abs().max().item()


@pytest.mark.parametrize(
    ("order", "kind", "low", "high"), [(1, "heun", 1.6, 2.6), (2, "heun", 3, 6), (2, "midpoint", 3, 6)]
)
def test_order_of_convergence(order: int, kind: str, low: float, high: float) -> None:
    means = torch.tensor([[1.0, 0.5], [-0.7, -1.0]], dtype=torch.float64)
    flow = GaussianMixtureFlow(means, 0.5)
    start = torch.randn(16, 2, dtype=torch.float64)
    errors = [completion_error(flow, start, steps, order, kind) for steps in (16, 32)]
    # Twice the steps, 2^order times less error.
    assert 0.75 * 2**order < errors[0] / errors[1] < 1.5 * 2**order


def test_ends_and_dtypes() -> None:
    for grid in (sd3_sigmas(5), dance_sigmas(1)):
        solver = DPMSolver(grid)
        x = torch.randn(2, 3, 4, dtype=torch.bfloat16)
        for index in range(len(grid) - 1):
            x = solver.step(x, x.float().cos(), index)
        assert x.dtype == torch.bfloat16 and x.isfinite().all()
    # The only step from noise to data is the prediction itself.
    x, v = torch.randn(2, 2, 3, dtype=torch.float64)
    torch.testing.assert_close(DPMSolver(dance_sigmas(1)).step(x, v, 0), x - v, rtol=1e-12, atol=1e-12)


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="order must be one of 1, 2, got 3"):
        solver_step(GRID, 1, order=3)
    with pytest.raises(ValueError, match="solver_type must be one of midpoint, heun, got 'euler'"):
        solver_step(GRID, 1, solver_type="euler")
    with pytest.raises(ValueError, match=r"step must be in \[1, 3\) at order 2, got 0"):
        solver_step(GRID, 0)
    with pytest.raises(ValueError, match="sigmas must decrease"):
        solver_step([0.5, 0.6], 0, order=1)
    with pytest.raises(ValueError, match="needs as many predictions, got 1"):
        combine(torch.zeros(1, 2), [torch.zeros(1, 2)], solver_step(GRID, 1))
    solver = DPMSolver(torch.tensor(GRID))
    solver.step(torch.zeros(1, 2), torch.zeros(1, 2), 0)
    with pytest.raises(ValueError, match="expected 0 or 1, got 2"):
        solver.step(torch.zeros(1, 2), torch.zeros(1, 2), 2)
