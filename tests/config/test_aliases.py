"""Old names of options and metrics are read, with a warning; what is stored means what it meant, also by omission; an
option that is gone may stand where it has no effect."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from densegrpo_fast.common.aliases import ADDED, OPTIONS, REMOVED, current_settings
from densegrpo_fast.common.errors import CheckpointError, UsageError
from densegrpo_fast.config.cli import load_config, parse_arguments, split_overrides
from densegrpo_fast.config.schema import Config, options
from densegrpo_fast.config.yaml_files import dump_yaml
from densegrpo_fast.run_files.checkpoint import CheckpointManager, newest_settings
from densegrpo_fast.run_files.metrics import read_metrics


def test_every_old_name_leads_to_an_option() -> None:
    assert set(OPTIONS.values()) <= set(options())
    assert not {*OPTIONS, *REMOVED} & set(options())


@pytest.mark.parametrize("form", [["--lookahead.guard_every", "7"], ["lookahead.guard_every=7"]])
def test_an_old_option_on_the_command_line(form: list[str], caplog: pytest.LogCaptureFixture) -> None:
    config, _ = parse_arguments(form)
    assert config.lookahead.monitor_every == 7
    assert "lookahead.guard_every is now called lookahead.monitor_every" in caplog.text
    assert split_overrides([*form, "file.png"])[0] == ["file.png"]


def test_an_old_option_in_a_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("lookahead:\n  guard_alarm: 0.25\n")
    config, _ = parse_arguments(["--config", str(path)])
    assert config.lookahead.monitor_alarm == 0.25
    assert str(path) in caplog.text


def test_both_names_of_one_option_are_refused(tmp_path: Path) -> None:
    expected = "lookahead.guard_every and lookahead.monitor_every are two names of one option"
    path = tmp_path / "mine.yaml"
    path.write_text("lookahead:\n  guard_every: 1\n  monitor_every: 1\n")
    with pytest.raises(UsageError, match=f"mine.yaml: {expected}"):
        load_config(path)
    with pytest.raises(UsageError, match=expected):
        current_settings({"lookahead": {"guard_every": 1, "monitor_every": 2}})
    with pytest.raises(UsageError, match=expected):
        load_config(overrides={"lookahead.guard_every": 1, "lookahead.monitor_every": 2})
    with pytest.raises(UsageError, match="lookahead.monitor_every is given twice"):
        parse_arguments(["lookahead.guard_every=1", "lookahead.monitor_every=2"])


def test_a_checkpoint_with_old_names_is_continued(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    tensors = {"adapter": {"weight": torch.ones(1)}}
    CheckpointManager(tmp_path, 1, {"lookahead": {"guard_every": 3, "guard_alarm": 0.5}}).save(1, tensors, {})
    manager = CheckpointManager(tmp_path, 1, {"lookahead": {"monitor_every": 3, "monitor_alarm": 0.5}})
    assert manager.load_latest().step == 1
    assert not caplog.records


@pytest.mark.parametrize(("factor", "stored", "continues"), [(1.0, 1.0, True), (0.0, None, True), (0.0, 1.0, False)])
def test_a_checkpoint_from_before_closeness_is_continued(
    tmp_path: Path, factor: float, stored: float | None, continues: bool
) -> None:
    """And a threshold counts where branches are held back, alone."""
    config, _ = parse_arguments([f"objective.negative_factor={factor}"])
    now = config.resume_settings()
    old = {**now, "objective": {**now["objective"], "negative_threshold": stored}}
    old["credit"] = {key: value for key, value in now["credit"].items() if key != "closeness"}
    CheckpointManager(tmp_path, 1, old).save(1, {"adapter": {"weight": torch.ones(1)}}, {})
    manager = CheckpointManager(tmp_path, 1, now)
    if continues:
        assert manager.load_latest().step == 1
    else:
        with pytest.raises(CheckpointError, match="negative_threshold: 1.0 in the checkpoint, null now"):
            manager.load_latest()


def test_an_unfinished_run_with_old_names_can_be_looked_at(tmp_path: Path) -> None:
    assert newest_settings(tmp_path) is None
    tensors = {"adapter": {"weight": torch.ones(1)}}
    CheckpointManager(tmp_path, 1, {"lookahead": {"guard_every": 3}}).save(1, tensors, {})
    settings = newest_settings(tmp_path)
    assert settings == {"lookahead": {"monitor_every": 3}}
    assert CheckpointManager(tmp_path, 1, settings).load_latest().step == 1


GUIDED = {"sampler.guidance_scale": 4.5}


def stored_before(config: Config, key: str) -> dict[str, Any]:
    """What a checkpoint of before an option held."""
    settings = config.resume_settings()
    section, name = key.split(".")
    del settings[section][name]
    return settings


@pytest.mark.parametrize("key", ADDED)
def test_an_option_that_an_old_runs_configuration_lacks_has_its_old_meaning(tmp_path: Path, key: str) -> None:
    section, name = key.split(".")
    path = tmp_path / "config.yaml"
    lines = dump_yaml(load_config("embedded_dense")).splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(f"  {name}:")))
    assert getattr(getattr(load_config(path), section), name) == ADDED[key]
    # what extends a preset or gives a few options goes by the preset
    now = getattr(getattr(load_config("embedded_dense"), section), name)
    for text in ("extends: embedded_paper\n", "", f"{section}:\n"):
        path.write_text(text)
        assert getattr(getattr(load_config(path), section), name) == now


def test_an_old_checkpoint_goes_on_with_the_guidance_gradient_that_it_had(tmp_path: Path) -> None:
    key, tensors = "objective.guidance_gradient", {"adapter": {"weight": torch.ones(1)}}
    old = load_config("embedded_dense", {**GUIDED, key: "conditional"})
    CheckpointManager(tmp_path, 1, stored_before(old, key)).save(1, tensors, {})
    assert CheckpointManager(tmp_path, 1, old.resume_settings()).load_latest().step == 1
    full = load_config("embedded_dense", GUIDED)
    with pytest.raises(CheckpointError, match=rf"{key}.*conditional.*full"):
        CheckpointManager(tmp_path, 1, full.resume_settings()).load_latest()


def test_without_guidance_an_old_checkpoint_goes_on_under_either(tmp_path: Path) -> None:
    key, config = "objective.guidance_gradient", load_config("embedded_dense")
    assert (config.sampler.guidance_scale, config.objective.guidance_gradient) == (1.0, "full")
    CheckpointManager(tmp_path, 1, stored_before(config, key)).save(1, {"adapter": {"weight": torch.ones(1)}}, {})
    assert CheckpointManager(tmp_path, 1, config.resume_settings()).load_latest().step == 1


NEUTRAL = "lookahead:\n  head: null\n  head_refresh: 0\n"
GONE = r"completion heads were removed.*\.929 to \.939"


def test_an_option_that_is_gone_may_have_no_effect(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    now = load_config("embedded_dense")
    path = tmp_path / "config.yaml"
    path.write_text(dump_yaml(now).replace("lookahead:\n", NEUTRAL))
    assert load_config(path) == now
    path.write_text(f"preset: embedded_dense\nextends: embedded_dense\n{NEUTRAL}")
    assert load_config(path) == now
    assert load_config("embedded_dense", {"lookahead.head": None, "lookahead.head_refresh": 0}) == now
    for form in (["--lookahead.head", "null", "--lookahead.head_refresh=0"], ["lookahead.head=null"]):
        assert parse_arguments(["--config", "embedded_dense", *form])[0] == now
        assert split_overrides([*form, "file.png"])[0] == ["file.png"]
    settings = now.resume_settings()
    stored = {**settings, "lookahead": {**settings["lookahead"], "head": None, "head_refresh": 0}}
    CheckpointManager(tmp_path, 1, stored).save(1, {"adapter": {"weight": torch.ones(1)}}, {})
    assert CheckpointManager(tmp_path, 1, settings).load_latest().step == 1
    assert newest_settings(tmp_path) == settings
    assert not caplog.records


@pytest.mark.parametrize(("name", "value"), [("head", "head.safetensors"), ("head_refresh", 50)])
def test_an_option_that_is_gone_is_refused_by_name(tmp_path: Path, name: str, value: object) -> None:
    message = rf"lookahead\.{name} {value}: {GONE}"
    path = tmp_path / "mine.yaml"
    path.write_text(f"lookahead:\n  {name}: {value}\n")
    with pytest.raises(UsageError, match=rf"mine\.yaml: {message}"):
        load_config(path)
    with pytest.raises(UsageError, match=rf"command line: {message}"):
        parse_arguments([f"--lookahead.{name}", str(value)])
    with pytest.raises(UsageError, match=message):
        load_config("embedded_dense", {f"lookahead.{name}": value})
    settings = load_config("embedded_dense").resume_settings()
    stored = {**settings, "lookahead": {**settings["lookahead"], name: value}}
    CheckpointManager(tmp_path, 1, stored).save(1, {"adapter": {"weight": torch.ones(1)}}, {})
    with pytest.raises(CheckpointError, match=rf"step-00000001.*{message}"):
        CheckpointManager(tmp_path, 1, settings).load_latest()
    with pytest.raises(CheckpointError, match=message):
        newest_settings(tmp_path)


def test_old_metrics_are_read_under_their_new_names(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    record = {"iteration": 1, "guard/spearman_gains": 0.5, "time/guard": 1.0, "nfe_guided/guard": 4, "flops/guard": 2.0}
    path.write_text(json.dumps(record) + "\n")
    assert read_metrics(path) == [
        {
            "iteration": 1,
            "monitor/spearman_gains": 0.5,
            "time/monitor": 1.0,
            "nfe_guided/monitor": 4,
            "flops/monitor": 2.0,
        }
    ]
