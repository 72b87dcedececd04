"""Flow-Factory's scheduler step against a float64 restatement of its formulas, and against its own float32 loop."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast.compat.flow_factory import SDESchedulerOutput, philox_samples, step, step_function
from densegrpo_fast.flow.schedule import sd3_sigmas

SIGMAS = sd3_sigmas(10)
DYNAMICS = ["Flow-SDE", "Dance-SDE", "CPS"]
FIELDS = ("next_latents", "next_latents_mean", "std_dev_t", "dt", "noise_pred")


@pytest.fixture
def host() -> ModuleType:
    """The restated scheduler's module."""
    path = Path(__file__).parents[1] / "hosts" / "flow_factory_scheduler.py"
    spec = importlib.util.spec_from_file_location("flow_factory_scheduler", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def schedulers(host: ModuleType, **options: Any) -> tuple[Any, Any]:
    """One in float32, one in float64."""
    return tuple(host.FlowMatchEulerDiscreteSDEScheduler(grid, **options) for grid in (SIGMAS, SIGMAS.double()))


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-6, atol=1e-6, equal_nan=True)


def close_log_prob(found: Tensor, expected: Tensor) -> None:
    assert torch.equal(found.isnan(), expected.isnan())
    error = (found.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)
    assert not (error > 1e-6).any()


@pytest.mark.parametrize("dynamics", DYNAMICS)
def test_every_step_is_the_formula(host: ModuleType, dynamics: str) -> None:
    narrow, wide = schedulers(host, dynamics_type=dynamics)
    x, v = torch.randn(2, 5, 64, 16)
    steps = [0, 1, 4, 8, 9]
    state = torch.get_rng_state()
    found = step(narrow, v, narrow.timesteps[steps], x, noise_level=0.7)
    torch.set_rng_state(state)
    noise = torch.randn(v.shape)
    assert isinstance(found, SDESchedulerOutput) and list(found.to_dict()) == [
        "next_latents",
        "next_latents_mean",
        "std_dev_t",
        "dt",
        "log_prob",
        "noise_pred",
    ]
    reached = found.next_latents.double()
    expected = wide.step(v.double(), wide.timesteps[steps], x.double(), reached, noise_level=0.7)
    for name in FIELDS[1:]:
        close(getattr(found, name), getattr(expected, name))
        assert getattr(found, name).dtype == torch.float32
        assert getattr(found, name).shape == getattr(expected, name).shape
    close_log_prob(found.log_prob, expected.log_prob)
    injected = expected.std_dev_t if dynamics == "CPS" else expected.std_dev_t * (-expected.dt).sqrt()
    close(found.next_latents, expected.next_latents_mean + injected * noise)
    scored = step(narrow, v, narrow.timesteps[steps], x, found.next_latents, noise_level=0.7)
    assert torch.equal(scored.next_latents, found.next_latents) and torch.equal(scored.log_prob, found.log_prob)


def test_published_values(host: ModuleType) -> None:
    # SD3.5's grid: step, noise level, A, B, std_dev_t of the codebases' own functions.
    scheduler, _ = schedulers(host)
    one, zero = torch.ones(1, 2, 2), torch.zeros(1, 2, 2)
    for dynamics, index, level, a, b, std in [
        ("Flow-SDE", 0, 0.7, 0.755, -0.03987068, 3.50567126),
        ("Flow-SDE", 1, 0.7, 0.71254101, -0.05824153, 3.43507385),
        ("Flow-SDE", 9, 0.7, 0.99779279, -0.01111607, 0.06644106),
        ("CPS", 0, 0.8, 0.33656696, -0.03987068, 0.91313726),
        ("CPS", 1, 0.8, 0.36889138, -0.07194308, 0.86864650),
        ("CPS", 9, 0.8, 1.0, -0.00892857, 0.0),
    ]:
        results = [
            step(scheduler, v, scheduler.timesteps[index], x, noise_level=level, dynamics_type=dynamics)
            for x, v in ((one, zero), (zero, one))
        ]
        means = [result.next_latents_mean[0, 0, 0].item() for result in results]
        assert means == pytest.approx([a, b], rel=1e-6, abs=1e-8)
        assert results[0].std_dev_t.item() == pytest.approx(std, rel=1e-6)


