"""The study of completion heads: what it asks of the commands, what it keeps, and that it goes on where it was."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benches"))

import head_study  # noqa: E402
from head_study import KEPT, Commands, Study, conduct, head_file, summary  # noqa: E402

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of


def study(**changes: Any) -> Study:
    options: dict[str, Any] = {
        "config": "embedded_dense",
        "plans": ("one_step", "nodes:2,4"),
        "trajectories": (8, 16),
        "steps": 5,
        "iterations": 4,
        "every": 2,
        "monitor_every": 1,
        "refresh": 3,
        "groups": 2,
        "group_size": 4,
    }
    return Study(**options | changes)


class FakeCommands:
    """Commands that only write what they are asked for; a fidelity is the number of the call."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, list[str]]] = []
        self.fails = ""

    def all(self) -> Commands:
        return Commands(self.completion, self.fidelity, self.train)

    def completion(self, arguments: Sequence[str]) -> int:
        return self.called("completion", arguments)

    def train(self, arguments: Sequence[str]) -> int:
        self.of(list(arguments), "--run.output_dir").mkdir(exist_ok=True)
        return self.called("train", arguments)

    def fidelity(self, arguments: Sequence[str]) -> int:
        number = len(self.calls)
        records = {
            name: {"head": head} | dict.fromkeys(KEPT, number + 0.5 * head) for name, head in (("a", 0), ("b", 1))
        }
        self.of(list(arguments), "--json").write_text(json.dumps({"plans": records}))
        return self.called("fidelity", arguments)

    def called(self, name: str, arguments: Sequence[str]) -> int:
        self.calls.append((name, list(arguments)))
        return int(ExitCode.REWARD if name == self.fails else ExitCode.OK)

    @staticmethod
    def of(arguments: list[str], option: str) -> Path:
        return Path(arguments[arguments.index(option) + 1])


def test_heads_then_a_run_with_the_last_plans_best_taught_head(tmp_path: Path) -> None:
    fake, output = FakeCommands(), tmp_path / "study.json"
    document = conduct(study(), tmp_path / "work", output, fake.all())
    names = [name for name, _ in fake.calls]
    # two plans, two heads of each; at iteration 0 both heads are judged; then two parts of a run
    assert names == ["completion", "fidelity"] * 4 + ["fidelity"] * 2 + ["train", "fidelity", "fidelity"] * 2
    assert [(record["plan"], record["trajectories"]) for record in document["data"]] == [
        ("one_step", 8),
        ("one_step", 16),
        ("nodes:2,4", 8),
        ("nodes:2,4", 16),
    ]
    assert [record["iteration"] for record in document["run"]] == [0, 2, 4]
    # the second call judges the first head
    assert document["data"][0]["without"]["spearman_gains_mean"] == 1
    assert document["data"][0]["with"]["spearman_gains_mean"] == 1.5
    taught = fake.calls[4][1]
    assert taught[taught.index("--lookahead.plan") + 1 :][:3] == ["nodes", "--lookahead.nodes", "[2,4]"]
    first, second = (arguments for name, arguments in fake.calls if name == "train")
    assert "--resume" not in first and second[-1] == "--resume"
    assert FakeCommands.of(second, "--run.iterations") == Path("4")
    best = head_file(tmp_path / "work", "nodes:2,4", 16)
    assert FakeCommands.of(second, "--lookahead.head") == best
    kept, refreshed = (arguments for _, arguments in fake.calls[-2:])
    assert FakeCommands.of(kept, "--head") == best
    assert FakeCommands.of(refreshed, "--head") == tmp_path / "work" / "run" / "completion_head.safetensors"
    assert FakeCommands.of(kept, "--adapter") == tmp_path / "work" / "run" / "adapter"
    lines = summary(document).splitlines()
    assert len(lines) == 4 * 2 + 3 * 3 and lines[0].startswith("one_step, without head of 8 trajectories: rewards_mean")
    written = json.loads(output.read_text())
    assert written["run"] == document["run"] and {"command", "commit", "hardware"} <= written.keys()


def test_a_study_goes_on_where_it_was(tmp_path: Path) -> None:
    output = tmp_path / "study.json"
    stopped = FakeCommands()
    stopped.fails = "train"
    with pytest.raises(UserError, match="train ended with exit code 5") as caught:
        conduct(study(), tmp_path / "work", output, stopped.all())
    assert exit_code_of(caught.value) == ExitCode.REWARD
    rest = FakeCommands()
    conduct(study(), tmp_path / "work", output, rest.all())
    assert [name for name, _ in rest.calls] == ["train", "fidelity", "fidelity"] * 2
    # what had begun is resumed
    assert rest.calls[0][1][-1] == "--resume"
    with pytest.raises(UserError, match="holds a study of other settings; give another --output"):
        conduct(study(steps=6), tmp_path / "work", output, rest.all())


def test_what_the_commands_are_told_they_understand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Options of the real commands, parsed by them, without any work."""
    from densegrpo_fast.config.cli import configuration, parse_arguments
    from densegrpo_fast.fidelity.options import parse

    fake = FakeCommands()
    conduct(study(), tmp_path / "work", tmp_path / "study.json", fake.all())
    for name, arguments in fake.calls:
        if name == "fidelity":
            assert parse(arguments)[0].plans is not None
        elif name == "train":
            with_head = [text for text in arguments if text != "--resume"]
            Path(with_head[with_head.index("--lookahead.head") + 1]).touch()
            assert parse_arguments(with_head)[0].lookahead.head_refresh == 3
        else:
            assert configuration(arguments[6:]).lookahead.plan in ("one_step", "nodes")
    assert head_study._parser().parse_args([]).plans == ["one_step", "nodes:4"]
