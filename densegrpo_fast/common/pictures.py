"""Pictures outside of tensors: 8-bit arrays, and PNG files in base64 for JSON."""

from __future__ import annotations

import base64
import binascii
import struct
from io import BytesIO
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import numpy as np

MAX_SIDE = 4096
"""Longest side of a picture that `decode_png` accepts, in pixels."""


def to_unit(images: Tensor) -> Tensor:
    """Pictures clamped to [0, 1]; NaN where they are not finite, so that an infinity does not become white."""
    return images.where(images.isfinite(), torch.nan).clamp(0, 1)


def finite_pictures(images: Tensor) -> Tensor:
    """[N] bool, whether a picture [N, 3, H, W], or a video [N, 3, F, H, W], holds finite numbers alone."""
    return images.flatten(1).isfinite().all(1)


def still(images: Tensor) -> Tensor:
    """Pictures as they are, of videos [N, 3, F, H, W] the frame in the middle: [N, 3, H, W]."""
    return images if images.ndim == 4 else images[:, :, images.shape[2] // 2]


def chosen_frames(videos: Tensor, count: int) -> Tensor:
    """[N, K, 3, H, W] of videos [N, 3, F, H, W]: at most `count` frames in the middle of as many equal parts."""
    total = videos.shape[2]
    count = min(count, total)
    places = [(2 * part + 1) * total // (2 * count) for part in range(count)]
    return videos[:, :, places].transpose(1, 2)


def to_bytes(images: Tensor) -> np.ndarray:
    """Pictures as 8-bit RGB.

    Args:
        images: [N, 3, H, W] float on any device; values outside [0, 1] are clamped, the rest rounded.

    Returns:
        [N, H, W, 3] uint8.

    Raises:
        ValueError: a number is not finite.
    """
    if not images.isfinite().all():
        raise ValueError("to_bytes: expected finite pictures")
    return images.detach().float().clamp(0, 1).mul(255).round().to("cpu", torch.uint8).permute(0, 2, 3, 1).numpy()


def encode_png(picture: np.ndarray) -> str:
    """A picture [H, W, 3] uint8 as a PNG file in base64."""
    import numpy as np
    from PIL import Image

    buffer = BytesIO()
    # losing no pixel at any level; the lowest one is several times faster
    Image.fromarray(np.ascontiguousarray(picture)).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def png_size(text: str) -> tuple[int, int]:
    """Width and height that a PNG file in base64 gives first, without decoding it.

    Raises:
        ValueError: the text does not begin as such a file does.
    """
    try:
        head = base64.b64decode(text[:32], validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("not base64") from None
    if len(head) != 24 or head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR":
        raise ValueError("not a PNG picture: it does not begin as one")
    width, height = struct.unpack(">II", head[16:])
    return width, height


def decode_png(text: str) -> np.ndarray:
    """The picture [H, W, 3] uint8 of a PNG file in base64; transparency is dropped.

    Raises:
        ValueError: the text is not base64, not a PNG file, or the picture has a side above `MAX_SIDE`.
    """
    import numpy as np
    from PIL import Image

    size = png_size(text)
    if max(size) > MAX_SIDE or min(size) == 0:
        raise ValueError(f"{size[0]} x {size[1]} pixels, expected 1 to {MAX_SIDE} a side")
    try:
        content = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise ValueError("not base64") from None
    try:
        with Image.open(BytesIO(content), formats=["PNG"]) as picture:
            # a second header may say something else
            if picture.size == size:
                return np.asarray(picture.convert("RGB"))
    except Exception as error:  # Pillow answers a damaged file with errors of a dozen classes
        raise ValueError(f"not a PNG picture: {type(error).__name__}: {error}") from None
    raise ValueError("not a PNG picture: it has two sizes")
