"""The model of a run: loaded as the configuration asks, with its adapter, on its device."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

import torch

from densegrpo_fast.calibration.rules import Staircase
from densegrpo_fast.calibration.store import read_calibration
from densegrpo_fast.common.errors import SetupError, UsageError, UserError
from densegrpo_fast.common.files import user_path
from densegrpo_fast.common.plugins import is_outside, load
from densegrpo_fast.common.pretrained import is_hub_id, silence_loading
from densegrpo_fast.config import Config
from densegrpo_fast.config.sections import ModelOptions
from densegrpo_fast.embedded import EMBEDDED
from densegrpo_fast.models.adapter_formats import fit_to, read_lora
from densegrpo_fast.models.attention import check_attention
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.loading import (
    Weights,
    directory_family,
    hub_family,
    load_pipeline,
    pipeline_directory,
    resolve_dtype,
    text_files,
)
from densegrpo_fast.models.lora import add_lora
from densegrpo_fast.models.prompt_cache import PromptCache, files_fingerprint
from densegrpo_fast.models.published import MODELS
from densegrpo_fast.models.whole_network import train_whole
from densegrpo_fast.rewards.registry import USE, resolve_alias
from densegrpo_fast.run_files.model_refs import adapter_file
from densegrpo_fast.training.prompts import is_there

logger = logging.getLogger(__name__)

_LARGE = 2**30
"""Bytes of a transformer's weights; SD3.5-Medium has five times as many."""
_WEIGHTLESS = ("scenes", "scenes_strict", "scenes_smooth", "jpeg_compressibility", "jpeg_incompressibility")
"""Rewards of the package that need neither weights nor a server."""


def default_device() -> torch.device:
    """The current GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def synchronizer(device: torch.device) -> Callable[[], object]:
    """What a timer must call for the device to have finished."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def check_device(config: Config, device: torch.device) -> None:
    """Refuse to start on a large model without a GPU, before anything is downloaded or loaded.

    Raises:
        SetupError: as `run.memory_check refuse` asks for.
    """
    if config.run.memory_check == "refuse" and is_slow(config.model, device):
        raise SetupError(
            f"there is no CUDA device: {without_gpu(config.model)}. --dry-run tries these settings on a tiny random "
            "model; run.memory_check warn goes on all the same"
        )


def build_model(config: Config, device: torch.device, dry_run: bool = False, weights: Weights = "placed") -> FlowModel:
    """The model, ready to be trained; in a dry run of a pipeline that is not in the package, a tiny one of its kind.

    Args:
        config: the run's.
        device: of the model.
        dry_run: whether this is one.
        weights: where those of a pipeline's network go (`load_pipeline`).

    Raises:
        SetupError: it, or what it needs, cannot be loaded; UsageError: an option does not fit it.
    """
    options = config.model
    model: FlowModel
    if dry_run and options.path not in EMBEDDED and not is_outside(options.path):
        kind = pipeline_class(options)
        with silence_loading():
            from densegrpo_fast.models.tiny import tiny_model

            model = tiny_model(kind)
        set_up(model, options)
    else:
        model = load_model(options, device, weights)
    check_calibration(config, model)
    lora = config.lora
    try:
        if options.train == "full":
            train_whole(model, reference=config.objective.kl_coef != 0)
        else:
            add_lora(model.network, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=lora.init_seed)
    except ValueError as error:
        raise UsageError(str(error)) from None
    if lora.start is not None:
        path = user_path(lora.start)
        try:
            layers = read_lora(path if os.path.isfile(path) else adapter_file(path))
            fit_to(layers, model.trainable_parameters(), lora.alpha / lora.rank)
        except ValueError as error:
            raise SetupError(f"lora.start: {error}") from None
    if options.compile is not None:
        model.compile(options.compile)
    return model


def check_calibration(config: Config, model: FlowModel) -> None:
    """Refuse a calibration that was made for another schedule than the model's.

    Raises:
        UsageError: the sigmas differ, or the file holds other levels than the configuration took from it.
    """
    if config.sampler.calibration is None:
        return
    made = read_calibration(Path(config.sampler.calibration))
    made.check_sampler(config.sampler.num_steps, config.sampler.dynamics, config.calibrated_steps())
    made.check_sigmas(model.sigmas(config.sampler.num_steps).tolist())
    if made.noise_level != config.noise_levels:
        raise UsageError(
            f"sampler.calibration: {made.path} does not hold the levels of sampler.noise_level; has it just changed?",
        )


