"""What the library raises where the user can act: one class for each kind of failure.

The text says what is wrong and what to do about it. The commands print it as `error: TEXT`, without a traceback, and
end with the exit code of the class (`exit_codes.py`); as a library, catch `UserError` or one of its classes.
"""

from __future__ import annotations


class UserError(Exception):
    """A failure that the user can act on; always raised as one of the classes below."""


class UsageError(UserError):
    """An option, a configuration file or a prompt file is wrong."""


class SetupError(UserError):
    """A model, a package or an optional extra is missing, or the machine is too small."""


class CheckpointError(UserError):
    """No usable checkpoint, or one that belongs to other settings."""


class RewardError(UserError):
    """A reward raised, returned something unusable, or too many of its scores are missing.

    Attributes:
        name: the reward's name in its mixture; None where no single reward is to blame.
    """

    def __init__(self, message: str, name: str | None = None):
        super().__init__(message)
        self.name = name


class PluginError(UserError):
    """Code of one's own (a credit method, a policy loss, step weights, a model) raised, exited or returned something
    unusable; for rewards see `RewardError`."""


class NonFiniteError(UserError):
    """Too many losses or gradients in a row were not finite, or weights or pictures are not."""


class OutputError(UserError):
    """The output cannot be written: full disk, no permission, or the directory of another run."""
