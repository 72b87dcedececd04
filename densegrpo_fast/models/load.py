"""Loads a pipeline by name or directory and wraps it as a `FlowModel`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from densegrpo_fast.embedded import WEIGHTS
from densegrpo_fast.exit_codes import ExitCode, UserError
from densegrpo_fast.models.sd3 import SD3

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_NEEDED = ("transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The frozen base's dtype: "auto" is bfloat16 on a GPU and float32 on a CPU."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return _DTYPES[name]


def load_sd3(
    path: str,
    *,
    device: torch.device,
    dtype: torch.dtype,
    max_sequence_length: int,
    height: int = 0,
    width: int = 0,
    revision: str | None = None,
) -> SD3:
    """Load an SD3 pipeline, without its T5 encoder if the directory has none.

    Args:
        path: "embedded", a local pipeline directory, or a hub id. A `preview_decoder` folder in a local directory is
            loaded as the `AutoencoderTiny` for previews.
        dtype: of transformer and text encoders; the autoencoders stay float32.

    Raises:
        UserError: (environment) something is missing; the message says what and what to do.
    """
    directory = WEIGHTS if path == "embedded" else Path(path).expanduser()
    if path == "embedded" or directory.is_dir():
        absent = _check_directory(directory)
        source = str(directory)
    elif path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"model.path: {path!r} is no directory; give a pipeline directory, a hub id such as "
            "stabilityai/stable-diffusion-3.5-medium, or embedded",
            ExitCode.ENVIRONMENT,
        )
    else:
        absent, source = {}, path
    pipeline = _load_pipeline(source, dtype, revision, absent)
    if pipeline.text_encoder_3 is not None and max_sequence_length == 0:
        raise UserError(
            "model.max_sequence_length: this model has a T5 encoder, so expected at least 1", ExitCode.USAGE
        )
    pipeline.to(device)
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
        module.requires_grad_(False).eval()
    return SD3(
        pipeline,
        _load_preview(directory / "preview_decoder", device),
        max_sequence_length=max_sequence_length,
        height=height,
        width=width,
    )


def _check_directory(directory: Path) -> dict[str, None]:
    """Components to pass as None because the directory lacks them (T5 only); complains about any other gap."""
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
    # diffusers refuses a pipeline without T5 unless told that it is left out on purpose
    return {name: None for name in ("text_encoder_3", "tokenizer_3") if not (directory / name).is_dir()}


def _load_pipeline(source: str, dtype: torch.dtype, revision: str | None, absent: dict[str, None]) -> Any:
    with _quiet():
        from diffusers import StableDiffusion3Pipeline

        try:
            return StableDiffusion3Pipeline.from_pretrained(
                source,
                dtype={"default": dtype, "vae": torch.float32},
                revision=revision,
                use_safetensors=True,
                **absent,
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"model.path: cannot load {source}: {str(error).strip()}\nGive the directory of a downloaded pipeline "
                "with --model.path, or try the whole loop on a tiny random pipeline with --dry-run.",
                ExitCode.ENVIRONMENT,
            ) from None


def _load_preview(directory: Path, device: torch.device) -> Any:
    if not directory.is_dir():
        return None
    with _quiet():
        from diffusers import AutoencoderTiny

        preview = AutoencoderTiny.from_pretrained(directory, dtype=torch.float32).to(device)
    return preview.requires_grad_(False).eval().to(memory_format=torch.channels_last)


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
