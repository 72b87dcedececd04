"""Who does what, when several processes work on one study: a run is claimed, and its result file is locked to write."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Claim:
    """A run that this process does; the operating system gives it back when the process ends, however it ends.

    Attributes:
        descriptor: of the open, locked file, which holds the CPU seconds that were spent on the run.
    """

    descriptor: int

    @property
    def cpu_seconds(self) -> float | None:
        """CPU seconds of the processes that worked on the run before; None = not known."""
        text = os.pread(self.descriptor, 64, 0)
        return float(text) if text else None

    def keep(self, cpu_seconds: float | None) -> None:
        """Note the CPU seconds so far."""
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, b"" if cpu_seconds is None else f"{cpu_seconds:.3f}".encode(), 0)


@contextmanager
def claimed(path: Path) -> Iterator[Claim | None]:
    """Claim a run by its file for as long as the context lasts; None if another process has it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
            return
        yield Claim(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Within the context, no other process is in one for this directory; waits for it. No file is left behind."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
