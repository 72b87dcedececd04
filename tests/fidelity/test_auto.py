"""`lookahead.plan auto`: what the short measurement measures, what is chosen from it, and runs that go on with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from math import nan
from pathlib import Path
from typing import Any

import pytest
import torch

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import load_config, parse_arguments
from densegrpo_fast.config.sections import CHOSEN_BY_AUTO
from densegrpo_fast.fidelity import auto
from densegrpo_fast.fidelity.measure import agreement_of, measure
from densegrpo_fast.fidelity.price import DRAWS, Draw, Price
from densegrpo_fast.fidelity.search import Candidate, Thresholds, ladder, search
from densegrpo_fast.fidelity.target import analytic_target
from densegrpo_fast.fidelity.trial import FEWEST, Row
from densegrpo_fast.fidelity.variance import mean_square
from densegrpo_fast.fidelity.variants import Variant, reference
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.training.agreement import Agreement

Train = Callable[..., int]
WANTED = Thresholds(0.95, 0.9, 0.75)
AUTO = {"lookahead.plan": "auto", "optimizer.updates_per_iteration": 1, "objective.trained_steps": "all_but_last"}


def agreement(rewards: float = 1.0, gains: float = 1.0, worst: float = 1.0) -> Agreement:
    exact = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(0))
    target = analytic_target(1)
    same = agreement_of(
        replace(target, coefficients=coefficients(target.model.sigmas(4), 0.7, "flow_sde")), exact, exact
    )
    return replace(same, spearman_rewards_mean=rewards, spearman_gains_mean=gains, spearman_gains_worst_step=worst)


def setup(cost: float, variance: float, *, gains: float = 1.0, drawn: int | None = 2) -> auto.Setup:
    variant = replace(reference(4), plan=plans.nodes(4, [1]))
    row = Row(Candidate(variant, 4, None, agreement(gains=gains)), 8)
    return auto.Setup(row, gains >= WANTED.gains, {}, drawn, Price(cost, cost, cost), variance)


def test_the_least_variance_times_operations_within_the_budget_is_chosen() -> None:
    setups = [setup(2.0, 0.1), setup(1.3, 1.0), setup(1.2, 1.05), setup(0.6, 3.0), setup(0.5, 0.5, gains=0.8)]
    chosen, reason = auto.best(setups, 1.3, WANTED)
    assert chosen is setups[2] and "at most the budget of 1.3" in reason
    assert auto.best(setups, None, WANTED)[0] is setups[0]
    # what a larger budget would bring
    assert "A budget of 2 would allow" in reason and "whose variance x iteration is 0.20" in reason


def test_without_one_within_the_budget_the_cheapest_is_chosen_and_that_is_said() -> None:
    setups = [setup(2.0, 1.0), setup(1.4, 9.0), setup(1.0, 0.5, gains=0.8)]
    chosen, reason = auto.best(setups, 1.3, WANTED)
    assert chosen is setups[1]
    assert "Nothing that reaches the fidelity (rewards 0.95, gains 0.9, worst 0.75) costs at most" in reason
    # nothing is known of the variance
    blind = [setup(1.2, nan), setup(1.1, nan)]
    assert auto.best(blind, 1.3, WANTED)[0] is blind[1]


def test_few_groups_must_reach_the_fidelity_with_a_standard_error_to_spare() -> None:
    def reaches(error: float) -> bool:
        found = replace(agreement(0.96, 0.92), spearman_rewards_error=0.005, spearman_gains_error=error)
        return Row(Candidate(reference(4), 4, None, found), 8).reaches(WANTED)

    assert reaches(0.015) and not reaches(0.025) and not reaches(nan)


def test_the_mean_square_is_that_of_the_estimator() -> None:
    gradients = torch.randn(6, 3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    products = torch.stack([group @ group.T for group in gradients]).mean(0)
    factors = torch.tensor([2.0, 0.5, 1.0, 1.5, 9.0])
    drawn = [Draw((0, 2), factors, DRAWS // 4), Draw((2, 3), factors, DRAWS * 3 // 4)]
    # steps 0, 2, 3 of five are candidates, the rows 0, 1, 2 of the gradients
    first = (2.0 * gradients[:, 0] + 1.0 * gradients[:, 1]) / 2
    second = (1.0 * gradients[:, 1] + 1.5 * gradients[:, 2]) / 2
    expected = 0.25 * first.square().sum(-1).mean() + 0.75 * second.square().sum(-1).mean()
    assert mean_square(products, drawn, (0, 2, 3)) == pytest.approx(expected.item())


def test_the_ladder_goes_from_exact_down_and_lies_ahead_of_the_first_completed_state() -> None:
    target = analytic_target(1)
    names = ["exact", "exact_but_last", "nodes{1,3,4,5,7,8}", "nodes{2,4,6,8}", "nodes{4,8}", "one_step"]
    assert [plan.name for plan in ladder(target)] == names
    late = replace(target, coefficients=target.coefficients.only([6, 7]))
    # the states 6 and 7 can evaluate at 7, 8 and 9
    assert [plan.name for plan in ladder(late)] == ["exact", "exact_but_last", "nodes{8}", "one_step"]


def test_a_named_plan_competes_in_the_search_as_it_is_measured() -> None:
    target, named = analytic_target(2), [plans.nodes(10, [2, 4, 6, 8]), plans.nodes(10, [4]), plans.exact(10)]
    options: dict[str, Any] = {"group_size": 5, "seed": 0}
    seen = []
    ways = [Variant(plans.exact(10), "full", "full")]
    found = search(
        target,
        range(2),
        ways=ways,
        max_nodes=0,
        named=named,
        observe=lambda batch, exact: seen.append(exact),
        **options,
    )
    variants = [replace(ways[0], plan=plan) for plan in named]
    rewards = measure(target, variants, range(2), **options)
    exact = rewards[reference(10)]
    torch.testing.assert_close(torch.cat(seen), exact)
    by_variant = {candidate.variant: candidate for candidate in found}
    assert len(by_variant) == len(found) == 4  # and one_step
    for variant in variants:
        assert by_variant[variant].agreement == agreement_of(target, exact, rewards[variant])


@pytest.fixture(scope="module")
def auto_run(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run whose lookahead was chosen."""
    output = tmp_path_factory.mktemp("auto") / "run"
    assert train(output, **AUTO, **{"run.iterations": 1, "lookahead.budget": 9}) == 0
    return output


