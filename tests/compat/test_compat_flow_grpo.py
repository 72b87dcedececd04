"""Flow-GRPO's step functions against float64 statements of their formulas, and against published values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from densegrpo_fast.compat.flow_grpo import philox_samples, sde_step_with_logprob, step_function

diffusers = pytest.importorskip("diffusers")

Result = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]
STEPS = [0, 1, 4, 8, 9]


def sd3_scheduler(num_steps: int = 10) -> Any:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(num_steps)
    return scheduler


def wan_scheduler() -> Any:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )
    scheduler.set_timesteps(10)
    return scheduler


def formula(
    kind: str,
    sigmas: Tensor,
    steps: list[int],
    velocity: Tensor,
    latents: Tensor,
    level: float,
    noise: Tensor | None = None,
    prev: Tensor | None = None,
    euler: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Result:
    """prev, log_prob, mean, std_dev, std of the injected noise, sqrt(-dt), in the formulas' own shape."""
    x, v = latents.to(dtype), velocity.to(dtype)
    sigmas = sigmas.to(dtype)
    column = (-1, *[1] * (x.ndim - 1))
    here, there = sigmas[steps].reshape(column), sigmas[[step + 1 for step in steps]].reshape(column)
    gap = here - there
    if kind == "cps":
        std = math.sin(level * math.pi / 2) * there
        clean, pure = x - here * v, x + (1 - here) * v
        mean = (1 - there) * clean + (there**2 - std**2).clamp(min=0).sqrt() * pure
        injected = std
    else:
        if kind == "sde":
            inner = torch.where(here == 1, sigmas[1], here)
            std = level * (here / (1 - inner)).sqrt()
        else:
            std = sigmas[-1] + (sigmas[1] - sigmas[-1]) * here
        score = -(x + (1 - here) * v) / here
        mean = x - gap * v + 0.5 * std**2 * gap * score
        injected = std * gap.sqrt()
    if prev is None:
        prev = mean + injected * (0 if noise is None else noise.to(dtype))
    prev = x - gap * v if euler else prev
    target = prev.detach().to(dtype)
    if kind == "cps":
        density = -((target - mean) ** 2)
    else:
        density = torch.distributions.Normal(mean, injected, validate_args=False).log_prob(target)
    return prev, density.flatten(1).mean(1), mean, std, injected, gap.sqrt()


def tensors(*shape: int, count: int = 3) -> tuple[Tensor, ...]:
    return tuple(torch.randn(count, *shape))


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-6, atol=1e-6)


def close_log_prob(actual: Tensor, expected: Tensor) -> None:
    error = (actual.double() - expected.double()).abs() / expected.double().abs().clamp(min=1)
    assert error.max() <= 1e-6


# SD3.5: [step, std_dev, A, B, injected]; published runs of the host's own function.
GOLDEN_SDE = [
    (0, 3.50567126, 0.755, -0.03987068, 0.7),
    (1, 3.43507385, 0.71254101, -0.05824153, 0.74296407),
    (9, 0.06644106, 0.99779279, -0.01111607, 0.00627809),
]
GOLDEN_CPS = [
    (0, 0.91313726, 0.33656696, -0.03987068),
    (1, 0.86864650, 0.36889138, -0.07194308),
    (9, 0.0, 1.0, -0.00892857),
]


def affine(step: Callable[..., Any], scheduler: Any, index: int, **options: Any) -> tuple[float, float]:
    """A and B of a step, by its mean on unit inputs."""
    one, zero = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)
    t = scheduler.timesteps[index].unsqueeze(0)
    means = [step(scheduler, v, t, x, **options)[2] for x, v in ((one, zero), (zero, one))]
    return means[0].flatten()[0].item(), means[1].flatten()[0].item()


@pytest.mark.parametrize(("index", "std", "a", "b", "injected"), GOLDEN_SDE)
def test_published_values_of_sde(index: int, std: float, a: float, b: float, injected: float) -> None:
    scheduler = sd3_scheduler()
    assert affine(sde_step_with_logprob, scheduler, index) == pytest.approx((a, b), rel=1e-6, abs=1e-8)
    x, v = tensors(1, 4, 2, 2, count=2)
    t = scheduler.timesteps[index].unsqueeze(0)
    assert sde_step_with_logprob(scheduler, v, t, x)[3].item() == pytest.approx(std, rel=1e-6)
    assert step_function("V1")(scheduler, v, t, x)[3].item() == pytest.approx(injected, rel=1e-6)


