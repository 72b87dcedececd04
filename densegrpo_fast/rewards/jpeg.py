"""JPEG rewards: how small or how large a picture becomes as a JPEG file.

The toy rewards of DDPO (arXiv 2305.13301), on Flow-GRPO's scale: quality 95, a kilobyte is 1000 bytes. They
need no model and no network, and any sampler can learn them, so they make good smoke tests.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any

from torch import Tensor

from densegrpo_fast.common.pictures import to_bytes


def jpeg_kilobytes(images: Tensor, quality: int = 95) -> list[float]:
    """Size of each picture as a JPEG file, in units of 1000 bytes.

    Args:
        images: [N, 3, H, W] float; values outside [0, 1] are clamped, the rest rounded to 8 bits.
        quality: JPEG quality, 1 to 95.
    """
    from PIL import Image

    sizes = []
    for picture in to_bytes(images):
        buffer = BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=quality)
        sizes.append(buffer.tell() / 1000)
    return sizes


class JpegIncompressibility:
    """Reward for detail: the size of the JPEG file in kilobytes, higher for busier pictures."""

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> list[float]:
        """Size in kB per picture; images [N, 3, H, W] float in [0, 1]."""
        return jpeg_kilobytes(images)


class JpegCompressibility:
    """Reward for smoothness: minus the size of the JPEG file in units of 500 kB, at most 0."""

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> list[float]:
        """Minus size / 500 kB per picture; images [N, 3, H, W] float in [0, 1]."""
        return [-size / 500 for size in jpeg_kilobytes(images)]
