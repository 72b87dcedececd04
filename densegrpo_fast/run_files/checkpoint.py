"""Checkpoints that are whole or absent, notice a flipped bit, and continue only the run they belong to.

One checkpoint is a directory `step-NNNNNNNN` of safetensors files, a `state.json`, and a `manifest.json` with
the size and SHA-256 of each, the settings of the run, and a SHA-256 of its own. It is written beside under
another name, synced to disk, read back, and renamed: at every moment the directory holds only complete
checkpoints. What all processes have written (`run_files/shared_tensors.py`) lies in its folder `shared`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densegrpo_fast.common.aliases import comparable_settings, complete_settings
from densegrpo_fast.common.errors import CheckpointError, NonFiniteError, UsageError
from densegrpo_fast.common.files import (
    open_plainly,
    output_errors,
    read_plainly,
    sync,
    unused_name,
    write_durably,
)
from densegrpo_fast.common.fingerprint import canonical_json, differences, fingerprint
from densegrpo_fast.run_files.shared_tensors import SHARED

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
"""Version of the layout on disk. A checkpoint of another version is refused."""

_MANIFEST = "manifest.json"
_STATE = "state.json"
_NAME = re.compile(r"step-([0-9]{8,})")
_STAGE_PREFIX = ".stage-"
_GROUP = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]*")


class CorruptCheckpoint(Exception):
    """A checkpoint whose files are not what its manifest says; the message names the file and the reason."""


@dataclass(frozen=True)
class Checkpoint:
    """What was saved.

    Attributes:
        step: iterations done when it was saved.
        tensors: group name -> tensor name -> tensor on the CPU, in the saved dtype and shape.
        state: the JSON data saved with them.
        path: the directory it came from.
    """

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path

    @property
    def shared(self) -> Path | None:
        """The folder with the tensors that all processes have written, which are not in `tensors`; None without."""
        folder = self.path / SHARED
        return folder if folder.is_dir() else None


class CheckpointManager:
    """The checkpoints of one run.

    Only one process at a time may save (see `run_directory.RunLock`); any number may load.

    Args:
        directory: where the checkpoints are; created by the first save.
        keep: how many of the newest stay, at least 1.
        settings: what a run must keep to be continued, as JSON data (`Config.resume_settings()`, and a hash
            of the base model's weights if it has one). Stored in every checkpoint and compared before
            loading.
    """

    def __init__(self, directory: Path | str, keep: int, settings: Mapping[str, Any]) -> None:
        if keep < 1:
            raise ValueError(f"CheckpointManager: keep must be at least 1, got {keep}")
        self.directory = Path(directory)
        self.keep = keep
        self.settings = json.loads(canonical_json(dict(settings)))

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, oldest first, whether intact or not."""
        if not self.directory.is_dir():
            return []
        matches = (_NAME.fullmatch(entry.name) for entry in self.directory.iterdir() if entry.is_dir())
        return sorted(int(match[1]) for match in matches if match)

    def stage(self, step: int) -> Path | None:
        """A new folder for the tensors that all processes write before `save` is given it.

        Returns:
            None if the step is already saved and intact.

        Raises:
            OutputError: if it cannot be made.
        """
        target = self._path(step)
        if target.exists() and self._is_intact(target):
            return None
        with output_errors(f"cannot save checkpoint {target}"):
            self._clear_stages()
            folder = self._stage(target) / SHARED
            folder.mkdir(parents=True)
        return folder.resolve()

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: Mapping[str, Any],
        shared: Path | None = None,
    ) -> Path:
        """Save one checkpoint, then delete those that are no longer kept.

        A step that is already saved and intact is left as it is: a run reaches every step once.

        Args:
            step: iterations done, at least 0.
            tensors: group name -> tensor name -> tensor, on any device; each group becomes one file.
            state: JSON data; floats are kept to the bit.
            shared: the folder that `stage` has returned, with what all processes have written into it.

        Returns:
            The directory of the checkpoint.

        Raises:
            OutputError: if it cannot be written (full disk); NonFiniteError: if a tensor is not
                finite. The earlier checkpoints stay as they are and nothing half-written remains.
            ValueError: if `step` is negative, a group's name is not a plain word, or `state` holds a NaN.
            TypeError: if `state` is not JSON data.
        """
        if step < 0:
            raise ValueError(f"CheckpointManager.save: step must be at least 0, got {step}")
        files = _serialise(tensors, state)
        target = self._path(step)
        if target.exists() and self._is_intact(target):
            return target
        stage = self._stage(target)
        with output_errors(f"cannot save checkpoint {target}"):
            if shared is None:
                self._clear_stages()
                stage.mkdir(parents=True)
            try:
                self._write(stage, step, files)
                if target.exists():
                    # a corrupt one, which is not deleted
                    target.rename(unused_name(target, "corrupt"))
                os.replace(stage, target)
                sync(self.directory)
            except BaseException:
                shutil.rmtree(stage, ignore_errors=True)
                raise
        self._remove_old(step)
        return target

    def load_latest(self) -> Checkpoint:
        """Load the newest intact checkpoint, with a warning for every newer one that is not.

        Raises:
            CheckpointError: if there is none, none is intact, or the newest intact one was saved with
                other settings, each of which is named, or in another format version.
        """
        steps = self.steps()
        if not steps:
            raise CheckpointError(f"no checkpoint in {self.directory}")
        for step in reversed(steps):
            path = self._path(step)
            try:
                manifest, contents = _read_verified(path)
            except CorruptCheckpoint as error:
                logger.warning("checkpoint %s is corrupt (%s); trying the one before it", path, error)
                continue
            self._refuse_other_settings(path, manifest)
            return Checkpoint(step, *_deserialise(contents), path)
        raise CheckpointError(f"no intact checkpoint in {self.directory}: all {len(steps)} are corrupt")

    def _path(self, step: int) -> Path:
        return self.directory / f"step-{step:08d}"

    def _stage(self, target: Path) -> Path:
        return self.directory / f"{_STAGE_PREFIX}{target.name}"

    def _clear_stages(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        for entry in self.directory.iterdir():
            if entry.name.startswith(_STAGE_PREFIX):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()

    def _is_intact(self, path: Path) -> bool:
        try:
            manifest, _ = _read_verified(path)
        except CorruptCheckpoint:
            return False
        self._refuse_other_settings(path, manifest)
        return True

    def _write(self, stage: Path, step: int, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            write_durably(stage / name, data)
        about = {name: {"size": len(data), "sha256": _sha256(data)} for name, data in files.items()}
        for file in sorted((stage / SHARED).glob("*")):
            sync(file)
            about[f"{SHARED}/{file.name}"] = _about(file)
        if about.keys() != files.keys():
            sync(stage / SHARED)
        body = {
            "format_version": FORMAT_VERSION,
            "step": step,
            "fingerprint": fingerprint(self.settings),
            "settings": self.settings,
            "files": about,
        }
        manifest = {**body, "sha256": _sha256(canonical_json(body))}
        write_durably(stage / _MANIFEST, json.dumps(manifest, indent=1).encode("ascii"))
        sync(stage)
        try:
            _read_verified(stage)
        except CorruptCheckpoint as error:
            raise OSError(f"what was read back differs from what was written ({error})") from error

    def _refuse_other_settings(self, path: Path, manifest: Mapping[str, Any]) -> None:
        with _named(path):
            stored = comparable_settings(manifest["settings"])
        _refuse_differing(path, self.directory, stored, self.settings)

    def _remove_old(self, newest: int) -> None:
        # A corrupt checkpoint may stand ahead of the one just saved; it must not push good ones out.
        saved = [step for step in self.steps() if step <= newest]
        for step in saved[: -self.keep]:
            try:
                shutil.rmtree(self._path(step))
            except OSError as error:
                logger.warning("cannot delete old checkpoint %s: %s", self._path(step), error)


def newest_settings(directory: Path) -> dict[str, Any] | None:
    """The settings in the newest intact manifest of a run's checkpoints, by the names of today.

    Returns:
        None without any.

    Raises:
        CheckpointError: an option that is gone has a value with an effect, or the manifest is of another format.
    """
    for path in sorted(directory.glob(f"step-*/{_MANIFEST}"), reverse=True):
        try:
            settings = _read_manifest(path.parent)["settings"]
        except (CorruptCheckpoint, KeyError):
            continue
        if isinstance(settings, dict):
            with _named(path.parent):
                return complete_settings(settings)
    return None


def refuse_other_settings(directory: Path, settings: Mapping[str, Any]) -> None:
    """Refuse to go on with a run under other settings, before anything is loaded; without a checkpoint there are none.

    Args:
        directory: of the run's checkpoints.
        settings: as `CheckpointManager` takes them; what else a checkpoint holds is not compared yet.

    Raises:
        CheckpointError: naming each setting that differs.
    """
    stored = newest_settings(directory)
    if stored is not None:
        own = json.loads(canonical_json(dict(settings)))
        known = {key: value for key, value in comparable_settings(stored).items() if key in own}
        _refuse_differing(directory, directory, known, own)


def _refuse_differing(path: Path, directory: Path, stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    if fingerprint(stored) != fingerprint(own):
        differing = "\n  ".join(differences(stored, own))
        raise CheckpointError(
            f"{path} belongs to a run with other settings:\n  {differing}\n"
            f"`--resume {directory.parent}` goes on with the run's own; beside them only what does not change the "
            "training may differ, such as run.iterations and evaluation.every"
        )


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the checkpoint whose settings have an option that is gone."""
    try:
        yield
    except UsageError as error:
        raise CheckpointError(f"{path} belongs to a run with other settings: {error}") from None


def _serialise(tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> dict[str, bytes]:
    import safetensors.torch
    import torch

    files: dict[str, bytes] = {}
    for group, members in tensors.items():
        if not _GROUP.fullmatch(group):
            raise ValueError(f"CheckpointManager.save: a group's name must be a plain word, got {group!r}")
        for name, tensor in members.items():
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                raise NonFiniteError(f"not saved: {group} tensor {name} is not finite")
        # Safetensors refuses tensors that share memory; a copy of each shares nothing.
        copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in members.items()}
        files[f"{group}.safetensors"] = safetensors.torch.save(copies)
    files[_STATE] = json.dumps(dict(state), allow_nan=False).encode("ascii")
    return files


def _deserialise(contents: Mapping[str, bytes]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    import safetensors.torch

    tensors = {
        name.removesuffix(".safetensors"): safetensors.torch.load(data)
        for name, data in contents.items()
        if name.endswith(".safetensors")
    }
    return tensors, json.loads(contents[_STATE])


def _read_verified(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the content of every file it lists, each checked against it; of the shared ones no content.

    The bytes that were checked are the bytes that are returned, so nothing can change between check and use.
    """
    manifest = _read_manifest(path)
    contents: dict[str, bytes] = {}
    for name, expected in manifest["files"].items():
        own = name.removeprefix(f"{SHARED}/")
        if Path(own).name != own:
            raise CorruptCheckpoint(f"{_MANIFEST}: {name!r} is not the name of a file beside it")
        if own != name:
            try:
                found = _about(path / name)
            except OSError as error:
                raise CorruptCheckpoint(f"{name}: {error.strerror}") from error
            if found != expected:
                raise CorruptCheckpoint(f"{name}: its content does not match its checksum")
            continue
        data = _read(path / name)
        if len(data) != expected["size"]:
            raise CorruptCheckpoint(f"{name}: {len(data)} bytes instead of {expected['size']}")
        if _sha256(data) != expected["sha256"]:
            raise CorruptCheckpoint(f"{name}: its content does not match its checksum")
        contents[name] = data
    return manifest, contents


def _read_manifest(path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_read(path / _MANIFEST))
        checksum = manifest.pop("sha256")
        intact = checksum == _sha256(canonical_json(manifest))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise CorruptCheckpoint(f"{_MANIFEST}: its content does not match its checksum")
    version = manifest["format_version"]
    if version != FORMAT_VERSION:
        raise CheckpointError(f"{path}: checkpoint format {version}, this program reads {FORMAT_VERSION}")
    match = _NAME.fullmatch(path.name.removeprefix(_STAGE_PREFIX))
    if match is None or manifest["step"] != int(match[1]):
        raise CorruptCheckpoint(f"{_MANIFEST}: it is the manifest of step {manifest['step']}")
    return manifest


def _read(path: Path) -> bytes:
    try:
        return read_plainly(path)
    except OSError as error:
        raise CorruptCheckpoint(f"{path.name}: {error.strerror}") from error


def _about(file: Path) -> dict[str, Any]:
    """Size and digest of a file, of which a part is read at a time."""
    with os.fdopen(open_plainly(file, os.O_RDONLY), "rb") as opened:
        digest = hashlib.file_digest(opened, "sha256")
        return {"size": opened.tell(), "sha256": digest.hexdigest()}


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
