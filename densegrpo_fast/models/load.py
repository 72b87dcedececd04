"""Loads a pipeline by name or directory and wraps it as a `FlowModel`."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from densegrpo_fast.embedded import WEIGHTS
from densegrpo_fast.exit_codes import ExitCode, UserError
from densegrpo_fast.models.sd3 import SD3, PromptStore, StoredPrompts

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
_TEXT = (*_ENCODERS, "tokenizer", "tokenizer_2", "tokenizer_3")
_T5 = ("text_encoder_3", "tokenizer_3")
_NEEDED = ("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The frozen base's dtype: "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return _DTYPES[name]


def pipeline_directory(path: str, revision: str | None = None) -> Path:
    """The directory of an SD3 pipeline that `model.path` names; a hub id is downloaded unless it is here already.

    Raises:
        UserError: (environment) there is no such pipeline, or its directory is not whole; the message says what is
            missing and what to do.
    """
    directory = WEIGHTS if path == "embedded" else Path(path).expanduser()
    if path != "embedded" and not directory.is_dir():
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise UserError(
                f"model.path: {path!r} is no directory; give a pipeline directory, a hub id such as "
                "stabilityai/stable-diffusion-3.5-medium, or embedded",
                ExitCode.ENVIRONMENT,
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
    prompt_store: PromptStore | None = None,
) -> SD3:
    """Load an SD3 pipeline, without its T5 encoder if the directory has none.

    Args:
        path: "embedded", a local pipeline directory, or a hub id.
        dtype: of transformer and text encoders; the preview decoder stays float32.
        vae_dtype: of the full decoder.
        preview_decoder: directory of the `AutoencoderTiny` for previews; None = the pipeline directory's own folder
            `preview_decoder`, if it has one.
        prompt_store: where encoded prompts are kept; the text encoders are then loaded for missing prompts alone.

    Raises:
        UserError: (environment) something is missing, or the device's memory is too small; the message says what and
            what to do.
    """
    directory = pipeline_directory(path, revision)
    has_t5 = (directory / "text_encoder_3").is_dir()
    if has_t5 and max_sequence_length == 0:
        raise UserError(
            "model.max_sequence_length: this model has a T5 encoder, so expected at least 1", ExitCode.USAGE
        )
    encoders: Callable[[Any], AbstractContextManager[Any]] = partial(_text_encoders, directory, device, dtype)
    with _fits(path, device):
        left_out = _absent_t5(directory) if prompt_store is None else dict.fromkeys(_TEXT)
        pipeline = _load_pipeline(directory, {"default": dtype, "vae": vae_dtype}, left_out)
        pipeline.to(device)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        if module is not None:
            module.requires_grad_(False).eval()
    preview = _load_preview(directory, preview_decoder, pipeline.transformer.config.in_channels, device)
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
    with _quiet():
        from diffusers import StableDiffusion3Pipeline

        try:
            return Path(StableDiffusion3Pipeline.download(path, revision=revision, use_safetensors=True))
        except (OSError, ValueError) as error:
            raise _cannot_load(path, str(error).strip()) from None


def _check_directory(directory: Path) -> None:
    """Complain about anything but T5 that a pipeline directory lacks."""
    index = directory / "model_index.json"
    if not index.is_file():
        raise UserError(
            f"model.path: {directory} has no model_index.json, so it is no pipeline directory",
            ExitCode.ENVIRONMENT,
        )
    try:
        parts: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"model.path: {index} is not valid JSON ({error})", ExitCode.ENVIRONMENT) from None
    if parts.get("_class_name") != "StableDiffusion3Pipeline":
        raise UserError(
            f"model.path: {directory} is a {parts.get('_class_name')}, expected a StableDiffusion3Pipeline",
            ExitCode.ENVIRONMENT,
        )
    missing = [name for name in _NEEDED if not (directory / name).is_dir()]
    if missing:
        raise UserError(f"model.path: {directory} lacks {', '.join(missing)}", ExitCode.ENVIRONMENT)
    for name in ("transformer", "vae", *_ENCODERS):
        problem = _component_problem(directory / name) if (directory / name).is_dir() else None
        if problem:
            raise _cannot_load(str(directory), f"{name}: {problem}")


def _component_problem(directory: Path) -> str | None:
    """What keeps a component's directory from being loaded, as far as its file names tell."""
    if not (directory / "config.json").is_file():
        return "expected the file config.json"
    for index in directory.glob("*.safetensors.index.json"):
        try:
            shards = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return f"{index.name} is not the index of a model's files"
        absent = [shard for shard in shards if not (directory / shard).is_file()]
        if absent:
            return f"expected {len(shards)} files of weights, {absent[0]} is missing"
    if any(directory.glob("*.safetensors")):
        return None
    pickled = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in directory.glob(pattern))
    if pickled:
        return (
            f"expected safetensors weights, found only {pickled[0]}: a pickle file can run any code when it is read, "
            "so such weights are refused"
        )
    return "expected safetensors weights, found none"


def _load_pipeline(directory: Path, dtype: dict[str, torch.dtype], given: dict[str, Any]) -> Any:
    with _quiet():
        from diffusers import StableDiffusion3Pipeline
        from safetensors import SafetensorError

        try:
            return StableDiffusion3Pipeline.from_pretrained(
                str(directory), dtype=dtype, use_safetensors=True, local_files_only=True, **given
            )
        except (OSError, ValueError, SafetensorError) as error:
            raise _cannot_load(str(directory), str(error).strip()) from None


def _load_preview(pipeline: Path, given: str | None, channels: int, device: torch.device) -> Any:
    directory = pipeline / "preview_decoder" if given is None else Path(given).expanduser()
    if not directory.is_dir():
        if given is None:
            return None
        raise UserError(f"model.preview_decoder: {directory} is no directory", ExitCode.ENVIRONMENT)
    problem = _component_problem(directory)
    with _quiet():
        from diffusers import AutoencoderTiny
        from safetensors import SafetensorError

        try:
            if problem:
                raise ValueError(problem)
            preview = AutoencoderTiny.from_pretrained(directory, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError, SafetensorError) as error:
            words = f"cannot load an AutoencoderTiny from {directory}: {str(error).strip()}"
            raise UserError(f"model.preview_decoder: {words}", ExitCode.ENVIRONMENT) from None
    if preview.config.latent_channels != channels:
        raise UserError(
            f"model.preview_decoder: {directory} decodes latents of {preview.config.latent_channels} channels, "
            f"this model has {channels}",
            ExitCode.ENVIRONMENT,
        )
    return preview.to(device).requires_grad_(False).eval().to(memory_format=torch.channels_last)


def _cannot_load(source: str, problem: str) -> UserError:
    return UserError(
        f"model.path: cannot load {source}: {problem}\nGive the directory of a downloaded pipeline "
        "with --model.path, or try the whole loop on a tiny random pipeline with --dry-run.",
        ExitCode.ENVIRONMENT,
    )


@contextmanager
def _fits(path: str, device: torch.device) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError:
        free, total = (size / 2**30 for size in torch.cuda.mem_get_info(device))
        raise UserError(
            f"model.path: the weights of {path} do not fit into the memory of {device} ({free:.1f} of {total:.1f} GiB "
            "free): end what else runs there, set model.prompt_cache so that the text encoders leave it again, or use "
            "a GPU with more",
            ExitCode.ENVIRONMENT,
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Loading bars and advice about absent optional packages stay off the screen; errors do not."""
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
