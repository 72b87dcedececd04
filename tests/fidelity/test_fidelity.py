"""What the fidelity command measures: its search, costs and scores against plain lookaheads and counts by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from densegrpo_fast.fidelity.measure import agreement_of, cost_of, measure, score, trajectories
from densegrpo_fast.fidelity.report import table
from densegrpo_fast.fidelity.search import Path, Thresholds, cheapest, completions, node_sets, path_after, search
from densegrpo_fast.fidelity.target import FidelityTarget, analytic_target
from densegrpo_fast.fidelity.variants import Variant, reference
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.flow.remainder import with_remainder
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.branches import branch_rollout
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import Trajectory, initial_noise, rollout
from densegrpo_fast.sampling.step_runner import StepInput, StepOutput, StepRunner
from densegrpo_fast.training import agreement


@pytest.fixture(scope="module")
def target() -> FidelityTarget:
    """The analytic flow with 5 steps and 4 prompts."""
    whole = analytic_target(4)
    table = coefficients(whole.model.sigmas(5), 0.7, "flow_sde")
    return replace(whole, coefficients=table, trained_steps=4, chunk=12)


def test_one_rollout_serves_all_variants_in_any_split(target: FidelityTarget) -> None:
    variants = [Variant(plans.nodes(5, (2,)), guidance, "full") for guidance in ("full", "cond_only")]
    together = measure(target, variants, range(4), group_size=6, seed=0)
    assert set(together) == {reference(5), *variants}
    # the end of a trajectory is the same image whatever the plan
    for rewards in together.values():
        assert rewards.shape == (4, 6, 6)
        assert torch.equal(rewards[..., -1], together[reference(5)][..., -1])
    alone = measure(target, variants[:1], range(2, 4), group_size=6, seed=0)
    torch.testing.assert_close(alone[variants[0]], together[variants[0]][2:])
    assert not torch.equal(together[variants[0]], together[variants[1]])


def test_samples_of_one_noise_share_their_first_completion(target: FidelityTarget) -> None:
    shared, variant = replace(target, shared_noise=True), Variant(plans.nodes(5, (2,)), "full", "full")
    rewards = measure(shared, [variant], range(2), group_size=6, seed=0)
    for found in rewards.values():
        # in state 0 a group is one sample, and from then on six
        assert [len(group.unique()) for group in found[..., 0]] == [1, 1]
        assert all(len(group.unique()) == 6 for group in found[..., 1])
    # of 4 + 3 + 2 + 1 evaluations the first 4 are for all six
    assert cost_of(reference(5), shared, 6).lookahead.guided == pytest.approx(4 / 6 + 6)
    reused = replace(reference(5), guidance="reuse")
    assert cost_of(reused, shared, 6).lookahead.unguided == cost_of(reference(5), target, 6).lookahead.guided == 10


def test_forwards_are_run_as_the_target_says(target: FidelityTarget) -> None:
    class Counted(StepRunner):
        rows = 0

        def __call__(self, model: FlowModel, rows: StepInput, *arguments: object, **options: object) -> StepOutput:
            self.rows += len(rows)
            return super().__call__(model, rows, *arguments, **options)

    # branches of the steps 1 and 2: 6 rows arrive at the states 2 and 3, and go on by 2 and 1 nodes
    runner = Counted()
    branched = replace(target, coefficients=target.coefficients.only((1, 2)), branched=True, step_runner=runner)
    measure(branched, [], range(1), group_size=6, seed=0)
    assert runner.rows == 6 * (2 + (2 + 1))


def test_exact_is_its_own_reference(target: FidelityTarget) -> None:
    rewards = measure(target, [reference(5)], range(2), group_size=6, seed=0)
    (exact,) = rewards.values()
    assert agreement.compare(exact, rewards[reference(5)]).spearman_gains_mean == pytest.approx(1.0)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_tree_holds_every_plans_completions(mixture_model: FlowModel, guidance_scale: float) -> None:
    steps, index = 4, torch.arange(3)
    table = coefficients(mixture_model.sigmas(steps), [0.7, 0.0, 0.7, 0.7], "flow_sde")
    trajectory = rollout(
        mixture_model,
        initial_noise(mixture_model, index, seed=0, iteration=0),
        mixture_model.encode(["0", "1", "12"]),
        table,
        sample_index=index,
        seed=0,
        iteration=0,
        guidance_scale=guidance_scale,
    )
    mixture_model.calls.clear()
    tree = completed_everywhere(Lookahead(mixture_model, plans.exact(steps), guidance="cond_only"), trajectory)
    # states 0, 2, 3 (state 1 shares state 2's): subsets of the nodes ahead, less the empty one, are evaluations
    assert len(mixture_model.calls) == (2**3 - 1) + (2**1 - 1)
    for nodes in node_sets(steps, 3):
        expected = Lookahead(mixture_model, plans.nodes(steps, nodes), guidance="cond_only").complete(trajectory)
        for state in (0, 2, 3):
            torch.testing.assert_close(tree[state, path_after(nodes, state)], expected[state])


@pytest.mark.parametrize("group", [1, 3])
def test_the_tree_ends_as_the_window_says(mixture_model: FlowModel, group: int) -> None:
    """Noise in steps 0 and 1 of 5, then DPM-Solver++, for samples with and without one initial noise."""
    steps, index = 5, torch.arange(6)
    euler = coefficients(mixture_model.sigmas(steps), 0.7, "flow_sde").only(range(2))
    trajectory = rollout(
        mixture_model,
        initial_noise(mixture_model, index - index % group, seed=0, iteration=0),
        mixture_model.encode(["0"] * 3 + ["12"] * 3),
        with_remainder(euler, 2, second_order=True),
        sample_index=index,
        seed=0,
        iteration=0,
    )
    trajectory = replace(trajectory, shared=group)
    exact = Lookahead(mixture_model, plans.exact(steps), chunk=4)
    tree, expected = completed_everywhere(exact, trajectory), exact.complete(trajectory)
    first_order = exact.complete(replace(trajectory, coefficients=euler))
    for state in (0, 1):
        full = tuple(range(state + 1, steps))
        torch.testing.assert_close(tree[state, full], expected[state])
        assert (expected[state] - first_order[state]).abs().max() > 1e-3
    for nodes in node_sets(steps, 3):
        expected = exact.by(plans.nodes(steps, nodes)).complete(trajectory)
        for state in (0, 1):
            torch.testing.assert_close(tree[state, path_after(nodes, state)], expected[state])


def completed_everywhere(lookahead: Lookahead, trajectory: Trajectory) -> dict[tuple[int, Path], Tensor]:
    """The completions of every state along every path."""
    found = completions(lookahead, trajectory, max_nodes=trajectory.num_steps)
    return {(state, path): clean for state, path, clean in found}


def test_the_search_finds_what_measuring_finds(target: FidelityTarget) -> None:
    ways = [Variant(plans.exact(5), "full", decoder) for decoder in ("full", "preview")]
    found = search(target, range(2), ways=ways, max_nodes=2, group_size=6, seed=1)
    names = [candidate.variant.plan.name for candidate in found]
    # of the nodes 1..4: no one, one or two, with either decoder
    assert len([name for name in names if not name.startswith("paths")]) == 2 * (1 + 4 + 6)
    # nothing is known of operations: by forwards
    assert [candidate.forwards for candidate in found] == sorted(candidate.forwards for candidate in found)
    own = [candidate for candidate in found if candidate.variant.plan.name.startswith("paths")]
    assert own
    picked = [candidate for candidate in found if candidate.variant.plan.name in ("nodes{2,3}", "one_step")]
    picked += [own[0], own[-1]]
    rewards = measure(target, [candidate.variant for candidate in picked], range(2), group_size=6, seed=1)
    for candidate in picked:
        direct = agreement.compare(rewards[reference(5)], rewards[candidate.variant])
        assert candidate.agreement.spearman_gains_mean == pytest.approx(direct.spearman_gains_mean, abs=1e-6)
        assert candidate.agreement.spearman_rewards_mean == pytest.approx(direct.spearman_rewards_mean, abs=1e-6)


def test_the_search_looks_at_branches_and_windows_too(target: FidelityTarget) -> None:
    windowed = replace(target, coefficients=target.coefficients.only((1, 2)))
    for searched in (windowed, replace(windowed, branched=True)):
        found = search(searched, range(2), ways=[reference(5)], max_nodes=2, group_size=4, seed=3)
        plans_found = [candidate.variant for candidate in found]
        rewards = measure(searched, plans_found, range(2), group_size=4, seed=3)
        for candidate in found:
            direct = agreement_of(searched, rewards[reference(5)], rewards[candidate.variant])
            assert candidate.agreement.spearman_rewards_mean == pytest.approx(direct.spearman_rewards_mean, abs=1e-6)
            assert candidate.agreement.spearman_gains_mean == pytest.approx(direct.spearman_gains_mean, abs=1e-6)
        # the states that are completed are 1 and 2, or 2 and 3: sets that differ before them alone are one
        ahead = [step_index for step_index in range(1, 5) if step_index > (2 if searched.branched else 1)]
        sets = [variant for variant in plans_found if not variant.plan.name.startswith("paths")]
        assert len(sets) == 1 + len(ahead) + len(ahead) * (len(ahead) - 1) / 2


def test_operations_come_before_forwards(target: FidelityTarget) -> None:
    """A preview costs a hundredth of a full decode, which outweighs any forward here."""

    class Flops:
        forward = reference_forward = backward = 1.0
        full_decode, preview_decode, reward = 1000.0, 10.0, 0.0

    known = replace(target, flops=Flops())
    ways = [Variant(plans.exact(5), "full", decoder) for decoder in ("full", "preview")]
    found = search(known, range(1), ways=ways, max_nodes=1, group_size=4, seed=1)
    decoders = [candidate.variant.decoder for candidate in found]
    count = decoders.count("preview")
    assert decoders == ["preview"] * count + ["full"] * (len(found) - count)
    ratios = [candidate.iteration for candidate in found]
    assert ratios == sorted(ratios)
    # one_step with previews: 5 states and the image, 6 decodes of 10, and the image's full one; 5 + 4 + 4 guided
    # evaluations and 8 backwards
    assert ratios[0] == pytest.approx((2 * 13 + 8 + 6 * 10 + 1000) / (2 * 13 + 8 + 1000))


def test_branches_are_judged_among_those_of_their_state(target: FidelityTarget) -> None:
    """Against branches that are drawn, completed and scored here."""
    branched = replace(target, coefficients=target.coefficients.only((0, 1, 2)), branched=True)
    variants = [Variant(plans.one_step(5), "full", "full"), Variant(plans.exact(5), "full", "preview")]
    rewards = measure(branched, variants, range(3), group_size=4, seed=7)
    roots, rows = torch.arange(0, 12, 4), [branched.prompts.prompts[group] for group in range(3) for _ in range(4)]
    model, metadata = branched.model, [{} for _ in rows]
    branched_rollout = branch_rollout(
        model,
        initial_noise(model, roots, seed=7, iteration=0),
        model.encode(rows),
        branched.coefficients,
        branches=4,
        sample_index=roots,
        seed=7,
        iteration=0,
        guidance_scale=branched.guidance_scale,
    )
    clean = Lookahead(model, plans.exact(5), chunk=100).complete(branched_rollout)
    expected = branched.reward(model.decode(clean.flatten(0, 1), "full"), rows * 3, metadata * 3).values
    torch.testing.assert_close(rewards[reference(5)], expected.view(3, 3, 4).permute(1, 2, 0), rtol=1e-5, atol=1e-6)
    noisy = branched.coefficients.noisy
    found = [agreement.compare_branches(rewards[reference(5)], rewards[variant], noisy) for variant in variants]
    assert found[1].spearman_rewards_mean == found[1].spearman_gains_mean > 0.9 > found[0].spearman_gains_mean
    assert len(found[0].spearman_gains) == 3 and found[0].remaining_gains == 1
    # in part: the same group in another range
    torch.testing.assert_close(
        measure(branched, [], range(2, 3), group_size=4, seed=7)[reference(5)], rewards[reference(5)][2:]
    )


def test_the_cheapest_plan_above_the_thresholds(target: FidelityTarget) -> None:
    found = search(target, range(2), ways=[reference(5)], max_nodes=4, group_size=8, seed=0)
    limits = Thresholds(0.9, 0.85, 0.5)
    chosen = cheapest(found, limits)
    assert chosen is not None and limits.met_by(chosen.agreement)
    assert not any(limits.met_by(c.agreement) for c in found if c.forwards < chosen.forwards)
    assert cheapest(found, Thresholds(1.0, 1.0, 1.0 + 1e-9)) is None


def test_scores_are_by_group_and_state(target: FidelityTarget) -> None:
    """A reward that reads the prompt and the picture's value back."""
    (batch,) = trajectories(target, range(2), group_size=3, seed=0)
    values = torch.arange(2 * 6.0).view(2, 6) / 100

    def read(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        first = torch.tensor([float(prompt == batch.rows[0]) for prompt in prompts])
        return images[:, 0, 0, 0] + first

    images = values[..., None, None, None].expand(2, 6, 3, 4, 4)
    mixture = type(target.reward)({"read": (read, 1.0)})
    found = score(replace(target, reward=mixture), batch, images)
    # [P, G, S]: group 0 holds rows 0..2 (and the first prompt), group 1 rows 3..5; states are 6 apart
    expected = torch.tensor([[[1.00, 1.06], [1.01, 1.07], [1.02, 1.08]], [[0.03, 0.09], [0.04, 0.10], [0.05, 0.11]]])
    torch.testing.assert_close(found, expected)


def test_a_table_is_aligned() -> None:
    assert table(["plan", "cost"], [["a", "1"], ["longer", "10"]]) == "plan    cost\na          1\nlonger    10"
