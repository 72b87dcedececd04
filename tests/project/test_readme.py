"""What README shows in Python, and its first commands, run as they stand, with small settings."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from densegrpo_fast.config.yaml_files import parse_yaml
from densegrpo_fast.train import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(page: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


def small(train: Any, directory: Path) -> dict[str, Any]:
    """The test suite's small settings, as overrides by key."""
    settings = {**train.SETTINGS, "model.path": str(train.model), "run.output_dir": str(directory)}
    settings["objective.trained_steps"] = "all_but_last"
    return {key: parse_yaml(value, key) if isinstance(value, str) else value for key, value in settings.items()}


def test_a_reward_of_one_s_own(train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (reward,) = (block for block in blocks(README, "python") if block.startswith("# mine.py"))
    (command,) = (block for block in blocks(README, "bash") if "mine.py:reward" in block)
    (tmp_path / "mine.py").write_text(reward)
    monkeypatch.chdir(tmp_path)
    program, *arguments = shlex.split(command)[2:]
    assert program == "densegrpo_fast.train"
    settings = {k: v for k, v in train.SETTINGS.items() if k not in ("reward.terms", "run.iterations")}
    settings |= {"model.path": train.model, "run.output_dir": tmp_path / "run", "reward.observed": "[]"}
    # the command's own number of iterations is for a machine that trains, and the test's run directory is its own
    arguments[arguments.index("--run.iterations") + 1] = "1"
    where = arguments.index("--run.output_dir")
    del arguments[where : where + 2]
    options = [f"--{key}={value}" for key, value in settings.items()]
    assert main(["--config=embedded_dense", *arguments, *options]) == 0
    assert "mine.py" in (tmp_path / "run" / "config.yaml").read_text()
    assert (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize(
    "code",
    [block for block in blocks(README, "python") if "from densegrpo_fast import" in block],
)
def test_the_library(train: Any, tmp_path: Path, code: str, capsys: pytest.CaptureFixture[str]) -> None:
    import densegrpo_fast

    settings = small(train, tmp_path / "run")
    original = densegrpo_fast.load_config

    def shortened(source: str, overrides: dict[str, Any] | None = None) -> Any:
        known = {key: value for key, value in (overrides or {}).items() if key not in settings}
        return original(source, {**known, **settings})

    exec(
        code.replace("from densegrpo_fast import Trainer, load_config", "from densegrpo_fast import Trainer"),
        {"load_config": shortened},
    )
    assert "held-out reward" in capsys.readouterr().out