@pytest.mark.parametrize(("index", "std", "a", "b"), GOLDEN_CPS)
def test_published_values_of_cps(index: int, std: float, a: float, b: float) -> None:
    scheduler = sd3_scheduler()
    found = affine(sde_step_with_logprob, scheduler, index, noise_level=0.8, sde_type="cps")
    assert found == pytest.approx((a, b), rel=1e-6, abs=1e-8)
    x, v = tensors(1, 4, 2, 2, count=2)
    result = sde_step_with_logprob(scheduler, v, scheduler.timesteps[index].unsqueeze(0), x, 0.8, sde_type="cps")
    assert result[3].item() == pytest.approx(std, rel=1e-6)
    if index == 9:
        assert result[1].item() == 0


def test_published_grids() -> None:
    expected = [1.0, 0.960129, 0.913349, 0.857692, 0.790368, 0.707278, 0.602151, 0.464876, 0.278049, 0.008929, 0.0]
    assert sd3_scheduler().sigmas.tolist() == pytest.approx(expected, abs=1e-6)
    flux = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    flux.set_timesteps(sigmas=np.linspace(1, 1 / 6, 6), mu=0.63)
    assert flux.sigmas.tolist() == pytest.approx([1, 0.903736, 0.789705, 0.652489, 0.484218, 0.273003, 0], abs=1e-6)


@pytest.mark.parametrize("sample_is_given", [True, False])
@pytest.mark.parametrize("shape", [(16, 32, 32), (256, 64)], ids=["images", "tokens"])
@pytest.mark.parametrize(("kind", "level"), [("sde", 0.7), ("sde", 1.3), ("cps", 0.8), ("cps", 1.0)])
def test_every_step_is_the_formula(kind: str, level: float, shape: tuple[int, ...], sample_is_given: bool) -> None:
    scheduler = sd3_scheduler()
    x, v, z = tensors(len(STEPS), *shape)
    expected = formula(kind, scheduler.sigmas, STEPS, v, x, level, noise=z)
    prev = expected[0].float() if sample_is_given else None
    if sample_is_given:
        expected = formula(kind, scheduler.sigmas, STEPS, v, x, level, prev=prev)
    torch.manual_seed(5)
    found = sde_step_with_logprob(scheduler, v, scheduler.timesteps[STEPS], x, level, prev, None, kind, True)
    if prev is None:
        torch.manual_seed(5)
        expected = formula(kind, scheduler.sigmas, STEPS, v, x, level, noise=torch.randn(v.shape))
        scored = formula(kind, scheduler.sigmas, STEPS, v, x, level, prev=found[0])
        expected = (expected[0], scored[1], *expected[2:])
    assert len(found) == 5 and all(value.dtype == torch.float32 for value in found)
    close(found[0], expected[0])
    close_log_prob(found[1], expected[1])
    for place, value in ((2, expected[2]), (3, expected[3]), (4, expected[5])):
        assert found[place].shape == value.shape
        close(found[place], value)


@pytest.mark.parametrize("determistic", [False, True])
def test_wan_is_its_formula(determistic: bool) -> None:
    scheduler = wan_scheduler()
    x, v, z = tensors(5, 4, 3, 16, 16)
    prev = formula("wan", scheduler.sigmas, STEPS, v, x, 1.0, noise=z)[0].float()
    expected = formula("wan", scheduler.sigmas, STEPS, v, x, 1.0, prev=prev, euler=determistic)
    step = step_function("Wan")
    for last in (False, True):
        found = step(scheduler, v, scheduler.timesteps[STEPS], x, prev, None, determistic, False, last)
        close(found[0], expected[0])
        close_log_prob(found[1], expected[1])
        close(found[2], expected[2])
        close(found[3], expected[3] if last else expected[4])
        assert len(found) == 4 + last
    close(found[4], expected[5])


