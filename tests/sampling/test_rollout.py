"""Rollouts: noise by name and not by position, the sampler's density, and the deterministic sampler."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.flow.noise import Stream
from densegrpo_fast.models.base import FlowModel, Velocity
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling.rollout import Trajectory, initial_noise, rollout, sample_ode
from densegrpo_fast.training.prompts import PromptBatch
from densegrpo_fast.training.trainer import Trainer

T = 4
PROMPTS = ["0", "0", "12", "12", "1", "2"]
INDEX = torch.arange(6)


def sampled(
    model: FlowModel,
    prompts: list[str] = PROMPTS,
    index: Tensor = INDEX,
    *,
    noise_level: float = 0.7,
    iteration: int = 0,
    seed: int = 3,
    micro_batch: int | None = None,
    guidance_scale: float = 1.0,
) -> Trajectory:
    return rollout(
        model,
        initial_noise(model, index, seed=seed, iteration=iteration),
        model.encode(prompts),
        coefficients(model.sigmas(T), noise_level, "flow_sde"),
        sample_index=index,
        seed=seed,
        iteration=iteration,
        micro_batch=micro_batch,
        guidance_scale=guidance_scale,
    )


def assert_same(one: Trajectory, two: Trajectory) -> None:
    for name in ("latents", "velocities", "log_probs"):
        torch.testing.assert_close(getattr(one, name), getattr(two, name), rtol=1e-5, atol=1e-5, msg=name)


def test_shapes(mixture_model: FlowModel) -> None:
    trajectory = sampled(mixture_model)
    assert trajectory.latents.shape == (T + 1, 6, 4)
    assert trajectory.velocities.shape == (T, 6, 4)
    assert trajectory.log_probs.shape == (T, 6)
    assert (trajectory.num_steps, trajectory.batch) == (T, 6)
    assert torch.equal(trajectory.latents[0], initial_noise(mixture_model, INDEX, seed=3, iteration=0))


def test_velocities_are_the_guided_ones_of_each_state(mixture_model: FlowModel) -> None:
    trajectory = sampled(mixture_model, guidance_scale=3.0)
    sigmas = mixture_model.sigmas(T)
    for step in range(T):
        expected = mixture_model.velocity(
            trajectory.latents[step], sigmas[step].expand(6), trajectory.conditioning, 3.0
        ).combined()
        torch.testing.assert_close(trajectory.velocities[step], expected, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(order=st.permutations(range(6)))
def test_a_sample_does_not_depend_on_its_place(mixture_model: FlowModel, order: list[int]) -> None:
    whole = sampled(mixture_model)
    shuffled = sampled(mixture_model, [PROMPTS[i] for i in order], torch.tensor(order))
    torch.testing.assert_close(shuffled.latents, whole.latents[:, order], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(shuffled.log_probs, whole.log_probs[:, order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("micro_batch", [1, 2, 3])
def test_micro_batches_change_nothing(mixture_model: FlowModel, micro_batch: int) -> None:
    assert_same(sampled(mixture_model, micro_batch=micro_batch), sampled(mixture_model))
    assert {rows for rows, _, _ in mixture_model.calls} == {micro_batch, 6}


def test_a_micro_batch_must_divide_the_batch(mixture_model: FlowModel) -> None:
    with pytest.raises(ValueError, match="6 samples, micro_batch 4"):
        sampled(mixture_model, micro_batch=4)


@pytest.mark.parametrize("change", [{"iteration": 1}, {"seed": 4}])
def test_epoch_and_seed_change_the_noise(mixture_model: FlowModel, change: dict[str, int]) -> None:
    names = {"iteration": 0, "seed": 3}
    first = sampled(mixture_model, **names)
    assert torch.equal(first.latents, sampled(mixture_model, **names).latents)
    assert (sampled(mixture_model, **{**names, **change}).latents[0] != first.latents[0]).all()
    # the noise of the steps as well: from the same start, the first step already ends elsewhere
    again = rollout(
        mixture_model,
        first.latents[0],
        first.conditioning,
        first.coefficients,
        sample_index=INDEX,
        **{**names, **change},
    )
    assert torch.equal(again.velocities[0], first.velocities[0])
    assert (again.latents[1] != first.latents[1]).all()


def test_streams_have_their_own_noise(mixture_model: FlowModel) -> None:
    rollout_noise = initial_noise(mixture_model, INDEX, seed=0, iteration=0)
    evaluation = initial_noise(mixture_model, INDEX, seed=0, iteration=0, stream=Stream.EVALUATION)
    assert (rollout_noise != evaluation).all()


@pytest.mark.parametrize("guidance_scale", [1.0, 2.5])
def test_without_noise_it_is_euler(mixture_model: FlowModel, guidance_scale: float) -> None:
    trajectory = sampled(mixture_model, noise_level=0.0, guidance_scale=guidance_scale)
    clean = sample_ode(
        mixture_model,
        trajectory.latents[0],
        trajectory.conditioning,
        mixture_model.sigmas(T),
        guidance_scale=guidance_scale,
    )
    assert torch.equal(trajectory.latents[T], clean)
    assert (trajectory.log_probs == 0).all()
    # and written out
    latents, sigmas = trajectory.latents[0], mixture_model.sigmas(T)
    for k in range(T):
        velocity = mixture_model.velocity(latents, sigmas[k].expand(6), trajectory.conditioning, guidance_scale)
        latents = latents + (sigmas[k + 1] - sigmas[k]) * velocity.combined()
    torch.testing.assert_close(clean, latents, rtol=2e-6, atol=2e-6)


def test_ode_in_micro_batches(mixture_model: FlowModel) -> None:
    noise = initial_noise(mixture_model, INDEX, seed=0, iteration=0)
    conditioning, sigmas = mixture_model.encode(PROMPTS), mixture_model.sigmas(T)
    whole = sample_ode(mixture_model, noise, conditioning, sigmas)
    mixture_model.calls.clear()
    # the last part may be smaller
    parts = sample_ode(mixture_model, noise, conditioning, sigmas, micro_batch=4)
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-6)
    assert [rows for rows, _, _ in mixture_model.calls] == [4] * T + [2] * T


def test_log_prob_is_the_gaussian_density(mixture_model: FlowModel) -> None:
    # Flow-GRPO's step in float64: s = a sqrt(sigma/(1-sigma)), where a first sigma of 1 borrows the second one inside
    # the root; drift v + s^2/(2 sigma) (x + (1-sigma) v); injected std s sqrt(-dt). The mean is over the 4 elements.
    trajectory, grid, level = sampled(mixture_model), mixture_model.sigmas(T).double().tolist(), 0.7
    for step in range(T):
        sigma, dt = grid[step], grid[step + 1] - grid[step]
        s = level * math.sqrt(sigma / (1 - (grid[1] if step == 0 else sigma)))
        x, v = trajectory.latents[step].double(), trajectory.velocities[step].double()
        mean = x + (v + s**2 / (2 * sigma) * (x + (1 - sigma) * v)) * dt
        density = torch.distributions.Normal(mean, s * math.sqrt(-dt)).log_prob(trajectory.latents[step + 1].double())
        torch.testing.assert_close(trajectory.log_probs[step].double(), density.mean(1), rtol=1e-5, atol=1e-5)


def test_samples_of_a_prompt_can_share_their_first_noise(mixture_model: FlowModel) -> None:
    rows = ["0", "0", "12", "12"]

    def draw(shared: str) -> Trajectory:
        settings = {
            "sampler.shared_noise": shared,
            "sampler.num_steps": str(T),
            "sampler.group_size": "2",
            "data.num_prompts": "2",
            "sampler.micro_batch": "2",
        }
        config, _ = parse_arguments(["--config=embedded_dense", *(f"{key}={value}" for key, value in settings.items())])
        trainer = Trainer(config, model=mixture_model, reward=RewardMixture({"none": (lambda *_: [], 1.0)}))
        steps = replace(trainer.schedule.at(0), coefficients=coefficients(mixture_model.sigmas(T), 0.7, "flow_sde"))
        trajectory = trainer.sample(PromptBatch(rows, [{}] * 4, 2), steps, 5)
        assert isinstance(trajectory, Trajectory)
        return trajectory

    own, shared = draw("false"), draw("true")
    assert (own.latents[0, 0] != own.latents[0, 1]).all()
    assert torch.equal(shared.latents[0, 0], shared.latents[0, 1])
    assert torch.equal(shared.latents[0, 2], shared.latents[0, 3])
    assert (shared.latents[0, 0] != shared.latents[0, 2]).all()
    # the first sample of a group is the same either way, and the steps' noise is each sample's own
    assert torch.equal(shared.latents[0, ::2], own.latents[0, ::2])
    assert (shared.latents[1, 0] != shared.latents[1, 1]).all()
    torch.testing.assert_close(shared.latents[:, ::2], own.latents[:, ::2], rtol=1e-5, atol=1e-5)


def test_a_model_in_half_precision_gets_the_states_in_it(tiny_policy: Callable[..., FlowModel]) -> None:
    model = tiny_policy(spread=0.3)
    model.network.to(torch.bfloat16)
    assert model.input_dtype == torch.bfloat16
    given, velocity = [], model.velocity

    def as_given(latents: Tensor, *rest: Any) -> Velocity:
        given.append(latents)
        return velocity(latents, *rest)

    prompts = ["a photo of a cat"] * 6
    model.velocity = as_given
    trajectory = sampled(model, prompts)
    assert [latents.dtype for latents in given] == [torch.float32, *[torch.bfloat16] * (T - 1)]
    for step in range(1, T):
        assert torch.equal(given[step], trajectory.latents[step].bfloat16())
    # the network rounds a float32 state to the very same numbers
    for step in range(T):
        again = velocity(
            trajectory.latents[step], trajectory.coefficients.sigmas[step].expand(6), model.encode(prompts)
        )
        assert torch.equal(again.combined(), trajectory.velocities[step])
