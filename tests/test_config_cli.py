"""The command line of the configuration: what it prints, instantly, and how commands share it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.config import options
from densegrpo_fast.config.cli import parse_arguments, split_overrides
from densegrpo_fast.config.yaml_files import preset_names


def run_cli(*argv: str) -> subprocess.CompletedProcess[str]:
    script = (
        "import sys\n"
        "from densegrpo_fast.common.exit_codes import user_errors_exit\n"
        "from densegrpo_fast.config.cli import parse_arguments\n"
        "try:\n"
        "    with user_errors_exit():\n"
        "        parse_arguments(sys.argv[1:])\n"
        "finally:\n"
        "    assert not {'torch', 'numpy', 'diffusers'} & set(sys.modules), 'heavy import'\n"
    )
    root = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.run(
        [sys.executable, "-c", script, *argv], capture_output=True, text=True, timeout=60, env=environment
    )


def test_help_shows_every_option_without_importing_torch() -> None:
    result = run_cli("--help")
    assert (result.returncode, result.stderr) == (0, "")
    for key, option in options().items():
        assert f"  {key} = " in result.stdout
        assert option.description is not None and option.description in result.stdout


def test_print_config_prints_what_reads_back_the_same(tmp_path: Path) -> None:
    result = run_cli("--config", "embedded_paper", "--print-config", "seed=9")
    assert (result.returncode, result.stderr) == (0, "")
    (tmp_path / "c.yaml").write_text(result.stdout)
    again, expected = (["--config", str(tmp_path / "c.yaml")], ["--config=embedded_paper", "seed=9"])
    assert parse_arguments(again)[0] == parse_arguments(expected)[0]


def test_list_presets_says_what_each_is_for(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_arguments(["--list-presets"])
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == preset_names()
    assert all(len(line.split()) > 5 for line in lines)


def test_a_mistake_exits_with_2_and_no_traceback() -> None:
    result = run_cli("--sampler.group_sise", "8")
    assert result.returncode == 2
    assert result.stdout == ""
    expected = 'error: unknown option "sampler.group_sise"; did you mean "sampler.group_size"?\n'
    assert result.stderr == expected


def test_a_command_tells_its_arguments_from_the_configurations() -> None:
    own, overrides = split_overrides(
        ["a prompt", "--seeds", "0-3", "--sampler.num_steps", "6", "model.path=x", "--run.overwrite", "a.b=c", "v1.5"]
    )
    assert own == ["a prompt", "--seeds", "0-3", "a.b=c", "v1.5"]
    assert overrides == ["sampler.num_steps=6", "model.path=x", "run.overwrite=true"]
    assert split_overrides(["x", "--", "--run.overwrite"]) == (["x", "--", "--run.overwrite"], [])


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--sampler.num_stps", "6"], 'did you mean "sampler.num_steps"'),
        (["--sampler.num_steps"], "--sampler.num_steps needs a value"),
    ],
)
def test_a_command_refuses_wrong_options_of_the_configuration(argv: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        split_overrides(argv)
    assert exit_code_of(caught.value) == ExitCode.USAGE
