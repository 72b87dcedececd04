"""What a run shows and keeps of its iterations: the metrics file and the progress line."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from tqdm import tqdm

from densegrpo_fast.common.aliases import current_metric
from densegrpo_fast.common.errors import OutputError
from densegrpo_fast.common.files import finite, open_plainly, output_errors, read_plainly
from densegrpo_fast.common.progress import clock_time
from densegrpo_fast.run_files.loggers import Loggers

logger = logging.getLogger(__name__)


class MetricsLog:
    """One JSON object per line, appended and flushed at once.

    A last line that was cut by a crash is dropped when the file is opened again.

    Args:
        path: the file; created if absent.

    Raises:
        OutputError: if the file cannot be written, here or in any method.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        with output_errors(f"cannot write {self.path}"):
            descriptor = open_plainly(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
            self._file = open(descriptor, "ab+")  # noqa: SIM115 - lives as long as the log
            self._cut_to_whole_lines(self._file.seek(0, os.SEEK_END))
        self._loggers: Loggers | None = None

    def records(self) -> list[dict[str, Any]]:
        """Everything written so far, oldest first.

        Raises:
            OutputError: if a line is not a record; the message gives its number.
        """
        try:
            with output_errors(f"cannot read {self.path}"):
                return read_metrics(self.path)
        except ValueError as error:
            raise OutputError(str(error)) from None

    def also(self, loggers: Loggers) -> None:
        """Let loggers show every record that is appended from here on; they are closed with the log."""
        self._loggers = loggers

    def show(self, record: Mapping[str, Any]) -> None:
        """Give a record to the loggers alone, such as an evaluation outside of the iterations."""
        if self._loggers is not None:
            self._loggers.log(record)

    def show_picture(self, name: str, path: Path, iteration: int) -> None:
        """Give a picture file to the loggers."""
        if self._loggers is not None:
            self._loggers.log_picture(name, path, iteration)

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and show it. Values are JSON data; a NaN or infinity becomes null."""
        line = json.dumps(finite(record), allow_nan=False)
        with output_errors(f"cannot write {self.path}"):
            self._file.write(line.encode("ascii") + b"\n")
            self._file.flush()
        self.show(record)

    def position(self) -> int:
        """Bytes written so far, all of them on disk: what a checkpoint stores to `truncate` to."""
        with output_errors(f"cannot write {self.path}"):
            os.fsync(self._file.fileno())
            return self._file.seek(0, os.SEEK_END)

    def digest(self) -> str:
        """SHA-256 of everything written so far: what a checkpoint stores to `truncate` with."""
        with output_errors(f"cannot read {self.path}"):
            self._file.seek(0)
            return hashlib.sha256(self._file.read()).hexdigest()

    def truncate(self, position: int, digest: str | None = None) -> None:
        """Drop the records after `position`, so that a resumed run writes each iteration once.

        A file that is shorter than that, or of another digest (None = not known), was changed by someone else, or by a
        disk: what there is stays, with a warning.
        """
        if position < 0:
            raise ValueError(f"MetricsLog.truncate: position must be at least 0, got {position}")
        with output_errors(f"cannot write {self.path}"):
            size = self._file.seek(0, os.SEEK_END)
            if size < position:
                logger.warning(
                    "%s: %d bytes where the checkpoint saw %d; records are missing", self.path, size, position
                )
            self._cut_to_whole_lines(min(size, position))
        if size >= position and digest not in (None, self.digest()):
            logger.warning(
                "%s: its records up to the checkpoint are not what was written; they stay as they are", self.path
            )

    def close(self) -> None:
        """Close the file and the loggers."""
        self._file.close()
        if self._loggers is not None:
            self._loggers.close()

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _cut_to_whole_lines(self, size: int) -> None:
        self._file.seek(0)
        whole = self._file.read(size).rfind(b"\n") + 1
        self._file.truncate(whole)


def read_metrics(path: Path | str) -> list[dict[str, Any]]:
    """The records of a metrics file, oldest first, under the names of today. A last line without its end is left out.

    Raises:
        OSError: if the file cannot be read.
        ValueError: if a line is not a JSON object; the message gives its number.
    """
    records: list[dict[str, Any]] = []
    for number, line in enumerate(read_plainly(Path(path)).split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number}: expected an object, got {type(record).__name__}")
        records.append({current_metric(name): value for name, value in record.items()})
    return records


class Progress:
    """Iteration, reward and time left: a bar on a terminal, one line per iteration elsewhere.

    The time left includes the evaluations that are still to come.

    Args:
        total: iterations of the whole run.
        done: iterations done before this process began.
        stream: where to write.
        clock: seconds that only grow.
        images: samples of an iteration, for the images per second; 0 = not shown.
        gpus: devices whose hours are counted; 0 = not shown.
        pauses: how many evaluations come after so many iterations.
    """

    def __init__(
        self,
        total: int,
        done: int = 0,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        *,
        images: int = 0,
        gpus: int = 0,
        pauses: Callable[[int], int] = lambda done: 0,
    ) -> None:
        self._total = total
        self._first = self._done = done
        self._stream = stream if stream is not None else sys.stderr
        self._clock, self._images, self._gpus, self._pauses = clock, images, gpus, pauses
        self._start = clock()
        self._paused: list[float] = []
        self._bar: Any = None
        if self._stream.isatty():
            form = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            options = {"unit": "it", "dynamic_ncols": True, "bar_format": form}
            self._bar = tqdm(total=total, initial=done, file=self._stream, **options)

    def update(self, iteration: int, **values: float) -> None:
        """Show that `iteration` iterations are done.

        Args:
            iteration: iterations done in the whole run.
            **values: numbers to show beside it, such as `reward=0.52`.
        """
        shown = {name: f"{value:.4g}" for name, value in values.items()} | self._pace(iteration)
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(iteration - self._done)
        else:
            words = "".join(f"  {name} {value}" for name, value in shown.items())
            self.write(f"iteration {iteration}/{self._total}{words}")
        self._done = iteration

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Within the context there is an evaluation, whose seconds are no iteration's."""
        start = self._clock()
        yield
        self._paused.append(self._clock() - start)

    def write(self, line: str) -> None:
        """Print a line without breaking the bar."""
        if self._bar is not None:
            self._bar.write(line, file=self._stream)
        else:
            print(line, file=self._stream, flush=True)

    def close(self) -> None:
        """Leave the bar as it is and end its line."""
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _pace(self, iteration: int) -> dict[str, str]:
        """Images per second, the time left, and hours of the GPUs so far and to the end."""
        finished, elapsed = iteration - self._first, self._clock() - self._start
        if finished < 1:
            return {"left": "?"}
        each = (elapsed - sum(self._paused)) / finished
        pause = sum(self._paused) / len(self._paused) if self._paused else 0.0
        left = each * (self._total - iteration) + pause * self._pauses(iteration)
        pace = {"images/s": f"{self._images / each:.3g}"} if self._images and each > 0 else {}
        pace["left"] = clock_time(left)
        if self._gpus:
            so_far, whole = (self._gpus * seconds / 3600 for seconds in (elapsed, elapsed + left))
            pace["GPU hours"] = f"{so_far:.2f} of {whole:.2f}"
        return pace
