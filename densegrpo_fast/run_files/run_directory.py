"""The directory of a run: one run at a time writes in it, and no earlier run in it is lost.

with open_run_directory(config.output_dir, resume=flags.resume, overwrite=config.run.overwrite) as directory:
    ...
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType

from densegrpo_fast.common.errors import CheckpointError, OutputError, UsageError, UserError
from densegrpo_fast.common.files import STAGE_SUFFIX, output_errors, unused_name

logger = logging.getLogger(__name__)

CONFIG_FILE, METRICS_FILE, REPORT_FILE = "config.yaml", "metrics.jsonl", "report.html"
CHECKPOINTS, ADAPTER, SAMPLES, STRIPS = "checkpoints", "adapter", "samples", "strips"
"""Names of what a run writes in its directory: files, and directories."""

_LOCK_NAME = "run.lock"


class RunLock:
    """A lock file that holds the writer's host and process id.

    The operating system drops the lock when its process ends, however it ends; the content says who had it. A
    lock left by a dead process of this host is taken over. One left by another host is refused, since a file
    system without locks across hosts cannot tell whether that process is alive.

    Args:
        directory: an existing directory; the file is `directory/run.lock`.
    """

    def __init__(self, directory: Path) -> None:
        self.path = directory / _LOCK_NAME
        self._descriptor: int | None = None

    def acquire(self) -> RunLock:
        """Take the lock.

        Raises:
            OutputError: if another live run has it or the file cannot be written.
        """
        with output_errors(f"cannot write {self.path}"):
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            self._refuse_left_over(descriptor, locked=self._lock(descriptor))
            holder = {"pid": os.getpid(), "host": socket.gethostname()}
            with output_errors(f"cannot write {self.path}"):
                _write_holder(descriptor, json.dumps(holder))
        except UserError:
            os.close(descriptor)
            raise
        self._descriptor = descriptor
        return self

    def release(self) -> None:
        """Give the lock back. The file stays, empty: deleting it could let two waiting processes in."""
        if self._descriptor is not None:
            _write_holder(self._descriptor, "")
            os.close(self._descriptor)
            self._descriptor = None

    def _lock(self, descriptor: int) -> bool:
        """Lock the file; False where the file system has no locks."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(descriptor)
            raise OutputError(
                f"{self.path.parent} is in use by another run, process {holder.get('pid')} on "
                f"{holder.get('host')}; choose another run.output_dir or stop that run",
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK):
                raise OutputError(f"cannot lock {self.path}: {error.strerror}") from error
            logger.warning("%s: this file system has no locks; start no second run there", self.path)
            return False
        return True

    def _refuse_left_over(self, descriptor: int, locked: bool) -> None:
        """Refuse the file of an earlier process, unless having its lock proves that process dead."""
        holder = _read_holder(descriptor)
        if not holder:
            return
        if not locked or holder.get("host") != socket.gethostname():
            raise OutputError(
                f"{self.path.parent} was in use by process {holder.get('pid')} on {holder.get('host')}, "
                f"which did not end in an orderly way; if it is dead, delete {self.path}",
            )
        logger.warning("%s: taking over from process %s, which is gone", self.path, holder.get("pid"))

    def __enter__(self) -> RunLock:
        return self.acquire()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _read_holder(descriptor: int) -> dict[str, object]:
    """Who wrote the lock file; empty for a released or unreadable one."""
    try:
        holder = json.loads(os.pread(descriptor, 4096, 0))
    except ValueError:
        return {}
    return holder if isinstance(holder, dict) else {}


def _write_holder(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode("ascii"), 0)


def iteration_name(done: int) -> str:
    """Name, without its ending, of a file that belongs to the moment after so many iterations."""
    return f"iteration-{done:05d}"


def holds_run(directory: Path) -> bool:
    """Whether a run has written its configuration, metrics or checkpoints in a directory."""
    return any((directory / name).exists() for name in (CONFIG_FILE, METRICS_FILE, CHECKPOINTS))


@contextmanager
def open_run_directory(path: Path, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Create or reopen the directory of a run and lock it for as long as the context lasts.

    A new run that fails before its first record leaves no directory behind.

    Args:
        path: the run directory.
        resume: continue the run that is there.
        overwrite: move a run that is there to `NAME.old-K` (K = 1, 2, ...) and start in a new directory.
            Nothing is deleted.

    Yields:
        `path`.

    Raises:
        CheckpointError: if there is no run to resume; OutputError: if the directory holds something
            else, holds a run and neither option is set, is used by a live run, or cannot be written;
            UsageError: if both options are set.
    """
    if resume and overwrite:
        raise UsageError("--resume and run.overwrite contradict each other: choose one")
    if resume and not holds_run(path):
        raise CheckpointError(f"--resume: {path} holds no run to continue")
    created = not path.exists()
    with output_errors(f"cannot create run directory {path}"):
        path.mkdir(parents=True, exist_ok=True)
    lock, fresh = RunLock(path).acquire(), False
    try:
        # a crash may leave the lock and a half-written file behind; neither is worth keeping
        if not resume and any(file.name != _LOCK_NAME and file.suffix != STAGE_SUFFIX for file in path.iterdir()):
            if not holds_run(path):
                raise OutputError(
                    f"{path} is not empty and holds no run of this program; choose another run.output_dir",
                )
            if not overwrite:
                raise OutputError(
                    f"{path} already holds a run; continue it with --resume, move it aside with --run.overwrite, "
                    "or choose another run.output_dir",
                )
            lock = _move_aside(path, lock)
        fresh = not resume
        yield path
        fresh = False
    finally:
        if fresh and not any(path.glob(f"{CHECKPOINTS}/*")) and not _has_records(path):
            # nothing is lost, and the next start finds the name free
            _empty(path)
            if created:
                path.rmdir()
        lock.release()


def _empty(path: Path) -> None:
    """Delete what is in a directory, links themselves and not what they point to."""
    for entry in path.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _has_records(path: Path) -> bool:
    metrics = path / METRICS_FILE
    return metrics.is_file() and metrics.stat().st_size > 0


def _move_aside(path: Path, lock: RunLock) -> RunLock:
    """Rename a run that we hold the lock of, and put a new, locked directory in its place."""
    aside = unused_name(path, "old")
    with output_errors(f"cannot move {path} to {aside}"):
        path.rename(aside)
        path.mkdir()
    new_lock = RunLock(path).acquire()
    lock.release()
    logger.warning("the earlier run in %s is now in %s", path, aside)
    return new_lock
