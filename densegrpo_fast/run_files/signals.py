"""Stopping in an orderly way on SIGTERM and Ctrl-C."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

logger = logging.getLogger(__name__)

_STOPPING = (signal.SIGTERM, signal.SIGINT)

_SAME_REQUEST_SECONDS = 1.0
"""Launchers often deliver one request twice, to the process and to its group; that is still one request."""


class GracefulStop:
    """Turn the first SIGTERM or Ctrl-C into a flag, and let the second one end the process at once.

        with GracefulStop() as stop:
            for iteration in ...:
                ...
                if stop.requested:
                    save()
                    break

    A SIGHUP, of a terminal that is gone, is ignored. Outside of the main thread no signal can be received, which is
    logged. The handlers that were there before come back on exit.

    Args:
        clock: seconds that only grow.

    Attributes:
        signal: the first that arrived; None so far.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.signal: signal.Signals | None = None
        self._requested_at = 0.0
        self._earlier: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has arrived."""
        return self.signal is not None

    def __enter__(self) -> GracefulStop:
        if threading.current_thread() is not threading.main_thread():
            logger.warning("not in the main thread: SIGTERM and Ctrl-C do not end this run in an orderly way")
            return self
        self._earlier = {number: signal.signal(number, self._receive) for number in _STOPPING}
        if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
            self._earlier[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = self._clock()
        if self.signal is None:
            self.signal = signal.Signals(number)
            self._requested_at = now
        elif now - self._requested_at >= _SAME_REQUEST_SECONDS:
            # Checkpoints are whole or absent at every moment, so dying here loses no more than one interval.
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
