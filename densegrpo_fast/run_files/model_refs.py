"""What `sample` and `evaluate` can be pointed at: the base model, an adapter, a trained network, or a run directory.

A model is named on the command line and located before torch is imported; its weights are read later.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from densegrpo_fast.common.errors import OutputError, SetupError, UsageError
from densegrpo_fast.common.files import ADAPTER_FILE, PEFT_WEIGHTS, read_verified, user_path
from densegrpo_fast.config.yaml_files import BASE_PRESET, read_settings
from densegrpo_fast.run_files.checkpoint import CheckpointManager, newest_settings
from densegrpo_fast.run_files.run_directory import ADAPTER, CHECKPOINTS, CONFIG_FILE, NETWORK
from densegrpo_fast.run_files.shared_tensors import read_shared, shared_names

if TYPE_CHECKING:
    from torch import Tensor

    from densegrpo_fast.models.base import FlowModel

logger = logging.getLogger(__name__)

BASE = "base"
"""The name of the model as it comes, without an adapter."""


@dataclass(frozen=True)
class ModelRef:
    """A model that a command is pointed at.

    Attributes:
        name: as it was written on the command line.
        run: the run directory that it belongs to, whose `config.yaml` describes its model; None if there is none.
        adapter: its adapter file; None for the base model, and for a run that has only checkpoints so far.
        network: the directory of its network, if all weights were trained; None likewise.
    """

    name: str
    run: Path | None = None
    adapter: Path | None = None
    network: Path | None = None


@dataclass(frozen=True)
class Weights:
    """An adapter that was read, or all weights of a network.

    Attributes:
        layers: as `lora.lora_layers` returns them, or by the network's own names; None for the base model.
        origin: where they come from, in words.
        base: `lora.base_fingerprint` of the model that they were trained on, if their run's checkpoints tell.
        whole: whether they are all weights of the network.
    """

    layers: dict[str, Tensor] | None
    origin: str
    base: str | None = None
    whole: bool = False

    def fingerprint(self) -> str | None:
        """SHA-256 over names and values of the layers; None for the base model."""
        if self.layers is None:
            return None
        import torch

        digest = hashlib.sha256()
        for name, tensor in sorted(self.layers.items()):
            digest.update(f"{name}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def about(self) -> dict[str, str | None]:
        """What a document says about them, as JSON data: origin and sha256."""
        return {"origin": self.origin, "sha256": self.fingerprint()}


def locate(name: str) -> ModelRef:
    """Find what a name on the command line stands for.

    Args:
        name: "base"; a run directory; an adapter directory, or its file; the directory of a trained network.

    Raises:
        SetupError: if it is none of these, or a run without an adapter or checkpoint.
    """
    if name == BASE:
        return ModelRef(name)
    path = user_path(name)
    expected = f"expected {BASE}, a run directory or an adapter directory"
    if not os.path.exists(path):  # Path.exists raises for a name that is too long
        raise SetupError(f"{name}: there is no such file or directory; {expected}")
    file = path if path.is_file() else adapter_file(path)
    if file.is_file():
        above = file.parent.parent
        return ModelRef(name, above if (above / CONFIG_FILE).is_file() else None, file)
    if _is_network(path):
        return ModelRef(name, path.parent if (path.parent / CONFIG_FILE).is_file() else None, network=path)
    if not (path / CONFIG_FILE).is_file():
        problem = f"it holds no {ADAPTER_FILE}"
        if pickled := sorted(path.glob("*.bin")) + sorted(path.glob("*.pt")):
            problem += f", only {pickled[0].name}, a pickle file, which can run any code: save it as safetensors"
        raise SetupError(f"{name}: {problem}; {expected}")
    if _is_network(path / NETWORK):
        return ModelRef(name, path, network=path / NETWORK)
    exported = path / ADAPTER / ADAPTER_FILE
    if not exported.is_file() and newest_settings(path / CHECKPOINTS) is None:
        raise SetupError(f"{name}: this run has no adapter and no checkpoint yet")
    return ModelRef(name, path, exported if exported.is_file() else None)


def _is_network(directory: Path) -> bool:
    return (directory / "config.json").is_file() and any(directory.glob("*.safetensors"))


def adapter_file(directory: Path) -> Path:
    """The file of an adapter directory: diffusers', or PEFT's where that alone is there."""
    peft = directory / PEFT_WEIGHTS
    lone = os.path.isfile(peft) and not os.path.isfile(directory / ADAPTER_FILE)
    return peft if lone else directory / ADAPTER_FILE


def settings_source(refs: Sequence[ModelRef], config: str | None) -> str:
    """The configuration that describes the model of several references.

    Args:
        config: what the user asked for; None = the settings of the first one that belongs to a run, else the base
            preset.

    Returns:
        A preset's name or the path of a file.
    """
    if config is not None:
        return config
    return next((str(ref.run / CONFIG_FILE) for ref in refs if ref.run is not None), BASE_PRESET)


def check_models(refs: Sequence[ModelRef], model: str) -> None:
    """Refuse runs of another model.

    Args:
        model: `model.path` of the configuration that all of them are looked at with.

    Raises:
        UsageError: naming the run and both models.
    """
    for ref in refs:
        if ref.run is None:
            continue
        trained = read_settings(str(ref.run / CONFIG_FILE)).get("model", {}).get("path")
        if trained != model:
            raise UsageError(
                f"{ref.name}: this run trained the model {trained}, model.path is {model}; "
                "look at runs of different models one at a time",
            )


def read_weights(ref: ModelRef) -> Weights:
    """Read adapter or network: the exported one, which is the running average if the run keeps one.

    Of a run that is not finished, the newest intact checkpoint is taken.

    Raises:
        SetupError: if the file is no adapter; CheckpointError: if no checkpoint is intact.
    """
    from densegrpo_fast.models.adapter_formats import read_lora
    from densegrpo_fast.models.lora import lora_layers

    settings = None if ref.run is None else newest_settings(ref.run / CHECKPOINTS)
    base = None if settings is None else settings.get("base_weights")
    if ref.adapter is not None:
        try:
            return Weights(read_lora(ref.adapter), "exported adapter", base)
        except ValueError as error:
            raise SetupError(str(error)) from None
    if ref.network is not None:
        return Weights(_read_network(ref.network), "exported network", base, whole=True)
    if ref.run is None:
        return Weights(None, "the model as it comes")
    assert settings is not None  # `locate` has looked
    # by its own settings: what is asked is whether the files are whole, not whether a run may go on
    checkpoint = CheckpointManager(ref.run / CHECKPOINTS, 1, settings).load_latest()
    if checkpoint.shared is not None:
        groups = {group for group, _ in shared_names(checkpoint.shared)}
        kind, words = ("ema", "running average") if "ema" in groups else ("adapter", "weights")
        layers = read_shared(checkpoint.shared, kind)
        return Weights(layers, f"{words} at iteration {checkpoint.step}", base, whole=True)
    kind, words = ("ema", "running average") if "ema" in checkpoint.tensors else ("adapter", "adapter")
    lora = settings["lora"]
    layers = lora_layers(checkpoint.tensors[kind], rank=lora["rank"], alpha=lora["alpha"])
    return Weights(layers, f"{words} at iteration {checkpoint.step}", base)


def _read_network(directory: Path) -> dict[str, Tensor]:
    """The weights in a directory that diffusers has written.

    Raises:
        SetupError: they are not what `SUMS` says, or cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    from densegrpo_fast.common.pretrained import check_finite

    layers: dict[str, Tensor] = {}
    try:
        for file in sorted(directory.glob("*.safetensors")):
            layers |= load(read_verified(file))
    except (OSError, OutputError, SafetensorError) as error:
        raise SetupError(f"{directory}: {error}") from None
    check_finite(str(directory), layers)
    return layers


@contextmanager
def with_adapter(model: FlowModel, ref: ModelRef, weights: Weights) -> Iterator[None]:
    """Within the context, the model has the adapter or the weights of `ref`, as `read_weights` read them.

    Raises:
        SetupError: if they do not fit the model.
    """
    from densegrpo_fast.models.lora import attached_lora, base_fingerprint
    from densegrpo_fast.models.whole_network import with_weights

    if weights.layers is None:
        yield
        return
    with ExitStack() as stack:
        start = base_fingerprint(model.network) if weights.whole else None
        try:
            attached = (with_weights if weights.whole else attached_lora)(model.network, weights.layers)
            stack.enter_context(attached)
        except ValueError as error:
            raise SetupError(f"{ref.name}: {error}") from None
        if weights.base is not None and weights.base != (start or base_fingerprint(model.network)):
            logger.warning(
                "%s: the loaded model is not the one that this run trained, or is in another precision", ref.name
            )
        yield
