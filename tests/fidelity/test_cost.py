"""Cost accounting against numbers counted by hand, and against a model that counts what it is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.models.base import Conditioning, Decoder, FlowModel, GuidanceGradient, Velocity
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.cost import (
    Evaluations,
    branched_iteration,
    dense_iteration,
    lookahead_evaluations,
    sparse_iteration,
)
from densegrpo_fast.sampling.lookahead import Guidance, Lookahead
from densegrpo_fast.sampling.rollout import initial_noise, rollout
from densegrpo_fast.training.learner import Learner, LearnerOptions


@dataclass(frozen=True)
class Unit:
    """Powers of ten, so that a sum of operations shows every count as a digit or two."""

    forward: float = 1.0
    reference_forward: float = 1e3
    backward: float = 1e5
    full_decode: float = 1e7
    preview_decode: float = 1e9
    reward: float = 1e11


def test_forwards_of_the_lookahead_may_cost_less() -> None:
    cost = dense_iteration(plans.exact(10), trained_steps=9, guided=False, kl=False)
    # 45 forwards at half the price
    assert cost.flops(Unit()) - cost.flops(Unit(), lookahead_forward=0.5) == pytest.approx(22.5)


@pytest.mark.parametrize(
    ("plan", "evaluations"),
    [
        # T = 10: 9 + 8 + ... + 1
        (plans.exact(10), 45),
        # the same without the terminal node, which nine states (0..8) reach
        (plans.exact_but_last(10), 36),
        # four states lie before node 4, seven before node 7
        (plans.nodes(10, (4, 7)), 11),
        (plans.one_step(10), 0),
        # one evaluation for each state with at least two steps left
        (plans.n_step(10, 2), 9),
    ],
)
def test_evaluations_of_the_plans_of_ten_steps(plan: plans.Plan, evaluations: int) -> None:
    assert lookahead_evaluations(plan, guided=True) == Evaluations(guided=evaluations)
    assert lookahead_evaluations(plan, guided=True, guidance="cond_only") == Evaluations(unguided=evaluations)
    assert lookahead_evaluations(plan, guided=False) == Evaluations(unguided=evaluations)


@settings(deadline=None, max_examples=30)
@given(steps=st.integers(2, 30), data=st.data())
def test_closed_forms(steps: int, data: st.DataObject) -> None:
    points = sorted(data.draw(st.sets(st.integers(1, steps - 1))))
    assert lookahead_evaluations(plans.nodes(steps, points), guided=False).total == sum(points)
    assert lookahead_evaluations(plans.exact(steps), guided=True).forwards == steps * (steps - 1)
    assert lookahead_evaluations(plans.exact_but_last(steps), guided=False).total == (steps - 1) * (steps - 2) // 2


def test_the_published_settings_by_hand() -> None:
    """T = 10, guided, 9 trained steps, KL, nodes {4,7} without guidance, preview decoder.

    Forwards: rollout 20, lookahead 11, replay 18, reference 18; backward through the replay's 18, or its 9 conditional
    halves; 11 previews, and the final image once more in full.
    """
    cost, cheaper = (
        dense_iteration(
            plans.nodes(10, (4, 7)),
            trained_steps=9,
            guided=True,
            kl=True,
            guidance_gradient=gradient,
            guidance="cond_only",
            decoder="preview",
        )
        for gradient in ("full", "conditional")
    )
    assert (cost.rollout.forwards, cost.lookahead.forwards) == (20, 11)
    assert (cost.policy.forwards, cost.reference.forwards, cost.backwards) == (18, 18, 18)
    assert (cost.full_decodes, cost.preview_decodes, cost.rewards) == (1, 11, 12)
    assert cost.forwards == 67
    assert cost.flops(Unit()) == 49 + 18e3 + 18e5 + 1e7 + 11e9 + 12e11
    assert cheaper.backwards == 9 and cost.flops(Unit()) - cheaper.flops(Unit()) == 9e5


def test_a_branched_iteration_by_hand() -> None:
    """T = 10, guided, 9 trained steps, KL, 8 branches of one trunk at each step but the last, exact plan, previews.

    Evaluations per sample: 9/8 of the trunk and 9 where its branches lead, 8 + 7 + ... + 0 = 36 to complete those, and
    9/8 in the replay; forwards are twice as many.
    """
    cost = branched_iteration(
        plans.exact(10),
        branches=8,
        trained_steps=9,
        guided=True,
        kl=True,
        decoder="preview",
        noisy=(True,) * 9 + (False,),
    )
    assert (cost.rollout.forwards, cost.lookahead.forwards) == (2.25, 18 + 72)
    assert (cost.policy.forwards, cost.reference.forwards, cost.backwards) == (2.25, 2.25, 2.25)
    assert (cost.full_decodes, cost.preview_decodes, cost.rewards) == (0, 9, 9)
    # a branch at the last step is a picture, with nothing to evaluate
    noisy = (False,) * 3 + (True,)
    last = branched_iteration(plans.exact(4), branches=2, trained_steps=1, guided=False, kl=False, noisy=noisy)
    assert (last.rollout.total, last.lookahead.total, last.full_decodes) == (4 / 2, 0, 1)
    with pytest.raises(ValueError, match="at least one branch, got 10 and 0"):
        branched_iteration(plans.exact(10), branches=0, trained_steps=9, guided=True, kl=True)
    with pytest.raises(ValueError, match=r"one entry per step \(10\), got 1"):
        branched_iteration(plans.exact(10), branches=2, trained_steps=9, guided=True, kl=True, noisy=(True,))


def test_the_sparse_iteration_by_hand() -> None:
    cost = sparse_iteration(10, trained_steps=9, guided=False, kl=False)
    assert cost.flops(Unit()) == 19 + 9e5 + 1e7 + 1e11


def test_a_decoder_that_is_not_used_needs_no_number() -> None:
    cost = sparse_iteration(4, trained_steps=2, guided=False, kl=False)
    assert cost.flops(Unit(preview_decode=float("nan"))) == cost.flops(Unit())


def test_states_that_a_noise_free_step_joins_count_once() -> None:
    """T = 4, steps 0 and 3 without noise: state 0 shares state 1's completion, and state 3 the final image."""
    noisy = (False, True, True, False)
    cost = dense_iteration(plans.exact(4), trained_steps=2, guided=False, kl=False, noisy=noisy)
    # states 1 and 2 remain: paths (2, 3) and (3,)
    assert cost.lookahead == Evaluations(unguided=3)
    # images of states 1, 2 and the end are decoded and scored
    assert (cost.full_decodes, cost.rewards) == (3, 3)


