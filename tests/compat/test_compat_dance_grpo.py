"""DanceGRPO's step against a float64 restatement of its formulas, and against its own float32 loop."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast.compat.dance_grpo import flux_step, philox_samples, step_function
from densegrpo_fast.flow.schedule import dance_sigmas

ETA = 0.3
GRID = dance_sigmas(16)


@pytest.fixture(scope="module")
def host() -> ModuleType:
    """The restated script."""
    path = Path(__file__).parents[1] / "hosts" / "dance_script.py"
    spec = importlib.util.spec_from_file_location("dance_script", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-6)


def close_log_prob(found: Tensor, expected: Tensor) -> None:
    error = (found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)
    assert error.max() <= 1e-6


def test_published_values() -> None:
    # s = eta: A = 1 + eta^2 dt / (2 sigma), B = (1 + eta^2 (1 - sigma) / (2 sigma)) dt, std = eta sqrt(-dt). The grid
    # of shift 3 and two steps is 1, 0.75, 0: at step 0 dt = -0.25, A = 1 - 0.09/8, B = -0.25, std = 0.15; at step 1
    # dt = -0.75, A = 1 - 0.09/2, B = -0.75 (1 + 0.09 * 0.25 / 1.5), std = 0.3 sqrt(0.75).
    grid = dance_sigmas(2)
    assert grid.tolist() == [1.0, 0.75, 0.0]
    one, zero = torch.ones(1, 2, 2), torch.zeros(1, 2, 2)
    for index, a, b, std in [(0, 0.98875, -0.25, 0.15), (1, 0.955, -0.76125, 0.3 * math.sqrt(0.75))]:
        means = [flux_step(v, x, ETA, grid, index, None, False, True)[0] for x, v in ((one, zero), (zero, one))]
        assert [mean[0, 0, 0].item() for mean in means] == pytest.approx([a, b], rel=1e-6)
        at_mean = flux_step(zero, one, ETA, grid, index, means[0], True, True)[2].item()
        assert at_mean == pytest.approx(-math.log(std) - 0.5 * math.log(2 * math.pi), rel=1e-6)
        no_constants = step_function(constants=False)(zero, one, ETA, grid, index, means[0] + std, True, True)[2].item()
        assert no_constants == pytest.approx(-0.5, rel=1e-6)


@pytest.mark.parametrize("constants", [True, False])
@pytest.mark.parametrize("sde_solver", [True, False])
def test_every_step_is_the_formula(host: ModuleType, sde_solver: bool, constants: bool) -> None:
    host.CONSTANTS = constants
    step = step_function(constants=constants)
    x, v = torch.randn(2, 3, 64, 16)
    wide = x.double(), v.double()
    for index in range(16):
        state = torch.get_rng_state()
        found = step(v, x, ETA, GRID, index, None, True, sde_solver)
        torch.set_rng_state(state)
        noise = torch.randn_like(x)
        mean, clean = host.flux_step(wide[1], wide[0], ETA, GRID.double(), index, None, False, sde_solver)
        prev = mean + ETA * (GRID[index] - GRID[index + 1]).double().sqrt() * noise
        close(found[0], prev)
        close(found[1], clean)
        _, _, expected = host.flux_step(
            wide[1], wide[0], ETA, GRID.double(), index, found[0].double(), True, sde_solver
        )
        close_log_prob(found[2], expected)
        scored = step(v, x, ETA, GRID, index, found[0], True, sde_solver)
        assert scored[0] is found[0] and torch.equal(scored[2], found[2])
        close(step(v, x, ETA, GRID, index, found[0], False, sde_solver)[0], mean)
        assert [value.dtype for value in found] == [torch.float32] * 3 and found[2].shape == (3,)


def test_gradients(host: ModuleType) -> None:
    host.CONSTANTS = True
    x, v = torch.randn(2, 3, 64, 16)
    prev = flux_step(v, x, ETA, GRID, 5, None, True, True)[0]
    gradients = []
    for step, dtype in ((flux_step, torch.float32), (host.flux_step, torch.float64)):
        velocity = v.to(dtype).requires_grad_()
        result = step(velocity, x.to(dtype), ETA, GRID.to(dtype), 5, prev.to(dtype), True, True)
        loss = (result[2] * torch.tensor([1.0, -2.0, 0.5])).sum() + result[1].square().mean()
        gradients.append(torch.autograd.grad(loss, velocity)[0].double())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5 * gradients[1].abs().max().item())


def rollout(step: Any, start: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The host's loop: float32 states, a velocity of any dtype, the prediction of data at the end."""
    torch.manual_seed(4)
    z, states, log_probs = start, [], []
    for index in range(len(GRID) - 1):
        velocity = (0.5 * z.float().sin() + z.float()).to(dtype)
        z, data, log_prob = step(velocity, z.to(torch.float32), ETA, GRID, index, None, True, True)
        states.append(z)
        log_probs.append(log_prob)
    return torch.stack([*states, data]), torch.stack(log_probs)


