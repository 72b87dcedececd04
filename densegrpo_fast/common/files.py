"""Writing files so that they survive a crash, and saying plainly when they cannot be written."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from densegrpo_fast.common.errors import OutputError

ADAPTER_FILE = "pytorch_lora_weights.safetensors"
"""Name of the file in an adapter directory, as diffusers has it."""

PEFT_CONFIG, PEFT_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
"""Names of the files in an adapter directory of PEFT."""

SUMS = "SHA256SUMS"
"""Name of the file that holds the digests of a directory's files: `sha256sum -c SHA256SUMS` checks them."""

_SUM = re.compile(r"([0-9a-f]{64})  ([^/]+)")

STAGE_SUFFIX = ".stage"
"""End of the name of a file that is being written; one left by a crash is safe to delete."""


def open_plainly(path: Path, flags: int) -> int:
    """Open a file of the project's own to write in it: no link is followed, and nothing but a plain file is opened.

    Args:
        flags: of `os.open`.

    Returns:
        The descriptor.

    Raises:
        OSError: as the operating system reports it; ELOOP for a link, EINVAL for a fifo, a device or a directory.
    """
    # without O_NONBLOCK a fifo would be waited for
    descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a plain file", str(path))
    return descriptor


def user_path(text: str) -> Path:
    """A path as a user wrote it, with `~` replaced where there is such a home directory."""
    return Path(os.path.expanduser(text))


def write_durably(path: Path, data: bytes) -> None:
    """Write a new file and wait until the disk has it; what stands there under that name is replaced, not followed.

    Raises:
        OSError: as the operating system reports it, such as a full disk.
    """
    with open(open_plainly(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a directory, without which a power cut may undo a rename."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_bytes(path: Path, data: bytes, *, digest: bool = False) -> None:
    """Write a file as a whole: a reader finds the old content or the new one, never a part.

    Args:
        digest: also note its SHA-256 in `SUMS` beside it, for `read_verified`.

    Raises:
        OutputError: if it cannot be written; the old content stays.
    """
    with output_errors(f"cannot write {path}"):
        if not digest:
            _replace(path, data)
            return
        known = sums(path.parent)
        others = [line for line in known if line[1] != path.name]
        new, before = (hashlib.sha256(data).hexdigest(), path.name), [line for line in known if line[1] == path.name]
        # nothing replaces two files at once: in between, the old content is as good as the new one
        _replace(path.with_name(SUMS), _lines([*others, *before, new]))
        _replace(path, data)
        if before:
            _replace(path.with_name(SUMS), _lines([*others, new]))


def _replace(path: Path, data: bytes) -> None:
    staged = path.with_name(f".{path.name}{STAGE_SUFFIX}")
    try:
        write_durably(staged, data)
        os.replace(staged, path)
        sync(path.parent)
    except OSError:
        with suppress(OSError):
            staged.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str, *, digest: bool = False) -> None:
    """`replace_bytes` of a text in UTF-8."""
    replace_bytes(path, text.encode("utf-8"), digest=digest)


def read_plainly(path: Path) -> bytes:
    """The content of a file; a fifo, a device or a directory in its place is not waited for.

    Raises:
        OSError: it cannot be read, or is no plain file.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise OSError(errno.EINVAL, "not a plain file", str(path))
        return file.read()


def read_verified(path: Path) -> bytes:
    """The content of a file, checked against its digest if `SUMS` beside it has one.

    Raises:
        OSError: it cannot be read, or is not what was written; the message says so.
    """
    data = read_plainly(path)
    written = [digest for digest, name in sums(path.parent) if name == path.name]
    if written and hashlib.sha256(data).hexdigest() not in written:
        way_out = "if it was changed on purpose, delete that file"
        raise OSError(errno.EIO, f"it is not what was written, by {SUMS} beside it; {way_out}")
    return data


def verify_directory(directory: Path) -> None:
    """Check every file of a directory that has a digest there.

    Raises:
        OSError: one is missing or not what was written.
    """
    for _, name in sums(directory):
        try:
            read_verified(directory / name)
        except OSError as error:
            raise OSError(error.errno, f"{name}: {error.strerror}") from None


def sums(directory: Path) -> list[tuple[str, str]]:
    """Digest and name of the files that a directory holds the digests of, in the form of sha256sum."""
    try:
        lines = read_plainly(directory / SUMS).decode("utf-8", "replace").splitlines()
    except OSError:
        return []
    return [(found[1], found[2]) for line in lines if (found := _SUM.fullmatch(line))]


def _lines(sums: Sequence[tuple[str, str]]) -> bytes:
    return "".join(f"{digest}  {name}\n" for digest, name in sorted({*sums}, key=lambda line: line[1])).encode()


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
