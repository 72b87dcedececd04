"""The comparison of runs: paired intervals, costs, and a page of its own, from run directories alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from densegrpo_fast.compare import main
from densegrpo_fast.run_files.comparison import compare_runs, cost_to
from densegrpo_fast.run_files.run_data import read_run

Fill = Callable[..., Path]


@pytest.fixture
def runs(tmp_path: Path, fill_run: Fill) -> list[Path]:
    """Two runs whose last evaluations differ by .1 in prompt 0 and by .3 in prompt 1."""
    first, second = (fill_run(tmp_path / name) for name in ("a <b>", "b"))
    edit(second / "evaluation-after.json", {"reward": [[0.6, 1.0], [0.8, None]]})
    return [first, second]


def edit(path: Path, scores: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"scores": scores}))


def fails(arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == code and words in capsys.readouterr().err


def test_runs_are_compared_prompt_by_prompt(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / "out.json", tmp_path / "out.html"]
    assert main([*map(str, runs), "--json", str(files[0]), "--html", str(files[1])]) == 0
    text, found = capsys.readouterr().out, json.loads(files[0].read_text())
    (change,) = found["differences"]
    assert (change["first"], change["second"]) == tuple(map(str, runs)) and change["mean"] == pytest.approx(0.2)
    assert "+0.2000" in text and "no difference shown" in text
    assert all(about["evaluated"] == 40 and about["finished"] for about in found["runs"].values())
    page = files[1].read_text()
    assert "a &lt;b&gt;" in page and "a <b>" not in page and "http:" not in page and "https:" not in page
    # two prompts with a picture before and one after each run; the last scores of the first ones
    assert page.count('<img alt="before training') == 2 and page.count("<img") == 6
    assert ">0.500</span>" in page and ">0.600</span>" in page


def test_the_cost_to_a_reward_lies_on_the_line_between_evaluations(runs: list[Path]) -> None:
    found = compare_runs({run.name: read_run(run) for run in runs}, reward=0.78)
    # the means of b: .75 before, .675 at iteration 20, .8 at 40; a never gets there
    spent = found["cost"]["runs"]["b"]
    assert found["cost"]["runs"]["a <b>"] is None and spent["iterations"] == pytest.approx(20 + 20 * 0.105 / 0.125)
    times = [sum(v for k, v in record.items() if k.startswith("time/")) for record in read_run(runs[1]).records]
    assert sum(times[:20]) < spent["seconds"] < sum(times) and spent["gflop"] is None
    # a never rises above its start, so all of them reach no higher reward than that
    assert compare_runs({run.name: read_run(run) for run in runs})["cost"] is None
    curve = found["curves"]["b"]
    assert cost_to(curve, curve[-1]["mean"]) == {name: curve[-1][name] for name in spent}


def test_runs_of_other_lengths_are_compared_with_a_note(runs: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    edit(runs[0] / "evaluation-after.json", {"reward": [[0.9, 1.0], [0.8, 0.9]]})
    assert compare_runs({run.name: read_run(run) for run in runs})["notes"] == []
    document = json.loads((runs[1] / "evaluation-after.json").read_text())
    for run, length in zip(runs, (20, 40), strict=True):
        (run / "evaluation-after.json").write_text(json.dumps(document | {"iteration": length}))
    assert main([*map(str, runs)]) == 0
    assert "the runs differ in length" in capsys.readouterr().out


def test_runs_of_different_rewards_are_compared_by_what_they_share(
    runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = runs[1] / "config.yaml"
    config.write_text(config.read_text().replace("alert(1)", "alert(2)"))
    fails([*map(str, runs)], 2, "no reward in common", capsys)
    for run in runs:
        for path in run.glob("evaluation-*.json"):
            scores = json.loads(path.read_text())["scores"]
            edit(path, scores | {"strict": [[0.0, 0.0], [1.0, 1.0]]})
    assert main([*map(str, runs)]) == 0
    text = capsys.readouterr().out
    assert "Cost to a held-out" not in text and "strict" in text and "reward.terms" in text


def test_what_cannot_be_compared_is_refused(
    runs: list[Path], tmp_path: Path, fill_run: Fill, capsys: pytest.CaptureFixture[str]
) -> None:
    fails([str(runs[0])], 2, "at least two different", capsys)
    fails([str(runs[0]), f"{runs[0]}/."], 2, "at least two different", capsys)
    fails([str(runs[0]), str(tmp_path / "none")], 3, "there is no run here", capsys)
    young = fill_run(tmp_path / "young", done=3, times=())
    fails([str(runs[0]), str(young)], 2, "no held-out evaluation yet", capsys)
    edit(runs[1] / "evaluation-after.json", {"reward": [[0.6], [0.8]]})
    fails([*map(str, runs)], 2, "cannot be compared prompt by prompt", capsys)
    fails([*map(str, runs), "--reward", "nan"], 2, "--reward: expected a finite number", capsys)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("config.yaml", "run: {}\n", "run.iterations"),
        ("metrics.jsonl", '{"iteration": 1}\n{}\n', "line 2"),
        ("evaluation-after.json", '{"iteration": "x", "prompts": ["a"], "scores": {"reward": [[1]]}}', "whole number"),
        ("evaluation-after.json", '{"iteration": 1, "prompts": ["a"], "scores": {}}', "scores of every prompt"),
        ("evaluation-after.json", '{"iteration": 1, "prompts": ["a"], "scores": {"reward": []}}', "every prompt"),
    ],
)
def test_a_damaged_file_is_named(
    runs: list[Path], file: str, text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (runs[1] / file).write_text(text)
    with pytest.raises(SystemExit) as stop:
        main([*map(str, runs)])
    message = capsys.readouterr().err
    assert stop.value.code == 3 and str(runs[1] / file) in message and words in message
