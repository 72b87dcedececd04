"""Stopping in an orderly way on SIGTERM and Ctrl-C."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from densegrpo_fast.common.exit_codes import ExitCode

_EXIT_CODES = {signal.SIGTERM: ExitCode.TERMINATED, signal.SIGINT: ExitCode.INTERRUPTED}

_SAME_REQUEST_SECONDS = 1.0
"""Launchers often deliver one request twice, to the process and to its group; that is still one request."""


class GracefulStop:
    """Turn the first SIGTERM or Ctrl-C into a flag, and let the second one end the process at once.

        with GracefulStop() as stop:
            for iteration in ...:
                ...
                if stop.requested:
                    save()
                    return stop.exit_code

    Must be entered in the main thread. The handlers that were there before come back on exit.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._signal: signal.Signals | None = None
        self._requested_at = 0.0
        self._earlier: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self._signal is not None

    @property
    def exit_code(self) -> ExitCode:
        """The status to end with once all is saved: 75 after SIGTERM, 130 after Ctrl-C, 0 after neither."""
        return ExitCode.OK if self._signal is None else _EXIT_CODES[self._signal]

    def __enter__(self) -> GracefulStop:
        self._earlier = {number: signal.signal(number, self._receive) for number in _EXIT_CODES}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = self._clock()
        if self._signal is None:
            self._signal = signal.Signals(number)
            self._requested_at = now
        elif now - self._requested_at >= _SAME_REQUEST_SECONDS:
            # Checkpoints are whole or absent at every moment, so dying here loses no more than one interval.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
