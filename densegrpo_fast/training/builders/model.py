"""The model of a run, with its adapter, on its device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from densegrpo_fast.calibration.store import read_calibration
from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.common.pretrained import silence_loading
from densegrpo_fast.config import Config
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.lora import add_lora
from densegrpo_fast.models.sd3 import SD3
from densegrpo_fast.training.loading import load_model, set_up


def default_device() -> torch.device:
    """The current GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def synchronizer(device: torch.device) -> Callable[[], object]:
    """What a timer must call for the device to have finished."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def load_base(config: Config, device: torch.device) -> SD3:
    """The model as it comes, without an adapter; see `load_model`."""
    return load_model(config.model, device)


def build_model(config: Config, device: torch.device, dry_run: bool = False) -> FlowModel:
    """The model with its adapter; in a dry run of a model that is not in the package, a tiny random one."""
    options = config.model
    if dry_run and options.path != "embedded":
        with silence_loading():
            from densegrpo_fast.models.tiny import tiny_sd3

        model = tiny_sd3()
        set_up(model, options)
    else:
        model = load_base(config, device)
    check_calibration(config, model)
    lora = config.lora
    try:
        add_lora(model.network, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=lora.init_seed)
    except ValueError as error:
        raise UsageError(str(error)) from None
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
