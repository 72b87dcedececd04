"""`densegrpo COMMAND`: every command is reached, with its own help and exit code."""

from __future__ import annotations

from typing import Any

import pytest

from densegrpo_fast import __version__
from densegrpo_fast.__main__ import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_reached(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert "usage:" in capsys.readouterr().out


def test_what_is_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    assert capsys.readouterr().out.count("densegrpo COMMAND --help") == 2
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"densegrpo-fast {__version__}\n"
    with pytest.raises(SystemExit) as stopped:
        main(["evalute"])
    assert stopped.value.code == 2
    assert "no command 'evalute'; did you mean \"evaluate\"?" in capsys.readouterr().err


def test_a_command_s_error_is_its_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--run.iteration", "3"])
    assert stopped.value.code == 2 and "run.iterations" in capsys.readouterr().err


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(name: str, *rest: Any) -> Any:
        raise ModuleNotFoundError("No module named 'pydantic'", name="pydantic")

    monkeypatch.setattr("densegrpo_fast.__main__.import_module", missing)
    with pytest.raises(SystemExit) as stopped:
        main(["train"])
    assert stopped.value.code == 3
    assert 'train needs pydantic: pip install "densegrpo-fast[train]"' in capsys.readouterr().err
