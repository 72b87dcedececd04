"""The calibrate command on a random pipeline: what it writes, that training takes it, and what it refuses."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from densegrpo_fast.calibrate import main
from densegrpo_fast.calibration import report
from densegrpo_fast.calibration.rules import Limits, PrintedRule, Round, Signs
from densegrpo_fast.calibration.store import read_calibration
from densegrpo_fast.common.errors import UserError
from densegrpo_fast.flow.dynamics import STD_DEV, C, coefficients
from densegrpo_fast.flow.schedule import sd3_sigmas

pytestmark = pytest.mark.ci

STEPS = 3


def calibrate(model: Path, *arguments: object, **changes: object) -> int:
    """Run the command with settings that take a moment, changed by `section__key`."""
    settings = {
        "model.path": model,
        "data.num_prompts": 2,
        "sampler.group_size": 2,
        "sampler.num_steps": STEPS,
        "sampler.micro_batch": 4,
        "sampler.noise_level": 0.7,
        "sampler.dynamics": "flow_sde",
        "window.schedule": "none",
        "window.size": "null",
        "lookahead.decoder": "preview",
        "reward.terms": "{jpeg_incompressibility: 1.0}",
        "lora.rank": 2,
        "lora.alpha": 4,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    try:
        return main([*map(str, arguments), *(f"--{key}={value}" for key, value in settings.items())])
    except SystemExit as stop:
        return int(stop.code or 0)


@pytest.fixture(scope="module")
def calibrated(pipeline_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a calibration of eight samples, levels.json and levels.png."""
    directory = tmp_path_factory.mktemp("calibration")
    names = ("--output", directory / "levels.json", "--plot", directory / "levels.png")
    assert calibrate(pipeline_directory, *names, "--samples=8", "--rounds=5", "--branches=4") == 0
    return directory


def test_the_file_holds_levels_schedule_and_evidence(calibrated: Path, pipeline_directory: Path) -> None:
    text = (calibrated / "levels.json").read_text()
    made = json.loads(text)
    assert made["dynamics"] == "flow_sde" and made["num_steps"] == STEPS
    assert len(made["sigmas"]) == STEPS + 1 and made["sigmas"][0] == 1.0 and made["sigmas"][-1] == 0.0
    assert made["noise_level"] == made["after"]["noise_level"] and len(made["noise_level"]) == STEPS
    assert all(0.1 <= level <= 1.0 for level in made["noise_level"])
    assert made["rule"]["name"] == "staircase" and 1 <= len(made["rounds"]) <= 5
    for measured in (*made["rounds"], made["before"], made["after"]):
        counts = zip(*(measured[key] for key in ("positive", "negative", "ties", "missing")), strict=True)
        assert [sum(step) for step in counts] == [8] * STEPS
    assert made["before"]["noise_level"] == [0.7] * STEPS
    gains = made["before"]["gains"]
    assert [Signs.of(step).positive for step in gains] == made["before"]["positive"]
    # one state for every four of the eight samples
    assert made["after"]["consistency"]["states"] == [2] * STEPS
    assert {"torch", "python"} <= made["versions"].keys() and "commit" in made
    # no directory of this machine
    assert made["settings"]["model"] == pipeline_directory.name
    assert str(pipeline_directory.parent) not in text and str(calibrated) not in text
    assert (calibrated / "levels.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_command_finds_the_same(calibrated: Path, pipeline_directory: Path, tmp_path: Path) -> None:
    output = tmp_path / "again.json"
    assert calibrate(pipeline_directory, "--output", output, "--samples=8", "--rounds=5", "--branches=0") == 0
    first, again = json.loads((calibrated / "levels.json").read_text()), json.loads(output.read_text())
    assert again["rounds"] == first["rounds"] and again["noise_level"] == first["noise_level"]
    assert again["before"]["gains"] == first["before"]["gains"] and again["before"]["consistency"] is None


@pytest.mark.parametrize("branches", [False, True])
def test_noise_is_where_training_has_it(pipeline_directory: Path, tmp_path: Path, capsys: Any, branches: bool) -> None:
    """In the windows' steps alone, from trajectories or from noise-free ones; the file says which."""
    window = {"window__schedule": "random", "window__size": 1, "window__first": 1, "sampler__num_steps": 4}
    if branches:
        window |= {"sampler__branches": 2, "sampler__micro_batch": 2, "credit__method": "branch"}
    output = tmp_path / "levels.json"
    arguments = ("--output", output, "--plot", tmp_path / "levels.png", "--samples=8", "--rounds=4", "--branches=2")
    assert calibrate(pipeline_directory, *arguments, **window) == 0
    made = json.loads(output.read_text())
    assert made["steps"] == [1, 2] and made["settings"]["drawn"] == ("branches" if branches else "trajectories")
    assert made["before"]["noise_level"] == [0.0, 0.7, 0.7, 0.0]
    assert made["noise_level"][0] == made["noise_level"][3] == 0 and min(made["noise_level"][1:3]) >= 0.1
    for step, gains in enumerate(made["before"]["gains"]):
        assert any(gains) == (step in (1, 2))
    own = made["before"]["consistency"]["own"]
    assert own[0] == own[3] == 0 and own[1] > 0 and own[2] > 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown[1:3]] == ["1", "2"] and not shown[3]