@pytest.mark.parametrize("determistic", [False, True])
def test_v1_is_its_formula(determistic: bool) -> None:
    scheduler = sd3_scheduler()
    x, v, z = tensors(5, 16, 32, 32)
    prev = formula("sde", scheduler.sigmas, STEPS, v, x, 0.9, noise=z)[0].float()
    expected = formula("sde", scheduler.sigmas, STEPS, v, x, 0.9, prev=prev, euler=determistic)
    found = step_function("V1")(scheduler, v, scheduler.timesteps[STEPS], x, prev, None, determistic, 0.9)
    close(found[0], expected[0])
    close_log_prob(found[1], expected[1])
    close(found[2], expected[2])
    close(found[3], expected[4])


def test_v1_converts_nothing() -> None:
    scheduler = sd3_scheduler()
    x, v, prev = (tensor.bfloat16() for tensor in tensors(2, 16, 8, 8))
    step = step_function("V1")
    t = scheduler.timesteps[[3, 4]]
    assert step(scheduler, v, t, x, prev)[0] is prev
    torch.manual_seed(1)
    found = step(scheduler, v, t, x)
    torch.manual_seed(1)
    noise = torch.randn(v.shape, dtype=torch.bfloat16)
    close(found[0], formula("sde", scheduler.sigmas, [3, 4], v, x, 0.7, noise=noise)[0])
    assert found[0].dtype == found[1].dtype == torch.float32
    assert step(scheduler, v.double(), t, x.double())[2].dtype == torch.float64


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_gradients(kind: str) -> None:
    scheduler = sd3_scheduler()
    x, v, z = tensors(3, 16, 8, 8)
    steps = [0, 3, 7]
    prev = formula(kind, scheduler.sigmas, steps, v, x, 0.7, noise=z)[0].float()
    gradients = []
    for dtype in (torch.float32, torch.float64):
        velocity = v.to(dtype).requires_grad_()
        if dtype == torch.float32:
            result = sde_step_with_logprob(scheduler, velocity, scheduler.timesteps[steps], x, 0.7, prev, sde_type=kind)
        else:
            result = formula(kind, scheduler.sigmas, steps, velocity, x, 0.7, prev=prev)[:4]
        penalty = ((result[2] - x) ** 2).mean(dim=(1, 2, 3)) / (2 * result[3].flatten() ** 2)
        (gradient,) = torch.autograd.grad((result[1] * torch.tensor([1.0, -2.0, 0.5]) + penalty).sum(), velocity)
        gradients.append(gradient.double())
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5 * gradients[1].abs().max().item())


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_a_noise_free_step_is_euler_to_the_bit(kind: str) -> None:
    scheduler = sd3_scheduler()
    x, v = tensors(10, 16, 8, 8, count=2)
    sigmas = scheduler.sigmas.reshape(-1, 1, 1, 1)
    prev, log_prob, mean, std = sde_step_with_logprob(scheduler, v, scheduler.timesteps, x, 0.0, sde_type=kind)
    euler = x + v * (sigmas[1:] - sigmas[:-1])
    assert torch.equal(prev, euler) and torch.equal(mean, euler) and not std.any()
    # 'sde' divides by the noise: its log_prob is NaN, and scripts rely on throwing it away.
    assert log_prob.isnan().all() if kind == "sde" else not log_prob.any()


def test_cps_scores_a_noise_free_step_by_distance() -> None:
    scheduler = sd3_scheduler()
    x, v, prev = tensors(2, 16, 32, 32)
    for level, steps in ((0.0, [2, 5]), (0.8, [9, 9])):
        expected = formula("cps", scheduler.sigmas, steps, v, x, level, prev=prev)
        found = sde_step_with_logprob(scheduler, v, scheduler.timesteps[steps], x, level, prev, sde_type="cps")
        close_log_prob(found[1], expected[1])


def host_rollout(scheduler: Any, noise: Tensor, levels: list[float], kind: str, draw: Callable[[Tensor], Tensor]):
    """What a host does in float32: one draw per step, used or not."""
    latents, states, log_probs = noise, [], []
    for index, level in enumerate(levels):
        velocity = 0.5 * latents.sin() + latents
        rows = [index] * len(latents)
        done = formula(
            kind, scheduler.sigmas, rows, velocity, latents, level, noise=draw(velocity), dtype=torch.float32
        )
        latents = done[0]
        states.append(latents)
        log_probs.append(done[1])
    return torch.stack(states), torch.stack(log_probs)


