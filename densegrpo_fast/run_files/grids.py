"""Pictures inside the PNG files of a run, read without torch: their places, captions, and how a page holds them."""

from __future__ import annotations

import base64
import json
from io import BytesIO
from pathlib import Path

from PIL import Image

PROMPTS_KEY, PLACES_KEY = "prompts", "places"
"""PNG text fields, as JSON: the captions in reading order; the scale, and x, y, width and height of each picture."""

_LOSSLESS_SIDE = 96


def read_captions(path: str | Path) -> list[str]:
    """Captions that `images.save_grid` stored in a PNG file, in reading order; empty if it stored none."""
    with Image.open(path) as image:
        return [str(text) for text in json.loads(image.info.get(PROMPTS_KEY, "[]"))]


def read_grid(path: str | Path) -> list[Image.Image]:
    """The pictures of a file of `images.save_grid` in their own size; empty if the file does not tell where they are.

    Raises:
        OSError: it cannot be read.
    """
    with Image.open(path) as image:
        found = json.loads(image.info.get(PLACES_KEY, '{"boxes": []}'))
        whole = image.convert("RGB")
    pictures = []
    for x, y, width, height in found["boxes"]:
        own = (width // found["scale"], height // found["scale"])
        pictures.append(whole.crop((x, y, x + width, y + height)).resize(own, Image.Resampling.NEAREST))
    return pictures


def data_url(picture: Image.Image, side: int) -> str:
    """A picture as a URL that holds it whole.

    Args:
        side: most pixels of its longer side.
    """
    if max(picture.size) > side:
        factor = side / max(picture.size)
        size = (max(1, round(picture.width * factor)), max(1, round(picture.height * factor)))
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    buffer = BytesIO()
    # small pictures are enlarged by the page, which would show what compression loses
    picture.save(buffer, format="WEBP", lossless=max(picture.size) <= _LOSSLESS_SIDE, quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
