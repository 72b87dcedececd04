"""What README shows in Python runs as it stands, with small settings; its commands: test_commands.py."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from densegrpo_fast.config.yaml_files import parse_yaml

pytestmark = pytest.mark.ci

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