def load_model(options: ModelOptions, device: torch.device, weights: Weights = "placed") -> FlowModel:
    """The model as it comes, without an adapter.

    `model.path` names a pipeline, or a function of the reader's own as `file.py:NAME`, which is called with the options
    and the device and returns a `FlowModel`.

    Raises:
        SetupError: it, or what it needs, cannot be loaded; UsageError: an option does not fit it.
    """
    dtype = resolve_dtype(options.dtype, device)
    if is_outside(options.path):
        return _outside(options, device)
    if is_slow(options, device):
        logger.warning("there is no CUDA device: %s", without_gpu(options))
    # before minutes are spent on loading
    check_attention(options.attention, device, dtype)
    model = load_pipeline(
        options.path,
        device=device,
        dtype=dtype,
        max_sequence_length=options.max_sequence_length,
        height=options.height,
        width=options.width,
        frames=options.frames,
        revision=options.revision,
        vae_dtype=resolve_dtype(options.vae_dtype, device),
        preview_decoder=options.preview_decoder,
        preview_dtype=resolve_dtype(options.preview_dtype, device),
        prompt_store=prompt_cache(options, dtype),
        weights=weights,
    )
    set_up(model, options)
    return model


def is_slow(options: ModelOptions, device: torch.device) -> bool:
    """Whether a model without a GPU is one to wait hours for: known to be large, or not here yet to be looked at."""
    if device.type != "cpu":
        return False
    parts = (user_path(options.path) / name for name in ("transformer", "unet"))
    size = sum(file.stat().st_size for part in parts for file in part.glob("*.safetensors"))
    return is_hub_id(options.path) or size > _LARGE


def without_gpu(options: ModelOptions) -> str:
    """What a user should know who has no GPU for such a model."""
    return (
        f"{options.path} would run on the CPU, where a large model takes hours for an iteration; the embedded model "
        "trains in minutes (python -m densegrpo_fast.train)"
    )


def _outside(options: ModelOptions, device: torch.device) -> FlowModel:
    """The model that a function from outside of the package makes."""
    try:
        model = load(options.path)(options, device)
    except UserError:
        raise
    except Exception as error:  # user code may raise anything
        raise SetupError(f"model.path: {options.path}: {type(error).__name__}: {error}") from error
    if not isinstance(model, FlowModel):
        raise UsageError(
            f"model.path: expected a FlowModel (densegrpo_fast.models.base) of {options.path}, got {model!r}"
        )
    return model


def pipeline_class(options: ModelOptions) -> str:
    """Class of the pipeline that `model.path` names, without downloading more than its model_index.json.

    Raises:
        SetupError: there is no such pipeline, or its kind is not supported.
    """
    for model in MODELS.values():
        if options.path == model.hub:
            return model.pipeline
    if not is_hub_id(options.path):
        return directory_family(pipeline_directory(options.path)).pipeline_class
    try:
        return hub_family(options.path, options.revision).pipeline_class
    except SetupError as error:
        if isinstance(error.__cause__, OSError):
            # the hub cannot be reached: what most pipelines were, so that the other settings can be tried
            return "StableDiffusion3Pipeline"
        raise


def set_up(model: DiffusersModel, options: ModelOptions) -> None:
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
    return PromptCache(user_path(options.prompt_cache), settings)


def tiny_config(config: Config, processes: int = 1) -> Config:
    """The configuration of a dry run: two samples of one prompt, and rewards that need no weights and no server.

    Args:
        processes: that share the samples; each has some.
    """
    settings = config.model_dump()
    settings["data"] |= {"num_prompts": processes if config.distributed.split == "groups" else 1}
    settings["sampler"] |= {"group_size": max(2, processes), "micro_batch": max(2, processes)}
    if config.sampler.branches is not None:
        settings["sampler"] |= {"group_size": 2 * processes, "branches": 2, "micro_batch": 1}
    settings["optimizer"] |= {"updates_per_iteration": 1}
    settings["lookahead"] |= {"monitor_every": 0}
    settings["calibration"] |= {"samples": Staircase.enough, "rounds": 1}
    if config.model.path not in EMBEDDED:
        settings["model"] |= {"height": 0, "width": 0, "frames": 1}
        # the levels stay; the tiny model that takes the place of this one has a schedule of its own
        settings["sampler"] |= {"calibration": None}
        for key in ("prompts", "eval_prompts"):
            if not is_there(settings["data"][key]):
                settings["data"][key] = "scenes"
        for name in (*config.reward.terms, *config.reward.observed):
            kind, _ = resolve_alias(name, config.reward.options)
            if not (is_outside(kind) or kind in _WEIGHTLESS):
                settings["reward"]["options"][name] = {USE: "jpeg_compressibility"}
    return Config.model_validate(settings)
