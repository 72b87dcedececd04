"""Loads a pipeline by name or directory and wraps it as a `FlowModel`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from densegrpo_fast.common.errors import SetupError, UsageError, UserError
from densegrpo_fast.common.files import user_path
from densegrpo_fast.common.pretrained import (
    empty_network,
    fetch,
    files_problem,
    is_hub_id,
    load_network,
    load_tokenizer,
    read_settings,
    silence_loading,
    why_not_fetched,
)
from densegrpo_fast.embedded import EMBEDDED
from densegrpo_fast.models.diffusers_model import DiffusersModel, PromptStore, StoredPrompts
from densegrpo_fast.models.families import family_of
from densegrpo_fast.models.family import Family

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ENCODER, _TOKENIZER = "text_encoder", "tokenizer"
_INDEX = "model_index.json"
Weights = Literal["placed", "on_host", "awaited"]
"""Where `load_pipeline` puts the network's: on the device; on the CPU, for all processes; nowhere, another has them."""

_NO_LIMIT = 10**9
"""transformers gives a tokenizer without a limit a larger one."""


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The frozen base's dtype: "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return _DTYPES[name]


def pipeline_directory(path: str, revision: str | None = None) -> Path:
    """The directory of a pipeline that `model.path` names; a hub id is downloaded unless it is here already.

    What kind of pipeline it is says its model_index.json, which is read, or downloaded, before anything else.

    Raises:
        SetupError: there is no such pipeline, no family of models (`models/families.py`) has its kind, or its directory
            is not whole; the message says what is missing and what to do.
    """
    directory = EMBEDDED.get(path, user_path(path))
    if path not in EMBEDDED and not directory.is_dir():
        if not is_hub_id(path):
            raise SetupError(
                f"model.path: {path!r} is no directory; give a pipeline directory, a hub id such as "
                f"stabilityai/stable-diffusion-3.5-medium, or one of the package: {', '.join(EMBEDDED)}",
            )
        directory = _download(path, revision)
    _check_directory(directory, directory_family(directory))
    return directory


def directory_family(directory: Path, name: str | None = None) -> type[Family]:
    """The family of the pipeline in a directory; `name` is what messages call it, None = its path.

    Raises:
        SetupError: it holds no pipeline, or one of another kind.
    """
    index, name = directory / _INDEX, str(directory) if name is None else name
    if not index.is_file():
        snapshots = sorted(path.parent for path in directory.glob(f"snapshots/*/{_INDEX}"))
        way_out = f"; it is a folder of the hub's cache, give {snapshots[-1]}" if snapshots else ""
        raise SetupError(f"model.path: {name} has no {_INDEX}, so it is no pipeline directory{way_out}")
    try:
        return family_of(str(read_settings(index).get("_class_name")))
    except (OSError, ValueError) as error:
        raise SetupError(f"model.path: {name}: {error}") from None


