"""Loads the model that a configuration names, in the precision and with the memory options that it asks for."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from densegrpo_fast.common.pretrained import is_hub_id
from densegrpo_fast.config.sampling import ModelOptions
from densegrpo_fast.models.attention import check_attention
from densegrpo_fast.models.loading import load_sd3, pipeline_directory, resolve_dtype, text_files
from densegrpo_fast.models.prompt_cache import PromptCache, files_fingerprint
from densegrpo_fast.models.sd3 import SD3

logger = logging.getLogger(__name__)

_LARGE = 2**30
"""Bytes of a transformer's weights; SD3.5-Medium has five times as many."""


def load_model(options: ModelOptions, device: torch.device) -> SD3:
    """The model as it comes, without an adapter.

    Raises:
        SetupError: it, or what it needs, cannot be loaded; UsageError: an option does not fit it.
    """
    dtype = resolve_dtype(options.dtype, device)
    if is_slow(options, device):
        logger.warning("there is no CUDA device: %s", without_gpu(options))
    # before minutes are spent on loading
    check_attention(options.attention, device, dtype)
    model = load_sd3(
        options.path,
        device=device,
        dtype=dtype,
        max_sequence_length=options.max_sequence_length,
        height=options.height,
        width=options.width,
        revision=options.revision,
        vae_dtype=resolve_dtype(options.vae_dtype, device),
        preview_decoder=options.preview_decoder,
        preview_dtype=resolve_dtype(options.preview_dtype, device),
        prompt_store=prompt_cache(options, dtype),
    )
    set_up(model, options)
    return model


def is_slow(options: ModelOptions, device: torch.device) -> bool:
    """Whether a model without a GPU is one to wait hours for: known to be large, or not here yet to be looked at."""
    if device.type != "cpu":
        return False
    weights = (Path(options.path).expanduser() / "transformer").glob("*.safetensors")
    return is_hub_id(options.path) or sum(file.stat().st_size for file in weights) > _LARGE


def without_gpu(options: ModelOptions) -> str:
    """What a user should know who has no GPU for such a model."""
    return (
        f"{options.path} would run on the CPU, where a large model takes hours for an iteration; the embedded model "
        "trains in minutes (python -m densegrpo_fast.train)"
    )


def set_up(model: SD3, options: ModelOptions) -> None:
    """Apply the options that a loaded model takes: attention, decoding and gradient checkpointing."""
    model.set_attention(options.attention)
    model.decode_by(options.vae_decode)
    if options.gradient_checkpointing:
        model.checkpoint_gradients()


def prompt_cache(options: ModelOptions, dtype: torch.dtype) -> PromptCache | None:
    """The cache of `model.prompt_cache`, for this model's encoders alone; None without one."""
    if options.prompt_cache is None:
        return None
    directory = pipeline_directory(options.path, options.revision)
    settings = {
        "encoders": files_fingerprint(directory, text_files(directory)),
        "max_sequence_length": options.max_sequence_length,
        "dtype": str(dtype).removeprefix("torch."),
    }
    return PromptCache(Path(options.prompt_cache).expanduser(), settings)
