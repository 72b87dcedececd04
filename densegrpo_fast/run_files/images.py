"""Grids of pictures as PNG files that carry their own prompts."""

from __future__ import annotations

import errno
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from densegrpo_fast.common.files import read_plainly, replace_bytes
from densegrpo_fast.common.pictures import finite_pictures, to_bytes
from densegrpo_fast.run_files.grids import PLACES_KEY, PROMPTS_KEY

_MARKER, _VERSION = "densegrpo_fast", "1"
"""PNG text field by which `read_picture` knows its own fields: other programs write a `prompt`, too."""
MAX_PIXELS = 2**26
"""Most pixels of a picture that `read_picture` reads."""
_GAP = 6
_FONT_SIZE = 11
_PAPER, _INK = (255, 255, 255), (60, 60, 67)


def save_grid(
    images: Tensor, path: str | Path, columns: int, scale: int = 2, captions: Sequence[str] | None = None
) -> Path:
    """Save pictures as one PNG, row by row.

    Args:
        images: [N, 3, H, W] float; values outside [0, 1] are clamped, and a picture that is not finite is left grey.
        path: the file to write; its directory is made.
        columns: pictures per row, at least 1.
        scale: whole-number enlargement without smoothing, so that small pictures show their pixels.
        captions: N texts (the prompts), drawn below the pictures and stored in the file (see
            `grids.read_captions`).

    Returns:
        The path written.

    Raises:
        OutputError: the file cannot be written.
        ValueError: images is empty or not [N, 3, H, W], the number of captions differs, or columns or scale
            is below 1.
    """
    if images.ndim != 4 or images.shape[1] != 3 or len(images) == 0:
        raise ValueError(f"save_grid: images must have shape [N, 3, H, W] with N >= 1, got {list(images.shape)}")
    if columns < 1 or scale < 1:
        raise ValueError(f"save_grid: columns and scale must be at least 1, got {columns} and {scale}")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"save_grid: captions must hold {len(images)} texts, one per image, got {len(captions)}")
    pixels = to_bytes(images.where(finite_pictures(images)[:, None, None, None], 0.5))
    width, height = images.shape[3] * scale, images.shape[2] * scale
    columns = min(columns, len(images))

    font = ImageFont.load_default(_FONT_SIZE)
    texts = [_wrap(text, font, width) for text in captions or ()]
    text_height = max((text.count("\n") + 1 for text in texts), default=0) * (_FONT_SIZE + 3)
    step_x, step_y = width + _GAP, height + text_height + _GAP
    grid = Image.new("RGB", (columns * step_x + _GAP, math.ceil(len(images) / columns) * step_y + _GAP), _PAPER)
    draw = ImageDraw.Draw(grid)
    boxes = []
    for index, picture in enumerate(pixels):
        x, y = _GAP + index % columns * step_x, _GAP + index // columns * step_y
        boxes.append([x, y, width, height])
        grid.paste(Image.fromarray(picture).resize((width, height), Image.Resampling.NEAREST), (x, y))
        if texts:
            draw.multiline_text((x, y + height + 2), texts[index], fill=_INK, font=font, spacing=1)

    information = PngInfo()
    information.add_text(PLACES_KEY, json.dumps({"scale": scale, "boxes": boxes}))
    if captions is not None:
        information.add_itxt(PROMPTS_KEY, json.dumps(list(captions), ensure_ascii=False))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _save(grid, path, information)
    return path


def save_pictures(images: Tensor, directory: Path, rows: Sequence[tuple[str, int]], columns: int) -> list[str]:
    """Save pictures of prompts and seeds, each as `images/NNNN-seedS.png`, and all together as `grid.png`.

    Args:
        images: [N, 3, H, W] float; values outside [0, 1] are clamped.
        directory: where; made if absent. Files of the same name are replaced.
        rows: prompt and seed of each picture, prompt after prompt; both are stored in its file.
        columns: seeds per prompt; NNNN counts the prompts.

    Returns:
        The pictures' files, as names relative to the directory.
    """
    (directory / "images").mkdir(parents=True, exist_ok=True)
    names = [f"images/{index // columns:04d}-seed{seed}.png" for index, (_, seed) in enumerate(rows)]
    for name, (prompt, seed), image in zip(names, rows, images, strict=True):
        save_picture(image, directory / name, {"prompt": prompt, "seed": str(seed)})
    captions = [prompt for prompt, _ in rows]
    scale = max(1, 128 // images.shape[-1])
    save_grid(images, directory / "grid.png", columns=columns, scale=scale, captions=captions)
    return names


def save_picture(image: Tensor, path: str | Path, texts: Mapping[str, str]) -> None:
    """Save one picture [3, H, W] as PNG, values clamped to [0, 1], with text fields that `read_picture` returns."""
    information = PngInfo()
    for name, text in {**texts, _MARKER: _VERSION}.items():
        information.add_itxt(name, text)
    _save(Image.fromarray(to_bytes(image[None])[0]), Path(path), information)


def _save(picture: Image.Image, path: Path, information: PngInfo) -> None:
    buffer = BytesIO()
    picture.save(buffer, format="PNG", pnginfo=information)
    replace_bytes(path, buffer.getvalue())


def read_picture(path: str | Path) -> tuple[Tensor, dict[str, str]]:
    """A picture file as [3, H, W] float32 in [0, 1], upright, transparency on white, and the fields of `save_picture`.

    Text fields of other programs are left out. 16-bit grey is scaled; numbers without a known white are refused.

    Raises:
        OSError: it cannot be read, is no picture, or has more than `MAX_PIXELS` pixels; the message says so.
    """
    try:
        with warnings.catch_warnings():
            # what is larger than Pillow likes is refused below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(BytesIO(read_plainly(Path(path)))) as image:
                return _pixels(image), _own_texts(image.info)
    except OSError:
        raise
    except Exception as error:  # Pillow answers a damaged file with errors of a dozen classes
        raise OSError(f"{type(error).__name__}: {error}") from None


def _pixels(image: Image.Image) -> Tensor:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise OSError(errno.EFBIG, f"it has {width} x {height} pixels, expected at most {MAX_PIXELS} in all")
    if image.mode in ("F", "I") or (image.mode.startswith("I;") and not image.mode.startswith("I;16")):
        raise OSError(
            errno.EINVAL, f"its mode {image.mode} does not say which number is white; save it with 8 or 16 bits"
        )
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        grey = torch.from_numpy(np.array(upright).astype(np.float32)) / 65535
        return grey.expand(3, -1, -1).contiguous()
    colour = upright.convert("RGBA")
    opaque = Image.alpha_composite(Image.new("RGBA", colour.size, (255, 255, 255, 255)), colour).convert("RGB")
    return torch.from_numpy(np.array(opaque)).permute(2, 0, 1).float() / 255


def _own_texts(fields: Mapping[Any, Any]) -> dict[str, str]:
    """The fields that `save_picture` wrote; those of earlier versions are known by being a prompt and a seed alone."""
    texts = {name: str(text) for name, text in fields.items() if isinstance(name, str) and isinstance(text, str)}
    if texts.pop(_MARKER, None) is not None or ({*texts} == {"prompt", "seed"} and texts["seed"].isdecimal()):
        return texts
    return {}


def _wrap(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int) -> str:
    """`text` broken between words into lines of at most `width` pixels; a longer word has its own line."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)
