"""What a command does at its end when nothing else has: one line for what nobody foresaw, and streams that last.

No traceback reaches a terminal: it is written to the run's directory, or to a temporary file, for a report.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TextIO

_SHOWN = 300

directories: list[Path] = []
"""Where a traceback goes if it can: the directory of the run that was opened last."""


def explain(error: BaseException) -> tuple[str, type[BaseException] | None]:
    """What an unforeseen error means for the user.

    Returns:
        One line, and the class among Python's own that says whose fault it is: `ImportError` a package is missing or
        does not work, `MemoryError`, `OSError` a file cannot be written; None = a fault of this program.
    """
    names = {kind.__name__ for cause in _causes(error) for kind in type(cause).__mro__}
    said = " ".join(f"{type(error).__name__}: {_message(error)}".split())[:_SHOWN]
    compiler = {"InductorError", "BackendCompilerFailed", "TorchDynamoException", "CompilationError"}
    if names & {"OutOfMemoryError", "MemoryError"} or "not enough memory" in said:
        return f"the memory ran out: {said}; lower sampler.micro_batch and lookahead.chunk", MemoryError
    caches = [
        os.environ.get(name) or default
        for name, default in (
            ("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_USER"),
            ("TRITON_CACHE_DIR", "~/.triton/cache"),
        )
    ]
    # a library in there that is cut off is told by the system's loader
    if names & compiler or any(cache.removesuffix("USER").removeprefix("~") in said for cache in caches):
        way_out = "set model.compile to null, or delete the compiler's caches"
        return f"torch.compile failed: {said}; {way_out}, {' and '.join(caches)}", ImportError
    if isinstance(error, ImportError):
        package = (error.name or "a package").partition(".")[0]
        return f"the package {package} is missing or does not work here: {said}; install it again", ImportError
    if isinstance(error, OSError) and error.errno is not None:
        return said, OSError
    return f"unforeseen {said} (in {_place(error)}); this should not happen, please report it", None


def keep_traceback(error: BaseException) -> Path | None:
    """Write an error's traceback to a file; None if no place takes it."""
    text = "".join(traceback.format_exception(error))
    for directory in [*reversed(directories), Path(tempfile.gettempdir())]:
        with suppress(OSError):
            if directory.is_dir():
                descriptor, name = tempfile.mkstemp(".txt", "error-", directory)
                with open(descriptor, "w", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(text)
                return Path(name)
    return None


class LastingStream:
    """A text stream that falls silent, instead of failing, when its terminal, pipe or disk is gone.

    Args:
        stream: a standard stream.
    """

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write text; what the encoding does not have is written as escapes."""
        try:
            self._lasting(lambda: self._stream.write(text))
        except UnicodeEncodeError:
            coding = self._stream.encoding or "ascii"
            self._lasting(lambda: self._stream.write(text.encode(coding, "backslashreplace").decode(coding)))
        return len(text)

    def flush(self) -> None:
        """Flush, if anybody is there."""
        self._lasting(self._stream.flush)

    def _lasting(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except UnicodeEncodeError:
            raise
        except (OSError, ValueError):
            # also what is flushed when the interpreter ends goes nowhere
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def lasting_streams() -> Iterator[None]:
    """Within the context, the standard streams are `LastingStream`s."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (
        stream if stream is None or isinstance(stream, LastingStream) else LastingStream(stream) for stream in before
    )  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        sys.stdout, sys.stderr = before


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return "(its message cannot be read)"


def _place(error: BaseException) -> str:
    """File and line where an error arose, without the directories of this machine."""
    frames = traceback.extract_tb(error.__traceback__)
    if not frames:
        return "an unknown place"
    path = Path(frames[-1].filename)
    return f"{'/'.join(path.parts[-2:])}, line {frames[-1].lineno}"
