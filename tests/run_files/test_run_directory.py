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
from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.common.files import SUMS, output_errors, read_verified, replace_text, write_durably
from densegrpo_fast.run_files import run_directory
from densegrpo_fast.run_files.metrics import MetricsLog
from densegrpo_fast.run_files.run_directory import RunLock, open_run_directory


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


def test_a_start_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    for existed in (False, True):
        path = tmp_path / str(existed) / "a"
        if existed:
            path.mkdir(parents=True)
        with pytest.raises(KeyError), open_run_directory(path, resume=False, overwrite=False):
            (path / "metrics.jsonl").touch()
            replace_text(path / "config.yaml", "seed: 1\n")
            raise KeyError
        assert (list(path.iterdir()) == []) if existed else not path.exists()
    # but for what somebody else may want
    with pytest.raises(KeyError), open_run_directory(path, resume=False, overwrite=False):
        (path / "notes.txt").write_text("x")
        raise KeyError
    assert {file.name for file in path.iterdir()} == {"notes.txt", "run.lock"}
    # and a run that has recorded something stays
    with pytest.raises(KeyError), open_run_directory(path.with_name("b"), resume=False, overwrite=False) as path:
        (path / "metrics.jsonl").write_text("{}\n")
        raise KeyError
    assert {file.name for file in path.iterdir()} == {"metrics.jsonl", "run.lock"}


def test_a_lock_whose_file_is_deleted_by_its_holder_is_taken_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between opening the file and locking it, the holder may have failed to start and taken its directory away."""
    lock, locked = run_directory.fcntl.flock, []

    def late(descriptor: int, operation: int) -> None:
        if not locked:
            (tmp_path / "run.lock").unlink()
        locked.append(descriptor)
        lock(descriptor, operation)

    monkeypatch.setattr(run_directory.fcntl, "flock", late)
    with RunLock(tmp_path):
        assert len(locked) == 2 and json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("name", ["run.lock", "config.yaml", "metrics.jsonl"])
@pytest.mark.parametrize("kind", ["link", "fifo", "directory"])
def test_what_is_no_plain_file_is_neither_followed_nor_waited_for(tmp_path: Path, name: str, kind: str) -> None:
    target, path = tmp_path / "precious", tmp_path / "a" / name
    target.write_text("precious")
    path.parent.mkdir()
    {"link": lambda: path.symlink_to(target), "fifo": lambda: os.mkfifo(path), "directory": path.mkdir}[kind]()
    with pytest.raises(UserError, match=f"cannot write .*{name}") as caught:
        if name == "run.lock":
            RunLock(path.parent).acquire()
        elif name == "metrics.jsonl":
            MetricsLog(path)
        else:
            with output_errors(f"cannot write {path}"):
                write_durably(path, b"x")
    assert exit_code_of(caught.value) == ExitCode.OUTPUT
    assert target.read_text() == "precious"


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
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_what_a_crash_leaves_behind_does_not_block_a_new_run(tmp_path: Path) -> None:
    (tmp_path / ".config.yaml.stage").write_text("se")
    with open_run_directory(tmp_path, resume=False, overwrite=False) as directory:
        assert directory == tmp_path


def test_the_digest_of_a_configuration_that_was_never_written_blocks_no_new_run(tmp_path: Path) -> None:
    """A run that is killed between the two files."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / SUMS).write_text(f"{'0' * 64}  config.yaml\n")
    with open_run_directory(tmp_path / "a", resume=False, overwrite=False) as directory:
        replace_text(directory / "config.yaml", "seed: 1\n", digest=True)
        assert read_verified(directory / "config.yaml") == b"seed: 1\n"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / SUMS).write_text(f"{'0' * 64}  thesis.pdf\n")
    assert "holds no run" in refused(tmp_path / "b", ExitCode.OUTPUT)


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("x")
    assert "cannot create run directory" in refused(tmp_path / "a", ExitCode.OUTPUT)


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
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
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


def test_a_child_does_not_keep_the_lock_of_a_dead_trainer(tmp_path: Path) -> None:
    script = (
        "import os, sys, time\n"
        "from pathlib import Path\n"
        "from densegrpo_fast.run_files.run_directory import RunLock\n"
        "RunLock(Path(sys.argv[1])).acquire()\n"
        "if os.fork():\n"
        "    os._exit(0)\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    command = [sys.executable, "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert process.wait(30) == 0
        try:
            with RunLock(tmp_path) as lock:
                assert json.loads(lock.path.read_text())["pid"] == os.getpid()
        finally:
            os.kill(child, signal.SIGKILL)


def test_the_lock_of_a_dead_process_that_somebody_holds_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.lock").write_text(json.dumps({"pid": 2**22 + 5, "host": run_directory.socket.gethostname()}))

    def held(descriptor: int, operation: int) -> None:
        raise BlockingIOError

    monkeypatch.setattr(run_directory.fcntl, "flock", held)
    with pytest.raises(UserError, match="though the run itself is gone; find it with `fuser .*run.lock`"):
        RunLock(tmp_path).acquire()


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
