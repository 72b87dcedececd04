"""JPEG rewards: scale, direction and rounding."""

from __future__ import annotations

from io import BytesIO

import pytest
import torch
from PIL import Image

from densegrpo_fast.rewards.jpeg import jpeg_kilobytes
from densegrpo_fast.rewards.registry import create


@pytest.fixture
def pictures():
    generator = torch.Generator().manual_seed(0)
    flat = torch.full((3, 32, 48), 0.5)
    noise = torch.rand(3, 32, 48, generator=generator)
    return torch.stack([flat, noise])


def test_size_is_that_of_the_file_pillow_writes_at_quality_95(pictures):
    pixels = (pictures[1] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=95)
    assert jpeg_kilobytes(pictures)[1] == len(buffer.getvalue()) / 1000


def test_compressibility_is_minus_the_size_over_500_kilobytes(pictures):
    sizes = create("jpeg_incompressibility")(pictures, ["", ""], [{}, {}])
    assert sizes == jpeg_kilobytes(pictures)
    assert create("jpeg_compressibility")(pictures, ["", ""], [{}, {}]) == pytest.approx([-s / 500 for s in sizes])
    assert sizes[1] > 2 * sizes[0] > 0, "noise takes more room than one colour"


def test_values_outside_the_range_are_clamped_and_half_precision_is_accepted(pictures):
    assert jpeg_kilobytes(pictures * 10 - 5) == jpeg_kilobytes((pictures * 10 - 5).clamp(0, 1))
    assert jpeg_kilobytes(pictures.bfloat16()) == jpeg_kilobytes(pictures.bfloat16().float())
