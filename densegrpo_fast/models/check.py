"""What a model that user code has made must keep to, tried on two rows before anything is trained."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.models.base import FlowModel, Velocity


@torch.no_grad()
def check_model(model: FlowModel, prompt: str, guidance_scale: float, num_steps: int) -> None:
    """Ask a model for everything that training needs once, and look at shapes, dtypes and ranges.

    Args:
        model: user code's.
        prompt: one that it can encode.
        guidance_scale, num_steps: of the run.

    Raises:
        UsageError: it has nothing to train, or an answer is not what `FlowModel` says.
    """
    if not isinstance(model, FlowModel):
        raise UsageError(f"Trainer: expected a model derived from densegrpo_fast.FlowModel, got {model!r}")
    name = type(model).__name__
    if not model.trainable_parameters():
        raise UsageError("Trainer: the model that was given has no adapter, so there is nothing to train")
    sigmas = model.sigmas(num_steps)
    if list(sigmas.shape) != [num_steps + 1] or not (sigmas.diff() < 0).all():
        raise UsageError(
            f"{name}.sigmas: expected {num_steps + 1} falling noise levels for {num_steps} steps, got {sigmas.tolist()}"
        )
    conditioning = model.encode([prompt, prompt])
    if len(conditioning) != 2:
        raise UsageError(f"{name}.encode: expected rows [2] for 2 prompts, got {list(conditioning.rows.shape)}")
    latents = torch.zeros(2, *model.latent_shape, device=model.device)
    sigma = sigmas[0].to(latents).expand(2)
    velocity = model.velocity(latents, sigma, conditioning, guidance_scale)
    if not isinstance(velocity, Velocity):
        raise UsageError(f"{name}.velocity: expected a Velocity, got {type(velocity).__name__}")
    for half in ("cond", "uncond"):
        if (values := getattr(velocity, half)) is not None:
            _check(f"{name}.velocity: {half}", values, list(latents.shape), "like latents")
    images = model.decode(latents)
    height, width = images.shape[-2:] if images.ndim == 4 else ("H", "W")
    _check(f"{name}.decode: images", images, [2, 3, height, width], "[B, 3, H, W]")
    low, high = images.min().item(), images.max().item()
    if low < -0.01 or high > 1.01:
        raise UsageError(f"{name}.decode: images must be in [0, 1], got values from {low:.3g} to {high:.3g}")


def _check(what: str, values: Tensor, shape: list[Any], which: str) -> None:
    if list(values.shape) != shape or values.dtype != torch.float32:
        raise UsageError(
            f"{what} must be float32 with shape {shape} {which}, got {values.dtype} with shape {list(values.shape)}"
        )