def load_pipeline(
    path: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_sequence_length: int,
    height: int = 0,
    width: int = 0,
    frames: int = 1,
    revision: str | None = None,
    vae_dtype: torch.dtype = torch.float32,
    preview_decoder: str | None = None,
    preview_dtype: torch.dtype = torch.float32,
    prompt_store: PromptStore | None = None,
    family: type[Family] | None = None,
    weights: Weights = "placed",
) -> DiffusersModel:
    """Load a pipeline, without the parts that its family can do without and the directory lacks.

    Args:
        path: one of `EMBEDDED`, a local pipeline directory, or a hub id.
        dtype: of network and text encoders.
        max_sequence_length: of the text encoder in tokens, where the family lets one choose.
        height, width: in pixels; 0 = the model's own.
        frames: of a video; 1 = a picture.
        vae_dtype: of the full decoder.
        preview_decoder: directory of the `AutoencoderTiny` for previews; None = the pipeline directory's own folder
            `preview_decoder`, if it has one.
        preview_dtype: of the preview decoder.
        prompt_store: where encoded prompts are kept; the text encoders are then loaded for missing prompts alone.
        family: of the pipeline; None = what its model_index.json says.
        weights: where the network's go; unless they are placed, `training/handing.py` has to hand them out.

    Raises:
        SetupError: something is missing, or the device's memory is too small; the message says what and what to do.
        UsageError: a size, a length or the schedule is none that the family computes.
    """
    if family is None:
        directory = pipeline_directory(path, revision)
        family = directory_family(directory)
    else:
        directory = user_path(path)
        _check_directory(directory, family)
    has_t5 = (directory / "text_encoder_3").is_dir()
    if has_t5 and max_sequence_length == 0:
        raise UsageError("model.max_sequence_length: this model has a T5 encoder, so expected at least 1")
    encoders: Callable[[Any], AbstractContextManager[Any]] = partial(_text_encoders, directory, family, device, dtype)
    with _fits(path, device):
        left_out = _absent(directory, family) if prompt_store is None else dict.fromkeys(_text_parts(family))
        given: dict[str, Any] = dict(left_out)
        if weights == "awaited":
            given[family.network_part] = _empty_network(directory, family)
        pipeline = _load_pipeline(directory, family, {"default": dtype, "vae": vae_dtype}, given)
        for name, part in pipeline.components.items():
            if isinstance(part, torch.nn.Module) and (weights == "placed" or name != family.network_part):
                part.to(device)
    for name in (*family.parts, *family.optional):
        if isinstance(module := getattr(pipeline, name), torch.nn.Module):
            module.requires_grad_(False).eval()
    if all(weight.ndim < 5 for weight in pipeline.vae.parameters()):
        pipeline.vae.to(memory_format=_layout(device))
    preview = _load_preview(directory, preview_decoder, pipeline.vae, device, preview_dtype)
    try:
        model = DiffusersModel(
            pipeline,
            preview,
            max_sequence_length=max_sequence_length,
            height=height,
            width=width,
            frames=frames,
            stored_prompts=None if prompt_store is None else StoredPrompts(prompt_store, encoders),
            has_t5=has_t5,
            family=family,
        )
        model.device, model.awaits_weights = device, weights != "placed"
        return model
    except UserError:
        raise
    except ValueError as error:
        raise UsageError(f"model: {error}") from None
    # texts for numbers, lists that are too short, ...
    except (TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise _cannot_load(str(directory), f"its settings do not fit: {type(error).__name__}: {error}") from None


def text_files(directory: Path) -> list[Path]:
    """Every file of a pipeline directory that the encoding of a prompt depends on, sorted."""
    names = _text_parts(directory_family(directory))
    return sorted(path for name in names for path in (directory / name).rglob("*") if path.is_file())


def _text_parts(family: type[Family]) -> list[str]:
    return [name for name in (*family.parts, *family.optional) if name.startswith((_ENCODER, _TOKENIZER))]


@contextmanager
def _text_encoders(
    directory: Path, family: type[Family], device: torch.device, dtype: torch.dtype, network: Any
) -> Iterator[Any]:
    """A pipeline of this network and the text encoders, which are let go of at the end."""
    names = [name for name in _text_parts(family) if name.startswith(_ENCODER)]
    with _fits(str(directory), device):
        given = _absent(directory, family) | {"vae": None, family.network_part: network}
        pipeline = _load_pipeline(directory, family, {"default": dtype}, given)
        for name in names:
            if getattr(pipeline, name) is not None:
                getattr(pipeline, name).requires_grad_(False).eval().to(device)
    try:
        yield pipeline
    finally:
        for name in names:
            setattr(pipeline, name, None)
        del pipeline
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _absent(directory: Path, family: type[Family]) -> dict[str, None]:
    """What to pass for parts that a directory lacks: diffusers wants to be told that they are left out on purpose."""
    return {name: None for name in family.optional if not (directory / name).is_dir()}


def hub_family(path: str, revision: str | None = None) -> type[Family]:
    """The family of a pipeline on the hub, of which a few hundred bytes are downloaded.

    Raises:
        SetupError: it is of another kind, or (from an OSError) cannot be fetched.
    """
    try:
        directory = fetch(path, [_INDEX], revision)
    except OSError as error:
        raise _cannot_load(path, str(error)) from error
    return directory_family(directory, path)


def _download(path: str, revision: str | None) -> Path:
    family = hub_family(path, revision)
    with silence_loading():
        import diffusers

    unused = dict.fromkeys(family.unused)
    try:
        kind = getattr(diffusers, family.pipeline_class)
        return Path(kind.download(path, revision=revision, use_safetensors=True, **unused))
    # connections fail with errors of the HTTP library, which are not OSErrors
    except Exception as error:
        raise _cannot_load(path, why_not_fetched(path, error)) from None


def _check_directory(directory: Path, family: type[Family]) -> None:
    """Complain about anything that a pipeline directory lacks and its family needs."""
    try:
        index = read_settings(directory / _INDEX)
    except OSError as error:
        raise SetupError(f"model.path: {directory}: {error}") from None
    # a part that is left out on purpose is listed as [null, null], or not at all
    listed = [name for name in family.optional if isinstance(index.get(name), list) and any(index[name])]
    missing = [name for name in (*family.parts, *listed) if not (directory / name).is_dir()]
    if missing:
        way_out = "; to use it without T5, set these to [null, null] in its model_index.json"
        raise SetupError(
            f"model.path: {directory} lacks {', '.join(missing)}{way_out if {*missing} <= {*family.optional} else ''}",
        )
    for name in family.optional:
        other = name.replace(*((_ENCODER, _TOKENIZER) if name.startswith(_ENCODER) else (_TOKENIZER, _ENCODER)))
        if other in family.optional and (directory / name).is_dir() and not (directory / other).is_dir():
            raise SetupError(f"model.path: {directory} lacks {other}, though it has {name}")
    for name in (*family.parts, *family.optional):
        if name == "scheduler" or name.startswith(_TOKENIZER) or not (directory / name).is_dir():
            continue
        problem = files_problem(directory / name)
        if problem:
            raise _cannot_load(str(directory), f"{name}: {problem}")


def _load_pipeline(directory: Path, family: type[Family], dtype: dict[str, torch.dtype], given: dict[str, Any]) -> Any:
    """A pipeline whose parts are loaded one by one, so that a fault has the name of its part.

    Args:
        dtype: by part, else under "default".
        given: parts that are not loaded; None leaves one out.
    """
    with silence_loading():
        import diffusers

    parts = dict(given)
    for name, kinds in {**family.parts, **family.optional}.items():
        if name in parts:
            continue
        try:
            parts[name] = _load_part(name, kinds, directory / name, dtype.get(name, dtype["default"]))
        except OSError as error:
            raise _cannot_load(str(directory), f"{name}: {error}") from None
    for encoder in (name for name in parts if name.startswith(_ENCODER)):
        tokenizer = encoder.replace(_ENCODER, _TOKENIZER)
        network, words = parts[encoder], parts[tokenizer]
        if network is not None and words is not None:
            limit = words.model_max_length
            if isinstance(limit, bool) or not isinstance(limit, int | float) or not limit >= 1:
                problem = f"model_max_length: expected a number of tokens, got {limit!r}"
                raise _cannot_load(str(directory), f"{tokenizer}: {problem}"[:300])
            # a tokenizer that does not say how long a prompt may be, or more than the encoder can read, has its limit
            known = getattr(network.config, "max_position_embeddings", 512 if limit > _NO_LIMIT else limit)
            words.model_max_length = int(min(limit, known))
            size = network.config.get_text_config().vocab_size
            if len(words) > size:
                problem = f"it has {len(words)} tokens, {encoder} has {size}"
                raise _cannot_load(str(directory), f"{tokenizer}: {problem}")
    # what the pipeline was saved with besides its parts, such as whether an empty prompt means zeros
    index = read_settings(directory / _INDEX)
    with silence_loading():
        kind = getattr(diffusers, family.pipeline_class)
        accepted = inspect.signature(kind).parameters
        settings = {name: value for name, value in index.items() if name in accepted and not isinstance(value, list)}
        try:
            return kind(**(settings | dict.fromkeys(family.unused) | parts))
        except Exception as error:
            raise _cannot_load(str(directory), f"its parts do not fit: {type(error).__name__}: {error}") from None


def _empty_network(directory: Path, family: type[Family]) -> Any:
    import diffusers

    name = family.network_part
    kinds = family.parts[name]
    kind = getattr(diffusers, kinds if isinstance(kinds, str) else kinds[0])
    try:
        return empty_network(kind, directory / name)
    except OSError as error:
        raise _cannot_load(str(directory), f"{name}: {error}") from None


def _load_part(name: str, kinds: str | tuple[str, ...], directory: Path, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers

    names = (kinds,) if isinstance(kinds, str) else kinds
    text = name.startswith((_ENCODER, _TOKENIZER))
    if text:
        kind = getattr(transformers, names[0])
        return load_tokenizer(kind, directory) if name.startswith(_TOKENIZER) else load_network(kind, directory, dtype)
    if name != "scheduler":
        return load_network(getattr(diffusers, names[0]), directory, dtype)
    settings = read_settings(directory / "scheduler_config.json")
    if (said := settings.get("_class_name")) not in names:
        raise OSError(f"expected a {' or '.join(names)}, its scheduler_config.json says {said}")
    try:
        return getattr(diffusers, str(said)).from_config(settings)
    # settings of somebody else's fail in every way: texts for numbers, two that exclude each other, ...
    except Exception as error:
        raise OSError(f"its scheduler_config.json cannot be used: {type(error).__name__}: {error}") from None


def _load_preview(pipeline: Path, given: str | None, vae: Any, device: torch.device, dtype: torch.dtype) -> Any:
    directory = pipeline / "preview_decoder" if given is None else user_path(given)
    if not directory.is_dir():
        if given is None:
            return None
        raise SetupError(f"model.preview_decoder: {directory} is no directory")
    with silence_loading():
        from diffusers import AutoencoderTiny

    try:
        preview = load_network(AutoencoderTiny, directory, dtype)
    except OSError as error:
        words = f"cannot load an AutoencoderTiny from {directory}: {error}"
        raise SetupError(f"model.preview_decoder: {words}") from None
    channels = vae.config.get("latent_channels") or vae.config.get("z_dim")
    if preview.config.latent_channels != channels:
        raise SetupError(
            f"model.preview_decoder: {directory} decodes latents of {preview.config.latent_channels} channels, "
            f"this model has {channels}",
        )
    return preview.to(device).requires_grad_(False).eval().to(memory_format=_layout(device))


def _layout(device: torch.device) -> torch.memory_format:
    """Of a decoder's convolutions: channels last is quicker on CPUs; on GPUs normalisations would change it back."""
    return torch.channels_last if device.type == "cpu" else torch.preserve_format


def _cannot_load(source: str, problem: str) -> UserError:
    return SetupError(
        f"model.path: cannot load {source}: {problem}\nGive the directory of a downloaded pipeline "
        "with --model.path, or try the whole loop on a tiny random pipeline with --dry-run.",
    )


@contextmanager
def _fits(path: str, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
        raise SetupError(
            f"model.path: the weights of {path} do not fit into the memory of {device} ({free:.1f} of {total:.1f} GiB "
            "free): end what else runs there, set model.prompt_cache so that the text encoders leave it again, or use "
            "a GPU with more",
        ) from None
