"""A completion head that goes on learning during a run: that it does, what it costs, and that nothing else changes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.completion_head import CompletionHead, HeadConfig, load_head, save_head
from densegrpo_fast.models.flops import ModelFlops
from densegrpo_fast.models.lookahead_copy import LookaheadCopy
from densegrpo_fast.run_files.metrics import read_metrics
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.branches import branch_rollout
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import initial_noise, rollout
from densegrpo_fast.training import head_training
from densegrpo_fast.training.costs import Prices
from densegrpo_fast.training.head_training import Examples, HeadRefresher, exactly_completed, examples_of, explained
from densegrpo_fast.training.meter import Counts, Meter, MeteredModel

SHAPE = HeadConfig(3, ((1,), (), ()), (4, 4, 4), patch=2, hidden=8, width=16, depth=1)


def head_of(config: HeadConfig = SHAPE, seed: int = 0) -> CompletionHead:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return CompletionHead(config).requires_grad_(False).eval()


def examples(seed: int, count: int = 24, kind: int = 0) -> Examples:
    """Targets that follow from the latents: half of them, or minus half where the tokens are of a negative kind."""
    generator = torch.Generator().manual_seed(seed)
    latents, estimate = (torch.randn(count, 4, 4, 4, generator=generator) for _ in range(2))
    hidden = torch.randn(count, 4, 8, generator=generator) + 3.0 * kind * torch.tensor([1.0, -1.0] * 4)
    share = -0.5 if kind < 0 else 0.5
    return Examples(hidden, latents, estimate, share * latents, torch.arange(count) % 2)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that shows in a few steps what a run's rate shows in many."""
    monkeypatch.setattr(head_training, "_REFRESH_LR", 3e-4)


@pytest.mark.usefixtures("fast")
def test_it_learns_and_is_judged_on_what_it_has_not_seen() -> None:
    head = head_of()
    before, random_state = {name: x.clone() for name, x in head.state_dict().items()}, torch.get_rng_state()
    refresher = HeadRefresher(head, steps=30, seed=0)
    shares = [refresher.refresh(examples(seed), iteration=seed).explained for seed in range(8)]
    # the zero function explains nothing
    assert shares[0] == pytest.approx(0.0, abs=1e-6)
    assert sorted(shares) == shares and shares[-1] > 0.25
    held_out = examples(99)
    by_state = explained(head, held_out)
    assert [count for count, _ in by_state.values()] == [12, 12] and all(share > 0.2 for _, share in by_state.values())
    assert torch.equal(torch.get_rng_state(), random_state)
    # frozen as it was before, and the units of the errors are those that it was made with
    assert not head.training and not any(p.requires_grad for p in head.parameters())
    assert torch.equal(head.scale, before["scale"]) and not torch.equal(head.out.weight, before["out.weight"])


@pytest.mark.usefixtures("fast")
def test_what_it_learns_of_one_kind_is_not_at_the_cost_of_another() -> None:
    """Twenty refreshes by turns of two kinds, then ten of one alone; each other refresher forgets what it was shown."""
    others, found = examples(99, 200, kind=-1), []
    for forgets in (False, True):
        refresher = HeadRefresher(head_of(), steps=30, seed=0)
        for seed in range(20):
            refresher.refresh(examples(seed, kind=1 if seed % 2 else -1), seed)
        before = [share for _, share in explained(refresher.head, others).values()]
        for seed in range(20, 30):
            refresher.memory = None if forgets else refresher.memory
            refresher.refresh(examples(seed, kind=1), seed)
        after = [share for _, share in explained(refresher.head, others).values()]
        found.append([late - early for early, late in zip(before, after, strict=True)])
    (kept, forgotten) = found
    assert min(kept) >= 0 and max(forgotten) < -0.3


