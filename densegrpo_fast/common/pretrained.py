"""Pretrained networks and tokenizers: fetched from the hub, checked, and loaded whole or not at all.

transformers gives a network random numbers where its file lacks a tensor, and an empty tokenizer where its files are
absent; diffusers leaves such tensors without data. Here all of these are errors that say what was expected.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from densegrpo_fast.common.errors import NonFiniteError
from densegrpo_fast.common.files import verify_directory

NETWORK_FILES = ("config.json", "model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
"""What `fetch` is asked for to load a network of transformers."""
TOKENIZER_FILES = ("tokenizer*.json", "special_tokens_map.json", "vocab.json", "merges.txt", "spiece.model")
"""What `fetch` is asked for to load a tokenizer."""

_TOKENIZERS = ({"tokenizer.json"}, {"vocab.json", "merges.txt"}, {"spiece.model"})
_VARIANT = re.compile(r"(?:model|diffusion_pytorch_model)\.(\w+?)(?:-\d+-of-\d+)?\.safetensors")
_PICKLES = ("*.bin", "*.pt", "*.pth")


def is_hub_id(path: str) -> bool:
    """Whether `model.path` names a repository of the hub: OWNER/NAME, and no directory here."""
    return path.count("/") == 1 and ":" not in path and not path.startswith((".", "/", "~")) and not Path(path).is_dir()


def fetch(repository: str, patterns: Sequence[str], revision: str | None = None) -> Path:
    """The directory of a hub repository's files, downloaded unless they are here already.

    Args:
        repository: hub id, OWNER/NAME.
        patterns: file names to fetch, with wildcards.
        revision: branch, tag or commit; None = the main branch.

    Raises:
        OSError: it cannot be fetched; the message says why and what to do.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    # connections fail with errors of the HTTP library, a wrong name with a ValueError, the rest with OSErrors
    except Exception as error:
        raise OSError(why_not_fetched(repository, error)) from None


def why_not_fetched(repository: str, error: BaseException) -> str:
    """What a failed download means for the user, read from the errors that led to it."""
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    causes = list(_causes(error))

    def met(*kinds: type[BaseException]) -> bool:
        return any(isinstance(cause, kinds) for cause in causes)

    page = f"https://huggingface.co/{repository}"
    if met(GatedRepoError):
        return f"its owner gives access on request: accept the terms at {page}, then log in here with `hf auth login`"
    if met(RepositoryNotFoundError):
        return f"there is no {page}, or it is private: check the name, or log in with `hf auth login`"
    if met(RevisionNotFoundError):
        return f"there is no such revision of {page}"
    if met(OfflineModeIsEnabled):
        return "it is not whole in this machine's cache, and HF_HUB_OFFLINE forbids to download it"
    # the HTTP library's own errors (ConnectError, ConnectTimeout) are no ConnectionErrors
    unconnected = any(type(cause).__name__.startswith("Connect") for cause in causes)
    if unconnected or met(ConnectionError, TimeoutError, LocalEntryNotFoundError):
        return "the hub cannot be reached, and it is not whole in this machine's cache"
    return str(error).strip() or type(error).__name__


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def files_problem(directory: Path) -> str | None:
    """What keeps a network's directory from being loaded, as far as its file names tell; None = nothing."""
    if not (directory / "config.json").is_file():
        return "expected the file config.json in this directory"
    for index in directory.glob("*.safetensors.index.json"):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
            return f"{index.name} is not the index of a model's files"
        absent = [shard for shard in shards if not (directory / shard).is_file()]
        if absent:
            return f"expected {len(shards)} files of weights, {absent[0]} is missing"
    if any(directory.glob("*.safetensors")):
        return None
    pickled = sorted(path.name for pattern in _PICKLES for path in directory.glob(pattern))
    if pickled:
        return (
            f"expected safetensors weights, found only {pickled[0]}: a pickle file can run any code when it is read, "
            "so such weights are refused"
        )
    return "expected safetensors weights, found none"


def empty_network(kind: Any, directory: Path) -> Any:
    """A diffusers network as its directory's config.json describes it, its parameters without data.

    Raises:
        OSError: it is another network, or none can be made of its config.json.
    """
    from accelerate import init_empty_weights

    if problem := files_problem(directory) or _kind_problem(kind, directory / "config.json"):
        raise OSError(problem)
    try:
        with silence_loading(), init_empty_weights(include_buffers=False):
            return kind.from_config(read_settings(directory / "config.json"))
    # as in `load_network`
    except Exception as error:
        raise OSError(_words(error)) from None


