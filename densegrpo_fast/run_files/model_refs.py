"""What `sample` and `evaluate` can be pointed at: the base model, an adapter, or a run directory.

A subject is named on the command line and located before torch is imported; its weights are read later.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densegrpo_fast.common.errors import SetupError, UsageError
from densegrpo_fast.config.yaml_files import BASE_PRESET, read_settings

if TYPE_CHECKING:
    from torch import Tensor

    from densegrpo_fast.models.base import FlowModel

logger = logging.getLogger(__name__)

BASE = "base"
"""The name of the model as it comes, without an adapter."""

# models/lora.py has it too, and imports torch
_ADAPTER_FILE = "pytorch_lora_weights.safetensors"


@dataclass(frozen=True)
class ModelRef:
    """One thing to look at.

    Attributes:
        name: as it was written on the command line.
        run: the run directory that it belongs to, whose `config.yaml` describes its model; None if there is none.
        adapter: its adapter file; None for the base model, and for a run that has only checkpoints so far.
    """

    name: str
    run: Path | None = None
    adapter: Path | None = None


@dataclass(frozen=True)
class Weights:
    """An adapter that was read.

    Attributes:
        layers: as `lora.lora_layers` returns them; None for the base model.
        origin: where they come from, in words.
        base: `lora.base_fingerprint` of the model that they were trained on, if their run's checkpoints tell.
    """

    layers: dict[str, Tensor] | None
    origin: str
    base: str | None = None

    def fingerprint(self) -> str | None:
        """SHA-256 over names and values of the layers; None for the base model."""
        if self.layers is None:
            return None
        digest = hashlib.sha256()
        for name, tensor in sorted(self.layers.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().tobytes())
        return digest.hexdigest()


def locate(name: str) -> ModelRef:
    """Find what a name on the command line stands for.

    Args:
        name: "base"; a run directory; an adapter directory, or its file.

    Raises:
        SetupError: if it is none of these, or a run without an adapter or checkpoint.
    """
    if name == BASE:
        return ModelRef(name)
    path = Path(name).expanduser()
    file = path if path.is_file() else path / _ADAPTER_FILE
    if file.is_file():
        above = file.parent.parent
        return ModelRef(name, above if (above / "config.yaml").is_file() else None, file)
    if not (path / "config.yaml").is_file():
        problem = "there is no such file or directory" if not path.exists() else f"it holds no {_ADAPTER_FILE}"
        raise SetupError(f"{name}: {problem}; expected {BASE}, a run directory or an adapter directory")
    exported = path / "adapter" / _ADAPTER_FILE
    if not exported.is_file() and _newest_manifest(path) is None:
        raise SetupError(f"{name}: this run has no adapter and no checkpoint yet")
    return ModelRef(name, path, exported if exported.is_file() else None)


def settings_source(subjects: Sequence[ModelRef], config: str | None) -> str:
    """The configuration that describes the model of several subjects.

    Args:
        config: what the user asked for; None = the settings of the first subject that belongs to a run, else the
            base preset.

    Returns:
        A preset's name or the path of a file.
    """
    if config is not None:
        return config
    runs = [subject.run for subject in subjects if subject.run is not None]
    return str(runs[0] / "config.yaml") if runs else BASE_PRESET


def check_models(subjects: Sequence[ModelRef], model: str) -> None:
    """Refuse runs of another model.

    Args:
        model: `model.path` of the configuration that all subjects are looked at with.

    Raises:
        UsageError: naming the run and both models.
    """
    for subject in subjects:
        if subject.run is None:
            continue
        trained = read_settings(str(subject.run / "config.yaml")).get("model", {}).get("path")
        if trained != model:
            raise UsageError(
                f"{subject.name}: this run trained the model {trained}, model.path is {model}; "
                "look at runs of different models one at a time",
            )


def read_weights(subject: ModelRef) -> Weights:
    """Read a subject's adapter: the exported one, which is the running average if the run keeps one.

    Of a run that is not finished, the newest intact checkpoint is taken.

    Raises:
        SetupError: if the file is no adapter; CheckpointError: if no checkpoint is intact.
    """
    from densegrpo_fast.models.lora import read_lora

    if subject.adapter is not None:
        try:
            layers = read_lora(subject.adapter)
        except ValueError as error:
            raise SetupError(str(error)) from None
        manifest = None if subject.run is None else _newest_manifest(subject.run)
        return Weights(layers, "exported adapter", _base_of(manifest))
    if subject.run is None:
        return Weights(None, "the model as it comes")
    return _checkpoint_weights(subject.run)


@contextmanager
def with_adapter(model: FlowModel, subject: ModelRef, weights: Weights) -> Iterator[None]:
    """Within the context, the model has the subject's adapter.

    Raises:
        SetupError: if the adapter does not fit the model.
    """
    from densegrpo_fast.models.lora import attached_lora, base_fingerprint

    if weights.layers is None:
        yield
        return
    with ExitStack() as stack:
        try:
            stack.enter_context(attached_lora(model.network, weights.layers))
        except ValueError as error:
            raise SetupError(f"{subject.name}: {error}") from None
        if weights.base is not None and weights.base != base_fingerprint(model.network):
            logger.warning(
                "%s: the loaded model is not the one that this run trained, or is in another precision", subject.name
            )
        yield


def _checkpoint_weights(run: Path) -> Weights:
    from densegrpo_fast.models.lora import lora_layers
    from densegrpo_fast.run_files.checkpoint import CheckpointManager

    manifest = _newest_manifest(run)
    assert manifest is not None  # `locate` has looked
    settings = manifest["settings"]
    # by its own settings: what is asked is whether the files are whole, not whether a run may go on
    checkpoint = CheckpointManager(run / "checkpoints", 1, settings).load_latest()
    kind = "ema" if "ema" in checkpoint.tensors else "adapter"
    names = {"ema": "running average", "adapter": "adapter"}
    lora = settings["lora"]
    layers = lora_layers(checkpoint.tensors[kind], rank=lora["rank"], alpha=lora["alpha"])
    return Weights(layers, f"{names[kind]} at iteration {checkpoint.step}", _base_of(manifest))


def _base_of(manifest: Mapping[str, Any] | None) -> str | None:
    return None if manifest is None else manifest["settings"].get("base_weights")


def _newest_manifest(run: Path) -> dict[str, Any] | None:
    """The newest readable manifest of a run's checkpoints; None without any."""
    for path in sorted((run / "checkpoints").glob("step-*/manifest.json"), reverse=True):
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(manifest, dict) and isinstance(manifest.get("settings"), dict):
            return manifest
    return None