@pytest.mark.parametrize("kind", ["sde", "cps"])
def test_a_seeded_trajectory_is_the_hosts(kind: str) -> None:
    scheduler = sd3_scheduler()
    levels = [0.0, 0.7, 0.7, 0.7, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    start = torch.randn(3, 16, 16, 16)
    torch.manual_seed(11)
    states, log_probs = host_rollout(scheduler, start, levels, kind, lambda v: torch.randn(v.shape))
    after = torch.get_rng_state()
    torch.manual_seed(11)
    latents = start
    for index, t in enumerate(scheduler.timesteps):
        velocity = 0.5 * latents.sin() + latents
        done = sde_step_with_logprob(scheduler, velocity, t.unsqueeze(0), latents, levels[index], sde_type=kind)
        latents = done[0]
        torch.testing.assert_close(latents, states[index], rtol=1e-6, atol=5e-6)
        torch.testing.assert_close(done[1], log_probs[index], rtol=1e-5, atol=1e-5, equal_nan=True)
    assert torch.equal(torch.get_rng_state(), after)


@pytest.mark.parametrize("version", ["V1", "Wan"])
def test_a_deterministic_step_draws_and_throws_away(version: str) -> None:
    scheduler = wan_scheduler()
    x, v = tensors(2, 4, 3, 4, 4, count=2)
    ours, host = (torch.Generator().manual_seed(2) for _ in range(2))
    prev = step_function(version)(scheduler, v, scheduler.timesteps[[3]], x, None, ours, True)[0]
    close(prev, formula("wan", scheduler.sigmas, [3, 3], v, x, 1.0, euler=True)[0])
    torch.randn(v.shape, generator=host)
    assert torch.equal(ours.get_state(), host.get_state())
    state = torch.get_rng_state()
    counted = step_function(version, rng="philox")(scheduler, v, scheduler.timesteps[[3]], x, None, None, True)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(counted[0], prev)
    kind = "sde" if version == "V1" else "wan"
    expected = formula(kind, scheduler.sigmas, [3, 3], v, x, 0.7, euler=True)[1]
    torch.testing.assert_close(counted[1].double(), expected, rtol=1e-5, atol=1e-5)


def test_philox_noise_belongs_to_the_sample() -> None:
    scheduler = sd3_scheduler()
    x, v = tensors(4, 16, 8, 8, count=2)
    step = step_function("V3", rng="philox", seed=9)

    def run(rows: slice) -> Tensor:
        with philox_samples(torch.arange(4)[rows] + 40, epoch=2):
            prev, log_prob, mean, std = step(scheduler, v[rows], scheduler.timesteps[3].unsqueeze(0), x[rows])
        dt = (scheduler.sigmas[4] - scheduler.sigmas[3]).item()
        noise = (prev - mean) / (std * math.sqrt(-dt))
        assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1
        close_log_prob(log_prob, formula("sde", scheduler.sigmas, [3] * len(mean), v[rows], x[rows], 0.7, prev=prev)[1])
        return prev

    state = torch.get_rng_state()
    whole = run(slice(0, 4))
    assert torch.equal(torch.get_rng_state(), state)
    torch.randn(5)
    assert torch.equal(torch.cat([run(slice(0, 1)), run(slice(1, 4))]), whole)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"version": "V4"}, "version must be one of V1, V2, V3, V3g, Wan, got 'V4'"),
        ({"rng": "cuda"}, "rng must be one of host, philox, got 'cuda'"),
        ({"rng": "host", "seed": 1}, 'seed is for rng="philox"'),
        ({"sde_type": "dance"}, "sde_type must be one of sde, cps, got 'dance'"),
    ],
)
def test_wrong_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        step_function(**options)


def test_wrong_calls() -> None:
    scheduler = sd3_scheduler()
    x = torch.zeros(1, 4, 2, 2)
    t = scheduler.timesteps[:1]
    with pytest.raises(ValueError, match="sde_type must be one of sde, cps"):
        sde_step_with_logprob(scheduler, x, t, x, sde_type="ode")
    for version in ("V1", "Wan"):
        with pytest.raises(ValueError, match="not both"):
            step_function(version)(scheduler, x, t, x, x, torch.Generator())