@pytest.mark.parametrize("dynamics", [*DYNAMICS, "ODE"])
def test_timestep_next_names_the_noise_levels(host: ModuleType, dynamics: str) -> None:
    narrow, wide = schedulers(host, dynamics_type=dynamics)
    x, v, prev = torch.randn(3, 3, 16, 8)
    times = torch.cat([narrow.timesteps, torch.zeros(1)])
    for steps, ends in [([2], [3]), ([0, 4, 9], [1, 6, 10]), ([9, 9, 9], [10, 10, 10])]:
        here, there = times[steps], times[ends]
        level = 0.6 if len(steps) == 1 else torch.tensor([0.6, 0.4, 0.6])
        found = step(narrow, v, here, x, prev, there, noise_level=level)
        exact = [(t / 1000).double() * 1000 for t in (here, there)]
        expected = wide.step(v.double(), exact[0], x.double(), prev.double(), exact[1], noise_level=level)
        for name in FIELDS:
            close(getattr(found, name), getattr(expected, name))
        close_log_prob(found.log_prob, expected.log_prob)
    plain = step(narrow, v, 500.0, x, prev, 250.0, noise_level=0.6)
    expected = wide.step(v.double(), 500.0, x.double(), prev.double(), 250.0, noise_level=0.6)
    close(plain.next_latents_mean, expected.next_latents_mean)


def test_noise_levels_are_the_schedulers(host: ModuleType) -> None:
    narrow, wide = schedulers(host, sde_steps=(1, 3), noise_level=0.5)
    x, v, prev = torch.randn(3, 4, 16, 8)
    steps = [0, 1, 3, 8]
    found = step(narrow, v, narrow.timesteps[steps], x, prev)
    expected = wide.step(v.double(), wide.timesteps[steps], x.double(), prev.double())
    assert found.log_prob.isnan().tolist() == [True, False, False, True]
    for name in FIELDS:
        close(getattr(found, name), getattr(expected, name))
    # In evaluation the step is Euler's to the bit; its noise is drawn all the same.
    narrow.is_eval = True
    for dynamics in ("Flow-SDE", "Dance-SDE", "CPS"):
        state = torch.get_rng_state()
        along = step(narrow, v, narrow.timesteps[1], x, dynamics_type=dynamics)
        assert not torch.equal(torch.get_rng_state(), state) and not along.std_dev_t.any()
        assert torch.equal(along.next_latents, x + v * (SIGMAS[2] - SIGMAS[1]))
        assert along.log_prob.isnan().all() == (dynamics != "CPS")
    state = torch.get_rng_state()
    ode = step(narrow, v, narrow.timesteps[1], x, dynamics_type="ODE")
    assert torch.equal(torch.get_rng_state(), state) and not ode.log_prob.any()


@pytest.mark.parametrize("sigma_max", [None, 0.9])
def test_the_inner_sigma(host: ModuleType, sigma_max: float | None) -> None:
    narrow, wide = schedulers(host)
    x, v, prev = torch.randn(3, 2, 16, 8)
    found = step(narrow, v, narrow.timesteps[0], x, prev, noise_level=0.7, sigma_max=sigma_max)
    # At sigma 1 the deviation is a / sqrt(1 - inner).
    assert found.std_dev_t[0].item() == pytest.approx(0.7 / math.sqrt(1 - (sigma_max or SIGMAS[1].item())), rel=1e-6)
    expected = wide.step(v.double(), wide.timesteps[0], x.double(), prev.double(), noise_level=0.7, sigma_max=sigma_max)
    close_log_prob(found.log_prob, expected.log_prob)