def test_it_remembers_the_newest_as_far_as_a_checkpoint_may_hold_them(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second, third = (examples(seed) for seed in range(3))
    refresher = HeadRefresher(head_of(), steps=2, seed=0)
    # no more than 128 rows of a step, as many of them remembered as new
    assert [refresher.refresh(each, seed).rows for seed, each in enumerate((first, second))] == [2 * 24, 2 * 48]
    assert refresher.memory is not None
    assert torch.equal(refresher.memory.latents, torch.cat([second.latents, first.latents]))
    monkeypatch.setattr(head_training, "_MEMORY_ROWS", 60)
    refresher.refresh(third, 2)
    expected = torch.cat([third.latents, second.latents, first.latents[:12]])
    assert torch.equal(refresher.memory.latents, expected)
    assert refresher.refresh(examples(3, 300), 3).rows == 2 * (64 + 60)
    # a row is 4 tokens of 8, 3 times 4x4x4 floats, and the state: 4 (32 + 192) + 8 bytes
    assert third.row_bytes == 904
    monkeypatch.setattr(head_training, "_MEMORY_BYTES", 904 * 30 + 1)
    refresher.refresh(third, 4)
    assert torch.equal(refresher.tensors()["head_memory"]["state"], torch.cat([third.state, torch.arange(6) % 2]))


def test_a_checkpoint_continues_to_the_bit() -> None:
    first = HeadRefresher(head_of(), steps=3, seed=1)
    for iteration in range(2):
        first.refresh(examples(iteration), iteration)
    saved = {group: {k: v.clone() for k, v in members.items()} for group, members in first.tensors().items()}
    second = HeadRefresher(head_of(seed=5), steps=3, seed=1)
    second.restore(saved)
    assert first.refresh(examples(2), 2) == second.refresh(examples(2), 2)
    for one, other in zip(first.head.state_dict().values(), second.head.state_dict().values(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_without_such_a_head_is_refused() -> None:
    refresher = HeadRefresher(head_of(), steps=1, seed=0)
    wide = HeadConfig(3, ((1,), (), ()), (4, 4, 4), patch=2, hidden=8, width=32, depth=1)
    for tensors in ({}, HeadRefresher(head_of(wide), steps=1, seed=0).tensors()):
        with pytest.raises(UserError, match="no completion head of this shape") as caught:
            refresher.restore(tensors)
        assert exit_code_of(caught.value) == ExitCode.CHECKPOINT


def test_examples_are_what_the_head_will_see(tiny_policy: Callable[..., FlowModel]) -> None:
    model, plan, index = tiny_policy(spread=0.1), plans.nodes(4, [2]), torch.arange(3)
    config = HeadConfig(4, plan.paths, model.latent_shape, patch=2, hidden=model.network.inner_dim, width=16, depth=1)
    head = head_of(config)
    trajectory = rollout(
        model,
        initial_noise(model, index, seed=0, iteration=0),
        model.encode(["a cat", "the moon", "a photo"]),
        coefficients(model.sigmas(4), 0.7, "flow_sde"),
        sample_index=index,
        seed=0,
        iteration=0,
        keep_hidden=True,
    )
    lookahead, exact = Lookahead(model, plan, head=head), Lookahead(model, plans.exact(4)).complete(trajectory)
    found = Examples.joined(examples_of(lookahead, head, trajectory, exact))
    # states 0, 1, 2 of three rows; state 3 leaves no step out
    assert found.state.tolist() == [0] * 3 + [1] * 3 + [2] * 3
    plain = Lookahead(model, plan).complete(trajectory)
    for state in range(3):
        torch.testing.assert_close(found.estimate[found.state == state], plain[state], rtol=1e-5, atol=1e-5)
    # the head's own correction takes it from there: added to the estimate, a perfect one gives the exact completion
    torch.testing.assert_close(found.estimate + found.target, exact[:3].flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_what_a_check_costs_by_hand() -> None:
    """24 trajectories of T = 10, guided: 45 exact evaluations and 11 images each; nodes {3,6} without guidance: 9.

    The head learns in 5 steps of 128 rows, three forwards a row.
    """
    counts = Counts(guided=24 * 45, unguided=24 * 9, policy=24 * 90, lookahead=24 * 9, full_decodes=24 * 11)
    counts += Counts(scored=24 * 11, learned=640)
    assert counts.forwards == 24 * 99
    # powers of ten, so that the sum shows every count
    unit = ModelFlops(1.0, 0.0, 0.0, full_decode=1e3, preview_decode=math.nan, reward=1e6, head=1e9)
    assert Prices(unit, 1.0).flops(counts) == pytest.approx(24 * (99 + 11e3 + 11e6 + 80e9), rel=1e-12)


@pytest.fixture(scope="module")
def head_file(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained head for node 1 of three steps of the command's pipeline."""
    from densegrpo_fast.embedded.architecture import build_transformer

    network = build_transformer()
    config = network.config
    path = tmp_path_factory.mktemp("head") / "head.safetensors"
    shape = (config.in_channels, config.sample_size, config.sample_size)
    save_head(head_of(HeadConfig(3, ((1,), (), ()), shape, config.patch_size, network.inner_dim, 16, 1)), path)
    return path


def options(head: Path, refresh: int, iterations: int = 3) -> dict[str, object]:
    return {
        "lookahead.plan": "nodes",
        "lookahead.nodes": "[1]",
        "lookahead.head": head,
        "lookahead.head_refresh": refresh,
        "lookahead.monitor_every": 1,
        "objective.trained_steps": "all_but_last",
        "evaluation.every": 0,
        "run.iterations": iterations,
    }


def without_seconds(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in record.items() if not key.startswith(("time/", "memory/", "cpu_seconds"))}
        for record in read_metrics(run / "metrics.jsonl")
    ]


def test_a_run_continues_to_the_bit_and_the_policy_is_left_alone(train: Any, head_file: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "whole", **options(head_file, 5)) == 0
    assert train(tmp_path / "parts", **options(head_file, 5, iterations=2)) == 0
    assert train(tmp_path / "parts", "--resume", **options(head_file, 5)) == 0
    assert train(tmp_path / "still", **options(head_file, 0)) == 0
    whole, parts, still = (without_seconds(tmp_path / name) for name in ("whole", "parts", "still"))
    assert parts == whole
    heads = [load_head(tmp_path / name / "completion_head.safetensors") for name in ("whole", "parts")]
    for one, other in zip(heads[0].state_dict().values(), heads[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert not (tmp_path / "still" / "completion_head.safetensors").exists()

    # the first update comes after the head has learnt, and knows nothing of it
    cost = ("monitor/head", "nfe/monitor", "nfe_unguided/monitor", "flops/")
    learnt, untaught = (
        {key: value for key, value in run[0].items() if not key.startswith(cost)} for run in (whole, still)
    )
    assert learnt == untaught
    assert whole[0]["flops/monitor"] > still[0]["flops/monitor"] > 0
    # exact completions 2 + 1 of three steps for each of 2 samples; the head sees state 0 at node 1, for both
    assert (still[0]["nfe/monitor"], whole[0]["nfe/monitor"]) == (6, 8)
    # states 0 and 1 of 2 samples, 5 steps; from the second time on as many rows that it remembers
    assert [record["monitor/head_rows"] for record in whole] == [20, 40, 40]
    # the zero function explains nothing
    assert whole[0]["monitor/head_explained"] == pytest.approx(0.0, abs=1e-6)
    # from then on the completions are other ones
    assert whole[1]["gain/step_0"] != still[1]["gain/step_0"]


def test_a_head_follows_the_policy_on_branches(train: Any, head_file: Path, tmp_path: Path) -> None:
    """2 prompts x 1 ODE trajectory x 2 branches of the steps 0 and 1 of three; the head corrects state 1 alone."""
    branches = {"sampler.branches": 2, "sampler.micro_batch": 1, "credit.method": "branch", "run.iterations": 2}
    branches |= {"objective.trained_steps": "[0, 1]", "optimizer.updates_per_iteration": 1}
    plain = load_head(head_file)
    one_step = head_of(replace(plain.config, paths=((), (), ())))
    save_head(one_step, tmp_path / "head.safetensors")
    common = options(tmp_path / "head.safetensors", 5) | {"lookahead.plan": "one_step", "lookahead.nodes": "[]"}
    common |= branches
    assert train(tmp_path / "whole", **common) == 0
    assert train(tmp_path / "parts", **common | {"run.iterations": 1}) == 0
    assert train(tmp_path / "parts", "--resume", **common) == 0
    assert train(tmp_path / "still", **common | {"lookahead.head_refresh": 0}) == 0
    whole, parts, still = (without_seconds(tmp_path / name) for name in ("whole", "parts", "still"))
    assert parts == whole
    heads = [load_head(tmp_path / name / "completion_head.safetensors") for name in ("whole", "parts")]
    for one, other in zip(heads[0].state_dict().values(), heads[1].state_dict().values(), strict=True):
        assert torch.equal(one, other)
    # the first update knows nothing of it, and the second is by other completions
    assert (whole[0]["reward"], whole[0]["grad_norm"]) == (still[0]["reward"], still[0]["grad_norm"])
    assert whole[1]["reward"] != still[1]["reward"]
    # both branches are reached at states 1 and 2, and go on exactly from the first; it sees nothing more than that
    assert whole[0]["nfe/monitor"] == still[0]["nfe/monitor"] == 2 * (2 + 1)
    assert whole[0]["monitor/head_explained"] == pytest.approx(0.0, abs=1e-6)
    # one state of 2 branches, 5 steps
    assert [record["monitor/head_rows"] for record in whole] == [10, 20]
    assert whole[0]["flops/monitor"] > still[0]["flops/monitor"] > 0


def test_examples_of_branches_are_what_the_head_will_see(tiny_policy: Callable[..., FlowModel]) -> None:
    model, plan, index = tiny_policy(spread=0.1), plans.nodes(4, [2]), torch.tensor([0, 2])
    config = HeadConfig(4, plan.paths, model.latent_shape, patch=2, hidden=model.network.inner_dim, width=16, depth=1)
    branched = branch_rollout(
        model,
        initial_noise(model, index, seed=0, iteration=0),
        model.encode(["a cat", "a cat", "the moon", "the moon"]),
        coefficients(model.sigmas(4), 0.7, "flow_sde").only([0, 1, 2]),
        branches=2,
        sample_index=index,
        seed=0,
        iteration=0,
    )
    head = head_of(config)
    lookahead, exact = Lookahead(model, plan, head=head), Lookahead(model, plans.exact(4))
    line, ends = exactly_completed(exact, lookahead, branched)
    found = Examples.joined(examples_of(lookahead, head, line, ends))
    # branches lead to the states 1, 2 and 3, of which the last leaves no step out
    assert found.state.tolist() == [1] * 4 + [2] * 4
    plain = Lookahead(model, plan).complete(branched)
    torch.testing.assert_close(found.estimate, plain[:2].flatten(0, 1), rtol=1e-5, atol=1e-5)
    exactly = exact.complete(branched)
    torch.testing.assert_close(found.estimate + found.target, exactly[:2].flatten(0, 1), rtol=1e-5, atol=1e-5)
    # branches lead to 3 states of 4 rows and go on exactly by 2 + 1 steps, and state 1 goes on at node 2; where they
    # lead is evaluated once, but for a lookahead that evaluates a copy
    copied = Lookahead(LookaheadCopy(model), plan, head=head)
    for shown, rows in ((lookahead, 4 * (3 + 3 + 1)), (copied, 4 * (3 + 3 + 1 + 3))):
        meter = Meter()
        metered = [replaced(one, MeteredModel(one.model, meter)) for one in (exact, shown)]
        line, ends = exactly_completed(*metered, branched)
        again = Examples.joined(examples_of(metered[1], head, line, ends))
        assert meter.now.forwards == rows
        torch.testing.assert_close(again.target, found.target, rtol=1e-3, atol=1e-3)


def replaced(lookahead: Lookahead, model: FlowModel) -> Lookahead:
    """The same lookahead with another model."""
    other = lookahead.by(lookahead.plan)
    other.model = model
    return other


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"lookahead.head": "null"}, "expected 0 without lookahead.head, got 5"),
        ({"lookahead.monitor_every": 0}, "expected 0 without lookahead.monitor_every, got 5"),
    ],
)
def test_what_it_needs(
    train: Any,
    head_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: dict[str, object],
    problem: str,
) -> None:
    assert train(tmp_path / "run", **{**options(head_file, 5), **change}) == ExitCode.USAGE
    assert f"lookahead.head_refresh: {problem}" in capsys.readouterr().err
