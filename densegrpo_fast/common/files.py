"""Writing files so that they survive a crash, and saying plainly when they cannot be written."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from densegrpo_fast.common.errors import OutputError

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""Name of the file in an adapter directory, as diffusers has it."""

STAGE_SUFFIX = ".stage"
"""End of the name of a file that is being written; one left by a crash is safe to delete."""


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has it.

    Raises:
        OSError: as the operating system reports it, such as a full disk.
    """
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_directory(path: Path) -> None:
    """Wait until the disk has the names in a directory: without it, a rename may be undone by a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_text(path: Path, text: str) -> None:
    """Write a text file (UTF-8) as a whole: a reader finds the old content or the new one, never a part.

    Raises:
        OutputError: if it cannot be written; the old content stays.
    """
    replace_bytes(path, text.encode("utf-8"))


def replace_bytes(path: Path, data: bytes) -> None:
    """Write a file as a whole, as `replace_text` does.

    Raises:
        OutputError: if it cannot be written; the old content stays.
    """
    staged = path.with_name(f".{path.name}{STAGE_SUFFIX}")
    with output_errors(f"cannot write {path}"):
        try:
            write_durably(staged, data)
            os.replace(staged, path)
            sync_directory(path.parent)
        except OSError:
            staged.unlink(missing_ok=True)
            raise


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write JSON data as a whole, as `replace_text` does; NaN and infinities become null.

    Raises:
        OutputError: if it cannot be written.
    """
    replace_text(path, json.dumps(finite(document), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def finite(value: Any) -> Any:
    """JSON data with None in place of NaN and infinities, which JSON has not."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def unused_name(path: Path, word: str) -> Path:
    """The first of `NAME.word-1`, `NAME.word-2`, ... beside a path that nothing has yet."""
    number = 1
    while (unused := path.with_name(f"{path.name}.{word}-{number}")).exists():
        number += 1
    return unused


@contextmanager
def output_errors(action: str) -> Iterator[None]:
    """Turn an `OSError` raised inside into an `OutputError`.

    Args:
        action: what failed, such as "cannot save checkpoint PATH"; begins the message.
    """
    try:
        yield
    except OSError as error:
        raise OutputError(f"{action}: {error.strerror or error}") from error