@pytest.mark.parametrize(
    ("start", "size", "plan", "evaluations"),
    [
        # T = 10: states 2 and 3 go on by the nodes 3..9 and 4..9
        (2, 2, plans.exact(10), 7 + 6),
        # Flow-GRPO-Fast's single step: R(image) - R(completion of state 4), by the nodes 5..9
        (4, 1, plans.exact(10), 5),
        # states 3, 4, 5: nodes 4 and 7 lie ahead of the first, 7 of the others
        (3, 3, plans.nodes(10, (4, 7)), 2 + 1 + 1),
        (0, 4, plans.one_step(10), 0),
    ],
)
def test_a_window_costs_its_own_states(start: int, size: int, plan: plans.Plan, evaluations: int) -> None:
    noisy = tuple(start <= step < start + size for step in range(10))
    cost = dense_iteration(plan, trained_steps=size, guided=True, kl=True, noisy=noisy)
    assert cost.lookahead == Evaluations(guided=evaluations)
    assert (cost.full_decodes, cost.rewards) == (size + 1, size + 1)
    assert (cost.rollout.forwards, cost.policy.forwards, cost.reference.forwards) == (20, 2 * size, 2 * size)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"trained_steps must lie in 0\.\.4 for 4 steps, got 5"):
        sparse_iteration(4, trained_steps=5, guided=False, kl=False)
    with pytest.raises(ValueError, match=r"noisy must have one entry per step \(4\), got 3"):
        lookahead_evaluations(plans.exact(4), guided=False, noisy=(True,) * 3)


