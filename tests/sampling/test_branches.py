"""Trees: branches of one state share its velocity, in sampling and in training, and cost what the closed form says."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from densegrpo_fast.flow import ops
from densegrpo_fast.flow.dynamics import A, C, coefficients
from densegrpo_fast.flow.dynamics import B as VELOCITY
from densegrpo_fast.flow.noise import branch_stream, gaussian
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.branches import BranchedRollout, branch_rollout
from densegrpo_fast.sampling.cost import IterationCost, branched_iteration
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.replay import replay
from densegrpo_fast.sampling.rollout import initial_noise, sample_ode

T, K = 5, 3
PROMPTS = ["0", "12"]
INDEX = torch.tensor([0, K])


def grown(
    model: FlowModel,
    steps: list[int],
    *,
    num_steps: int = T,
    branches: int = K,
    prompts: list[str] = PROMPTS,
    **options: Any,
) -> BranchedRollout:
    index = torch.arange(0, len(prompts) * branches, branches)
    return branch_rollout(
        model,
        initial_noise(model, index, seed=3, iteration=1),
        model.encode([prompt for prompt in prompts for _ in range(branches)]),
        coefficients(model.sigmas(num_steps), 0.7, "flow_sde").only(steps),
        branches=branches,
        sample_index=index,
        seed=3,
        iteration=1,
        **options,
    )


def test_trajectories_follow_the_flow_as_far_as_they_branch(mixture_model: Any) -> None:
    tree = grown(mixture_model, [1, 3])
    assert (tree.batch, tree.branches, tree.steps) == (2, K, (1, 3))
    # states 0..3 are evaluated, and then where the branches of steps 1 and 3 lead
    assert [rows for rows, _, _ in mixture_model.calls] == [2] * 4
    lookahead = Lookahead(mixture_model, plans.one_step(T), chunk=4)
    assert tree.branch_velocities is None
    evaluated = tree.evaluated(lookahead)
    assert evaluated.branch_velocities is not None and evaluated.evaluated(lookahead) is evaluated
    assert [rows for rows, _, _ in mixture_model.calls[4:]] == [4, 2 * K - 4] * 2
    sigmas, latents = mixture_model.sigmas(T), initial_noise(mixture_model, INDEX, seed=3, iteration=1)
    for step in range(4):
        assert torch.equal(tree.latents[step], latents)
        velocity = mixture_model.velocity(latents, sigmas[step].expand(2), mixture_model.encode(PROMPTS)).cond
        torch.testing.assert_close(tree.velocities[step], velocity, rtol=1e-6, atol=1e-6)
        latents = tree.latents[step + 1]
        torch.testing.assert_close(latents, tree.latents[step] + (sigmas[step + 1] - sigmas[step]) * velocity)


def test_branches_are_the_samplers_step_with_noise_of_their_own(mixture_model: Any) -> None:
    tree = grown(mixture_model, [1, 3], guidance_scale=2.0)
    for step in (1, 3):
        row = tree.coefficients.table[step].double()
        mean = row[A] * tree.latents[step].double() + row[VELOCITY] * tree.velocities[step].double()
        reached = tree.next_latents(step, slice(0, 2)).unflatten(0, (2, K))
        for branch in range(K):
            words = {"seed": 3, "sample_index": INDEX, "iteration": 1, "step": step}
            noise = gaussian((4,), stream=branch_stream(branch), **words).double()
            torch.testing.assert_close(reached[:, branch].double(), mean + row[C] * noise, rtol=1e-6, atol=1e-6)
            density = torch.distributions.Normal(mean, row[C]).log_prob(reached[:, branch].double()).mean(1)
            found = tree.log_probs[step].view(2, K)[:, branch].double()
            torch.testing.assert_close(found, density, rtol=1e-5, atol=1e-5)
    assert not tree.log_probs[[0, 2, 4]].any() and tree.log_probs[[1, 3]].all()


def test_branches_share_the_velocity_of_their_state_bit_for_bit(mixture_model: Any) -> None:
    tree = grown(mixture_model, [0, 2])
    for step in tree.steps:
        for ode_trajectory in range(2):
            alone = [tensor[step, ode_trajectory : ode_trajectory + 1] for tensor in (tree.latents, tree.velocities)]
            for branch, reached in enumerate(tree.next_latents(step, slice(ode_trajectory, ode_trajectory + 1))):
                log_prob = ops.sde_log_prob(*alone, reached[None], tree.coefficients.table, step)
                assert torch.equal(log_prob[0], tree.log_probs[step, ode_trajectory * K + branch])


def test_branches_depend_on_nothing_but_their_numbers(mixture_model: Any) -> None:
    """Neither on the other trajectories, nor on how many branches there are, nor on which other steps branch."""
    tree = grown(mixture_model, [1, 3], branches=4, micro_batch=1)
    more = grown(mixture_model, [0, 1, 3], branches=4, prompts=[*PROMPTS, "2"])
    close = {"rtol": 1e-5, "atol": 1e-5}
    for step in (1, 3):
        torch.testing.assert_close(tree.next_latents(step, slice(0, 2)), more.next_latents(step, slice(0, 2)), **close)
    fewer = grown(mixture_model, [1, 3], branches=2, prompts=PROMPTS[:1])
    torch.testing.assert_close(fewer.next_latents(3, slice(0, 1)), tree.next_latents(3, slice(0, 1))[:2], **close)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_exact_completions_go_on_by_euler(mixture_model: Any, guidance_scale: float) -> None:
    tree = grown(mixture_model, [0, 2, T - 1], guidance_scale=guidance_scale)
    found = Lookahead(mixture_model, plans.exact(T), chunk=4).complete(tree)
    assert found.shape == (3, 2 * K, 4)
    for clean, step in zip(found, tree.steps, strict=True):
        alone = sample_ode(
            mixture_model,
            tree.next_latents(step, slice(0, 2)),
            tree.sample_conditioning,
            mixture_model.sigmas(T)[step + 1 :],
            guidance_scale=guidance_scale,
        )
        torch.testing.assert_close(clean, alone, rtol=1e-5, atol=1e-5)


def test_a_stride_takes_every_so_many_of_the_sigmas_behind_the_branch(mixture_model: Any) -> None:
    # after step 0 of a 5-step grid G2RPO's suffix sigmas[2::2] is those of 2 and 4: the branch evaluates at 1 and at 2,
    # whose clean prediction is the image
    tree, sigmas = grown(mixture_model, [0]), mixture_model.sigmas(T)
    found = Lookahead(mixture_model, plans.strided(T, 2)).complete(tree)[0]
    alone = sample_ode(mixture_model, tree.next_latents(0, slice(0, 2)), tree.sample_conditioning, sigmas[[1, 2, 5]])
    torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_forwards_are_the_closed_form(mixture_model: Any, data: st.DataObject) -> None:
    steps_of_all, branches = data.draw(st.integers(2, 8)), data.draw(st.integers(2, 4))
    steps = sorted(data.draw(st.sets(st.integers(0, steps_of_all - 1), min_size=1)))
    strides = data.draw(st.sets(st.integers(1, steps_of_all - 1), min_size=1))
    mixture_model.calls.clear()
    tree = grown(mixture_model, steps, num_steps=steps_of_all, branches=branches)
    # a trajectory up to its last branching state; each branch's own first velocity, unless it is the image already
    assert mixture_model.evaluated_rows == 2 * (steps[-1] + 1)
    mixture_model.calls.clear()
    tree = tree.evaluated(Lookahead(mixture_model, plans.one_step(steps_of_all), chunk=3))
    first = branches * sum(step < steps_of_all - 1 for step in steps)
    assert mixture_model.evaluated_rows == 2 * first
    # a stride of g takes ceil((T-1-k)/g) evaluations after step k, of which the first is there
    ways, total = [plans.strided(steps_of_all, stride) for stride in strides], first
    for stride in strides:
        mixture_model.calls.clear()
        lookahead = Lookahead(mixture_model, plans.strided(steps_of_all, stride))
        lookahead.complete(tree)
        after = sum(max(math.ceil((steps_of_all - 1 - step) / stride) - 1, 0) for step in steps)
        assert mixture_model.evaluated_rows == 2 * branches * after
        total += branches * after
    cost = branched(ways, branches, tree.coefficients.noisy)
    assert cost.rollout.total * branches == pytest.approx(steps[-1] + 1)
    assert cost.lookahead.total * branches == pytest.approx(total)
    assert cost.full_decodes == cost.rewards == len(steps) * len(ways)


def branched(ways: list[plans.Plan], branches: int, noisy: tuple[bool, ...]) -> IterationCost:
    return branched_iteration(
        ways[0], others=ways[1:], branches=branches, trained_steps=sum(noisy), guided=False, kl=False, noisy=noisy
    )


def test_the_published_counts() -> None:
    # TempFlow-GRPO, T = 10, every step, exact: a trunk takes 10 evaluations and each branch 9 + 8 + ... + 0 = 45; with
    # 4 trunks of 6 branches 4 * (10 + 6 * 45) = 1120 per prompt.
    cost = branched([plans.exact(10)], 6, (True,) * 10)
    assert 4 * 6 * (cost.rollout.total + cost.lookahead.total) == pytest.approx(1120)
    # G2RPO, T = 16, the first 8 steps, granularities 1 and 2: the published code completes each branch of step k by
    # ceil((15-k)/1) + ceil((15-k)/2) evaluations, 15+8 .. 8+4 for k = 0..7, which is 92 + 48 = 140; the first of each
    # pair is one and the same here, which saves 8, and the trunk stops after 8 of 16 evaluations.
    cost = branched([plans.strided(16, stride) for stride in (1, 2)], 2, (True,) * 8 + (False,) * 8)
    assert 2 * (cost.rollout.total + cost.lookahead.total) == 8 + 2 * (140 - 8)


def test_a_branch_of_the_last_step_is_the_image(tiny_policy: Callable[..., FlowModel]) -> None:
    model = tiny_policy(spread=0.1)
    last = grown(model, [3], num_steps=4, prompts=["a cat"])
    assert torch.equal(Lookahead(model, plans.one_step(4)).complete(last)[0], last.state(4).latents)


def test_what_cannot_branch_is_refused(mixture_model: Any) -> None:
    with pytest.raises(ValueError, match="no step injects noise"):
        grown(mixture_model, [])
    with pytest.raises(ValueError, match="2 trajectories with 1 branches each do not make 2 rows"):
        grown(mixture_model, [1], branches=1)


def test_the_gradient_of_a_shared_state_is_that_of_its_branches_one_by_one(
    tiny_policy: Callable[..., FlowModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_policy(spread=0.05)
    tree = grown(model, [0, 2], num_steps=4, prompts=["a cat", "the moon"])
    parameters, weights = list(model.trainable_parameters().values()), torch.randn(2 * K)
    evaluated: list[int] = []
    velocity = type(model).velocity

    def counted(self: FlowModel, latents: Tensor, *arguments: Any) -> Any:
        evaluated.append(len(latents))
        return velocity(self, latents, *arguments)

    monkeypatch.setattr(type(model), "velocity", counted)
    for step in tree.steps:
        evaluated.clear()
        log_prob, _ = replay(model, tree, step, slice(0, 2))
        assert evaluated == [2] and log_prob.shape == (2 * K,)
        assert torch.equal(log_prob.detach(), tree.log_probs[step])
        together = torch.autograd.grad(log_prob @ weights, parameters)

        alone = [torch.zeros_like(parameter) for parameter in parameters]
        for ode_trajectory in range(2):
            state, sigma = (
                tree.latents[step, ode_trajectory : ode_trajectory + 1],
                tree.coefficients.sigmas[step].expand(1),
            )
            for branch in range(ode_trajectory * K, ode_trajectory * K + K):
                found = model.velocity(state, sigma, tree.sample_conditioning.select(slice(branch, branch + 1)))
                reached = tree.state(step + 1).latents[branch : branch + 1]
                one = ops.sde_log_prob(state, found.combined(), reached, tree.coefficients.table, step)
                grads = torch.autograd.grad(weights[branch] * one.sum(), parameters)
                alone = [total + grad for total, grad in zip(alone, grads, strict=True)]
        for one, other in zip(together, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * other.abs().max().item())
        assert any(grad.abs().max() > 0 for grad in together)
