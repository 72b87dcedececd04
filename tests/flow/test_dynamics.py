from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from densegrpo_fast.flow.dynamics import (
    FAMILIES,
    LOG_PROB_CONST,
    LOG_PROB_SCALE,
    STD_DEV,
    A,
    B,
    C,
    coefficients,
)
from densegrpo_fast.flow.schedule import dance_sigmas, flux_sigmas, sd3_sigmas

STOCHASTIC_FAMILIES = [family for family in FAMILIES if family != "ode"]


def host_step(family: str, x: Tensor, v: Tensor, z: Tensor, sigmas: Tensor, i: int, a: float) -> tuple[Tensor, Tensor]:
    """Next state and log_prob as each family's authors write them: scores and estimates of x_0."""
    s, sn = sigmas[i].double(), sigmas[i + 1].double()
    dt = sn - s
    data, noise = x - s * v, x + (1 - s) * v
    if family in ("cps", "precise"):
        if family == "cps":
            k = sn * math.sin(a * math.pi / 2)
        else:
            k = sn * (1 - (sn * (1 - s) / (s * (1 - sn))) ** (a * a)).sqrt()
        mean = (1 - sn) * data + (sn**2 - k**2).sqrt() * noise
        std = k
    else:
        if family == "flow_sde":
            eta = a * (s / (1 - (sigmas[1].double() if s == 1 else s))).sqrt()
        elif family == "dance":
            eta = torch.tensor(a, dtype=torch.float64)
        else:
            eta = a * (sigmas[-1].double() + (sigmas[1].double() - sigmas[-1].double()) * s)
        score = -(x - (1 - s) * data) / s**2
        mean = x + dt * v - 0.5 * eta**2 * score * dt
        std = eta * (-dt).sqrt()
    state = mean + std * z
    square = ((state - mean) ** 2).mean(1)
    if family == "cps":
        return state, -square
    return state, -square / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)


@pytest.mark.parametrize("family", STOCHASTIC_FAMILIES)
@pytest.mark.parametrize(
    "sigmas", [sd3_sigmas(10), flux_sigmas(6, 1024), dance_sigmas(16)], ids=["sd3", "flux", "dance"]
)
def test_affine_form_equals_the_hosts_formulas(family: str, sigmas: Tensor) -> None:
    noise_level = {"dance": 0.3, "wan": 1.0}.get(family, 0.7)
    table = coefficients(sigmas, noise_level, family).table.double()
    for step in range(len(sigmas) - 1):
        x, v, z = torch.randn(3, 4, 50, dtype=torch.float64)
        row = table[step]
        if row[C] == 0:
            assert family in ("cps", "precise")
            assert step == len(sigmas) - 2
            continue
        state = row[A] * x + row[B] * v + row[C] * z
        log_prob = -row[LOG_PROB_SCALE] * (row[C] * z).square().mean(1) + row[LOG_PROB_CONST]
        expected_state, expected_log_prob = host_step(family, x, v, z, sigmas, step, noise_level)
        torch.testing.assert_close(state, expected_state, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(log_prob, expected_log_prob, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "noise_level", "step", "std_dev", "a", "b", "c"),
    [
        ("flow_sde", 0.7, 0, 3.50567126, 0.755, -0.03987068, 0.7),
        ("flow_sde", 0.7, 1, 3.43507385, 0.71254101, -0.05824153, 0.74296407),
        ("flow_sde", 0.7, 9, 0.06644106, 0.99779279, -0.01111607, 0.00627809),
        ("cps", 0.8, 0, 0.91313726, 0.33656696, -0.03987068, 0.91313726),
        ("cps", 0.8, 1, 0.86864650, 0.36889138, -0.07194308, 0.86864650),
        ("cps", 0.8, 9, 0.0, 1.0, -0.00892857, 0.0),
    ],
)
def test_golden_values_of_the_sd3_grid(
    family: str, noise_level: float, step: int, std_dev: float, a: float, b: float, c: float
) -> None:
    # Values printed by the hosts' own float32 code, hence a few float32 roundings of slack.
    row = coefficients(sd3_sigmas(10), noise_level, family).table[step]
    expected = torch.tensor([a, b, c, std_dev])
    torch.testing.assert_close(row[[A, B, C, STD_DEV]], expected, rtol=1.5e-6, atol=5e-8)


