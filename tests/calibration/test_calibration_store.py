"""A calibration's file, and how a run takes it: what is refused, and what the run remembers of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from densegrpo_fast.calibration.store import FORMAT, read_calibration
from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.config.yaml_files import dump_yaml
from densegrpo_fast.flow.schedule import sd3_sigmas
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.training.models import check_calibration, tiny_config
from densegrpo_fast.training.schedule import Schedule

LEVELS = [0.5, 0.75, 0.3, 0.7]
WHOLE = {"format": FORMAT, "dynamics": "cps", "sigmas": [1, 0.5, 0], "noise_level": [0.5, 0.5]}


def write(path: Path, **changes: Any) -> Path:
    """A file for the four steps of flow_sde on SD3's grid."""
    content = {"format": FORMAT, "dynamics": "flow_sde", "sigmas": sd3_sigmas(4).tolist(), "noise_level": LEVELS}
    path.write_text(json.dumps(content | changes))
    return path


SAMPLER = ("--sampler.num_steps=4", "--sampler.dynamics=flow_sde", "--window.schedule=none", "--window.size=null")


def config(path: Path, *overrides: str) -> Config:
    """The last of several values of an option counts."""
    given = dict(option.split("=", 1) for option in (*SAMPLER, f"--sampler.calibration={path}", *overrides))
    return parse_arguments(["--config=embedded_dense", *(f"{key}={value}" for key, value in given.items())])[0]


def refused(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        config(path, *overrides)
    assert exit_code_of(caught.value) == ExitCode.USAGE
    message = str(caught.value)
    assert message.startswith("sampler.calibration: ") and path.name in message
    return message


def test_a_file_reads_back(tmp_path: Path) -> None:
    made = read_calibration(write(tmp_path / "levels.json"))
    assert made.num_steps == 4 and made.dynamics == "flow_sde"
    assert made.noise_level == tuple(LEVELS)
    made.check_sampler(4, "flow_sde", range(4))
    made.check_sigmas(sd3_sigmas(4).tolist())


def test_the_levels_replace_the_noise_level(tmp_path: Path, mixture_model: FlowModel) -> None:
    loaded = config(write(tmp_path / "levels.json"), "--sampler.noise_level=0.9")
    assert loaded.noise_levels == tuple(LEVELS)
    check_calibration(loaded, mixture_model)
    assert Schedule(loaded, mixture_model).coefficients().noise_level == tuple(LEVELS)


def test_a_run_remembers_the_levels_and_not_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "levels.json")
    calibrated = config(path)
    listed = parse_arguments(["--config=embedded_dense", *SAMPLER, f"--sampler.noise_level={LEVELS}"])[0]
    assert calibrated.fingerprint() == listed.fingerprint()
    stored = tmp_path / "config.yaml"
    stored.write_text(dump_yaml(calibrated.self_contained()))
    moved = path.rename(tmp_path / "moved.json")
    again = parse_arguments(["--config", str(stored)])[0]
    assert again.fingerprint() == calibrated.fingerprint() == config(moved).fingerprint()
    write(moved, noise_level=[0.5, 0.75, 0.3, 0.6])
    assert config(moved).fingerprint() != calibrated.fingerprint()


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("--sampler.num_steps=6", "was made for 4 steps, sampler.num_steps is 6"),
        ("--sampler.dynamics=cps", "was made for dynamics flow_sde, sampler.dynamics is cps"),
    ],
)
def test_another_sampler_is_refused(tmp_path: Path, override: str, expected: str) -> None:
    path = write(tmp_path / "levels.json")
    own = {"--sampler.num_steps": "4", "--sampler.dynamics": "flow_sde"} | dict([override.split("=")])
    with pytest.raises(UserError, match=expected):
        parse_arguments(
            [
                "--config=embedded_dense",
                *(f"{key}={value}" for key, value in own.items()),
                f"--sampler.calibration={path}",
            ]
        )


def test_the_steps_that_may_be_noisy_must_have_been_calibrated(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path / "levels.json", steps=[0, 1], noise_level=[0.5, 0.75, 0.0, 0.0])
    window = ("--window.schedule=random", "--window.size=1", "--window.last=1")
    loaded = config(path, *window)
    assert loaded.noise_levels == (0.5, 0.75, 0.0, 0.0) and not caplog.messages
    # nothing is said of the levels outside of the window, which are not used
    assert "steps [0, 1], this run may have it in [0, 1, 2]" in refused(path, *window[:2])
    assert "this run may have it in [0, 1, 2, 3]" in refused(path)
    # of branches none has noise in the last step, which is not trained
    branches = ("--sampler.branches=4", "--sampler.micro_batch=12", "--credit.method=branch")
    assert "this run may have it in [0, 1, 2]" in refused(path, *branches)


