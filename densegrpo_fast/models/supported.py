"""Which pipelines can be trained, by class; importing it needs neither torch nor diffusers."""

from __future__ import annotations

import json
from pathlib import Path

from densegrpo_fast.common.errors import SetupError
from densegrpo_fast.common.files import user_path

PIPELINES = (
    "StableDiffusion3Pipeline",
    "FluxPipeline",
    "StableDiffusionPipeline",
    "StableDiffusionXLPipeline",
    "QwenImagePipeline",
    "ZImagePipeline",
    "Flux2KleinPipeline",
    "WanPipeline",
)
"""Their classes in diffusers; each has a family in `families.py`."""


def unsupported(pipeline_class: object) -> str:
    """What to say of another class."""
    return f"{pipeline_class} is not supported; supported are {', '.join(PIPELINES)}"


def check_supported(path: str, revision: str | None) -> None:
    """Refuse a pipeline of another class at once, if its model_index.json is on this machine; what else there may be to
    say of it is said when it is loaded.

    Args:
        path: a directory, or a hub id.
        revision: of the hub id.

    Raises:
        SetupError: it is of another class.
    """
    index: object = user_path(path) / "model_index.json"
    if not Path(str(index)).is_file() and path.count("/") == 1:
        from huggingface_hub import try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError

        try:
            index = try_to_load_from_cache(path, "model_index.json", revision=revision)
        except HFValidationError:
            return
    try:
        found = json.loads(Path(str(index)).read_text(encoding="utf-8"))["_class_name"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if found not in PIPELINES:
        raise SetupError(f"model.path: {path}: {unsupported(found)}")