@pytest.mark.parametrize("round_trip", [True, False])
def test_storage_dtype(host: ModuleType, round_trip: bool) -> None:
    host.ROUND_TRIP = round_trip
    scheduler, _ = schedulers(host)
    x, v = torch.randn(2, 2, 64, 16).bfloat16()
    own = step_function(round_trip=round_trip)
    results = []
    for function in (own, host.FlowMatchEulerDiscreteSDEScheduler.step):
        torch.manual_seed(7)
        results.append(function(scheduler, v, scheduler.timesteps[3], x, noise_level=0.7))
    found, expected = results
    for name in FIELDS:
        assert getattr(found, name).dtype == torch.float32
        wrong = ~torch.isclose(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=2e-6)
        assert wrong.float().mean() < 1e-3  # a state beside the middle of two 16-bit numbers may round to the other one
    torch.testing.assert_close(found.log_prob, expected.log_prob, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.next_latents, found.next_latents.bfloat16().float()) == round_trip
    stored = found.next_latents.bfloat16()
    again = own(scheduler, v, scheduler.timesteps[3], x, stored, noise_level=0.7)
    assert torch.equal(again.log_prob, found.log_prob) == round_trip


def test_gradients(host: ModuleType) -> None:
    narrow, wide = schedulers(host)
    x, v, prev = torch.randn(3, 3, 64, 16)
    for dynamics in DYNAMICS:
        gradients = []
        for own, scheduler, dtype in ((step, narrow, torch.float32), (type(wide).step, wide, torch.float64)):
            velocity = v.to(dtype).requires_grad_()
            steps = scheduler.timesteps[[0, 3, 7]]
            done = own(scheduler, velocity, steps, x.to(dtype), prev.to(dtype), noise_level=0.7, dynamics_type=dynamics)
            loss = (done.log_prob * torch.tensor([1.0, -2.0, 0.5])).sum() + done.next_latents_mean.square().mean()
            gradients.append(torch.autograd.grad(loss, velocity)[0].double())
        torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5 * gradients[1].abs().max().item())


@pytest.mark.parametrize("dynamics", [*DYNAMICS, "ODE"])
def test_a_seeded_trajectory_is_the_hosts(host: ModuleType, dynamics: str) -> None:
    scheduler, _ = schedulers(host, sde_steps=(1, 2, 5), dynamics_type=dynamics)
    start = torch.randn(2, 64, 16)

    def run(own: Any) -> tuple[Tensor, Tensor, Tensor]:
        torch.manual_seed(3)
        latents, states, log_probs = start, [], []
        times = [*scheduler.timesteps, torch.tensor(0.0)]
        for t, following in zip(times[:-1], times[1:], strict=True):
            level = scheduler.noise_level if len(states) in (1, 2, 5) else 0.0
            done = own(
                scheduler,
                0.5 * latents.sin() + latents,
                t.expand(2),
                latents,
                timestep_next=following.expand(2),
                noise_level=level,
            )
            latents = done.next_latents
            states.append(latents)
            log_probs.append(done.log_prob)
        return torch.stack(states), torch.stack(log_probs), torch.get_rng_state()

    found, expected = run(step), run(type(scheduler).step)
    torch.testing.assert_close(found[0], expected[0], rtol=1e-6, atol=5e-6)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(found[2], expected[2])


