"""The lookahead against a serial Euler completion written out here, on a flow whose velocity is exact."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from densegrpo_fast.credit.dense import reward_gains
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.dedup import CompletionDedup
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import Trajectory, initial_noise, rollout

T = 5
PROMPTS = ["0", "0", "12", "1", "2"]


def sampled(model: FlowModel, noise_level: float | list[float] = 0.7, guidance_scale: float = 1.0) -> Trajectory:
    index = torch.arange(len(PROMPTS))
    noise = initial_noise(model, index, seed=3, iteration=0)
    table = coefficients(model.sigmas(T), noise_level, "flow_sde")
    trajectory = rollout(
        model,
        noise,
        model.encode(PROMPTS),
        table,
        sample_index=index,
        seed=3,
        iteration=0,
        guidance_scale=guidance_scale,
    )
    model.calls.clear()
    return trajectory


def serial_completion(model: FlowModel, trajectory: Trajectory, state: int, later_scale: float) -> Tensor:
    """Euler's method through every later grid point; the first velocity has the trajectory's guidance."""
    sigmas, latents, scale = model.sigmas(T), trajectory.latents[state], trajectory.guidance_scale
    for k in range(state, T):
        velocity = model.velocity(latents, sigmas[k].expand(len(latents)), trajectory.conditioning, scale).combined()
        latents = latents + (sigmas[k + 1] - sigmas[k]) * velocity
        scale = later_scale
    return latents


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_exact_is_the_serial_completion(mixture_model: FlowModel, guidance_scale: float) -> None:
    trajectory = sampled(mixture_model, guidance_scale=guidance_scale)
    clean = Lookahead(mixture_model, plans.exact(T)).complete(trajectory)
    for state in range(T):
        expected = serial_completion(mixture_model, trajectory, state, guidance_scale)
        torch.testing.assert_close(clean[state], expected, rtol=2e-6, atol=2e-6)
    assert torch.equal(clean[T], trajectory.latents[T])


def test_without_guidance_after_the_first_velocity(mixture_model: FlowModel) -> None:
    trajectory = sampled(mixture_model, guidance_scale=3.0)
    lookahead = Lookahead(mixture_model, plans.exact(T), guidance="cond_only")
    clean = lookahead.complete(trajectory)
    assert {scale for _, _, scale in mixture_model.calls} == {1.0}
    expected = serial_completion(mixture_model, trajectory, 0, later_scale=1.0)
    torch.testing.assert_close(clean[0], expected, rtol=2e-6, atol=2e-6)
    assert lookahead.guidance_scale(3.0) == 1.0


def test_guidance_is_reused_from_the_rollout_at_the_same_step(mixture_model: FlowModel) -> None:
    # noise of step 0 alone: state 0's completion differs from the trajectory, which gives the guidance at points 1..4
    index = torch.arange(len(PROMPTS))
    noise = initial_noise(mixture_model, index, seed=3, iteration=0)
    table = coefficients(mixture_model.sigmas(T), 0.7, "flow_sde")
    conditioning = mixture_model.encode(PROMPTS)
    trajectory = rollout(
        mixture_model,
        noise,
        conditioning,
        table,
        sample_index=index,
        seed=3,
        iteration=0,
        guidance_scale=3.0,
        keep_guidance=True,
    )
    mixture_model.calls.clear()
    clean = Lookahead(mixture_model, plans.exact(T), guidance="reuse").complete(trajectory)
    assert {scale for _, _, scale in mixture_model.calls} == {1.0}
    sigmas, latents = mixture_model.sigmas(T), trajectory.latents[0]
    velocity = trajectory.velocities[0]
    for k in range(T):
        if k:
            sigma = sigmas[k].expand(len(PROMPTS))
            there = mixture_model.velocity(trajectory.latents[k], sigma, conditioning, 3.0)
            velocity = mixture_model.velocity(latents, sigma, conditioning).cond + 2.0 * (there.cond - there.uncond)
        latents = latents + (sigmas[k + 1] - sigmas[k]) * velocity
    torch.testing.assert_close(clean[0], latents, rtol=5e-6, atol=5e-6)
    with pytest.raises(ValueError, match="keep_guidance"):
        Lookahead(mixture_model, plans.exact(T), guidance="reuse").complete(replace(trajectory, guidance_terms=None))


def test_one_step_is_the_clean_estimate(mixture_model: FlowModel) -> None:
    trajectory = sampled(mixture_model)
    clean = Lookahead(mixture_model, plans.one_step(T)).complete(trajectory)
    sigmas = mixture_model.sigmas(T)
    for state in range(T):
        expected = trajectory.latents[state] + (0 - sigmas[state]) * trajectory.velocities[state]
        torch.testing.assert_close(clean[state], expected, rtol=1e-6, atol=1e-6)
    assert mixture_model.calls == []


def test_nodes_are_evaluated_where_the_plan_says(mixture_model: FlowModel) -> None:
    # State 1 of a plan {3}: one jump to grid point 3 on the rollout's velocity, one to the end on a new one.
    trajectory, sigmas = sampled(mixture_model), mixture_model.sigmas(T)
    clean = Lookahead(mixture_model, plans.nodes(T, [3])).complete(trajectory)
    # one forward at the sigma of point 3 for the states 0, 1, 2 together
    assert mixture_model.calls == [(3 * len(PROMPTS), sigmas[3].item(), 1.0)]
    middle = trajectory.latents[1] + (sigmas[3] - sigmas[1]) * trajectory.velocities[1]
    velocity = mixture_model.velocity(middle, sigmas[3].expand(len(PROMPTS)), trajectory.conditioning).combined()
    torch.testing.assert_close(clean[1], middle - sigmas[3] * velocity, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("chunk", [1, 3])
def test_chunks_change_nothing(mixture_model: FlowModel, chunk: int) -> None:
    trajectory = sampled(mixture_model, guidance_scale=2.0)
    whole = Lookahead(mixture_model, plans.exact(T), chunk=1000)
    parts = Lookahead(mixture_model, plans.exact(T), chunk=chunk)
    clean = whole.complete(trajectory)
    mixture_model.calls.clear()
    torch.testing.assert_close(parts.complete(trajectory), clean, rtol=1e-6, atol=1e-6)
    assert max(rows for rows, _, _ in mixture_model.calls) == chunk
    torch.testing.assert_close(parts.images(trajectory, clean, "full"), whole.images(trajectory, clean, "full"))


@pytest.mark.parametrize("plan", [plans.exact(T), plans.exact_but_last(T), plans.nodes(T, [2, 3]), plans.n_step(T, 2)])
def test_the_first_velocity_is_never_computed_again(mixture_model: FlowModel, plan: plans.Plan) -> None:
    trajectory = sampled(mixture_model)
    lookahead = Lookahead(mixture_model, plan)
    lookahead.complete(trajectory)
    assert mixture_model.evaluated_rows == plan.evaluations * len(PROMPTS)
    assert lookahead.evaluations(trajectory.coefficients.noisy) == plan.evaluations


def test_a_noise_free_step_gains_nothing_and_costs_nothing(mixture_model: FlowModel) -> None:
    trajectory = sampled(mixture_model, noise_level=[0.7, 0.0, 0.0, 0.7, 0.0])
    lookahead = Lookahead(mixture_model, plans.exact(T))
    noisy = trajectory.coefficients.noisy
    assert noisy == (True, False, False, True, False)
    # States 1 and 2 lie on the ODE path of state 3, state 4 on that of the end.
    assert CompletionDedup(noisy).representatives == [0, 3, 3, 3, 5, 5]
    clean = lookahead.complete(trajectory)
    # state 0 evaluates at 1, 2, 3, 4 and state 3 at 4
    assert mixture_model.evaluated_rows == 5 * len(PROMPTS)
    assert lookahead.evaluations(noisy) == 5
    assert torch.equal(clean[1], clean[3]) and torch.equal(clean[2], clean[3]) and torch.equal(clean[4], clean[5])
    # sharing is exact: completing state 1 by itself ends at the same place
    alone = serial_completion(mixture_model, trajectory, 1, 1.0)
    torch.testing.assert_close(clean[1], alone, rtol=2e-6, atol=2e-6)

    images = lookahead.images(trajectory, clean, "full")
    # the completions of states 0, 3 and 5 are decoded, the others are theirs
    assert mixture_model.decoded == [3 * len(PROMPTS)]
    rewards = images.mean(dim=(2, 3, 4)).T[None]
    gains = reward_gains(rewards)
    assert (gains[..., [1, 2, 4]] == 0).all()
    assert (gains[..., [0, 3]] != 0).all()


def test_a_rollout_without_noise_is_its_own_completion(mixture_model: FlowModel) -> None:
    trajectory = sampled(mixture_model, noise_level=0.0)
    lookahead = Lookahead(mixture_model, plans.exact(T))
    clean = lookahead.complete(trajectory)
    assert mixture_model.calls == []
    assert torch.equal(clean, trajectory.latents[T].expand_as(clean))


def test_images_belong_to_their_states(mixture_model: FlowModel) -> None:
    trajectory = sampled(mixture_model)
    lookahead = Lookahead(mixture_model, plans.exact(T))
    clean = lookahead.complete(trajectory)
    images = lookahead.images(trajectory, clean, "full")
    assert images.shape == (T + 1, len(PROMPTS), 3, 2, 2)
    torch.testing.assert_close(images[..., 0, :, :].flatten(2), clean.sigmoid())


def test_gains_telescope(mixture_model: FlowModel) -> None:
    trajectory = sampled(mixture_model)
    lookahead = Lookahead(mixture_model, plans.exact(T))
    images = lookahead.images(trajectory, lookahead.complete(trajectory), "full")
    rewards = images.double().square().mean(dim=(2, 3, 4)).T[None]
    torch.testing.assert_close(reward_gains(rewards).sum(-1), rewards[..., -1] - rewards[..., 0])


def test_each_row_keeps_its_prompt(mixture_model: FlowModel) -> None:
    # A row alone completes to what it completes to in company.
    trajectory = sampled(mixture_model)
    lookahead = Lookahead(mixture_model, plans.exact(T))
    together = lookahead.complete(trajectory)
    row = slice(2, 3)
    alone = replace(
        trajectory,
        latents=trajectory.latents[:, row],
        velocities=trajectory.velocities[:, row],
        log_probs=trajectory.log_probs[:, row],
        conditioning=mixture_model.encode([PROMPTS[2]]),
    )
    torch.testing.assert_close(lookahead.complete(alone), together[:, row], rtol=1e-6, atol=1e-6)


def test_mistakes_are_refused(mixture_model: FlowModel) -> None:
    with pytest.raises(ValueError, match=f"plan is for 4 steps, the trajectory has {T}"):
        Lookahead(mixture_model, plans.exact(4)).complete(sampled(mixture_model))
    with pytest.raises(ValueError, match="chunk must be at least 1 row, got 0"):
        Lookahead(mixture_model, plans.exact(T), chunk=0)
