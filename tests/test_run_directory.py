from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from densegrpo_fast.common import files
from densegrpo_fast.common.errors import UsageError, UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.common.files import replace_text
from densegrpo_fast.run_files import run_directory
from densegrpo_fast.run_files.run_directory import CONFIG_FILE, METRICS_FILE, RunLock, open_run_directory


def refused(path: Path, code: ExitCode, *, resume: bool = False, overwrite: bool = False) -> str:
    with pytest.raises(UserError) as caught, open_run_directory(path, resume=resume, overwrite=overwrite):
        pass
    assert exit_code_of(caught.value) == code
    return str(caught.value)


def make_run(path: Path) -> Path:
    with open_run_directory(path, resume=False, overwrite=False) as directory:
        replace_text(directory / "config.yaml", "seed: 1\n")
    return path


def test_a_new_directory_is_created_and_an_empty_one_used(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "a"
    for _ in range(2):
        with open_run_directory(path, resume=False, overwrite=False) as directory:
            assert directory == path
            assert path.is_dir()


def test_a_directory_with_a_run_is_refused_by_default(tmp_path: Path) -> None:
    message = refused(make_run(tmp_path / "a"), ExitCode.OUTPUT)
    assert "--resume" in message
    assert "--run.overwrite" in message


def test_resume_continues_in_place(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    with open_run_directory(path, resume=True, overwrite=False):
        assert (path / "config.yaml").read_text() == "seed: 1\n"


def test_resume_of_nothing_is_refused(tmp_path: Path) -> None:
    assert "no run to continue" in refused(tmp_path / "absent", ExitCode.CHECKPOINT, resume=True)
    assert not (tmp_path / "absent").exists()


def test_overwrite_moves_the_earlier_runs_aside(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a")
    for text in ("seed: 2\n", "seed: 3\n"):
        with open_run_directory(path, resume=False, overwrite=True):
            assert not (path / "config.yaml").exists()
            replace_text(path / "config.yaml", text)
    kept = [(tmp_path / name / "config.yaml").read_text() for name in ("a.old-1", "a.old-2", "a")]
    assert kept == ["seed: 1\n", "seed: 2\n", "seed: 3\n"]


def test_a_directory_with_other_files_is_never_used(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        assert "holds no run" in refused(tmp_path, ExitCode.OUTPUT, overwrite=overwrite)
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_what_a_crash_leaves_behind_does_not_block_a_new_run(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.stage").write_text("se")
    with open_run_directory(tmp_path, resume=False, overwrite=False) as directory:
        assert directory == tmp_path


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    assert "cannot create run directory" in refused(tmp_path / "a", ExitCode.OUTPUT)


def test_resume_and_overwrite_contradict_each_other(tmp_path: Path) -> None:
    assert "contradict" in refused(make_run(tmp_path / "a"), ExitCode.USAGE, resume=True, overwrite=True)


def test_a_second_live_run_is_refused_and_names_the_first(tmp_path: Path) -> None:
    with open_run_directory(tmp_path / "a", resume=False, overwrite=False) as path:
        replace_text(path / "config.yaml", "seed: 1\n")
        for resume, overwrite in [(False, False), (True, False), (False, True)]:
            message = refused(path, ExitCode.OUTPUT, resume=resume, overwrite=overwrite)
            assert f"process {os.getpid()}" in message
        assert (path / "config.yaml").exists()
    with open_run_directory(path, resume=True, overwrite=False):
        assert (path / "config.yaml").exists()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from densegrpo_fast.run_files.run_directory import RunLock\n"
        "RunLock(Path(sys.argv[1])).acquire()\n"
        "print('locked', flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "locked\n"
        with pytest.raises(UserError, match=f"process {child.pid}"):
            RunLock(tmp_path).acquire()
        child.send_signal(signal.SIGKILL)
        child.wait()
    with RunLock(tmp_path) as lock:
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    assert f"taking over from process {child.pid}" in caplog.text


def test_a_lock_left_by_another_host_is_refused(tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text('{"pid": 1, "host": "elsewhere"}')
    with pytest.raises(UserError, match="process 1 on elsewhere") as caught:
        RunLock(tmp_path).acquire()
    assert exit_code_of(caught.value) == ExitCode.OUTPUT


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_an_unreadable_lock_file_is_taken_over(content: str, tmp_path: Path) -> None:
    (tmp_path / "run.lock").write_text(content)
    with RunLock(tmp_path) as lock:
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    assert lock.path.read_text() == ""


def test_without_locks_the_file_alone_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOTSUP, "Operation not supported")

    monkeypatch.setattr(run_directory.fcntl, "flock", unsupported)
    with RunLock(tmp_path), pytest.raises(UserError, match="if it is dead, delete"):
        RunLock(tmp_path).acquire()
    assert "has no locks" in caplog.text
    with RunLock(tmp_path) as lock:
        assert lock.path.exists()


def test_a_failed_write_keeps_the_old_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    replace_text(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left") as caught:
        replace_text(path, "new")
    assert exit_code_of(caught.value) == ExitCode.OUTPUT
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["config.yaml"]


@pytest.mark.parametrize("there", [False, True])
def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path, there: bool) -> None:
    path = tmp_path / "runs" / "mine"
    if there:
        path.mkdir(parents=True)
    with pytest.raises(UsageError), open_run_directory(path, resume=False, overwrite=False):
        (path / CONFIG_FILE).write_text("seed: 1\n")
        (path / METRICS_FILE).touch()
        (path / "samples").mkdir()
        (path / "samples" / "before.png").touch()
        raise UsageError("a reward does not know these prompts")
    assert path.exists() == there and not (there and list(path.iterdir()))
    with pytest.raises(UsageError), open_run_directory(path, resume=False, overwrite=False):
        (path / METRICS_FILE).write_text("{}\n")
        raise UsageError("after the first iteration")
    assert (path / METRICS_FILE).is_file(), "what a run has done is kept"
