"""One command for all: `densegrpo COMMAND ...`, or `python -m densegrpo_fast COMMAND ...`.

A command is imported when it is asked for, so that this needs the standard library alone.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from densegrpo_fast import __version__
from densegrpo_fast.common.errors import SetupError, UsageError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.common.suggest import did_you_mean

COMMANDS = {
    "train": ("train", "align a model with a reward for every denoising step"),
    "sample": ("sample", "draw pictures with a base model or an adapter"),
    "watch": ("watch", "show a run's report while it trains"),
    "compare": ("compare", "compare finished runs, in text and as a page"),
    "evaluate": ("evaluate", "score models, runs and picture files on held-out prompts"),
    "fidelity": ("fidelity.__main__", "measure how far cheap lookaheads can be trusted, and what they cost"),
    "calibrate": ("calibrate", "find the noise level of each step at which reward gains are balanced"),
    "preview": ("preview", "fit a preview decoder to the policy's own pictures"),
    "doctor": ("doctor.__main__", "examine this machine, or the importance ratio of a configuration"),
    "launch": ("launch", "run another codebase's training script on the ops of this package"),
    "serve": ("rewards.server", "serve a reward over HTTP"),
}
"""Name of a command -> its module in this package, and what it does."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code of the command."""
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or ["--help"]
    if name in ("-h", "--help"):
        lines = [f"  {command:10} {summary}" for command, (_, summary) in COMMANDS.items()]
        print("usage: densegrpo COMMAND ...\n", *lines, "", "densegrpo COMMAND --help tells the options.", sep="\n")
        return int(ExitCode.OK)
    if name == "--version":
        print(f"densegrpo-fast {__version__}")
        return int(ExitCode.OK)
    with user_errors_exit():
        if name not in COMMANDS:
            raise UsageError(
                f"densegrpo: there is no command {name!r}{did_you_mean(name, COMMANDS)} (known: {', '.join(COMMANDS)})"
            )
        try:
            module = import_module(f"densegrpo_fast.{COMMANDS[name][0]}")
        except ModuleNotFoundError as error:
            if str(error.name).startswith("densegrpo_fast"):
                raise
            raise SetupError(f'densegrpo {name} needs {error.name}: pip install "densegrpo-fast[train]"') from None
    return int(module.main(rest) or ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
