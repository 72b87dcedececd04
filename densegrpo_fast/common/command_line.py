"""What the commands beside training share: a parser described by the module, and checks before any work.

Importing it needs the standard library alone, so that a command's `--help` works without any other package.
"""

from __future__ import annotations

import argparse
import errno
import os
from contextlib import suppress
from pathlib import Path

from densegrpo_fast.common.errors import OutputError, UsageError
from densegrpo_fast.common.files import output_errors


def command_parser(name: str, docstring: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring: its first paragraph above the options, the rest below.

    Args:
        name: of the command, as in `python -m densegrpo_fast.NAME`.
        docstring: the module's.
    """
    summary, _, rest = (docstring or "").partition("\n\n")
    return argparse.ArgumentParser(
        prog=f"python -m densegrpo_fast.{name}",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def refuse_processes(name: str) -> None:
    """Refuse to run a command on several processes that does everything in each of them.

    Raises:
        UsageError: torchrun, or a script in its place, has started more than one.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UsageError(
            f"densegrpo_fast.{name} runs in one process, and there are {os.environ['WORLD_SIZE']} (WORLD_SIZE): start "
            "it without torchrun; densegrpo_fast.train shares its work among several"
        )


def check_outputs(options: argparse.Namespace, *names: str) -> None:
    """Check that the files that options name could be written, as far as that can be told without writing.

    Args:
        options: the parsed command line.
        names: of options that hold a path or None.

    Raises:
        OutputError: if a file's directory does not exist or cannot be written in, or nothing can have such a name.
    """
    for name in names:
        path: Path | None = getattr(options, name)
        if path is not None:
            check_output(f"--{name}", path)


def check_output(option: str, path: Path) -> None:
    """Check one of them; see `check_outputs`."""
    parent = path.absolute().parent
    if not os.path.isdir(parent):  # Path.is_dir raises for a name that is too long
        raise OutputError(f"{option}: there is no directory {path.parent}")
    with output_errors(f"{option}: cannot write {path}"):
        if not os.access(parent, os.W_OK):
            raise PermissionError(errno.EACCES, f"no permission to write in {parent}")
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "it is a directory")
        with suppress(FileNotFoundError):
            os.lstat(path)


def positive(text: str) -> int:
    """The type of an option that takes a whole number of at least 1.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)
