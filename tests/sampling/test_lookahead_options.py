"""The lookahead's cheaper forwards in use: a copy of the model, features of the rollout; in training and fidelity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from densegrpo_fast.fidelity.__main__ import main as fidelity
from densegrpo_fast.run_files.metrics import read_metrics

pytestmark = pytest.mark.ci

RUN = {
    "run.iterations": 2,
    "evaluation.every": 0,
    "sampler.num_steps": 4,
    "objective.trained_steps": "all_but_last",
}
NODES = {"lookahead.plan": "nodes", "lookahead.nodes": "[2]"}


def rewards(run: Path) -> list[float]:
    """Every gain of a run, iteration by iteration."""
    return [
        v for record in read_metrics(run / "metrics.jsonl") for k, v in record.items() if k.startswith("gain/step_")
    ]


@pytest.fixture(scope="module")
def plain(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without a copy or a cache."""
    directory = tmp_path_factory.mktemp("plain") / "run"
    assert train(directory, **RUN, **NODES) == 0
    return directory


def test_a_copy_in_the_policys_precision_changes_rounding_alone(train: Any, plain: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "copy", **RUN, **NODES, **{"lookahead.copy_dtype": "float32"}) == 0
    # the second iteration's copy follows an adapter that has moved
    assert rewards(tmp_path / "copy") == pytest.approx(rewards(plain), abs=2e-3)


def test_states_may_go_their_own_ways(train: Any, plain: Path, tmp_path: Path) -> None:
    for name, paths in (("same", "[[2], [2], [], []]"), ("other", "[[1, 2], [], [3], []]")):
        assert train(tmp_path / name, **RUN, **{"lookahead.plan": "paths", "lookahead.paths": paths}) == 0
    assert rewards(tmp_path / "same") == rewards(plain) != rewards(tmp_path / "other")


def test_a_cache_changes_the_lookahead_and_nothing_else(train: Any, plain: Path, tmp_path: Path) -> None:
    assert train(tmp_path / "cached", **RUN, **NODES, **{"lookahead.cache": "text:own"}) == 0
    assert rewards(tmp_path / "cached") != rewards(plain)
    plain_first, cached = (read_metrics(path / "metrics.jsonl")[0] for path in (plain, tmp_path / "cached"))
    # what the policy draws and what its images score is the same to the bit
    assert all(cached[key] == plain_first[key] for key in ("reward", "nfe/lookahead"))


def test_copy_and_cache_together_under_guidance(train: Any, tmp_path: Path) -> None:
    options = {"lookahead.copy_dtype": "bfloat16", "lookahead.cache": "text:own", "lookahead.guidance": "cond_only"}
    assert train(tmp_path / "run", **RUN, **NODES, **options, **{"sampler.guidance_scale": 2.0}) == 0
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == 2


@pytest.mark.parametrize(
    ("form", "words"),
    [
        ("none", "expected text:own, or null for no cache, got none"),
        *((form, f"{form} was removed: ") for form in ("text", "text+reuse:2-5", "reuse:2-5", "skip:1")),
    ],
)
def test_a_cache_that_cannot_be_is_refused(
    train: Any, tmp_path: Path, form: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", **NODES, **{"sampler.num_steps": 4, "lookahead.cache": form}) == 2
    assert f"lookahead.cache: {words}" in capsys.readouterr().err


def test_fidelity_measures_it_beside_its_plan(train: Any, tmp_path: Path) -> None:
    out = tmp_path / "fidelity.json"
    arguments = ["--plans", "nodes:2", "--copy-dtype", "bfloat16", "float32", "--cache", "text:own"]
    arguments += ["--json", str(out), *small(train)]
    assert fidelity(arguments) == 0
    found = json.loads(out.read_text())["plans"]

    def named(extras: str) -> dict[str, Any]:
        return found[f"nodes{{2}}{extras}/full/preview"]

    # the ceiling, the plan, two copies of the model, and either with the rollout's text
    assert len(found) == 2 + 2 + 2
    for dtype in ("bfloat16", "float32"):
        records = (named(""), named(f"+copy({dtype})"), named(f"+copy({dtype})+cache(text:own)"))
        # a copy has its adapter merged; what is reused need not be computed
        ratios = [record["iteration_flops_ratio"] for record in records]
        assert ratios == sorted(ratios, reverse=True) and len(set(ratios)) == 3
        assert records[1]["pooled_gains"] != records[2]["pooled_gains"]
        assert [record["copy"] for record in records] == [None, dtype, dtype]
        assert [record["cache"] for record in records] == [None, None, "text:own"]
    exact = named("+copy(float32)")["pooled_gains"]
    assert exact == pytest.approx(named("")["pooled_gains"], abs=1e-3) != named("+copy(bfloat16)")["pooled_gains"]


def small(train: Any) -> list[str]:
    """Options of a small fidelity run on the pipeline that tests train."""
    own = ["--groups=2", "--group-size=4", f"--model.path={train.model}", "--sampler.num_steps=4", "--lora.rank=2"]
    own += ["--lookahead.decoder=preview", "--lookahead.plan=exact", "--reward.terms={jpeg_incompressibility: 1.0}"]
    return own
