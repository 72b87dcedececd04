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
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from densegrpo_fast.common.errors import CheckpointError, OutputError, UserError
from densegrpo_fast.common.files import STAGE_SUFFIX, SUMS, open_plainly, output_errors, sums, unused_name
from densegrpo_fast.common.last_resort import directories

logger = logging.getLogger(__name__)

CONFIG_FILE, METRICS_FILE, REPORT_FILE = "config.yaml", "metrics.jsonl", "report.html"
AUTO_FILE = "lookahead_auto.json"
CHECKPOINTS, ADAPTER, NETWORK, SAMPLES, STRIPS = "checkpoints", "adapter", "network", "samples", "strips"
"""Names of what a run writes in its directory: files, and directories."""

_LOCK_NAME = "run.lock"
_OF_A_START = frozenset(
    (CONFIG_FILE, METRICS_FILE, REPORT_FILE, SUMS, _LOCK_NAME, "evaluation-before.json")
    + (SAMPLES, STRIPS, "tensorboard", "wandb")
)
"""What a run writes before its first record."""


_held: set[int] = set()
"""Descriptors of the locks of this process. A child that it forks lets go of them: it would keep the lock of a process
that has died."""


def _let_go() -> None:
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_let_go)


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
        while self._descriptor is None:
            self._acquire()
        return self

    def _acquire(self) -> None:
        """Take the lock, unless its file was deleted meanwhile by a run that failed to start."""
        with output_errors(f"cannot write {self.path}"):
            descriptor = open_plainly(self.path, os.O_RDWR | os.O_CREAT)
        try:
            self._refuse_left_over(descriptor, locked=self._lock(descriptor))
            holder = {"pid": os.getpid(), "host": socket.gethostname()}
            with output_errors(f"cannot write {self.path}"):
                _write_holder(descriptor, json.dumps(holder))
        except UserError:
            os.close(descriptor)
            raise
        if self.path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
            self._descriptor = descriptor
            _held.add(descriptor)
        else:
            os.close(descriptor)

    def release(self) -> None:
        """Give the lock back. The file stays, empty."""
        # in a forked child it is not ours
        if self._descriptor in _held:
            _held.remove(self._descriptor)
            _write_holder(self._descriptor, "")
            os.close(self._descriptor)
        self._descriptor = None

    def _lock(self, descriptor: int) -> bool:
        """Lock the file; False where the file system has no locks."""
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _read_holder(descriptor)
            if not holder or (holder.get("host") == socket.gethostname() and not _is_alive(holder.get("pid"))):
                raise OutputError(
                    f"{self.path.parent} is still locked by a process that an earlier run has started, though the run "
                    f"itself is gone; find it with `fuser {self.path}` and end it",
                ) from None
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


def _is_alive(pid: object) -> bool:
    try:
        os.kill(pid if isinstance(pid, int) and pid > 0 else 0, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass
    return True


def _write_holder(descriptor: int, text: str) -> None:
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode("ascii"), 0)


def iteration_name(done: int) -> str:
    """Name, without its ending, of a file that belongs to the moment after so many iterations."""
    return f"iteration-{done:05d}"


def holds_run(directory: Path) -> bool:
    """Whether a run has written its configuration, metrics, checkpoints or choice of a lookahead in a directory."""
    return any((directory / name).exists() for name in (CONFIG_FILE, METRICS_FILE, CHECKPOINTS, AUTO_FILE))


def auto_record(directory: Path) -> dict[str, Any] | None:
    """What `lookahead.plan auto` has measured and chosen for the run in a directory; None without it.

    Raises:
        CheckpointError: its file is broken; OutputError: it cannot be read.
    """
    path = directory / AUTO_FILE
    if not path.exists():
        return None
    try:
        with output_errors(f"cannot read {path}"):
            record = json.loads(path.read_text(encoding="utf-8"))
        return {"options": dict(record["options"]), "text": str(record["text"])} | record
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path} is broken; the options that were chosen stand in {CONFIG_FILE}, too") from None


@contextmanager
def open_run_directory(path: Path, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """Create or reopen the directory of a run and lock it for as long as the context lasts.

    A new run that fails before it has recorded anything takes its files away again.

    Args:
        path: the run directory.
        resume: continue the run that is there.
        overwrite: move a run that is there to `NAME.old-K` (K = 1, 2, ...) and start in a new directory.
            Nothing is deleted. Of no effect with `resume`.

    Yields:
        `path`.

    Raises:
        CheckpointError: if there is no run to resume; OutputError: if the directory holds something
            else, holds a run and neither option is set, is used by a live run, or cannot be written.
    """
    if resume and not holds_run(path):
        raise CheckpointError(f"--resume: {path} holds no run to continue")
    with output_errors(f"cannot create run directory {path}"):
        created = not path.exists()
        path.mkdir(parents=True, exist_ok=True)
    lock = RunLock(path).acquire()
    try:
        if not resume and not all(_is_left_over(file) for file in path.iterdir()):
            if not holds_run(path):
                lock.path.unlink(missing_ok=True)  # nothing of ours stays in somebody else's directory
                raise OutputError(
                    f"{path} is not empty and holds no run of this program; choose another run.output_dir",
                )
            if not overwrite:
                raise OutputError(
                    f"{path} already holds a run; continue it with --resume, move it aside with --run.overwrite, "
                    "or choose another run.output_dir",
                )
            lock = _move_aside(path, lock)
        try:
            directories.append(path)
            yield path
        except BaseException:
            if not resume:
                _withdraw(path, created)
            raise
    finally:
        lock.release()


def _is_left_over(file: Path) -> bool:
    """Whether it is what a crash leaves behind and nobody wants: the lock, a half-written file, an empty record, the
    digest of a configuration that is not there."""
    if file.name in (_LOCK_NAME, METRICS_FILE):
        return file.is_file() and (file.name == _LOCK_NAME or file.stat().st_size == 0)
    if file.name == SUMS:
        return {name for _, name in sums(file.parent)} == {CONFIG_FILE}
    return file.suffix == STAGE_SUFFIX


def _withdraw(path: Path, created: bool) -> None:
    """Take away the files of a run that failed before it recorded anything, and the directory if it was made for it.

    Where something else lies among them, all stays.
    """
    metrics = path / METRICS_FILE
    if (metrics.exists() and metrics.stat().st_size) or not all(
        file.name in _OF_A_START or file.suffix == STAGE_SUFFIX for file in path.iterdir()
    ):
        return
    with suppress(OSError):
        for file in path.iterdir():
            shutil.rmtree(file) if file.is_dir() and not file.is_symlink() else file.unlink()
        if created:
            path.rmdir()


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
