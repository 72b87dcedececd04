"""Encoded prompts on disk, so that the text encoders need not stay in memory, nor be loaded at all the next time.

One safetensors file per prompt, named by what it holds: SHA-256 over the encoders, the precision, the length of the T5
block and the prompt. Runs may share a directory, also at the same time. A file is about 1.7 MB for SD3.5 at 205 tokens.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.common.files import STAGE_SUFFIX, output_errors, write_durably
from densegrpo_fast.common.fingerprint import fingerprint

logger = logging.getLogger(__name__)

_PIECES, _PIECE = 64, 4096
_WHOLE = "sha256_of_names_and_values"
"""Key of the checksum in a file's header."""


class PromptCache:
    """A `PromptStore` (`models/diffusers_model.py`) in a directory.

    Args:
        directory: made if absent.
        settings: what an encoding depends on besides the prompt, as JSON data.

    Raises:
        OutputError: if the directory cannot be made, here, or written, in `keep`.
    """

    def __init__(self, directory: Path, settings: Mapping[str, Any]):
        self.directory, self.settings = directory, dict(settings)
        with output_errors(f"model.prompt_cache: cannot use {directory}"):
            directory.mkdir(parents=True, exist_ok=True)

    def path(self, prompt: str) -> Path:
        """The file of a prompt, whether or not it is there."""
        name = fingerprint({"settings": self.settings, "prompt": prompt})
        return self.directory / name[:2] / f"{name}.safetensors"

    def holds(self, prompt: str) -> bool:
        """Whether there is a file of the right length for the prompt; `find` also checks its content."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path(prompt), "pt") as file:
                return bool(file.keys())
        except (OSError, SafetensorError):
            return False

    def find(self, prompt: str) -> dict[str, Tensor] | None:
        """The prompt's tensors by name, on the CPU; None if absent, with a warning if damaged."""
        from safetensors import SafetensorError, safe_open

        path = self.path(prompt)
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
                stored = file.metadata() or {}
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError) as error:
            problem = str(error)
        else:
            # earlier versions kept a checksum without the names
            kept = (
                stored[_WHOLE] == _checksum(tensors) if _WHOLE in stored else stored.get("sha256") == _values(tensors)
            )
            if tensors and kept:
                return tensors
            problem = "its checksum is not that of its content"
        logger.warning("model.prompt_cache: %s is damaged (%s); the prompt is encoded again", path, problem)
        return None

    def keep(self, prompt: str, tensors: Mapping[str, Tensor]) -> None:
        """Write a prompt's file as a whole; a reader finds none, the old one or the new one."""
        from safetensors.torch import save

        path = self.path(prompt)
        staged = path.with_name(f".{path.name}.{os.getpid()}{STAGE_SUFFIX}")
        data = save({name: t.contiguous() for name, t in tensors.items()}, metadata={_WHOLE: _checksum(tensors)})
        with output_errors(f"model.prompt_cache: cannot write {path}"):
            path.parent.mkdir(exist_ok=True)
            try:
                write_durably(staged, data)
                os.replace(staged, path)
            finally:
                staged.unlink(missing_ok=True)


def files_fingerprint(directory: Path, files: list[Path]) -> str:
    """SHA-256 over names, sizes, and small files or pieces of large ones (64 of 4 kB): no time, whatever the size.

    Args:
        directory: what the names are relative to.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.relative_to(directory).as_posix()}\0{size}\0".encode())
        with open(path, "rb") as file:
            if size <= _PIECES * _PIECE:
                digest.update(file.read())
                continue
            for piece in range(_PIECES):
                file.seek((size - _PIECE) * piece // (_PIECES - 1))
                digest.update(file.read(_PIECE))
    return digest.hexdigest()


def _checksum(tensors: Mapping[str, Tensor]) -> str:
    return hashlib.sha256(f"{sorted(tensors)}{_values(tensors)}".encode()).hexdigest()


def _values(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
