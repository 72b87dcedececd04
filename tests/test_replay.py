"""Replaying a rollout's steps with the policy: ratio 1 at first, gradient through the conditional half alone."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from densegrpo_fast.flow import ops
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.objective.kl import gaussian_kl
from densegrpo_fast.sampling.replay import reference_velocity, replay, replay_kl, replay_velocity
from densegrpo_fast.sampling.rollout import Trajectory, initial_noise, rollout

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


@pytest.mark.parametrize("guidance_scale", [1.0, 4.5])
def test_an_unchanged_policy_has_ratio_one(tiny_policy: Policy, guidance_scale: float) -> None:
    model = tiny_policy(spread=0.3)
    trajectory = sampled(model, guidance_scale)
    for step in range(T):
        for rows in micro_batches():
            log_prob, velocity = replay(model, trajectory, step, rows)
            ratio = (log_prob - trajectory.log_probs[step, rows]).exp()
            assert (ratio - 1).abs().max() <= 1e-6
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


def test_the_unconditional_half_carries_no_gradient(tiny_policy: Policy) -> None:
    model, scale, step, rows = tiny_policy(spread=0.3), 4.5, 1, slice(0, 2)
    trajectory = sampled(model, scale)
    replayed = gradients(model, replay(model, trajectory, step, rows)[0])
    assert replayed

    latents, sigma = trajectory.latents[step, rows], trajectory.coefficients.sigmas[step].expand(2)

    def guided(detach: bool) -> dict[str, torch.Tensor]:
        cond = model.velocity(latents, sigma, model.encode(PROMPTS[rows])).combined()
        uncond = model.velocity(latents, sigma, model.encode(["", ""])).combined()
        uncond = uncond.detach() if detach else uncond
        log_prob = ops.sde_log_prob(
            latents,
            uncond + scale * (cond - uncond),
            trajectory.latents[step + 1, rows],
            trajectory.coefficients.table,
            step,
        )
        return gradients(model, log_prob)

    detached, full = guided(detach=True), guided(detach=False)
    assert replayed.keys() == detached.keys()
    for name, gradient in replayed.items():
        torch.testing.assert_close(gradient, detached[name], rtol=1e-3, atol=1e-5 * gradient.abs().max().item())
    # and it is another gradient than with the unconditional half in it
    assert any(not torch.allclose(replayed[name], full[name], rtol=1e-2) for name in replayed)


def test_the_gradient_is_the_derivative(tiny_policy: Policy) -> None:
    # A central difference of the replayed log_prob along the gradient itself: slope |g|^2 per unit of g.
    model, step, rows = tiny_policy(spread=0.3), 1, slice(0, 2)
    trajectory = sampled(model, 2.0)
    parameters = model.trainable_parameters()
    conditional = gradients(model, replay(model, trajectory, step, rows)[0])
    norm = torch.stack([g.square().sum() for g in conditional.values()]).sum().sqrt()
    uncond = model.velocity(
        trajectory.latents[step, rows], trajectory.coefficients.sigmas[step].expand(2), model.encode(["", ""])
    ).combined()

    @torch.no_grad()
    def shifted(distance: float) -> torch.Tensor:
        for name, gradient in conditional.items():
            parameters[name].add_(distance * gradient / norm)
        latents, sigma = trajectory.latents[step, rows], trajectory.coefficients.sigmas[step].expand(2)
        cond = model.velocity(latents, sigma, model.encode(PROMPTS[rows])).combined()
        for name, gradient in conditional.items():
            parameters[name].sub_(distance * gradient / norm)
        velocity = (uncond + 2.0 * (cond - uncond)).double()
        return ops.sde_log_prob(
            latents, velocity, trajectory.latents[step + 1, rows], trajectory.coefficients.table, step
        ).sum()

    slope = (shifted(0.02) - shifted(-0.02)) / 0.04
    assert slope.item() == pytest.approx(norm.item(), rel=0.02)


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
