"""What the exit status of every command means, and the status that each error of `errors.py` ends with.

Schedulers and scripts branch on these numbers, so they are part of the public interface and never change
meaning.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from signal import Signals

from densegrpo_fast.common.errors import (
    CheckpointError,
    NonFiniteError,
    OutputError,
    PluginError,
    RewardError,
    SetupError,
    UsageError,
    UserError,
)
from densegrpo_fast.common.last_resort import explain, keep_traceback, lasting_streams


class ExitCode(IntEnum):
    """Exit status of the commands of this package; what 2 to 7 mean is said by the errors that end with them."""

    OK = 0
    """The command did what was asked."""
    PROBLEM = 1
    """The doctor found something on this machine that will fail."""
    USAGE = 2
    """`UsageError`."""
    ENVIRONMENT = 3
    """`SetupError`."""
    CHECKPOINT = 4
    """`CheckpointError`."""
    REWARD = 5
    """`RewardError` or `PluginError`."""
    NON_FINITE = 6
    """`NonFiniteError`."""
    OUTPUT = 7
    """`OutputError`."""
    RATIO = 8
    """The doctor found that the importance ratio of an unchanged policy is not 1."""
    FAULT = 70
    """Something that nobody foresaw; the message names the file with its traceback (EX_SOFTWARE)."""
    TERMINATED = 75
    """SIGTERM: everything was saved; run again with --resume (EX_TEMPFAIL, which schedulers requeue)."""
    INTERRUPTED = 130
    """Ctrl-C: everything was saved; run again with --resume."""


EXIT_CODES: dict[type[UserError], ExitCode] = {
    UsageError: ExitCode.USAGE,
    SetupError: ExitCode.ENVIRONMENT,
    CheckpointError: ExitCode.CHECKPOINT,
    RewardError: ExitCode.REWARD,
    PluginError: ExitCode.REWARD,
    NonFiniteError: ExitCode.NON_FINITE,
    OutputError: ExitCode.OUTPUT,
}
"""The exit status that each class of error ends a command with."""


def exit_code_of(error: UserError) -> ExitCode:
    """The exit status that an error ends a command with."""
    return next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))


OF_SIGNALS = {Signals.SIGTERM: ExitCode.TERMINATED, Signals.SIGINT: ExitCode.INTERRUPTED}
"""The exit status after a signal that stopped a run in an orderly way."""


_OF_KINDS = {ImportError: ExitCode.ENVIRONMENT, MemoryError: ExitCode.ENVIRONMENT, OSError: ExitCode.OUTPUT}
"""The exit status for each class that `last_resort.explain` tells."""


@contextmanager
def user_errors_exit() -> Iterator[None]:
    """Turn whatever is raised inside into `error: MESSAGE` on stderr and an exit status, without a traceback.

    Within the context a dead terminal or pipe ends nothing (`last_resort.LastingStream`).

    Raises:
        SystemExit: in place of the error, with its exit code.
    """
    if threading.current_thread() is threading.main_thread() and signal.getsignal(Signals.SIGINT) is signal.SIG_DFL:
        signal.signal(
            Signals.SIGINT, signal.default_int_handler
        )  # commands begin without, so that imports end silently
    with lasting_streams():
        try:
            yield
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            raise SystemExit(int(exit_code_of(error))) from None
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            raise SystemExit(int(ExitCode.INTERRUPTED)) from None
        except Exception as error:
            words, kind = explain(error)
            kept = keep_traceback(error)
            print(f"error: {words}" + ("" if kept is None else f"; traceback: {kept}"), file=sys.stderr)
            raise SystemExit(int(ExitCode.FAULT if kind is None else _OF_KINDS[kind])) from None
