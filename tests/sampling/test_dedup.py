"""Completions that are one and the same are computed once: what is shared, what it costs, and that nothing changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.run_files.metrics import read_metrics
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.cost import Evaluations, dense_iteration, lookahead_evaluations
from densegrpo_fast.sampling.dedup import CompletionDedup
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import Trajectory, initial_noise, rollout

T, G = 4, 3
PROMPTS = ["0"] * G + ["12"] * G


def sampled(model: FlowModel, noise_level: float | list[float] = 0.7, scale: float = 1.0, **keep: Any) -> Trajectory:
    """Trajectories that start from one noise for each prompt, and are not said to."""
    index = torch.arange(len(PROMPTS))
    trajectory = rollout(
        model,
        initial_noise(model, index - index % G, seed=3, iteration=0),
        model.encode(PROMPTS),
        coefficients(model.sigmas(T), noise_level, "flow_sde"),
        sample_index=index,
        seed=3,
        iteration=0,
        guidance_scale=scale,
        **keep,
    )
    return trajectory


def test_a_window_by_hand() -> None:
    """T = 4 with noise in steps 1 and 2, groups of 3 among 6 rows.

    State 0 shares the completion of state 1, which all of a group have in common; state 2 is each row's own, and so is
    state 4, the image, which state 3 shares.
    """
    sharing = CompletionDedup((False, True, True, False), 3)
    assert sharing.representatives == [1, 1, 2, 4, 4] and sharing.states == [1, 2, 4]
    assert [sharing.stride(state) for state in sharing.states] == [3, 1, 1]
    assert sharing.samples(6) == [0, 3, *range(6), *range(6)]
    # one image for the group's 3 rows, and two for each row
    assert sharing.per_trajectory(lambda state: 1) == pytest.approx(1 / 3 + 2)
    values = torch.arange(5 * 6).view(5, 6)
    assert sharing.different(values).tolist() == [6, 9, *range(12, 18), *range(24, 30)]
    back = sharing.broadcast(sharing.different(values), 6)
    assert back.tolist() == [[6, 6, 6, 9, 9, 9], list(range(12, 18)), list(range(24, 30))]


@settings(deadline=None, max_examples=50)
@given(noisy=st.lists(st.booleans(), min_size=1, max_size=6), group=st.integers(1, 4), blocks=st.integers(1, 3))
def test_every_sample_gets_its_own_back(noisy: list[bool], group: int, blocks: int) -> None:
    sharing, batch = CompletionDedup(tuple(noisy), group), group * blocks
    # what each row has at a state is the state's, and until a noisy step the block's
    blind = torch.arange(batch) // group
    values = torch.stack(
        [100 * state + (torch.arange(batch) if any(noisy[:state]) else blind) for state in range(len(noisy) + 1)]
    )
    different = sharing.different(values)
    assert len(different) == len(sharing.samples(batch)) == round(sharing.per_trajectory(lambda state: 1) * batch)
    broadcast = sharing.broadcast(different, batch)
    assert torch.equal(broadcast, values[sharing.states])
    assert torch.equal(broadcast[sharing.positions], values[sharing.representatives])


@pytest.mark.parametrize("noise_level", [0.7, [0.0, 0.7, 0.7, 0.0], 0.0])
@pytest.mark.parametrize("plan", [plans.exact(T), plans.nodes(T, [2])])
@pytest.mark.parametrize("chunk", [2, 64])
def test_sharing_changes_rounding_alone(
    mixture_model: Any, plan: plans.Plan, noise_level: float | list[float], chunk: int
) -> None:
    apart = sampled(mixture_model, noise_level, scale=2.0)
    lookahead = Lookahead(mixture_model, plan, chunk=chunk)
    expected = lookahead.complete(apart)
    mixture_model.calls.clear()
    found = lookahead.complete(replace(apart, shared=G))
    torch.testing.assert_close(found, expected, rtol=2e-6, atol=2e-6)
    cost = lookahead_evaluations(plan, guided=True, noisy=apart.coefficients.noisy, shared=G)
    assert mixture_model.evaluated_rows == round(cost.total * len(PROMPTS))
    # the first state's completion is one for each group, to the bit
    assert torch.equal(found[0], found[0][::G].repeat_interleave(G, dim=0))


def test_the_cost_by_hand() -> None:
    """T = 10, groups of 4, exact: state 0 takes 9 evaluations for the group, states 1..8 take 8 + 7 + ... + 1 = 36."""
    assert lookahead_evaluations(plans.exact(10), guided=True, shared=4) == Evaluations(guided=36 + 9 / 4)
    cost = dense_iteration(plans.exact(10), trained_steps=9, guided=True, kl=False, shared=4)
    assert (cost.full_decodes, cost.rewards) == (10.25, 10.25)
    previews = dense_iteration(plans.exact(10), trained_steps=9, guided=True, kl=False, shared=4, decoder="preview")
    assert (previews.full_decodes, previews.preview_decodes, previews.rewards) == (1, 10.25, 11.25)
    # without any noise a group is one sample to the end
    still = {"noisy": (False,) * 10, "shared": 4, "decoder": "preview"}
    ends = dense_iteration(plans.exact(10), trained_steps=0, guided=True, kl=False, **still)
    assert (ends.full_decodes, ends.preview_decodes, ends.rewards) == (1 / 4, 1 / 4, 1 / 2)
    # the first noisy step is the second of a window's: states 0..2 are one, and of the group
    noisy = (False, False, True, True, *(False,) * 6)
    assert lookahead_evaluations(plans.exact(10), guided=False, noisy=noisy, shared=4).total == 7 / 4 + 6


def test_what_is_taken_over_from_each_rollout_is_not_shared(mixture_model: Any) -> None:
    trajectory = replace(sampled(mixture_model, scale=2.0, keep_guidance=True), shared=G)
    reused = Lookahead(mixture_model, plans.exact(T), guidance="reuse")
    assert reused.dedup(trajectory).group == 1
    assert torch.equal(reused.complete(trajectory), reused.complete(replace(trajectory, shared=1)))
    assert Lookahead(mixture_model, plans.exact(T)).dedup(trajectory).group == G


def test_a_cache_s_features_are_each_sample_s_own(tiny_policy: Callable[..., FlowModel]) -> None:
    from densegrpo_fast.models.feature_cache import FeatureCache

    model, plan = tiny_policy(spread=0.3), plans.nodes(T, [2])
    cache = FeatureCache(model.network, nodes=plan.nodes(), rows=len(PROMPTS))
    together = replace(sampled(model, cache=cache), shared=G)
    lookahead = Lookahead(model, plan, cache=cache, chunk=4)
    assert lookahead.dedup(together).group == 1
    torch.testing.assert_close(lookahead.complete(together), lookahead.complete(replace(together, shared=1)))
    # some of the prompts, as the lookahead monitor completes them
    second = lookahead.evaluate(together.select(slice(G, 2 * G)), first=G)
    for state, standing in lookahead.evaluate(together).items():
        torch.testing.assert_close(second[state].velocity, standing.velocity.chunk(2)[1], rtol=1e-5, atol=1e-5)


def test_whole_blocks_keep_what_they_share(mixture_model: FlowModel) -> None:
    trajectory = replace(sampled(mixture_model), shared=G)
    assert trajectory.select(slice(G, 2 * G)).shared == G
    assert trajectory.select(slice(1, 1 + G)).shared == 1 and trajectory.select(slice(0, 2)).shared == 1


@pytest.mark.ci
def test_training_from_one_noise_costs_less_and_scores_the_same(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"run.iterations": 1, "sampler.shared_noise": "true", "sampler.group_size": 4, "data.num_prompts": 1}
    assert train(tmp_path / "shared", **options) == 0
    monkeypatch.setattr(Lookahead, "dedup", lambda _, rollout: CompletionDedup(rollout.coefficients.noisy))
    assert train(tmp_path / "apart", **options) == 0
    shared, apart = (read_metrics(tmp_path / name / "metrics.jsonl")[0] for name in ("shared", "apart"))
    # T = 3, exact: state 0 takes 2 evaluations for the group of 4, state 1 takes 1 for each sample
    assert (shared["nfe/lookahead"], apart["nfe/lookahead"]) == (2 + 4, 4 * (2 + 1))
    for key in ("reward", "gain/step_0", "gain/step_1", "gain/step_2", "loss"):
        assert shared[key] == pytest.approx(apart[key], abs=2e-3), key


@pytest.mark.ci
def test_an_iteration_encodes_each_of_its_prompts_once(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusion3Pipeline

    encoded: list[list[str]] = []
    original = StableDiffusion3Pipeline.encode_prompt

    def counting(self: Any, prompt: list[str], **options: Any) -> Any:
        encoded.append(prompt)
        return original(self, prompt=prompt, **options)

    monkeypatch.setattr(StableDiffusion3Pipeline, "encode_prompt", counting)
    # rollout, lookahead, monitor, replay and reference, all of them guided, on 2 prompts of 2 samples
    options = {"sampler.guidance_scale": 2.0, "lookahead.monitor_every": 1, "objective.kl_coef": 0.1}
    calls = []
    for iterations in (1, 2):
        encoded.clear()
        options |= {"run.iterations": iterations, "evaluation.every": 0}
        assert train(tmp_path / str(iterations), **options) == 0
        calls.append(list(encoded))
    # what a second iteration adds is one call for its prompts; the empty one is remembered
    for prompts in calls[0]:
        calls[1].remove(prompts)
    assert [len(prompts) for prompts in calls[1]] == [2] and "" not in calls[1][0]
