"""Loads a pipeline by name or directory and wraps it as a `FlowModel`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from densegrpo_fast.common.errors import SetupError, UsageError, UserError
from densegrpo_fast.common.pretrained import (
    files_problem,
    is_hub_id,
    load_network,
    load_tokenizer,
    read_settings,
    silence_loading,
    why_not_fetched,
)
from densegrpo_fast.embedded import WEIGHTS
from densegrpo_fast.models.sd3 import SD3, PromptStore, StoredPrompts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
_TEXT = (*_ENCODERS, *_TOKENIZERS)
_T5 = ("text_encoder_3", "tokenizer_3")
_KINDS = {
    "transformer": "SD3Transformer2DModel",
    "vae": "AutoencoderKL",
    "scheduler": "FlowMatchEulerDiscreteScheduler",
    "text_encoder": "CLIPTextModelWithProjection",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "text_encoder_3": "T5EncoderModel",
    "tokenizer": "CLIPTokenizer",
    "tokenizer_2": "CLIPTokenizer",
    "tokenizer_3": "T5TokenizerFast",
}
_NO_LIMIT = 10**9
"""transformers gives a tokenizer without a limit a larger one."""
_NEEDED = ("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The frozen base's dtype: "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return _DTYPES[name]


def pipeline_directory(path: str, revision: str | None = None) -> Path:
    """The directory of an SD3 pipeline that `model.path` names; a hub id is downloaded unless it is here already.

    Raises:
        SetupError: there is no such pipeline, or its directory is not whole; the message says what is
            missing and what to do.
    """
    directory = WEIGHTS if path == "embedded" else Path(path).expanduser()
    if path != "embedded" and not directory.is_dir():
        if not is_hub_id(path):
            raise SetupError(
                f"model.path: {path!r} is no directory; give a pipeline directory, a hub id such as "
                "stabilityai/stable-diffusion-3.5-medium, or embedded",
            )
        directory = _download(path, revision)
    _check_directory(directory)
    return directory


def load_sd3(
    path: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_sequence_length: int,
    height: int = 0,
    width: int = 0,
    revision: str | None = None,
    vae_dtype: torch.dtype = torch.float32,
    preview_decoder: str | None = None,
    preview_dtype: torch.dtype = torch.float32,
    prompt_store: PromptStore | None = None,
) -> SD3:
    """Load an SD3 pipeline, without its T5 encoder if the directory has none.

    Args:
        path: "embedded", a local pipeline directory, or a hub id.
        dtype: of transformer and text encoders.
        vae_dtype: of the full decoder.
        preview_decoder: directory of the `AutoencoderTiny` for previews; None = the pipeline directory's own folder
            `preview_decoder`, if it has one.
        preview_dtype: of the preview decoder.
        prompt_store: where encoded prompts are kept; the text encoders are then loaded for missing prompts alone.

    Raises:
        SetupError: something is missing, or the device's memory is too small; the message says what and
            what to do.
    """
    directory = pipeline_directory(path, revision)
    has_t5 = (directory / "text_encoder_3").is_dir()
    if has_t5 and max_sequence_length == 0:
        raise UsageError("model.max_sequence_length: this model has a T5 encoder, so expected at least 1")
    encoders: Callable[[Any], AbstractContextManager[Any]] = partial(_text_encoders, directory, device, dtype)
    with _fits(path, device):
        left_out = _absent_t5(directory) if prompt_store is None else dict.fromkeys(_TEXT)
        pipeline = _load_pipeline(directory, {"default": dtype, "vae": vae_dtype}, left_out)
        pipeline.to(device)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        if module is not None:
            module.requires_grad_(False).eval()
    pipeline.vae.to(memory_format=torch.channels_last)
    channels = pipeline.transformer.config.in_channels
    preview = _load_preview(directory, preview_decoder, channels, device, preview_dtype)
    return SD3(
        pipeline,
        preview,
        max_sequence_length=max_sequence_length,
        height=height,
        width=width,
        stored_prompts=None if prompt_store is None else StoredPrompts(prompt_store, encoders),
        has_t5=has_t5,
    )


def text_files(directory: Path) -> list[Path]:
    """Every file of a pipeline directory that the encoding of a prompt depends on, sorted."""
    return sorted(path for name in _TEXT for path in (directory / name).rglob("*") if path.is_file())


@contextmanager
def _text_encoders(directory: Path, device: torch.device, dtype: torch.dtype, transformer: Any) -> Iterator[Any]:
    """A pipeline of this transformer and the text encoders, which are let go of at the end."""
    with _fits(str(directory), device):
        given = _absent_t5(directory) | {"vae": None, "transformer": transformer}
        pipeline = _load_pipeline(directory, {"default": dtype}, given)
        for name in _ENCODERS:
            if getattr(pipeline, name) is not None:
                getattr(pipeline, name).requires_grad_(False).eval().to(device)
    try:
        yield pipeline
    finally:
        for name in _ENCODERS:
            setattr(pipeline, name, None)
        del pipeline
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _absent_t5(directory: Path) -> dict[str, None]:
    """What to pass for T5: diffusers refuses a pipeline without it unless told that it is left out on purpose."""
    return {name: None for name in _T5 if not (directory / name).is_dir()}


def _download(path: str, revision: str | None) -> Path:
    with silence_loading():
        from diffusers import StableDiffusion3Pipeline

    try:
        return Path(StableDiffusion3Pipeline.download(path, revision=revision, use_safetensors=True))
    # connections fail with errors of the HTTP library, which are not OSErrors
    except Exception as error:
        raise _cannot_load(path, why_not_fetched(path, error)) from None


def _check_directory(directory: Path) -> None:
    """Complain about anything but T5 that a pipeline directory lacks."""
    index = directory / "model_index.json"
    if not index.is_file():
        snapshots = sorted(path.parent for path in directory.glob("snapshots/*/model_index.json"))
        way_out = f"; it is a folder of the hub's cache, give {snapshots[-1]}" if snapshots else ""
        raise SetupError(
            f"model.path: {directory} has no model_index.json, so it is no pipeline directory{way_out}",
        )
    try:
        parts = read_settings(index)
    except OSError as error:
        raise SetupError(f"model.path: {directory}: {error}") from None
    if parts.get("_class_name") != "StableDiffusion3Pipeline":
        raise SetupError(
            f"model.path: {directory} is a {parts.get('_class_name')}, expected a StableDiffusion3Pipeline",
        )
    # a part that is left out on purpose is listed as [null, null], or not at all
    listed = [name for name in _T5 if isinstance(parts.get(name), list) and any(parts[name])]
    missing = [name for name in (*_NEEDED, *listed) if not (directory / name).is_dir()]
    if missing:
        way_out = "; to use it without T5, set these to [null, null] in its model_index.json"
        raise SetupError(
            f"model.path: {directory} lacks {', '.join(missing)}{way_out if {*missing} <= {*_T5} else ''}",
        )
    for name in ("transformer", "vae", *_ENCODERS):
        problem = files_problem(directory / name) if (directory / name).is_dir() else None
        if problem:
            raise _cannot_load(str(directory), f"{name}: {problem}")


def _load_pipeline(directory: Path, dtype: dict[str, torch.dtype], given: dict[str, Any]) -> Any:
    """A pipeline whose parts are loaded one by one, so that a fault has the name of its part.

    Args:
        dtype: by part, else under "default".
        given: parts that are not loaded; None leaves one out.
    """
    with silence_loading():
        from diffusers import StableDiffusion3Pipeline

    parts = dict(given)
    for name in (*_NEEDED, *_T5):
        if name in parts:
            continue
        try:
            parts[name] = _load_part(name, directory / name, dtype.get(name, dtype["default"]))
        except OSError as error:
            raise _cannot_load(str(directory), f"{name}: {error}") from None
    for encoder, tokenizer in zip(_ENCODERS, _TOKENIZERS, strict=True):
        network, words = parts[encoder], parts[tokenizer]
        if network is not None and words is not None and words.model_max_length > _NO_LIMIT:
            # the tokenizer does not say how long a prompt may be, the encoder does
            words.model_max_length = getattr(network.config, "max_position_embeddings", 512)
        if network is not None and words is not None and len(words) > network.config.vocab_size:
            problem = f"it has {len(words)} tokens, {encoder} has {network.config.vocab_size}"
            raise _cannot_load(str(directory), f"{tokenizer}: {problem}")
    return StableDiffusion3Pipeline(**parts)


def _load_part(name: str, directory: Path, dtype: torch.dtype) -> Any:
    import diffusers
    import transformers

    kind = getattr(diffusers if name in ("transformer", "vae", "scheduler") else transformers, _KINDS[name])
    if name in _TOKENIZERS:
        return load_tokenizer(kind, directory)
    if name != "scheduler":
        return load_network(kind, directory, dtype)
    said = read_settings(directory / "scheduler_config.json").get("_class_name")
    if said != _KINDS[name]:
        raise OSError(f"expected a {_KINDS[name]}, its scheduler_config.json says {said}")
    return kind.from_pretrained(directory)


def _load_preview(pipeline: Path, given: str | None, channels: int, device: torch.device, dtype: torch.dtype) -> Any:
    directory = pipeline / "preview_decoder" if given is None else Path(given).expanduser()
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
    if preview.config.latent_channels != channels:
        raise SetupError(
            f"model.preview_decoder: {directory} decodes latents of {preview.config.latent_channels} channels, "
            f"this model has {channels}",
        )
    return preview.to(device).requires_grad_(False).eval().to(memory_format=torch.channels_last)


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
