from __future__ import annotations

import errno
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.common.progress import PhaseProgress
from densegrpo_fast.run_files import metrics
from densegrpo_fast.run_files.metrics import MetricsLog, Progress, read_metrics
from densegrpo_fast.training.meter import PhaseTimer

ROOT = Path(__file__).resolve().parents[2]


class Clock:
    """Seconds that pass only when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_records_read_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [
        {"iteration": 1, "reward": 0.1 + 0.2},
        {"iteration": 2, "note": "Würfel", "gain": [0.5, -1e-9]},
    ]
    with MetricsLog(path) as log:
        log.append(records[0])
        assert read_metrics(path) == records[:1]
        log.append(records[1])
    assert read_metrics(path) == records


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"kl": float("nan"), "gain": [float("inf"), 1.0]})
    assert read_metrics(path) == [{"kl": None, "gain": [None, 1.0]}]


def test_truncation_makes_a_resumed_log_equal_to_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole.jsonl", tmp_path / "resumed.jsonl"
    with MetricsLog(whole) as log:
        for iteration in range(5):
            log.append({"iteration": iteration})
    with MetricsLog(resumed) as log:
        for iteration in range(2):
            log.append({"iteration": iteration})
        position = log.position()
        log.append({"iteration": 2})
    with MetricsLog(resumed) as log:
        log.truncate(position)
        for iteration in range(2, 5):
            log.append({"iteration": iteration})
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_line_cut_by_a_crash_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n{"itera')
    assert read_metrics(path) == [{"iteration": 1}]
    with MetricsLog(path) as log:
        assert log.position() == 17
        log.append({"iteration": 2})
    assert read_metrics(path) == [{"iteration": 1}, {"iteration": 2}]


def test_a_log_shorter_than_the_checkpoint_saw_is_kept_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"iteration": 1}\n')
    with MetricsLog(path) as log:
        log.truncate(1000)
    assert "17 bytes where the checkpoint saw 1000" in caplog.text
    assert read_metrics(path) == [{"iteration": 1}]


def test_records_that_are_not_what_a_checkpoint_saw_are_kept_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.append({"iteration": 1})
        position, digest = log.position(), log.digest()
        log.append({"iteration": 2})
        log.truncate(position, digest)
        log.truncate(position)
        assert not caplog.text
    path.write_bytes(b'{"iteration": 3}\n')
    with MetricsLog(path) as log:
        log.truncate(position, digest)
    assert f"{path}: its records up to the checkpoint are not what was written" in caplog.text
    assert read_metrics(path) == [{"iteration": 3}]


@pytest.mark.parametrize(("line", "expected"), [(b"{bad", "line 2: not JSON"), (b"[1]", "line 2: expected an object")])
def test_a_bad_line_is_reported_by_number(line: bytes, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"{}\n" + line + b"\n{}\n")
    with pytest.raises(ValueError, match=expected):
        read_metrics(path)
    with MetricsLog(path) as log, pytest.raises(UserError, match=expected) as caught:
        log.records()
    assert exit_code_of(caught.value) == ExitCode.OUTPUT


def test_a_path_that_cannot_be_written_is_an_output_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write") as caught:
        MetricsLog(tmp_path / "absent" / "metrics.jsonl")
    assert exit_code_of(caught.value) == ExitCode.OUTPUT


def test_a_full_disk_is_an_output_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(metrics.os, "fsync", full)
    with (
        MetricsLog(tmp_path / "metrics.jsonl") as log,
        pytest.raises(UserError, match="No space left") as caught,
    ):
        log.position()
    assert exit_code_of(caught.value) == ExitCode.OUTPUT


def test_seconds_add_up_over_repeated_and_nested_phases() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    for _ in range(2):
        with timer("rollout"):
            clock.now += 3
            with timer("reward"):
                clock.now += 1
            clock.now += 2
        clock.now += 50
    # Each round: 3 + 2 seconds of rollout around 1 of reward; the 50 between belong to no phase.
    assert timer.seconds() == {"rollout": 10.0, "reward": 2.0}
    timer.reset()
    assert timer.seconds() == {}


def test_cpu_seconds_are_those_of_the_phases() -> None:
    clock, cpu = Clock(), Clock()
    timer = PhaseTimer(clock=clock, cpu_clock=cpu)
    with timer("rollout"):
        cpu.now += 3
        with timer("reward"):
            cpu.now += 1
        clock.now += 5
    cpu.now += 50
    with timer("update"):
        cpu.now += 2
    # 3 + 1 + 2; the 50 between belong to no phase
    assert timer.cpu_seconds() == 6.0 and timer.seconds() == {"reward": 0.0, "rollout": 5.0, "update": 0.0}
    timer.reset()
    assert timer.cpu_seconds() == 0.0


def test_a_phase_that_raises_is_counted_and_closed() -> None:
    clock = Clock()
    timer = PhaseTimer(clock=clock)
    with pytest.raises(RuntimeError), timer("update"):
        clock.now += 4
        raise RuntimeError
    clock.now += 9
    with timer("rollout"):
        clock.now += 1
    assert timer.seconds() == {"update": 4.0, "rollout": 1.0}


def test_the_device_is_waited_for_at_both_ends_of_a_phase() -> None:
    clock = Clock()

    def device_finishes() -> None:
        clock.now += 7

    timer = PhaseTimer(synchronize=device_finishes, clock=clock)
    with timer("rollout"):
        clock.now += 1
    assert timer.seconds() == {"rollout": 8.0}


def test_progress_prints_lines_where_there_is_no_terminal() -> None:
    clock, stream = Clock(), io.StringIO()
    with Progress(12, done=2, stream=stream, clock=clock) as progress:
        clock.now += 400
        progress.update(3, reward=0.51234)
        clock.now += 400
        progress.update(4, reward=0.6)
        progress.write("held-out reward 0.5")
    # 400 s per iteration and 9, then 8 iterations to go: 3600 s and 3200 s.
    assert stream.getvalue().splitlines() == [
        "iteration 3/12  reward 0.5123  left 1:00:00",
        "iteration 4/12  reward 0.6  left 53:20",
        "held-out reward 0.5",
    ]


def test_progress_shows_a_bar_on_a_terminal() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with Progress(4, stream=stream) as progress:
        progress.update(1, reward=0.25)
        progress.write("a line")
        progress.update(4, reward=0.5)
    shown = stream.getvalue()
    assert "4/4" in shown
    assert "reward=0.5" in shown
    assert "a line\n" in shown


def documented() -> list[str]:
    """The names in the first table of docs/metrics.md."""
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8").partition("## Alarms")[0]
    cells = (line.split("|")[1] for line in text.splitlines() if line.startswith("| `"))
    return [name for cell in cells for name in re.findall(r"`([^`]+)`", cell)]


@pytest.mark.ci
def test_what_a_run_writes_is_documented_and_what_is_documented_is_written(
    train: Callable[..., int], tmp_path: Path
) -> None:
    common = {"run.iterations": 2, "evaluation.every": 1, "lookahead.monitor_every": 1, "lookahead.monitor_alarm": 1}
    common |= {"sampler.group_size": 4, "sampler.micro_batch": 4}
    calibrated = {"calibration.every": 2, "calibration.samples": 8, "calibration.rounds": 1}
    branched = {"sampler.branches": 2, "credit.method": "branch", "objective.negative_factor": 0.5}
    written: set[str] = set()
    for name, own in (("trajectories", calibrated), ("branches", branched | {"sampler.micro_batch": 2})):
        assert train(tmp_path / name, **{**common, **own}) == 0
        written.update(*read_metrics(tmp_path / name / "metrics.jsonl"))
    places = {"K": r"\d+", "NAME": r"\w+", "PHASE": r"\w+"}
    patterns = {name: re.sub("|".join(places), lambda found: places[found[0]], name) for name in documented()}
    known = {name: {key for key in written if re.fullmatch(pattern, key)} for name, pattern in patterns.items()}
    assert written == set.union(*known.values())
    assert all(known.values())


def test_the_time_left_counts_the_evaluations_to_come() -> None:
    clock, stream = Clock(), io.StringIO()
    options = {"images": 48, "gpus": 2, "pauses": lambda done: 1 + (done < 2)}
    with Progress(4, stream=stream, clock=clock, **options) as progress:
        with progress.pause():
            clock.now += 100
        for done in (1, 2):
            clock.now += 24
            progress.update(done, reward=0.5)
    # 24 s per iteration and 3, then 2 to go; an evaluation of 100 s before iteration 2 and one at the end
    assert stream.getvalue().splitlines() == [
        "iteration 1/4  reward 0.5  images/s 2  left 4:32  GPU hours 0.07 of 0.22",
        "iteration 2/4  reward 0.5  images/s 2  left 2:28  GPU hours 0.08 of 0.16",
    ]


def test_a_long_phase_says_how_far_it_is() -> None:
    clock, stream = Clock(), io.StringIO()
    with PhaseProgress("evaluation", 100, "pictures", stream=stream, clock=clock) as progress:
        for seconds, done in ((1, 10), (3, 10), (10, 20), (31, 50), (1, 10)):
            clock.now += seconds
            progress(done)
    assert stream.getvalue().splitlines() == [
        "evaluation: 20 of 100 pictures  left 0:16",
        "evaluation: 90 of 100 pictures  left 0:05",
    ]
    with PhaseProgress("short", 2, "pictures", stream=stream, clock=clock) as progress:
        progress(2)
    assert "short" not in stream.getvalue()