def test_training_takes_the_file_and_goes_on_without_it(
    calibrated: Path, train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    levels, run = tmp_path / "levels.json", tmp_path / "run"
    levels.write_text((calibrated / "levels.json").read_text())
    sampler = {"sampler.dynamics": "flow_sde", "sampler.num_steps": STEPS, "evaluation.every": 0}
    assert train(run, **sampler, **{"sampler.calibration": levels, "run.iterations": 1}) == 0
    stored = (run / "config.yaml").read_text()
    assert f"noise_level: {json.loads(levels.read_text())['noise_level']}" in stored
    assert "calibration: null" in stored
    levels.unlink()
    from densegrpo_fast.train import main as train_main

    assert train_main([f"--resume={run}", "--run.iterations=2"]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    capsys.readouterr()
    made = json.loads((calibrated / "levels.json").read_text())
    levels.write_text(json.dumps(made | {"steps": [0, 1]}))
    assert train(tmp_path / "refused", **sampler, **{"sampler.calibration": levels}) == 2
    assert "is damaged, or was changed by hand" in capsys.readouterr().err
    del made["sha256"]
    levels.write_text(json.dumps(made | {"steps": [0, 1]}))
    wrong = [
        ({"sampler.num_steps": 4}, calibrated / "levels.json", "was made for 3 steps, sampler.num_steps is 4"),
        ({"sampler.dynamics": "cps"}, calibrated / "levels.json", "was made for dynamics flow_sde"),
        ({}, levels, "was made with noise in the steps [0, 1], this run may have it in [0, 1, 2]"),
    ]
    # all of which is told before the model is looked for
    for other, path, expected in wrong:
        options = sampler | other | {"sampler.calibration": path, "model.path": tmp_path / "no_model"}
        assert train(tmp_path / "refused", **options) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    # the sigmas are the model's
    levels.write_text(json.dumps(made | {"sigmas": [1.0, 0.9, 0.5, 0.0]}))
    assert train(tmp_path / "refused", **sampler, **{"sampler.calibration": levels}) == 2
    assert "was made for another schedule: its sigma 1 is 0.9, this model's" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["--output=levels.json", "--resume"], 2, "--resume and --dry-run"),
        (["--output=nowhere/levels.json"], 7, "--output: there is no directory nowhere"),
        (["--output=levels.json", "--plot=nowhere/levels.png"], 7, "--plot: there is no directory nowhere"),
        (["--output=levels.json", "--rule=printed", "--share=0.2"], 2, "--share: not an option of the printed rule"),
        (["--output=levels.json", "--samples=7"], 2, "--samples must be at least 8"),
        (["--output=levels.json", "--lowest=0.8", "--highest=0.5"], 2, "lowest <= highest"),
        (["--output=levels.json", "--highest=4"], 2, "--highest must be at most 3"),
        (["--output=levels.json", "--first=0.01"], 2, "resolution <= first"),
        (["--output=levels.json", "--branches=1"], 2, "expected 0 or at least 2, got 1"),
        (["--output=levels.json", "--sampler.noise_levle=1"], 2, "sampler.noise_level"),
        ([], 2, "--output"),
    ],
)
def test_refusals(
    arguments: list[str], code: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert calibrate(tmp_path / "no_model", *arguments) == code
    assert expected in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dynamics", "meaning"), [("flow_sde", "a, sigma_t = a sqrt(t / (1 - t))"), ("dance", "sigma_t")]
)
def test_a_calibration_says_what_its_levels_mean(
    pipeline_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], dynamics: str, meaning: str
) -> None:
    output = tmp_path / "levels.json"
    arguments = ("--output", output, "--plot", tmp_path / "levels.png", "--samples=8", "--rounds=2", "--branches=0")
    assert calibrate(pipeline_directory, *arguments, sampler__dynamics=dynamics) == 0
    made = json.loads(output.read_text())
    assert made["dynamics"] == dynamics and made["noise_level_is"] == meaning
    shown = capsys.readouterr().out
    assert f"before and after: {meaning}\n" in shown and report.noise_label(made).endswith(meaning)
    for when in ("before", "after"):
        state = made[when]
        table = coefficients(torch.tensor(made["sigmas"]), state["noise_level"], dynamics).table
        assert state["sigma_t"] == pytest.approx(table[:, STD_DEV].tolist(), rel=1e-5)
        assert state["injected_std"] == pytest.approx(table[:, C].tolist(), rel=1e-5)
        if dynamics == "dance":
            assert state["sigma_t"] == pytest.approx(state["noise_level"], rel=1e-5)
    # training takes it for these dynamics alone
    sampler = read_calibration(output)
    sampler.check_sampler(STEPS, dynamics, made["steps"])
    with pytest.raises(UserError, match=f"was made for dynamics {dynamics}, sampler.dynamics is"):
        sampler.check_sampler(STEPS, "dance" if dynamics == "flow_sde" else "flow_sde", made["steps"])


