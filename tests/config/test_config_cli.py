"""The command line of the configuration: what it prints, instantly, and how commands share it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from densegrpo_fast.common.errors import UsageError, UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.config import options
from densegrpo_fast.config.cli import load_config, parse_arguments, split_overrides
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
    root = Path(__file__).resolve().parents[2]
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


def test_an_automatic_micro_batch_divides_what_an_update_trains_on() -> None:
    for overrides, rows in (
        ({}, 6),
        ({"data.num_prompts": 5}, 5),
        ({"data.num_prompts": 67}, 1),
        ({"data.num_prompts": 16, "sampler.group_size": 64}, 64),
        ({"optimizer.updates_per_iteration": 2}, 3),
        ({"sampler.micro_batch": 2}, 2),
    ):
        assert load_config("embedded_branched", {"sampler.micro_batch": "auto"} | overrides).sampler.micro_batch == rows
    for wrong in ({"data.num_prompts": 0}, {"sampler.group_size": "many"}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            load_config("embedded_branched", wrong)


def test_rewards_of_a_preset_are_observed_with_its_own_rewards_and_prompts_alone(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("extends: embedded_branched\nreward: {terms: {jpeg_compressibility: 1.0}}\n")
    assert load_config().reward.observed == ["scenes_strict"]
    assert load_config(own).reward.observed == []
    prompts = {"data.eval_prompts": "general"}
    assert load_config("embedded_branched", prompts).reward.observed == []
    assert load_config("embedded_branched", prompts | {"reward.observed": ["scenes"]}).reward.observed == ["scenes"]
    own.write_text("extends: embedded_branched\nreward: {observed: [scenes]}\n")
    assert load_config(own, prompts).reward.observed == ["scenes"], "what a file asks for stays"
    assert parse_arguments(["reward.terms={jpeg_compressibility: 1.0}"])[0].reward.observed == []


def test_a_credit_method_that_does_not_fit_names_presets_that_do() -> None:
    with pytest.raises(UsageError, match=r"; presets with credit.method sparse: embedded_sparse, "):
        parse_arguments(["credit.method=sparse"])
    with pytest.raises(UsageError) as error:
        parse_arguments(["sampler.branches=1"])
    assert "presets with" not in str(error.value)