def test_a_file_that_was_made_otherwise_is_taken_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = config(write(tmp_path / "levels.json")).calibration_settings()
    assert own == {
        "model": "embedded",
        "prompts": "scenes",
        "reward": {"scenes": 1.0},
        "guidance_scale": 1.0,
        "drawn": "trajectories",
    }
    # the same, and with less: the file of an earlier version
    for settings in (own | {"samples": 64}, {"reward": {"scenes": 1.0}}):
        config(write(tmp_path / "levels.json", settings=settings))
    assert not caplog.messages
    others = {"model": "other", "reward": {"ocr": 1.0}, "guidance_scale": 4.5, "drawn": "branches", "prompts": "p.txt"}
    config(write(tmp_path / "levels.json", settings=others), "--window.schedule=fixed", "--window.size=2")
    (said,) = caplog.messages
    assert "levels.json was made with model other (here embedded), prompts p.txt (here scenes), reward" in said
    assert "{'ocr': 1.0} (here {'scenes': 1.0}), guidance_scale 4.5 (here 1.0), drawn branches" in said
    assert "noise in the steps [0, 1, 2, 3] (here [0, 1])" in said


def test_another_schedule_is_refused(tmp_path: Path, mixture_model: FlowModel) -> None:
    path = write(tmp_path / "levels.json", sigmas=sd3_sigmas(4, shift=2.0).tolist())
    with pytest.raises(UserError, match=r"another schedule: its sigma 1 is 0\.8\d*, this model's 0\.857"):
        check_calibration(config(path), mixture_model)


def test_a_file_that_has_changed_since_is_refused(tmp_path: Path, mixture_model: FlowModel) -> None:
    loaded = config(write(tmp_path / "levels.json"))
    write(tmp_path / "levels.json", noise_level=[0.5, 0.75, 0.3, 0.6])
    with pytest.raises(UserError, match="has it just changed"):
        check_calibration(loaded, mixture_model)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "is not JSON"),
        ("\udcff".encode("utf-8", "surrogateescape"), "is not JSON"),
        ("[]", "is no"),
        ('{"format": "densegrpo-fast calibration 2"}', "is no"),
        (json.dumps({"format": FORMAT}), "is broken"),
        (json.dumps({"format": FORMAT, "dynamics": "cps", "sigmas": [1, 0], "noise_level": [0.5, 0.5]}), "is broken"),
        (json.dumps({"format": FORMAT, "dynamics": "cps", "sigmas": [1, 0], "noise_level": ["a"]}), "is broken"),
        (f'{{"format": "{FORMAT}", "dynamics": "cps", "sigmas": [1, 0], "noise_level": [NaN]}}', "is broken"),
        (json.dumps(WHOLE | {"steps": [1, 0]}), "is broken"),
        (json.dumps(WHOLE | {"steps": [0, 2]}), "is broken"),
        (json.dumps(WHOLE | {"steps": 2}), "is broken"),
        (json.dumps(WHOLE | {"settings": []}), "is broken"),
    ],
)
def test_what_is_no_calibration_is_refused(tmp_path: Path, text: str | bytes, expected: str) -> None:
    path = tmp_path / "levels.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert expected in refused(path)


def test_a_calibration_of_endless_steps_is_refused_at_once(tmp_path: Path) -> None:
    sigmas = [1 - step / 100_000 for step in range(100_001)]
    with pytest.raises(UserError, match="endless.json is broken"):
        read_calibration(write(tmp_path / "endless.json", sigmas=sigmas, noise_level=[0.7] * 100_000))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    assert "cannot read" in refused(tmp_path / "nowhere.json")


def test_levels_out_of_range_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "levels.json", dynamics="cps", noise_level=[0.5, 1.2, 0.5, 0.5])
    expected = (
        r"sampler.calibration: the levels of .*levels.json do not fit: sampler.noise_level: expected at most 1 with"
    )
    with pytest.raises(UserError, match=expected):
        parse_arguments(
            [
                "--config=embedded_dense",
                "--sampler.num_steps=4",
                "--sampler.dynamics=cps",
                f"--sampler.calibration={path}",
            ]
        )


def test_a_dry_run_of_a_model_elsewhere_keeps_the_levels_alone(tmp_path: Path) -> None:
    loaded = config(write(tmp_path / "levels.json"), "--model.path=some/model")
    small = tiny_config(loaded)
    assert small.sampler.calibration is None and small.noise_levels == tuple(LEVELS)
