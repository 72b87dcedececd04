"""What a command says while it works: its first line at once, then how far each long phase is and how long it takes."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, TextIO

_SILENT_SECONDS, _LINE_SECONDS = 3.0, 30.0


def announce(line: str) -> None:
    """Say what is done next, before anything slow such as an import of torch; of several processes the first does."""
    if os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK") == "0":
        print(f"{line} ...", file=sys.stderr, flush=True)


class PhaseProgress:
    """Progress of one phase: nothing in its first 3 s, then a bar on a terminal, elsewhere a line now and then.

        with PhaseProgress("evaluation", 192, "pictures") as progress:
            for part in parts:
                work(part)
                progress(len(part))

    Args:
        name: of the phase.
        total: units of work in all.
        unit: what they are.
        stream: where to write; default: standard error.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        name: str,
        total: int,
        unit: str,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self.total, self.unit, self.done = name, total, unit, 0
        self._stream = sys.stderr if stream is None else stream
        self._clock, self._start, self._said = clock, clock(), -_LINE_SECONDS
        self._bar: Any = None
        if self._stream.isatty():
            # not before it is needed: commands answer at once
            from tqdm import tqdm

            options = {"desc": name, "unit": f" {unit}", "leave": False, "dynamic_ncols": True}
            self._bar = tqdm(total=total, file=self._stream, delay=_SILENT_SECONDS, **options)

    def __call__(self, done: int = 1) -> None:
        """So many more units are done."""
        self.done += done
        if self._bar is not None:
            self._bar.update(done)
            return
        seconds = self._clock() - self._start
        if seconds >= _SILENT_SECONDS and seconds - self._said >= _LINE_SECONDS and self.done < self.total:
            self._said = seconds
            left = clock_time(seconds / self.done * (self.total - self.done)) if self.done else "?"
            print(f"{self.name}: {self.done} of {self.total} {self.unit}  left {left}", file=self._stream, flush=True)

    def at(self, done: int) -> None:
        """So many units are done in all."""
        self(done - self.done)

    def __enter__(self) -> PhaseProgress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def clock_time(seconds: float) -> str:
    """Seconds as M:SS or H:MM:SS."""
    whole = round(seconds)
    hours, minutes = whole // 3600, whole // 60 % 60
    return f"{hours}:{minutes:02d}:{whole % 60:02d}" if hours else f"{minutes}:{whole % 60:02d}"