class CountingModel(FlowModel):
    """One trainable number; counts rows by the phase and kind of what is asked."""

    latent_shape = (2, 2)
    device = torch.device("cpu")

    def __init__(self) -> None:
        self.weight = nn.Parameter(torch.tensor(0.1))
        self.rows: Counter[str] = Counter()
        self.is_reference = False

    def encode(self, prompts: list[str]) -> Conditioning:
        one = torch.zeros(1, 1, 1)
        return Conditioning({"embeds": one}, {"embeds": one}, torch.zeros(len(prompts), dtype=torch.int64))

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        guidance_gradient: GuidanceGradient = "full",
    ) -> Velocity:
        phase = "reference" if self.is_reference else "policy" if torch.is_grad_enabled() else "sampling"
        self.rows[f"{phase}/{'unguided' if guidance_scale == 1.0 else 'guided'}"] += len(latents)
        cond, uncond = self.weight * latents, 0.5 * self.weight * latents
        if guidance_gradient == "conditional":
            uncond = uncond.detach()
        for half in (cond, uncond):
            if half.requires_grad:
                half.register_hook(lambda _: self.rows.update(backward=len(latents)))
        return Velocity(cond, None if guidance_scale == 1.0 else uncond, guidance_scale)

    def reference(self) -> CountingModel:
        return self

    def __enter__(self) -> None:
        self.is_reference = True

    def __exit__(self, *_: object) -> None:
        self.is_reference = False

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return {"weight": self.weight}

    def decode(self, latents: Tensor, decoder: Decoder = "full") -> Tensor:
        self.rows[decoder] += len(latents)
        return latents[:, None].expand(-1, 3, 2, 2)

    def sigmas(self, num_steps: int) -> Tensor:
        return torch.linspace(1, 0, num_steps + 1)


def evaluations(rows: Counter[str], phase: str, batch: int) -> Evaluations:
    counted = Evaluations(rows[f"{phase}/guided"] // batch, rows[f"{phase}/unguided"] // batch)
    assert counted.total * batch == rows[f"{phase}/guided"] + rows[f"{phase}/unguided"]
    return counted


@pytest.mark.parametrize("noise_level", [0.7, [0.7, 0.0, 0.7, 0.7, 0.0]])
@pytest.mark.parametrize("guidance", ["full", "cond_only"])
@pytest.mark.parametrize("gradient", ["full", "conditional"])
@pytest.mark.parametrize(("scale", "kl"), [(1.0, 0.0), (3.0, 0.1)])
def test_a_real_iteration_asks_for_what_is_counted(
    noise_level: float | list[float],
    guidance: Guidance,
    gradient: GuidanceGradient,
    scale: float,
    kl: float,
    learner_options: Callable[..., LearnerOptions],
) -> None:
    steps, batch, trained = 5, 4, [0, 2, 3]
    model, plan = CountingModel(), plans.nodes(steps, (2, 3))
    table = coefficients(model.sigmas(steps), noise_level, "flow_sde")
    index = torch.arange(batch)
    trajectory = rollout(
        model,
        initial_noise(model, index, seed=0, iteration=0),
        model.encode([""] * batch),
        table,
        sample_index=index,
        seed=0,
        iteration=0,
        guidance_scale=scale,
    )
    rollout_rows = evaluations(model.rows, "sampling", batch)
    model.rows.clear()
    lookahead = Lookahead(model, plan, guidance=guidance, chunk=3)
    images = lookahead.images(trajectory, lookahead.complete(trajectory), "preview")
    lookahead_rows, decodes = evaluations(model.rows, "sampling", batch), model.rows["preview"]
    model.rows.clear()
    options = learner_options(kl_coef=kl, micro_batch=2, guidance_gradient=gradient)
    Learner(model, options).update(trajectory, torch.randn(batch, steps), trained)

    cost = dense_iteration(
        plan,
        trained_steps=len(trained),
        guided=scale != 1.0,
        kl=kl > 0,
        guidance_gradient=gradient,
        guidance=guidance,
        decoder="preview",
        noisy=table.noisy,
    )
    assert rollout_rows == cost.rollout
    assert lookahead_rows == cost.lookahead
    assert evaluations(model.rows, "policy", batch) == cost.policy
    assert evaluations(model.rows, "reference", batch) == cost.reference
    assert model.rows["backward"] == cost.backwards * batch
    assert decodes == cost.preview_decodes * batch
    # the gains' pictures, and the final one's reward
    assert len(images.unique(dim=0)) == cost.rewards - cost.full_decodes == cost.preview_decodes
