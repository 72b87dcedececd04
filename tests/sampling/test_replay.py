"""Replaying a rollout's steps with the policy: ratio 1 at first, gradient through the halves that are asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from densegrpo_fast.flow import ops
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.models.base import FlowModel, GuidanceGradient
from densegrpo_fast.objective.kl import gaussian_kl
from densegrpo_fast.sampling.replay import reference_velocity, replay, replay_kl, replay_velocity
from densegrpo_fast.sampling.rollout import Trajectory, initial_noise, rollout
from densegrpo_fast.training.learner import Learner, LearnerOptions

T, MICRO_BATCH = 3, 2
PROMPTS = ["a photo of a cat", "a photo of a cat", "the moon", "the moon"]
Policy = Callable[..., FlowModel]


def sampled(model: FlowModel, guidance_scale: float = 1.0, noise_level: float | list[float] = 0.7) -> Trajectory:
    index = torch.arange(4)
    return rollout(
        model,
        initial_noise(model, index, seed=0, iteration=0),
        model.encode(PROMPTS),
        coefficients(model.sigmas(T), noise_level, "flow_sde"),
        sample_index=index,
        seed=0,
        iteration=0,
        guidance_scale=guidance_scale,
        micro_batch=MICRO_BATCH,
    )


def micro_batches() -> list[slice]:
    return [slice(start, start + MICRO_BATCH) for start in range(0, 4, MICRO_BATCH)]


def gradients(model: FlowModel, log_prob: torch.Tensor) -> dict[str, torch.Tensor]:
    parameters = model.trainable_parameters()
    found = torch.autograd.grad(log_prob.sum(), list(parameters.values()), allow_unused=True)
    return {name: g for name, g in zip(parameters, found, strict=True) if g is not None}


@pytest.mark.parametrize("gradient", ["full", "conditional"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_an_unchanged_policy_has_ratio_one(
    tiny_policy: Policy, guidance_scale: float, gradient: GuidanceGradient
) -> None:
    model = tiny_policy(spread=0.3)
    trajectory = sampled(model, guidance_scale)
    for step in range(T):
        for rows in micro_batches():
            log_prob, velocity = replay(model, trajectory, step, rows, gradient)
            assert torch.equal(log_prob.detach(), trajectory.log_probs[step, rows])
            assert torch.equal(velocity, trajectory.velocities[step, rows])


def test_a_changed_policy_has_another_ratio(tiny_policy: Policy) -> None:
    model = tiny_policy(spread=0.3)
    trajectory = sampled(model)
    with torch.no_grad():
        for parameter in model.trainable_parameters().values():
            parameter.mul_(1.5)
    log_prob, _ = replay(model, trajectory, 0, slice(0, 2))
    assert ((log_prob - trajectory.log_probs[0, :2]).exp() - 1).abs().max() > 1e-4


def test_log_prob_of_a_noise_free_step_is_zero(tiny_policy: Policy) -> None:
    model = tiny_policy(spread=0.3)
    trajectory = sampled(model, noise_level=[0.7, 0.0, 0.7])
    log_prob, _ = replay(model, trajectory, 1, slice(0, 2))
    assert torch.equal(log_prob, torch.zeros(2))
    assert all((gradient == 0).all() for gradient in gradients(model, log_prob).values())


def halves_detached(model: FlowModel, trajectory: Trajectory, step: int, detached: str) -> dict[str, torch.Tensor]:
    """Gradients of the guided log_prob of the first two rows by hand, with one half ("cond", "uncond") detached."""
    rows, scale = slice(0, 2), trajectory.guidance_scale
    latents, sigma = trajectory.latents[step, rows], trajectory.coefficients.sigmas[step].expand(2)
    given = trajectory.conditioning.select(rows)
    empty = replace(given, prompts=given.negative, rows=torch.zeros_like(given.rows))
    prompts = {"cond": given, "uncond": empty}
    halves = {name: model.velocity(latents, sigma, texts).cond for name, texts in prompts.items()}
    halves[detached] = halves[detached].detach()
    velocity = halves["uncond"] + scale * (halves["cond"] - halves["uncond"])
    following, table = trajectory.latents[step + 1, rows], trajectory.coefficients.table
    return gradients(model, ops.sde_log_prob(latents, velocity, following, table, step))


def test_the_gradient_is_that_of_both_halves_or_of_the_conditional_one(tiny_policy: Policy) -> None:
    model, step, rows = tiny_policy(spread=0.3), 1, slice(0, 2)
    trajectory = sampled(model, 4.5)
    conditional, unconditional = (halves_detached(model, trajectory, step, name) for name in ("uncond", "cond"))
    found = gradients(model, replay(model, trajectory, step, rows, "conditional")[0])
    assert found.keys() == conditional.keys()
    assert all(torch.equal(found[name], conditional[name]) for name in found)

    full = gradients(model, replay(model, trajectory, step, rows)[0])
    largest = max(gradient.abs().max().item() for gradient in full.values())
    reached = 0
    for name, gradient in full.items():
        parts = conditional[name] + unconditional[name]
        torch.testing.assert_close(gradient, parts, rtol=1e-4, atol=1e-5 * largest)
        reached += int(conditional[name].abs().max() > 1e-3 * largest < unconditional[name].abs().max())
    assert reached > len(full) / 2


@pytest.mark.parametrize("kl_coef", [0.0, 0.5])
def test_the_learners_gradient_is_the_derivative_of_the_guided_loss(
    tiny_policy: Policy, learner_options: Callable[..., LearnerOptions], kl_coef: float
) -> None:
    """Central differences in float64 of the loss at ratio 1, written out, against what the learner accumulates."""
    model, scale, steps = tiny_policy(spread=0.3), 4.5, [0, 2]
    model.network.double()
    trajectory = sampled(model, scale)
    generator = torch.Generator().manual_seed(3)
    advantages = torch.randn(4, T, generator=generator)
    own = {"lr": 0.0, "clip_range": 0.1, "max_grad_norm": 1e9}
    options = learner_options(kl_coef=kl_coef, kl_scale="paper", micro_batch=MICRO_BATCH, **own)
    learner = Learner(model, options)
    record = learner.update(trajectory, advantages, steps)
    assert record["first_ratio_deviation"] == 0
    found = {name: parameter.grad for name, parameter in learner.parameters.items()}

    conditioning, table = model.encode([*PROMPTS, ""]), trajectory.coefficients.table

    def velocity(step: int) -> torch.Tensor:
        def half(rows: torch.Tensor) -> torch.Tensor:
            (output,) = model.network(
                hidden_states=trajectory.latents[step].double(),
                encoder_hidden_states=conditioning.prompts["embeds"][rows],
                pooled_projections=conditioning.prompts["pooled"][rows],
                timestep=1000.0 * trajectory.coefficients.sigmas[step].expand(4),
                return_dict=False,
            )
            return output

        cond, uncond = half(conditioning.rows[:4]), half(conditioning.rows[4].expand(4))
        return uncond + scale * (cond - uncond)

    def scores(step: int, reference: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        latents, following = (trajectory.latents[at].double() for at in (step, step + 1))
        return ops.sde_log_prob_kl(latents, velocity(step), reference, following, table, step, scale="paper")

    with torch.no_grad():
        with model.reference():
            references = {step: velocity(step) for step in steps}
        before = {step: scores(step, references[step])[0] for step in steps}

        def loss(shift: dict[str, torch.Tensor], distance: float) -> float:
            for name, direction in shift.items():
                learner.parameters[name].add_(distance * direction)
            total = 0.0
            for step in steps:
                log_prob, kl = scores(step, references[step])
                policy = -advantages[:, step].double() * (log_prob - before[step]).exp()
                total += (policy + kl_coef * kl).mean().item() / len(steps)
            for name, direction in shift.items():
                learner.parameters[name].sub_(distance * direction)
            return total

        norm = sum(gradient.square().sum() for gradient in found.values()) ** 0.5
        directions = [{name: gradient / norm for name, gradient in found.items()}]
        for _ in range(2):
            drawn = {name: torch.randn(g.shape, generator=generator, dtype=g.dtype) for name, g in found.items()}
            size = sum(value.square().sum() for value in drawn.values()) ** 0.5
            directions.append({name: value / size for name, value in drawn.items()})
        for direction in directions:
            # a step for which the float32 norms inside the network do not show
            near, far = (loss(direction, size) - loss(direction, -size) for size in (0.01, 0.02))
            slope = (8 * near - far) / 0.12
            expected = sum((found[name] * value).sum() for name, value in direction.items()).item()
            assert slope == pytest.approx(expected, rel=1e-5, abs=1e-6 * norm.item())


def test_the_reference_is_the_model_without_its_adapter(tiny_policy: Policy) -> None:
    plain, model = tiny_policy(spread=0.0), tiny_policy(spread=0.3)
    trajectory = sampled(model, guidance_scale=3.0)
    for rows in micro_batches():
        reference = reference_velocity(model, trajectory, 0, rows)
        assert not reference.requires_grad
        with torch.no_grad():
            # a fresh adapter adds exact zeros
            assert torch.equal(reference, replay_velocity(plain, trajectory, 0, rows))
            assert not torch.equal(reference, replay_velocity(model, trajectory, 0, rows))


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
@pytest.mark.parametrize("scale", ["paper", "flow_grpo"])
def test_the_divergence_comes_with_the_same_score(tiny_policy: Policy, guidance_scale: float, scale: str) -> None:
    model = tiny_policy(spread=0.3)
    trajectory = sampled(model, guidance_scale, noise_level=[0.7, 0.0, 0.7])
    rows = slice(2, 4)
    for step in range(T):
        log_prob, velocity, kl = replay_kl(model, trajectory, step, rows, scale)
        assert torch.equal(velocity, trajectory.velocities[step, rows])
        again, same_velocity = replay(model, trajectory, step, rows)
        assert torch.equal(log_prob, again)
        assert (log_prob - trajectory.log_probs[step, rows]).abs().max() <= 1e-6
        index, reference = torch.full((2,), step), reference_velocity(model, trajectory, step, rows)
        expected = gaussian_kl(same_velocity, reference, trajectory.coefficients.table, index, scale=scale)
        torch.testing.assert_close(kl, expected, rtol=1e-5, atol=0)
        assert (kl > 0).all() == (step != 1)
        found, exact = gradients(model, kl), gradients(model, expected)
        for name, gradient in exact.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * gradient.abs().max().item())


def test_the_adapter_is_back_after_the_reference(tiny_policy: Policy) -> None:
    model = tiny_policy(spread=0.3)
    trajectory = sampled(model)
    with pytest.raises(RuntimeError, match="inside"), model.reference():
        raise RuntimeError("inside")
    assert torch.equal(replay_velocity(model, trajectory, 0, slice(0, 2)), trajectory.velocities[0, :2])
    assert all(parameter.requires_grad for parameter in model.trainable_parameters().values())
