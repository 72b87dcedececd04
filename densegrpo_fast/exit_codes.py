"""What the exit status of every command means, and the error a user is meant to read.

Schedulers and scripts branch on these numbers, so they are part of the public interface and never change
meaning.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum


class ExitCode(IntEnum):
    """Exit status of the commands of this package."""

    OK = 0
    """The command did what was asked."""
    PROBLEM = 1
    """The doctor found something on this machine that will fail."""
    USAGE = 2
    """An option, a configuration file or a prompt file is wrong."""
    ENVIRONMENT = 3
    """A model, a package or an optional extra is missing."""
    CHECKPOINT = 4
    """No usable checkpoint, or one that belongs to other settings."""
    REWARD = 5
    """A reward raised, returned something unusable, or too many of its scores are missing."""
    NON_FINITE = 6
    """Too many non-finite losses or gradients in a row."""
    OUTPUT = 7
    """The output cannot be written: full disk, no permission, or the directory of another run."""
    RATIO = 8
    """The doctor found that the importance ratio of an unchanged policy is not 1."""
    TERMINATED = 75
    """SIGTERM: everything was saved; run again with --resume (EX_TEMPFAIL, which schedulers requeue)."""
    INTERRUPTED = 130
    """Ctrl-C: everything was saved; run again with --resume."""


class UserError(Exception):
    """A failure that the user can act on: shown as a message, never as a traceback.

    Args:
        message: what is wrong and what to do about it, as plain text.
        exit_code: the status the process should end with.
    """

    def __init__(self, message: str, exit_code: ExitCode) -> None:
        super().__init__(message)
        self.exit_code = ExitCode(exit_code)


@contextmanager
def user_errors_exit() -> Iterator[None]:
    """Turn a `UserError` raised inside into `error: MESSAGE` on stderr and its exit status.

    Raises:
        SystemExit: in place of the `UserError`, with its exit code.
    """
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(int(error.exit_code)) from None
