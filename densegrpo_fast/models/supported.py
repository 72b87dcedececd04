"""The pipeline classes that there are families of (`families.py`), and the check of one, without torch."""

from __future__ import annotations

import json
from pathlib import Path

from densegrpo_fast.common.errors import SetupError
from densegrpo_fast.common.files import user_path
from densegrpo_fast.common.plugins import is_outside
from densegrpo_fast.embedded import EMBEDDED

_INDEX = "model_index.json"

SUPPORTED = (
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "QwenImagePipeline",
    "ZImagePipeline",
    "Flux2KleinPipeline",
    "WanPipeline",
)


def check_supported(pipeline_class: str) -> None:
    """Raises: ValueError: there is no family of the pipeline class."""
    if pipeline_class not in SUPPORTED:
        raise ValueError(f"{pipeline_class} is not supported; supported are {', '.join(SUPPORTED)}")


def check_path(path: str, revision: str | None = None, *, hub: bool = True) -> None:
    """Refuse a `model.path` whose model_index.json names a pipeline of another kind; what cannot be told is let by.

    Args:
        path: one of `EMBEDDED`, a directory, a hub id, or a model from outside the package.
        revision: of a hub id.
        hub: whether a hub id may be asked for on the hub.

    Raises:
        SetupError: there is no family of its kind.
    """
    if path in EMBEDDED or is_outside(path):
        return
    directory = user_path(path)
    index = directory / _INDEX
    if not directory.is_dir():
        if not hub or path.count("/") != 1 or path.startswith((".", "/", "~")):
            return
        try:
            from huggingface_hub import hf_hub_download

            index = Path(hf_hub_download(path, _INDEX, revision=revision))
        # the loader tells what is wrong with a hub that cannot be reached
        except Exception:
            return
    try:
        settings = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    if isinstance(settings, dict):
        try:
            check_supported(str(settings.get("_class_name")))
        except ValueError as error:
            raise SetupError(f"model.path: {path}: {error}") from None
