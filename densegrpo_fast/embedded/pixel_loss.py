"""What a small decoder is fitted by."""

from __future__ import annotations

from torch import Tensor


def pixel_loss(decoded: Tensor, target: Tensor) -> Tensor:
    """L1 on pixels plus L1 on horizontal and vertical differences, which keeps edges crisp; images [..., H, W]."""
    error = decoded - target
    return error.abs().mean() + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
