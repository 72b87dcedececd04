"""The fidelity command: its search against plain lookaheads, and whole small runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from densegrpo_fast.exit_codes import ExitCode
from densegrpo_fast.fidelity import __main__ as fidelity
from densegrpo_fast.fidelity import statistics
from densegrpo_fast.fidelity.measure import Variant, agreement_of, cost_of, measure, reference, score, trajectories
from densegrpo_fast.fidelity.options import parse, plans_of
from densegrpo_fast.fidelity.report import table
from densegrpo_fast.fidelity.search import Thresholds, cheapest, search
from densegrpo_fast.fidelity.subject import Subject, analytic_subject
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.flow.remainder import with_remainder
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.sampling import path_tree
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import initial_noise, rollout
from densegrpo_fast.sampling.trajectory import Trajectory
from densegrpo_fast.sampling.tree import grow
from densegrpo_fast.sampling.visit import Arrival, Travellers, Visits


@pytest.fixture(scope="module")
def subject() -> Subject:
    """The analytic flow with 5 steps and 4 prompts."""
    whole = analytic_subject(4)
    table = coefficients(whole.model.sigmas(5), 0.7, "flow_sde")
    return replace(whole, coefficients=table, trained_steps=4, chunk=12)


def test_one_rollout_serves_all_variants_in_any_split(subject: Subject) -> None:
    variants = [Variant(plans.nodes(5, (2,)), guidance, "full") for guidance in ("full", "cond_only")]
    together = measure(subject, variants, range(4), group_size=6, seed=0)
    assert set(together) == {reference(5), *variants}
    # the end of a trajectory is the same image whatever the plan
    for rewards in together.values():
        assert rewards.shape == (4, 6, 6)
        assert torch.equal(rewards[..., -1], together[reference(5)][..., -1])
    alone = measure(subject, variants[:1], range(2, 4), group_size=6, seed=0)
    torch.testing.assert_close(alone[variants[0]], together[variants[0]][2:])
    assert not torch.equal(together[variants[0]], together[variants[1]])


def test_samples_of_one_noise_share_their_first_completion(subject: Subject) -> None:
    shared, variant = replace(subject, shared_noise=True), Variant(plans.nodes(5, (2,)), "full", "full")
    rewards = measure(shared, [variant], range(2), group_size=6, seed=0)
    for found in rewards.values():
        # in state 0 a group is one sample, and from then on six
        assert [len(group.unique()) for group in found[..., 0]] == [1, 1]
        assert all(len(group.unique()) == 6 for group in found[..., 1])
    # of 4 + 3 + 2 + 1 evaluations the first 4 are for all six
    assert cost_of(reference(5), shared, 6).lookahead.guided == pytest.approx(4 / 6 + 6)
    reused = replace(reference(5), guidance="reuse")
    assert cost_of(reused, shared, 6).lookahead.unguided == cost_of(reference(5), subject, 6).lookahead.guided == 10


def test_forwards_are_run_as_the_subject_says(subject: Subject) -> None:
    class Counted(Visits):
        rows = 0

        def __call__(self, model: FlowModel, rows: Travellers, *arguments: object, **options: object) -> Arrival:
            self.rows += len(rows)
            return super().__call__(model, rows, *arguments, **options)

    # branches of the steps 1 and 2: 6 rows arrive at the states 2 and 3, and go on by 2 and 1 nodes
    visits = Counted()
    branched = replace(subject, coefficients=subject.coefficients.only((1, 2)), branched=True, visits=visits)
    measure(branched, [], range(1), group_size=6, seed=0)
    assert visits.rows == 6 * (2 + (2 + 1))


def test_exact_is_its_own_reference(subject: Subject) -> None:
    rewards = measure(subject, [reference(5)], range(2), group_size=6, seed=0)
    (exact,) = rewards.values()
    assert statistics.compare(exact, rewards[reference(5)]).spearman_gains_mean == pytest.approx(1.0)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_the_tree_holds_every_plans_completions(mixture_model: FlowModel, guidance_scale: float) -> None:
    steps, index = 4, torch.arange(3)
    table = coefficients(mixture_model.sigmas(steps), [0.7, 0.0, 0.7, 0.7], "flow_sde")
    trajectory = rollout(
        mixture_model,
        initial_noise(mixture_model, index, seed=0, epoch=0),
        mixture_model.encode(["0", "1", "12"]),
        table,
        sample_index=index,
        seed=0,
        epoch=0,
        guidance_scale=guidance_scale,
    )
    mixture_model.calls.clear()
    tree = completed_everywhere(Lookahead(mixture_model, plans.exact(steps), guidance="cond_only"), trajectory)
    # states 0, 2, 3 (state 1 shares state 2's): subsets of the nodes ahead, less the empty one, are evaluations
    assert len(mixture_model.calls) == (2**3 - 1) + (2**1 - 1)
    for nodes in path_tree.node_sets(steps, 3):
        expected = Lookahead(mixture_model, plans.nodes(steps, nodes), guidance="cond_only").complete(trajectory)
        for state in (0, 2, 3):
            torch.testing.assert_close(tree[state, path_tree.path_after(nodes, state)], expected[state])


@pytest.mark.parametrize("group", [1, 3])
def test_the_tree_ends_as_the_window_says(mixture_model: FlowModel, group: int) -> None:
    """Noise in steps 0 and 1 of 5, then DPM-Solver++, for samples with and without one initial noise."""
    steps, index = 5, torch.arange(6)
    euler = coefficients(mixture_model.sigmas(steps), 0.7, "flow_sde").only(range(2))
    trajectory = rollout(
        mixture_model,
        initial_noise(mixture_model, index - index % group, seed=0, epoch=0),
        mixture_model.encode(["0"] * 3 + ["12"] * 3),
        with_remainder(euler, 2, second_order=True),
        sample_index=index,
        seed=0,
        epoch=0,
    )
    trajectory = replace(trajectory, shared=group)
    exact = Lookahead(mixture_model, plans.exact(steps), chunk=4)
    tree, expected = completed_everywhere(exact, trajectory), exact.complete(trajectory)
    first_order = exact.complete(replace(trajectory, coefficients=euler))
    for state in (0, 1):
        full = tuple(range(state + 1, steps))
        torch.testing.assert_close(tree[state, full], expected[state])
        assert (expected[state] - first_order[state]).abs().max() > 1e-3
    for nodes in path_tree.node_sets(steps, 3):
        expected = exact.by(plans.nodes(steps, nodes)).complete(trajectory)
        for state in (0, 1):
            torch.testing.assert_close(tree[state, path_tree.path_after(nodes, state)], expected[state])


def completed_everywhere(lookahead: Lookahead, trajectory: Trajectory) -> dict[tuple[int, path_tree.Path], Tensor]:
    """The completions of every state along every path."""
    found = path_tree.completions(lookahead, trajectory, max_nodes=trajectory.num_steps)
    return {(state, path): clean for state, path, clean in found}


def test_the_search_finds_what_measuring_finds(subject: Subject) -> None:
    ways = [Variant(plans.exact(5), "full", decoder) for decoder in ("full", "preview")]
    found = search(subject, range(2), ways=ways, max_nodes=2, group_size=6, seed=1)
    names = [candidate.variant.plan.name for candidate in found]
    # of the nodes 1..4: no one, one or two, with either decoder
    assert len([name for name in names if not name.startswith("paths")]) == 2 * (1 + 4 + 6)
    # nothing is known of operations: by forwards
    assert [candidate.forwards for candidate in found] == sorted(candidate.forwards for candidate in found)
    own = [candidate for candidate in found if candidate.variant.plan.name.startswith("paths")]
    assert own
    picked = [candidate for candidate in found if candidate.variant.plan.name in ("nodes{2,3}", "one_step")]
    picked += [own[0], own[-1]]
    rewards = measure(subject, [candidate.variant for candidate in picked], range(2), group_size=6, seed=1)
    for candidate in picked:
        direct = statistics.compare(rewards[reference(5)], rewards[candidate.variant])
        assert candidate.agreement.spearman_gains_mean == pytest.approx(direct.spearman_gains_mean, abs=1e-6)
        assert candidate.agreement.spearman_rewards_mean == pytest.approx(direct.spearman_rewards_mean, abs=1e-6)


def test_the_search_looks_at_branches_and_windows_too(subject: Subject) -> None:
    windowed = replace(subject, coefficients=subject.coefficients.only((1, 2)))
    for searched in (windowed, replace(windowed, branched=True)):
        found = search(searched, range(2), ways=[reference(5)], max_nodes=2, group_size=4, seed=3)
        plans_found = [candidate.variant for candidate in found]
        rewards = measure(searched, plans_found, range(2), group_size=4, seed=3)
        for candidate in found:
            direct = agreement_of(searched, rewards[reference(5)], rewards[candidate.variant])
            assert candidate.agreement.spearman_rewards_mean == pytest.approx(direct.spearman_rewards_mean, abs=1e-6)
            assert candidate.agreement.spearman_gains_mean == pytest.approx(direct.spearman_gains_mean, abs=1e-6)
        # the states that are completed are 1 and 2, or 2 and 3: sets that differ before them alone are one
        ahead = [node for node in range(1, 5) if node > (2 if searched.branched else 1)]
        sets = [variant for variant in plans_found if not variant.plan.name.startswith("paths")]
        assert len(sets) == 1 + len(ahead) + len(ahead) * (len(ahead) - 1) / 2


def test_operations_come_before_forwards(subject: Subject) -> None:
    """A preview costs a hundredth of a full decode, which outweighs any forward here."""

    class Flops:
        forward = reference_forward = backward = 1.0
        full_decode, preview_decode, reward, head = 1000.0, 10.0, 0.0, 0.0

    known = replace(subject, flops=Flops())
    ways = [Variant(plans.exact(5), "full", decoder) for decoder in ("full", "preview")]
    found = search(known, range(1), ways=ways, max_nodes=1, group_size=4, seed=1)
    decoders = [candidate.variant.decoder for candidate in found]
    count = decoders.count("preview")
    assert decoders == ["preview"] * count + ["full"] * (len(found) - count)
    ratios = [candidate.iteration for candidate in found]
    assert ratios == sorted(ratios)
    # one_step with previews: 5 states and the image, 6 decodes of 10, and the image's full one; 5 + 4 + 4 guided
    # evaluations and 4 backwards
    assert ratios[0] == pytest.approx((2 * 13 + 4 + 6 * 10 + 1000) / (2 * 13 + 4 + 1000))


def test_branches_are_judged_among_those_of_their_state(subject: Subject) -> None:
    """Against a tree that is grown, completed and scored here."""
    branched = replace(subject, coefficients=subject.coefficients.only((0, 1, 2)), branched=True)
    variants = [Variant(plans.one_step(5), "full", "full"), Variant(plans.exact(5), "full", "preview")]
    rewards = measure(branched, variants, range(3), group_size=4, seed=7)
    trunks, rows = torch.arange(0, 12, 4), [branched.prompts.prompts[group] for group in range(3) for _ in range(4)]
    model, metadata = branched.model, [{} for _ in rows]
    tree = grow(
        model,
        initial_noise(model, trunks, seed=7, epoch=0),
        model.encode(rows),
        branched.coefficients,
        branches=4,
        sample_index=trunks,
        seed=7,
        epoch=0,
        guidance_scale=branched.guidance_scale,
    )
    clean = tree.completions(Lookahead(model, plans.exact(5), chunk=100))
    expected = branched.reward(model.decode(clean.flatten(0, 1), "full"), rows * 3, metadata * 3).values
    torch.testing.assert_close(rewards[reference(5)], expected.view(3, 3, 4).permute(1, 2, 0), rtol=1e-5, atol=1e-6)
    noisy = branched.coefficients.noisy
    found = [statistics.compare_branches(rewards[reference(5)], rewards[variant], noisy) for variant in variants]
    assert found[1].spearman_rewards_mean == found[1].spearman_gains_mean > 0.9 > found[0].spearman_gains_mean
    assert len(found[0].spearman_gains) == 3 and found[0].remaining_gains == 1
    # in part: the same group in another range
    torch.testing.assert_close(
        measure(branched, [], range(2, 3), group_size=4, seed=7)[reference(5)], rewards[reference(5)][2:]
    )


def test_the_cheapest_plan_above_the_thresholds(subject: Subject) -> None:
    found = search(subject, range(2), ways=[reference(5)], max_nodes=4, group_size=8, seed=0)
    limits = Thresholds(0.9, 0.85, 0.5)
    chosen = cheapest(found, limits)
    assert chosen is not None and limits.met_by(chosen.agreement)
    assert not any(limits.met_by(c.agreement) for c in found if c.forwards < chosen.forwards)
    assert cheapest(found, Thresholds(1.0, 1.0, 1.0 + 1e-9)) is None


def test_scores_are_by_group_and_state(subject: Subject) -> None:
    """A reward that reads the prompt and the picture's value back."""
    (batch,) = trajectories(subject, range(2), group_size=3, seed=0)
    values = torch.arange(2 * 6.0).view(2, 6) / 100

    def read(images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        first = torch.tensor([float(prompt == batch.rows[0]) for prompt in prompts])
        return images[:, 0, 0, 0] + first

    images = values[..., None, None, None].expand(2, 6, 3, 4, 4)
    mixture = type(subject.reward)({"read": (read, 1.0)})
    found = score(replace(subject, reward=mixture), batch, images)
    # [P, G, S]: group 0 holds rows 0..2 (and the first prompt), group 1 rows 3..5; states are 6 apart
    expected = torch.tensor([[[1.00, 1.06], [1.01, 1.07], [1.02, 1.08]], [[0.03, 0.09], [0.04, 0.10], [0.05, 0.11]]])
    torch.testing.assert_close(found, expected)


def test_a_table_is_aligned() -> None:
    assert table(["plan", "cost"], [["a", "1"], ["longer", "10"]]) == "plan    cost\na          1\nlonger    10"


def test_an_analytic_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, picture = tmp_path / "fidelity.json", tmp_path / "fidelity.png"
    arguments = ["--analytic", "--groups", "4", "--group-size", "6", "--plans", "exact", "nodes:4,7", "one_step"]
    arguments += ["--guidance", "full", "cond_only", "--decoder", "full", "preview"]
    assert fidelity.main([*arguments, "--json", str(out), "--plot", str(picture)]) == 0
    document = json.loads(out.read_text())
    own = {"plans", "search", "persistence", "settings"}
    assert set(document) == own | {"command", "commit", "hardware", "versions"}
    assert len(document["persistence"]) == 10 and all(0 < value <= 1 for value in document["persistence"])
    assert document["settings"]["group_size"] == 6 and document["search"] is None
    found = document["plans"]
    # exact and nodes with both guidances, one_step with one (it never evaluates), each with both decoders
    assert len(found) == 2 * (2 + 2 + 1)
    cheap = found["nodes{4,7}/cond_only/preview"]
    assert (cheap["nfe_guided"], cheap["nfe_unguided"], cheap["forwards"]) == (0, 11, 11)
    assert cheap["cost_ratio"] == pytest.approx(11 / 90)
    assert found["exact/full/full"]["spearman_gains_mean"] == pytest.approx(1.0)
    assert found["exact/full/preview"]["spearman_gains_mean"] > 0.9
    assert found["one_step/full/full"]["spearman_gains_mean"] < found["nodes{4,7}/full/full"]["spearman_gains_mean"]
    assert len(cheap["spearman_gains"]) == 9
    assert picture.read_bytes().startswith(b"\x89PNG")
    shown = capsys.readouterr().out
    assert "nodes{4,7}/cond_only/preview" in shown and str(tmp_path) not in out.read_text()


def test_an_analytic_search(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "search.json"
    arguments = ["--analytic", "--search", "--groups", "4", "--group-size", "6", "--max-nodes", "1", "--plans", "exact"]
    low = ["--threshold-rewards", "0.5", "--threshold-gains", "0.3", "--threshold-worst", "-1"]
    picture = tmp_path / "search.png"
    assert fidelity.main([*arguments, *low, "--json", str(out), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    document = json.loads(out.read_text())
    chosen = document["search"]["chosen"]
    candidates = document["search"]["candidates"]
    assert chosen in candidates and len([name for name in candidates if not name.startswith("paths")]) == 10
    # what is chosen can be asked for by what is printed
    again = document["search"]["chosen_plan"]
    assert f"again by --plans {again}\n" in (shown := capsys.readouterr().out)
    assert plans_of(parse(["--plans", again])[0])[0](10).name == document["plans"][chosen]["plan"]
    assert document["search"]["in_sample"]["spearman_rewards_mean"] >= 0.5
    # the held-out half judges the chosen plan beside the ones asked for
    assert set(document["plans"]) == {"exact/full/full", chosen}
    assert document["settings"]["groups_measured"] == 2
    assert "held out" in shown


def test_a_search_without_a_find_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--analytic", "--search", "--groups", "2", "--group-size", "4", "--max-nodes", "0"]
    assert fidelity.main([*arguments, "--plans", "one_step", "--threshold-gains", "1"]) == 0
    assert "none of 1 candidates reaches" in capsys.readouterr().out


def test_the_cost_table_by_hand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "cost.json"
    assert fidelity.main(["--cost", "--plans", "exact_but_last", "--guidance", "full", "--json", str(out)]) == 0
    for record in json.loads(out.read_text())["models"].values():
        unit, half = record["flops"], 2 if record["guided"] else 1
        forward, reference = half * unit["forward"], half * unit["reference_forward"]
        # 10 steps of the rollout, and 9 that are trained and held to the reference
        sparse = 19 * forward + 9 * (reference + unit["backward"]) + unit["full_decode"] + unit["reward"]
        assert record["sparse_kl"] == pytest.approx(sparse)
        # a trunk of 9 steps, and their training, in eighths; 9 branches' first velocities; 7 + 6 + ... + 1 to complete
        own = (2 * 9 / 8 + 9 + 28) * forward + 9 / 8 * (reference + unit["backward"])
        row = record["plans"]["exact_but_last/full/preview, 8 branches"]
        assert row["ratio_kl"] == pytest.approx((own + 9 * (unit["preview_decode"] + unit["reward"])) / sparse)
        assert row["ratio_kl"] < record["plans"]["exact_but_last/full/preview"]["ratio_kl"]
        # with noise in the steps 0..2 alone: 3 trained, completions of 8 + 7 + 6 evaluations, 3 states and the image,
        # which is decoded and scored in full besides
        sparse = 13 * forward + 3 * (reference + unit["backward"]) + unit["full_decode"] + unit["reward"]
        own = 34 * forward + 3 * (reference + unit["backward"]) + 4 * unit["preview_decode"] + 5 * unit["reward"]
        own += unit["full_decode"]
        row = record["plans"]["exact_but_last/full/preview, window 0..2"]
        assert row["ratio_kl"] == pytest.approx(own / sparse) and row["decodes"] == 5
        assert record["sparse_window_kl"] == pytest.approx(sparse)
    assert "FLUX.1-dev, 512 px" in capsys.readouterr().out


def test_costs_of_cheaper_forwards_by_hand(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from densegrpo_fast.fidelity import costs
    from densegrpo_fast.models import flops

    out = tmp_path / "cost.json"
    arguments = ["--cost", "--plans", "nodes:4", "--guidance", "cond_only", "--json", str(out)]
    assert fidelity.main([*arguments, "--head", "--copy-dtype", "bfloat16", "--cache", "text", "reuse:6-18"]) == 0
    models = json.loads(out.read_text())["models"]
    record = models["sd35_medium"]
    unit, found = record["flops"], record["plans"]
    plain = found["nodes{4}/cond_only/preview"]["extra_flops"]

    def saved(extras: str) -> float:
        return plain - found[f"nodes{{4}}{extras}/cond_only/preview"]["extra_flops"]

    # states 0..3 evaluate once each; of the states 0..8 each leaves a step out
    assert saved("+copy(bfloat16)") == pytest.approx(4 * (unit["forward"] - unit["reference_forward"]), rel=1e-6)
    assert saved("+head") == pytest.approx(-9 * unit["head"], rel=1e-6)
    # 12 of 24 blocks of which 7 have a second attention: about half of the forward
    row = found["nodes{4}+copy(bfloat16)+cache(reuse:6-18)/cond_only/preview"]
    assert saved("+copy(bfloat16)+cache(reuse:6-18)") == pytest.approx(4 * (unit["forward"] - row["lookahead_forward"]))
    assert 0.45 < row["lookahead_forward"] / unit["reference_forward"] < 0.55
    assert (row["copy"], row["cache"], row["head"]) == ("bfloat16", "reuse:6-18", False)
    assert found["nodes{4}+head/cond_only/preview"]["corrections"] == 9
    # branches of the steps 0 to 8 lead to the states 1 to 9, of which the last leaves no step out; about a tenth each
    assert found["nodes{4}+head/cond_only/preview, 8 branches"]["corrections"] == 8
    assert all(
        0.05 < models[name]["flops"]["head"] / models[name]["flops"]["forward"] < 0.2
        for name in ("embedded", "sd35_medium")
    )
    # what does not fit a model is left out, and said
    assert list(models["embedded"]["left_out"]) == ["cache(reuse:6-18)"] and not record["left_out"]
    assert list(models["flux"]["left_out"]) == ["head", "copy(bfloat16)", "cache(text)", "cache(reuse:6-18)"]
    assert "left out: cache(reuse:6-18): lookahead.cache: expected reuse with an end of" in capsys.readouterr().out
    monkeypatch.setattr(costs, "ARCHITECTURES", {"embedded": flops.embedded})
    with pytest.raises(SystemExit):
        fidelity.main([*arguments, "--cache", "skip:70"])
    assert "--cache skip:70: fits none of embedded" in capsys.readouterr().err


def test_a_pipeline_run(pipeline_directory: Path, tmp_path: Path) -> None:
    out = tmp_path / "fidelity.json"
    arguments = ["--groups", "2", "--group-size", "3", "--plans", "nodes:2", "--json", str(out)]
    arguments += ["--model.path", str(pipeline_directory), "--sampler.num_steps", "4", "--sampler.guidance_scale", "3"]
    arguments += ["--lookahead.decoder", "preview"]
    assert fidelity.main([*arguments, "--reward.terms", "{jpeg_compressibility: 1.0}"]) == 0
    document = json.loads(out.read_text())
    # with a preview decoder the ceiling stands beside the plan
    assert list(document["plans"]) == ["exact/full/preview", "nodes{2}/full/preview"]
    record = document["plans"]["nodes{2}/full/preview"]
    assert (record["nfe_guided"], record["nfe_unguided"]) == (2, 0)
    assert record["cost_ratio"] == pytest.approx(2 / 6)
    assert 1.0 < record["iteration_flops_ratio"] < document["plans"]["exact/full/preview"]["iteration_flops_ratio"]
    assert document["settings"]["model"] == pipeline_directory.name
    assert str(pipeline_directory.parent) not in out.read_text()


def test_a_preset_with_branches_is_judged_on_branches(
    pipeline_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "fidelity.json"
    arguments = ["--config", "embedded_tempflow", "--groups", "2", "--group-size", "4", "--plans", "exact", "one_step"]
    arguments += ["--model.path", str(pipeline_directory), "--reward.terms", "{jpeg_compressibility: 1.0}"]
    arguments += ["--decoder", "full", "--copy-dtype", "bfloat16", "--vae-dtype", "bfloat16"]
    picture = tmp_path / "fidelity.png"
    assert fidelity.main([*arguments, "--json", str(out), "--plot", str(picture)]) == 0
    assert picture.read_bytes().startswith(b"\x89PNG")
    document = json.loads(out.read_text())
    ways = ["exact/full/full", "one_step/full/full", "exact+copy(bfloat16)/full/full"]
    assert list(document["plans"]) == [*ways, *(f"{way}(bfloat16)" for way in ways)]
    exact = document["plans"]["exact/full/full"]
    # what is rounded is the pictures: nearly the same order, and the same completions
    rounded = document["plans"]["exact/full/full(bfloat16)"]
    assert 0.5 < rounded["spearman_rewards_mean"] < 1.0 and rounded["vae"] == "bfloat16"
    assert rounded["nfe_unguided"] == exact["nfe_unguided"]
    assert document["settings"]["vae_dtypes"] == ["float32", "bfloat16"]
    assert exact["spearman_gains_mean"] == exact["spearman_rewards_mean"] == pytest.approx(1.0)
    # three of six steps branch: states 1, 2, 3 are completed with 5 + 4 + 3 evaluations, and one picture each
    assert (exact["nfe_unguided"], exact["decodes"], len(exact["spearman_gains"])) == (12, 3, 3)
    assert document["plans"]["exact+copy(bfloat16)/full/full"]["spearman_rewards_mean"] > 0.5
    assert document["settings"]["branched"] and document["persistence"] is None
    assert "2 groups of 4 branches of one trunk" in capsys.readouterr().out
    for wrong, problem in ((["--cache", "text"], "--cache is for"), (["--guidance", "reuse"], "full or cond_only")):
        extra = ["--sampler.guidance_scale", "2"] if "--guidance" in wrong else []
        with pytest.raises(SystemExit) as ended:
            fidelity.main([*arguments, *wrong, *extra])
        assert ended.value.code == ExitCode.USAGE
        assert problem in capsys.readouterr().err


def test_an_adapter_changes_the_policy(pipeline_directory: Path, tmp_path: Path) -> None:
    from densegrpo_fast.config.cli import load_config
    from densegrpo_fast.fidelity.subject import pipeline_subject
    from densegrpo_fast.models.load import load_sd3
    from densegrpo_fast.runtime.lora import add_lora, save_lora

    model = load_sd3(str(pipeline_directory), device=torch.device("cpu"), dtype=torch.float32, max_sequence_length=0)
    add_lora(model.network, rank=2, alpha=4, targets=["attn.to_q", "attn.to_out.0"], seed=0)
    for parameter in model.trainable_parameters().values():
        torch.nn.init.normal_(parameter, std=0.3)
    save_lora(model.network, tmp_path, rank=2, alpha=4)
    config, _ = load_config(["--config", "embedded_dense", "--model.path", str(pipeline_directory)])
    latents, sigma = torch.randn(1, *model.latent_shape), torch.full((1,), 0.5)
    velocities = [
        subject.model.velocity(latents, sigma, subject.model.encode(["a red circle"])).cond.detach()
        for subject in (pipeline_subject(config, tmp_path, 1), pipeline_subject(config, None, 1))
    ]
    expected = model.velocity(latents, sigma, model.encode(["a red circle"])).cond.detach()
    torch.testing.assert_close(velocities[0], expected, rtol=1e-4, atol=1e-5)
    assert (velocities[1] - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plans", "nodes"], "expected exact, exact_but_last, one_step, nodes:3,6, n_step:2 or paths:2,3:3:-:-"),
        (["--plans", "paths"], "got 'paths'"),
        (["--plans", "paths:1,2::-"], "got 'paths:1,2::-'"),
        (["--analytic", "--plans", "paths:1:2:-"], "--plans: lookahead paths must be one for each of the 10 states"),
        (["--cache", "text:1"], "expected text (or text:own), reuse:2-5 or skip:0,6, joined by +"),
        (["--plans", "nodes:3,x"], "got 'nodes:3,x'"),
        (["--plans", "n_step:0"], "got 'n_step:0'"),
        (["--analytic", "--plans", "nodes:12"], "--plans: lookahead nodes must increase within 1..9 for 10 steps"),
        (
            ["--plans", "nodes:12", "--config", "embedded_paper"],
            "--plans: lookahead nodes must increase within 1..9 for 10 steps",
        ),
        (["--guidance", "half"], "invalid choice: 'half'"),
        (["--groups", "0"], "expected a whole number of at least 1, got '0'"),
        (["--group-size", "1"], "expected a whole number of at least 2, got '1'"),
        (["--threshold-gains", "2"], "expected a number in [-1, 1], got '2'"),
        (["--search", "--groups", "1"], "--search needs --groups of at least 2"),
        (["--search", "--head", "a.safetensors"], "--search and --head exclude each other"),
        (["--cost", "--analytic"], "--cost and --analytic exclude each other"),
        (["--cost", "--head", "a.safetensors"], "--cost --head counts a head of the usual size; leave its FILE out"),
        (["--head"], "--head needs the FILE of a head"),
        (["--analytic", "--config", "embedded_dense"], "--analytic and --config exclude each other"),
        (["--analytic", "--sampler.num_steps", "4"], "--analytic takes no configuration"),
        (["--sampler.steps", "4"], 'unknown option "sampler.steps"'),
        (["--dry-run"], "options of training"),
        (["--groups", "100000"], "--groups: expected at most the"),
        (["--config", "embedded_mixgrpo"], "window.remainder_share: plans are compared on all of the grid"),
    ],
)
def test_bad_options_exit_with_2_and_say_why(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fidelity.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--analytic", "--json", "nowhere/at/all.json"], 7, "there is no directory nowhere/at"),
        (["--model.path", "./nowhere"], 3, "is no directory"),
    ],
)
def test_other_failures_have_their_exit_codes(
    arguments: list[str], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fidelity.main(arguments)
    assert stopped.value.code == code
    assert message in capsys.readouterr().err


def test_an_adapter_that_is_not_there(
    pipeline_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        fidelity.main(["--groups", "1", "--adapter", str(tmp_path), "--model.path", str(pipeline_directory)])
    assert stopped.value.code == 3
    assert "holds no pytorch_lora_weights.safetensors" in capsys.readouterr().err


def test_an_analytic_run_needs_nothing_but_torch() -> None:
    """In a fresh process in which every other package of ours is out of reach."""
    program = (
        "import sys\n"
        "for name in ('numpy', 'scipy', 'pydantic', 'yaml', 'diffusers', 'transformers', 'peft', 'matplotlib'):\n"
        "    sys.modules[name] = None\n"
        "from densegrpo_fast.fidelity import __main__ as fidelity\n"
        "fidelity.parse(['--analytic'])\n"
        "assert 'torch' not in sys.modules\n"
        "arguments = ['--analytic', '--groups', '1', '--group-size', '3', '--plans', 'one_step']\n"
        "sys.exit(fidelity.main(arguments))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "one_step/full/full" in done.stdout