def test_a_seeded_trajectory_is_the_hosts(host: ModuleType) -> None:
    host.CONSTANTS = True
    start = torch.randn(2, 256, 64)
    expected = rollout(host.flux_step, start, torch.float32)
    after = torch.get_rng_state()
    found = rollout(flux_step, start, torch.float32)
    assert torch.equal(torch.get_rng_state(), after)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)


def test_a_16_bit_velocity_is_rounded_where_the_host_rounds_it(host: ModuleType) -> None:
    host.CONSTANTS = True
    x, v = torch.randn(2, 2, 256, 64)
    v = v.bfloat16()
    for solver in (True, False):
        for index in (0, 7, 15):
            torch.manual_seed(1)
            expected = host.flux_step(v, x, ETA, GRID, index, None, True, solver)
            torch.manual_seed(1)
            found = flux_step(v, x, ETA, GRID, index, None, True, solver)
            close(found[0], expected[0])
            assert torch.equal(found[1], expected[1])
            torch.testing.assert_close(found[2], expected[2], rtol=1e-5, atol=1e-5)
            # Without the rounding, states move by up to 2^-9 of sigma times the velocity.
            exact = step_function(upcast=True)(v, x, ETA, GRID, index, found[0], False, solver)
            wide = host.flux_step(v.double(), x.double(), ETA, GRID.double(), index, None, False, solver)
            close(exact[0], wide[0])
            close(exact[1], wide[1])
            assert index == 0 or (exact[1] - found[1]).abs().max() > 1e-4


def test_philox_noise_belongs_to_the_sample() -> None:
    step = step_function(rng="philox", seed=9)
    x, v = torch.randn(2, 4, 32, 8)

    def run(rows: slice) -> Tensor:
        with philox_samples(torch.arange(4)[rows] + 40, epoch=2):
            prev, _, log_prob = step(v[rows], x[rows], ETA, GRID, 3, None, True, True)
        mean = flux_step(v[rows], x[rows], ETA, GRID, 3, None, False, True)[0]
        noise = (prev - mean) / (ETA * (GRID[3] - GRID[4]).sqrt())
        assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.2
        close_log_prob(log_prob, flux_step(v[rows], x[rows], ETA, GRID, 3, prev, True, True)[2])
        return prev

    state = torch.get_rng_state()
    whole = run(slice(0, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cat([run(slice(0, 1)), run(slice(1, 4))]), whole)
    velocity = v.requires_grad_()
    assert torch.autograd.grad(step(velocity, x, ETA, GRID, 3, None, True, True)[2].sum(), velocity)[0].any()


def test_noise_free_and_wrong_calls(host: ModuleType) -> None:
    x, v = torch.randn(2, 2, 8, 4)
    mean = flux_step(v, x, 0.0, GRID, 2, None, False, True)[0]
    assert torch.equal(mean, x + v * (GRID[3] - GRID[2]))
    for step in (flux_step, host.flux_step):
        with pytest.raises(ValueError, match="eta must be positive|math domain error|expected a positive input"):
            step(v, x, 0.0, GRID, 2, None, True, True)
    with pytest.raises(IndexError, match=r"index must be in \[0, 16\)"):
        flux_step(v, x, ETA, GRID, 16, None, True, True)
    with pytest.raises(ValueError, match="noise_level must be finite and >= 0"):
        flux_step(v, x, -0.1, GRID, 2, None, True, True)
    with pytest.raises(TypeError, match="sigmas must be a floating point tensor"):
        flux_step(v, x, ETA, GRID.tolist(), 2, None, True, True)
    with pytest.raises(ValueError, match="rng must be one of host, philox"):
        step_function(rng="dice")


def test_a_grid_that_its_shift_leaves_beside_one() -> None:
    # 3.1 * 1 / (1 + 2.1) in float32 may not be 1.
    grid = GRID.clone()
    grid[0] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))
    x, v = torch.randn(2, 2, 8, 4)
    close(flux_step(v, x, ETA, grid, 0, None, False, True)[0], flux_step(v, x, ETA, GRID, 0, None, False, True)[0])
