"""Argument checks of the public ops: shapes, dtypes, devices, and numbers where no device is waited for."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from densegrpo_fast.flow.dynamics import NUM_COLUMNS
from densegrpo_fast.flow.noise import integer_tensor

FLOATING = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_latents(op: str, latents: Tensor, **same_shape: Tensor) -> None:
    """Check the state of a step and the tensors that must have its shape.

    Args:
        op: name for messages.
        latents: expected [B, ...] floating.
        same_shape: further floating tensors, by argument name.

    Raises:
        TypeError: a dtype that is not floating.
        ValueError: a shape or device that does not fit.
    """
    check_floating(op, "latents", latents)
    if latents.ndim < 2:
        raise ValueError(f"{op}: latents must have shape [B, ...] with 2 or more dimensions, got {list(latents.shape)}")
    for name, tensor in same_shape.items():
        check_floating(op, name, tensor)
        check_device(op, name, tensor, latents)
        if tensor.shape != latents.shape:
            raise ValueError(
                f"{op}: {name} must have shape {list(latents.shape)} like latents, got {list(tensor.shape)}"
            )


def check_table(op: str, table: Tensor, latents: Tensor) -> None:
    """Check a table of step coefficients.

    Raises:
        TypeError: not float32.
        ValueError: not [T, 6], or not on the device of `latents`.
    """
    if table.dtype != torch.float32:
        raise TypeError(f"{op}: table must be float32, got {table.dtype}")
    if table.ndim != 2 or table.shape[1] != NUM_COLUMNS:
        raise ValueError(f"{op}: table must have shape [T, {NUM_COLUMNS}], got {list(table.shape)}")
    check_device(op, "table", table, latents)


def check_finite(op: str, table: Tensor) -> None:
    """Check the coefficients themselves where that takes no wait for a device: on the CPU.

    Raises:
        ValueError: one is NaN or infinite.
    """
    if table.device.type == "cpu" and not table.isfinite().all():
        step, column = (~table.isfinite()).nonzero()[0].tolist()
        raise ValueError(
            f"{op}: table must be finite, got {table[step, column].item()} in column {column} of step {step}"
        )


def check_steps(op: str, step_index: Tensor, table: Tensor) -> None:
    """Check the steps of all rows, likewise on the CPU alone.

    Raises:
        ValueError: one is not in the table.
    """
    if step_index.device.type == "cpu":
        for row, step in enumerate(step_index.tolist()):
            if not 0 <= step < len(table):
                raise ValueError(f"{op}: step_index must be in [0, {len(table)}), got {step} in row {row}")


def check_levels(op: str, sigma: Tensor, next_sigma: Tensor) -> None:
    """Check the noise levels of a move, likewise on the CPU alone.

    Args:
        op: name for messages.
        sigma, next_sigma: levels that every row leaves and reaches, [B].

    Raises:
        ValueError: not 0 <= next_sigma <= sigma <= 1.
    """
    if sigma.device.type == "cpu":
        for row, (before, after) in enumerate(zip(sigma.tolist(), next_sigma.tolist(), strict=True)):
            if not 0 <= after <= before <= 1:
                given = f"next_sigma {after} and sigma {before} in row {row}"
                raise ValueError(f"{op}: must have 0 <= next_sigma <= sigma <= 1, got {given}")


def step_rows(op: str, index: int | Tensor, latents: Tensor) -> Tensor:
    """Step of every row as [B] int64; one number serves all rows.

    Raises:
        TypeError: neither an int nor int64.
        ValueError: a negative or too large int, or a tensor that is not [B].
    """
    batch = len(latents)
    sizes = (batch,) if isinstance(index, Tensor) else (1,)
    return integer_tensor(f"{op}: step_index", index, 16, sizes, latents.device).expand(batch)


def guidance_rows(op: str, scale: float | Tensor, uncond: Tensor | None, latents: Tensor) -> Tensor | None:
    """Guidance scale of every row as [B] float32; None without guidance.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: not [B], another device, a number that is not finite, or a scale without what it scales.
    """
    if uncond is None:
        if isinstance(scale, Tensor) or scale != 1.0:
            raise ValueError(f"{op}: guidance_scale {scale} needs uncond, got None")
        return None
    if not isinstance(scale, Tensor):
        if not math.isfinite(scale):
            raise ValueError(f"{op}: guidance_scale must be finite, got {scale}")
        scale = torch.full((1,), float(scale), device=latents.device).expand(len(latents))
    check_rows(op, "guidance_scale", scale, latents)
    if scale.dtype != torch.float32:
        raise TypeError(f"{op}: guidance_scale must be float32, got {scale.dtype}")
    return scale


def check_rows(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """Check a floating tensor of one value per row.

    Raises:
        TypeError: not floating.
        ValueError: not [B], or not on the device of `like`.
    """
    check_floating(op, name, tensor)
    check_device(op, name, tensor, like)
    if tensor.shape != like.shape[:1]:
        raise ValueError(f"{op}: {name} must have shape {list(like.shape[:1])}, got {list(tensor.shape)}")


def check_floating(op: str, name: str, tensor: Tensor) -> None:
    """Check that an argument is a tensor of a supported floating dtype.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATING:
        raise TypeError(f"{op}: {name} must be float32, float16, bfloat16 or float64, got {tensor.dtype}")


def check_device(op: str, name: str, tensor: Tensor, like: Tensor) -> None:
    """Check that two tensors are on one device.

    Raises:
        ValueError: they are not.
    """
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} must be on {like.device}, got {tensor.device}")
