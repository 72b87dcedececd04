"""What nobody foresaw ends as one line with an exit code, and a terminal that is gone ends nothing."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from densegrpo_fast.common import last_resort
from densegrpo_fast.common.errors import SetupError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.common.last_resort import LastingStream
from densegrpo_fast.run_files.run_directory import open_run_directory
from densegrpo_fast.run_files.signals import GracefulStop
from densegrpo_fast.training.trainer import Trainer


class InductorError(RuntimeError):
    pass


def ended(error: BaseException) -> int:
    with pytest.raises(SystemExit) as stop, user_errors_exit():
        raise error
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (SetupError("no model"), 3, "error: no model"),
        (ModuleNotFoundError("No module named 'bitsandbytes'", name="bitsandbytes.nn"), 3, "package bitsandbytes is"),
        (ImportError("undefined symbol: x"), 3, "undefined symbol: x"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 7, "No space left on device"),
        (MemoryError(), 3, "the memory ran out"),
        (torch.OutOfMemoryError("CUDA out of memory"), 3, "lower sampler.micro_batch"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate"), 3, "the memory ran out"),
        (InductorError("zero-byte library"), 3, "delete the compiler's caches"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (KeyError("x" * 10_000), 70, "unforeseen KeyError: 'xxx"),
        (RecursionError("maximum recursion depth exceeded"), 70, "unforeseen RecursionError"),
        (
            ValueError("two\nlines\n"),
            70,
            "unforeseen ValueError: two lines (in commands/test_last_resort.py, line",
        ),
    ],
)
def test_every_error_is_one_line_and_a_status(
    error: BaseException, status: int, words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(last_resort, "directories", [tmp_path])
        assert ended(error) == status
    told = capsys.readouterr().err
    assert words in told and told.count("\n") == 1 and len(told) < 1000 and "Traceback" not in told
    kept = list(tmp_path.iterdir())
    assert len(kept) == (0 if isinstance(error, SetupError | KeyboardInterrupt) else 1)
    assert all("Traceback" in path.read_text() and str(path) in told for path in kept)


def test_a_damaged_compiler_cache_is_named_by_its_folder(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/scratch/inductor")
    monkeypatch.setattr(last_resort, "directories", [tmp_path])
    cause = InductorError("OSError: /scratch/inductor/ab/cab.so: file too short")
    assert ended(cause) == 3
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    # as dlopen says it, without any class of the compiler's
    found = OSError(f"{tempfile.gettempdir()}/torchinductor_me/ab/cab.so: file too short")
    assert ended(found) == 3
    first, second = capsys.readouterr().err.splitlines()
    assert "delete the compiler's caches, /scratch/inductor and " in first
    assert f"delete the compiler's caches, {tempfile.gettempdir()}/torchinductor_" in second
    # an empty variable names no folder
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    assert ended(OSError(2, "no such file", "/elsewhere/file")) == ExitCode.OUTPUT
    assert "caches" not in capsys.readouterr().err


@pytest.mark.ci
def test_the_traceback_is_in_the_run_s_directory(
    train: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Trainer.step

    def broken(self: Trainer, iteration: int) -> dict[str, Any]:
        if iteration:
            raise ZeroDivisionError(f"in iteration {iteration}")
        return step(self, iteration)

    monkeypatch.setattr(Trainer, "step", broken)
    assert train(tmp_path / "run", **{"reward.observed": "[]"}) == 70
    (kept,) = tmp_path.rglob("error-*.txt")
    assert "ZeroDivisionError: in iteration 1" in kept.read_text() and str(kept) in capsys.readouterr().err


def test_streams_outlast_their_terminal() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

        def flush(self) -> None:
            self.write("")

    stream = LastingStream(Gone())
    assert stream.write("text") == 4
    stream.flush()
    closed = io.StringIO()
    closed.close()
    assert LastingStream(closed).write("text") == 4
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    LastingStream(narrow).write("a café")
    narrow.flush()
    assert narrow.buffer.getvalue() == b"a caf\\xe9"  # type: ignore[attr-defined]


def test_the_end_of_the_interpreter_does_not_fail_either() -> None:
    """Python flushes its streams when it ends, and would end with 120 where that fails."""
    program = (
        "from densegrpo_fast.common.exit_codes import user_errors_exit\n"
        "import sys\n"
        "with user_errors_exit():\n"
        "    for line in range(9000):\n        print('line', line)\n        print('line', line, file=sys.stderr)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    with (
        open("/dev/full", "w") as full,
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=full, env=environment
        ) as process,
    ):
        assert process.stdout is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0


def test_a_terminal_that_hangs_up_ends_nothing() -> None:
    before = signal.getsignal(signal.SIGHUP)
    with GracefulStop() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert not stop.requested
    assert signal.getsignal(signal.SIGHUP) == before


def test_a_directory_that_fails_to_open_keeps_no_traceback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(last_resort, "directories", [])
    with pytest.raises(KeyError), open_run_directory(tmp_path / "a", resume=False, overwrite=False):
        raise KeyError
    assert not (tmp_path / "a").exists()
    kept = last_resort.keep_traceback(KeyError())
    assert kept is not None and kept.parent != tmp_path
    kept.unlink()