@pytest.mark.ci
def test_a_run_writes_what_it_chose_and_why(auto_run: Path) -> None:
    record = json.loads((auto_run / "lookahead_auto.json").read_text())
    config = load_config(auto_run / "config.yaml")
    settings = config.model_dump(mode="json")
    assert set(record["options"]) == set(CHOSEN_BY_AUTO)
    for key, value in record["options"].items():
        section, _, name = key.partition(".")
        assert settings[section][name] == value
    assert config.lookahead.plan != "auto" and config.optimizer.update == "streamed"
    assert all(f"# {line}".rstrip() in (auto_run / "config.yaml").read_text() for line in record["text"].splitlines())
    assert record["measured"] == {"groups": FEWEST, "group_size": 2, "seed": 0}
    setups = {(found["candidate"], found["trained_steps"]): found for found in record["forms"]}
    exact = setups["exact/full/full", "all"]
    assert exact["reaches"] and exact["agreement"]["spearman_gains_mean"] == pytest.approx(1.0)
    assert exact["variance_over_all_steps"] == pytest.approx(1.0)
    # the reference costs most, one of two steps less than both
    assert exact["over_replayed_sparse"] == max(found["over_replayed_sparse"] for found in record["forms"])
    assert setups["exact/full/full", 1]["over_replayed_sparse"] < exact["over_replayed_sparse"]
    assert setups["exact/full/full", 1]["variance_over_all_steps"] >= 1.0


@pytest.mark.ci
def test_a_run_goes_on_with_what_it_chose(auto_run: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto, "choose", lambda config: pytest.fail("measured again"))
    assert train(auto_run, "--resume", **AUTO, **{"run.iterations": 2, "lookahead.budget": 1}) == 0
    assert len((auto_run / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.ci
def test_the_choice_is_repeatable_and_leaves_the_policy_alone(pipeline_directory: Path) -> None:
    """Along branches, whose groups are those of one state, and with a budget that nothing fits."""
    settings = {
        "model.path": str(pipeline_directory),
        "sampler.num_steps": 3,
        "sampler.branches": 2,
        "sampler.group_size": 4,
        "sampler.micro_batch": 2,
        "data.num_prompts": 1,
        "credit.method": "branch",
        "window.schedule": "none",
        "window.size": None,
        "lookahead.plan": "auto",
        "lookahead.budget": 1e-3,
        "reward.terms": {"jpeg_incompressibility": 1.0},
        "reward.observed": [],
        "lora.rank": 2,
    }
    said: list[str] = []
    first, second = (auto.choose(load_config("embedded_dense", settings), groups=3, say=said.append) for _ in range(2))
    # as text, in which a correlation that is not known equals itself
    assert first.config == second.config and str(first.record["forms"]) == str(second.record["forms"])
    assert "at the lowest cost" in first.record["reason"] and first.record["text"] in said
    assert first.config.optimizer.update == "replayed" and "repeated: " in first.record["text"]
    for one, other in zip(*(c.model.trainable_parameters().values() for c in (first, second)), strict=True):
        assert torch.equal(one, other) and one.grad is None


@pytest.mark.ci
def test_a_dry_run_says_what_would_be_measured(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", "--dry-run", **AUTO) == 0
    shown = capsys.readouterr().out
    assert f"on {FEWEST} groups of 2 samples" in shown and "iterations with one reward per picture" in shown
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--credit.method", "sparse"], "auto chooses how states are completed, credit.method sparse completes none"),
        (["--window.schedule", "random"], "window.schedule: expected fixed or none with lookahead.plan auto"),
        (["--lookahead.cache", "text:own"], "lookahead.cache: expected null with lookahead.plan auto"),
        (["--lookahead.fidelity", "[0.9]"], "lookahead.fidelity: expected at least 3 of them"),
    ],
)
def test_what_cannot_be_measured_is_refused_by_name(arguments: list[str], message: str) -> None:
    with pytest.raises(Exception, match="lookahead|window") as refused:
        parse_arguments(["--config=embedded_dense", "--lookahead.plan=auto", *arguments])
    assert message in str(refused.value)


def test_it_is_refused_where_nothing_was_chosen_yet(train: Train, tmp_path: Path, capsys: Any) -> None:
    from densegrpo_fast.common.errors import UsageError
    from densegrpo_fast.training.lookahead import build_plan

    config: Config = load_config("embedded_dense", {"lookahead.plan": "auto"})
    with pytest.raises(UsageError, match=r"lookahead.plan: auto is chosen by"):
        build_plan(config, config.sampler.num_steps)
    # a run that was begun without it
    (tmp_path / "config.yaml").write_text("")
    assert train(tmp_path, "--resume", **AUTO) == 4
    assert "was not begun with lookahead.plan auto" in capsys.readouterr().err


@pytest.mark.parametrize("key", ["nowhere.option", "lookahead.nowhere"])
def test_an_option_of_a_record_that_does_not_exist_is_named(key: str) -> None:
    with pytest.raises(UsageError, match="nowhere"):
        auto.with_options(load_config("embedded_dense", {}), {key: 1})