def test_forms_of_the_result(host: ModuleType) -> None:
    scheduler, _ = schedulers(host)
    x, v = torch.randn(2, 2, 16, 8)
    full = step(scheduler, v, scheduler.timesteps[1], x, x, noise_level=0.7)
    plain = step(scheduler, v, scheduler.timesteps[1], x, x, noise_level=0.7, return_dict=False)
    order = ("next_latents", "next_latents_mean", "noise_pred", "log_prob", "std_dev_t", "dt")
    for name, value in zip(order, plain, strict=True):
        assert torch.equal(getattr(full, name), value)
    some = step(
        scheduler, v, scheduler.timesteps[1], x, x, noise_level=0.7, return_kwargs=["dt"], compute_log_prob=False
    )
    assert some.next_latents is None and some.log_prob is None and torch.equal(some.dt, full.dt)
    own = step_function(output_type=host.SDESchedulerOutput)
    assert isinstance(own(scheduler, v, scheduler.timesteps[1], x), host.SDESchedulerOutput)
    # What is returned may be changed in place.
    full.std_dev_t.mul_(0)
    assert step(scheduler, v, scheduler.timesteps[1], x, x, noise_level=0.7).std_dev_t.all()
    injected = step_function(dance_std_injected=True)
    done = injected(scheduler, v, scheduler.timesteps[1], x, noise_level=0.7, dynamics_type="Dance-SDE")
    close(done.std_dev_t, torch.full((2, 1, 1), 0.7) * (SIGMAS[1] - SIGMAS[2]).sqrt())


def test_philox_noise_belongs_to_the_sample(host: ModuleType) -> None:
    scheduler, _ = schedulers(host)
    own = step_function(rng="philox", seed=9)
    x, v = torch.randn(2, 4, 32, 8)
    steps = scheduler.timesteps[[1, 3, 3, 1]]
    levels = torch.tensor([0.7, 0.7, 0.2, 0.2])

    def run(rows: slice) -> Tensor:
        with philox_samples(torch.arange(4)[rows] + 40, epoch=2):
            done = own(scheduler, v[rows], steps[rows], x[rows], noise_level=levels[rows])
        noise = (done.next_latents - done.next_latents_mean) / (done.std_dev_t * (-done.dt).sqrt())
        assert abs(noise.mean()) < 0.2 and abs(noise.std() - 1) < 0.2
        return done.next_latents

    state = torch.get_rng_state()
    whole = run(slice(0, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.cat([run(slice(0, 1)), run(slice(1, 4))]), whole)
    with pytest.raises(ValueError, match="timestep 500.0 is not in the schedule"):
        own(scheduler, v, 500.0, x, timestep_next=250.0, noise_level=0.5)


def test_an_integer_is_an_index(host: ModuleType, caplog: pytest.LogCaptureFixture) -> None:
    scheduler, _ = schedulers(host)
    x, v = torch.randn(2, 2, 16, 8)
    by_index = step(scheduler, v, 4, x, x, noise_level=0.7)
    assert "taken as the index of a step" in caplog.text
    by_value = step(scheduler, v, scheduler.timesteps[4].item(), x, x, noise_level=0.7)
    assert torch.equal(by_index.log_prob, by_value.log_prob)
    assert torch.equal(step(scheduler, v, torch.tensor(4), x, x, noise_level=0.7).log_prob, by_value.log_prob)


def test_wrong_calls(host: ModuleType) -> None:
    scheduler, _ = schedulers(host)
    x = torch.zeros(2, 4, 4)
    for arguments, message in [
        ({"timestep": torch.tensor([3.0])}, "timestep 3.0 is not in the scheduler's timesteps"),
        ({"timestep": 12}, "timestep 12 is not the index of one of 10 steps"),
        ({"timestep": scheduler.timesteps[:3]}, "must have 1 entry or one per row"),
        ({"timestep": scheduler.timesteps.reshape(2, 5)}, "timestep must be a scalar or have shape"),
        ({"timestep": 500.0, "timestep_next": 250.0}, "its noise level is not known; give noise_level"),
        ({"timestep": 250.0, "timestep_next": 500.0, "noise_level": 0.5}, "sigmas must be strictly decreasing"),
        ({"timestep": scheduler.timesteps[1], "dynamics_type": "SDE"}, "dynamics_type must be one of Flow-SDE"),
    ]:
        with pytest.raises(ValueError, match=message):
            step(scheduler, x, latents=x, **arguments)
    with pytest.raises(TypeError, match="timestep must be a number or a tensor, got str"):
        step(scheduler, x, "4", x)