def load_network(kind: Any, directory: Path, dtype: torch.dtype) -> Any:
    """A network from its directory, on the CPU.

    Args:
        kind: its class, of transformers or diffusers.
        directory: with config.json and safetensors weights.
        dtype: of its parameters.

    Raises:
        OSError: it is another network, or its files are not whole; the message says what was expected.
        NonFiniteError: a tensor is not finite.
    """
    verify_directory(directory)
    config = directory / "config.json"
    problem = files_problem(directory) or _kind_problem(kind, config) or _size_problem(directory)
    if problem:
        raise OSError(problem)
    variant = {} if (found_variant := _variant(directory)) is None else {"variant": found_variant}
    # transformers then names the tensors whose shape is wrong; diffusers raises, and names one
    extra = {} if _is_diffusers(kind) else {"ignore_mismatched_sizes": True}
    with silence_loading():
        try:
            network, found = kind.from_pretrained(
                str(directory),
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **extra,
                **variant,
            )
        except torch.OutOfMemoryError:
            raise
        # a config.json of somebody else's fails in every way: numbers that are texts, sizes that are none, ...
        except Exception as error:
            raise OSError(_words(error)) from None
    missing = sorted(found["missing_keys"])
    if missing:
        raise OSError(f"its weights lack {len(missing)} of the network's tensors, such as {missing[0]}")
    for name, *shapes in found["mismatched_keys"]:
        stored, expected = (list(shape) for shape in shapes)
        raise OSError(f"its config.json asks for {name} of shape {expected}, its weights have {stored}")
    check_finite(f"{directory.name}: {directory}", network.state_dict())
    return network


def check_finite(source: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights from a file that hold a NaN or an infinity.

    Args:
        source: the file or directory, for the message.

    Raises:
        NonFiniteError: naming the first such tensor.
    """
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise NonFiniteError(f"{source}: {name} holds numbers that are not finite, so nothing is made of it")


def load_tokenizer(kind: Any, directory: Path) -> Any:
    """A tokenizer from its directory.

    Raises:
        OSError: its files are not there, or damaged.
    """
    names = {path.name for path in directory.iterdir()}
    if not any(files <= names for files in _TOKENIZERS):
        raise OSError("expected tokenizer.json, or vocab.json and merges.txt, or spiece.model in this directory")
    with silence_loading():
        try:
            return kind.from_pretrained(str(directory), local_files_only=True)
        # a damaged file comes as one of many errors, or as the bare Exception of the tokenizers library
        except Exception as error:
            raise OSError(_words(error)) from None


def read_settings(path: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        OSError: it cannot be read, or holds something else.
    """
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise OSError(f"its {path.name} is not a JSON object")
    return settings


def _kind_problem(kind: Any, path: Path) -> str | None:
    """What the network's own config says that it is, if that is not the class."""
    try:
        settings = read_settings(path)
    except OSError as error:
        return str(error)
    key = "_class_name" if _is_diffusers(kind) else "model_type"
    expected = kind.__name__ if _is_diffusers(kind) else kind.config_class.model_type
    if settings.get(key) in (None, expected):
        return None
    return f"expected a network of the kind {expected}, its config.json says {settings[key]}"


def _size_problem(directory: Path) -> str | None:
    """What its config.json says that its weights cannot be: more layers than tensors, or numbers in fewer bits."""
    from safetensors import SafetensorError, safe_open

    settings = read_settings(directory / "config.json")
    if isinstance(quantised := settings.get("quantization_config"), dict):
        how = quantised.get("bnb_4bit_quant_type") or quantised.get("quant_method") or quantised.get("quant_type")
        return f"its weights are quantised ({how}), expected weights in full: download the model that they were made of"
    tensors = 0
    for path in directory.glob("*.safetensors"):
        try:
            with safe_open(path, "pt") as file:
                tensors += len(list(file.keys()))
        except (OSError, SafetensorError) as error:
            return f"{path.name} cannot be read: {error}"
    for key, value in settings.items():
        if "layers" in key and isinstance(value, int) and value > tensors:
            return f"its config.json asks for {key} {value}, its weights are {tensors} tensors"
    return None


def _variant(directory: Path) -> str | None:
    """The variant that a directory's weights are saved as where it has no others, such as "fp16"."""
    names = [path.name for path in directory.glob("*.safetensors")]
    found = {match[1] for name in names if (match := _VARIANT.fullmatch(name))}
    return found.pop() if len(found) == 1 and all(_VARIANT.fullmatch(name) for name in names) else None


def _is_diffusers(kind: Any) -> bool:
    return kind.__module__.split(".")[0] == "diffusers"


def _words(error: BaseException) -> str:
    """The part of a library's message that is about the files, not about its own options."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text.removeprefix("Cannot load because ").partition(". If you want to instead")[0]


@contextmanager
def silence_loading() -> Iterator[None]:
    """Loading bars and advice of transformers and diffusers stay off the screen; errors do not."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()