def test_injected_noise_of_the_published_sampler() -> None:
    # C of flow_sde at a = .7 on SD3's 10-step grid, label 10 ... 1.
    expected = torch.tensor([0.700, 0.743, 0.536, 0.446, 0.392, 0.353, 0.319, 0.282, 0.225, 0.006])
    torch.testing.assert_close(coefficients(sd3_sigmas(10), 0.7, "flow_sde").table[:, C], expected, atol=5e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_noise_level_zero_is_euler_bit_for_bit(family: str) -> None:
    sigmas = sd3_sigmas(10)
    steps = coefficients(sigmas, 0.0, family)
    x, v = torch.randn(2, 10, 64)
    euler = x + (sigmas[1:] - sigmas[:-1])[:, None] * v
    assert torch.equal(steps.table[:, A, None] * x + steps.table[:, B, None] * v, euler)
    assert not any(steps.noisy)
    assert (steps.table[:, [C, STD_DEV, LOG_PROB_SCALE, LOG_PROB_CONST]] == 0).all()


def test_noise_level_may_vary_by_step() -> None:
    levels = [0.0, 0.5, 0.7, 0.0]
    steps = coefficients(sd3_sigmas(4), levels, "flow_sde")
    assert list(steps.noisy) == [False, True, True, False]
    assert steps.noise_level == tuple(levels)
    assert torch.equal(steps.table[1], coefficients(sd3_sigmas(4), 0.5, "flow_sde").table[1])
    assert torch.equal(steps.table[2], coefficients(sd3_sigmas(4), 0.7, "flow_sde").table[2])


@settings(deadline=None, max_examples=40)
@given(
    family=st.sampled_from(["cps", "precise"]),
    num_steps=st.integers(2, 30),
    noise_level=st.floats(0.01, 1),
)
def test_marginal_preserving_families_keep_the_schedule(family: str, num_steps: int, noise_level: float) -> None:
    # With x = (1-s) data + s noise and v = noise - data, the mean is (1-s') data + q noise: the data keep
    # their scheduled share, and old noise q and fresh noise C together have the scheduled deviation s'.
    sigmas = sd3_sigmas(num_steps)
    table = coefficients(sigmas, noise_level, family).table.double()
    s, sn = sigmas[:-1].double(), sigmas[1:].double()
    data_share = table[:, A] * (1 - s) - table[:, B]
    kept = table[:, A] * s + table[:, B]
    torch.testing.assert_close(data_share, 1 - sn, atol=2e-7, rtol=0)
    torch.testing.assert_close((kept**2 + table[:, C] ** 2).sqrt(), sn, atol=2e-7, rtol=0)


def test_log_prob_columns_are_a_gaussian_density() -> None:
    steps = coefficients(sd3_sigmas(10), 0.7, "flow_sde")
    row = steps.table[4].double()
    residual = torch.linspace(-1, 1, 9, dtype=torch.float64)
    density = torch.distributions.Normal(0.0, row[C]).log_prob(residual)
    torch.testing.assert_close(-row[LOG_PROB_SCALE] * residual**2 + row[LOG_PROB_CONST], density, rtol=1e-6, atol=1e-6)


def test_cps_log_prob_has_no_constants() -> None:
    table = coefficients(sd3_sigmas(10), 0.8, "cps").table
    assert (table[:-1, LOG_PROB_SCALE] == 1).all()
    assert (table[:, LOG_PROB_CONST] == 0).all()


def test_to_moves_every_tensor() -> None:
    steps = coefficients(sd3_sigmas(3), 0.7, "flow_sde").to("meta")
    assert {steps.table.device.type, steps.sigmas.device.type} == {"meta"}
    assert steps.num_steps == 3


@pytest.mark.parametrize(
    ("noise_level", "family", "message"),
    [
        (0.7, "sde", "family must be one of ode, flow_sde, cps, dance, precise, wan, got 'sde'"),
        (0.7, "ode", r"noise_level must be in \[0, 0\] for family 'ode'"),
        (1.2, "cps", r"noise_level must be in \[0, 1\] for family 'cps'"),
        (-0.1, "flow_sde", "noise_level must be finite and >= 0"),
        (math.nan, "flow_sde", "noise_level must be finite and >= 0"),
        (math.inf, "dance", "noise_level must be finite and >= 0"),
        ([0.7] * 3, "flow_sde", r"one per step \(10\), got 3 values"),
        (1e-22, "flow_sde", "noise_level 1e-22 of step 0 is too small"),
        (1e-22, "precise", "noise_level 1e-22 of step 1 is too small"),
    ],
)
def test_bad_arguments_are_named(noise_level: float | list[float], family: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        coefficients(sd3_sigmas(10), noise_level, family)


def test_a_grid_that_rises_is_refused() -> None:
    with pytest.raises(ValueError, match="strictly decreasing"):
        coefficients(sd3_sigmas(10).flip(0), 0.7, "flow_sde")


def test_sigma_max_is_the_inner_sigma_at_pure_noise() -> None:
    # a / sqrt(1 - 0.9) at sigma 1; elsewhere it changes nothing.
    sigmas = sd3_sigmas(10)
    given, plain = coefficients(sigmas, 0.7, "flow_sde", sigma_max=0.9), coefficients(sigmas, 0.7, "flow_sde")
    assert given.table[0, STD_DEV].item() == pytest.approx(0.7 / math.sqrt(0.1), rel=1e-6)
    assert torch.equal(given.table[1:], plain.table[1:]) and not torch.equal(given.table[0], plain.table[0])
    with pytest.raises(ValueError, match=r"sigma_max must be in \[0, 1\), got 1.0"):
        coefficients(sigmas, 0.7, "flow_sde", sigma_max=1.0)