def test_a_step_of_a_level_is_another_step_of_sigma_t_at_each_step() -> None:
    """.01 of a, on SD3's grid of ten steps: .050 of sigma_t at the first step and .006 at label 2, the last but one."""
    moved = [coefficients(sd3_sigmas(10, shift=3.0), level, "flow_sde").table[:, STD_DEV] for level in (0.7, 0.71)]
    change = (moved[1] - moved[0]).tolist()
    assert [round(change[step], 3) for step in (0, 8)] == [0.050, 0.006]
    literal = [coefficients(sd3_sigmas(10, shift=3.0), level, "dance").table[:, STD_DEV] for level in (0.7, 0.71)]
    assert (literal[1] - literal[0]).tolist() == pytest.approx([0.01] * 10, rel=1e-5)


def test_options_are_parsed_without_torch() -> None:
    code = "import sys, densegrpo_fast.calibrate; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


def test_what_is_shown() -> None:
    noise = [0.5, 0.25], [1.0, 0.75, 0.5]
    before = report.state_record(Round((0.7, 0.7), [[-1.0] * 9 + [1.0], [1.0, -1.0, 0.0, float("nan")]]), None, *noise)
    after = report.state_record(Round((0.3, 0.7), [[-1.0] * 5 + [1.0] * 5, [1.0, -1.0, 0.0, 0.0]]), None, *noise)
    rule = PrintedRule([0.3, 0.7], Limits(0, 3))
    sampler = {"dynamics": "flow_sde", "num_steps": 2, "steps": [0, 1], "sigmas": [1.0, 0.75, 0.5]}
    content = report.document(rule, sampler, [], before, after, {})
    # nine against one of ten: 8 > 2 sqrt(10) = 6.3
    assert "steps out of balance: before 0; after none" in report.summary(content)
    lines = report.table(content).splitlines()
    # .5 over the root of .25
    shown = "0 1.0000 0.70 0.30 1.000 1.000 0.500 0.500 1 9 0 5 5 0 -0.80* +0.00 - - - - - -"
    assert lines[1].split() == shown.split()
    # what the step's own noise makes of its gains: share, per unit of noise, mirror; before alone
    parts = {"own_share": [0.25, math.nan], "sensitivity": [1.5, math.nan], "mirror": [-0.9, math.nan]}
    told = report.table(content | {"before": before | {"consistency": parts}}).splitlines()
    assert told[0].endswith("own  after  per noise  after  mirror  after")
    assert told[1].split()[-6:] == ["0.25", "-", "1.50", "-", "-0.90", "-"]
    # a step that was not calibrated is left out
    (_, only) = report.table(content | {"steps": [1]}).splitlines()
    assert only.split()[:4] == ["1", "0.7500", "0.70", "0.70"]
    assert before["mean_gain"] == [-0.8, 0.0] and before["std_gain"][0] == pytest.approx(0.6)
    assert before["missing"] == [0, 1] and before["ties"] == [0, 1]
