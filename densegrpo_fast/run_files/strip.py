"""Strips: what a few samples looked like at every step, with the reward that each step gained, as one picture.

A strip has a block for each sample. A block's columns are states of the sampler from noise to image: the latent as it
is, the final picture that the lookahead predicts from it, that picture's reward, and the gain of the step that led
there. It is kept as a PNG file that carries its numbers in a text field, from which `read_strip` makes it again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from densegrpo_fast.common.files import output_errors, replace_bytes

STRIP_KEY = "strip"
"""PNG text field with the numbers and places of a strip, as JSON."""

_CELL = 96
_GAP, _MARGIN = 6, 14
_FONT, _SMALL = 14, 12
_PAPER, _INK, _SOFT, _EMPTY = (255, 255, 255), (29, 29, 34), (106, 106, 115), (238, 238, 236)
_UP, _DOWN = (26, 127, 90), (192, 74, 38)
_FRAME_MS, _LAST_MS = 700, 2500


@dataclass(frozen=True)
class StripRow:
    """One sample, or one branch of every step.

    Attributes:
        label: which one it is.
        latents: for each of N columns the latent as a picture; None where it cannot be shown.
        pictures: the predicted final picture; None where none was made.
        rewards: of the pictures; NaN = none.
        gains: of the steps that led to the columns; NaN = none.
    """

    label: str
    latents: Sequence[Image.Image | None]
    pictures: Sequence[Image.Image | None]
    rewards: Sequence[float]
    gains: Sequence[float]


@dataclass(frozen=True)
class Strip:
    """Samples of one prompt, step by step.

    Attributes:
        prompt: what all of them show.
        note: where the pictures come from, and what is missing.
        columns: N headings.
        rows: at least one.
        gain: what the gains are, in a word or two.
    """

    prompt: str
    note: str
    columns: Sequence[str]
    rows: Sequence[StripRow]
    gain: str = "gain"


def save_strip(strip: Strip, path: Path) -> None:
    """Write a strip as PATH, a PNG file, and beside it, under `.webp`, as an animation over its columns.

    Raises:
        OutputError: a file cannot be written.
    """
    image, places = _draw(strip)
    information = PngInfo()
    information.add_itxt(STRIP_KEY, json.dumps(places, ensure_ascii=False))
    still, moving = BytesIO(), BytesIO()
    image.save(still, format="PNG", pnginfo=information, optimize=True)
    first, *others = (_frame(strip, column) for column in range(len(strip.columns)))
    times = [_FRAME_MS] * len(others) + [_LAST_MS]
    first.save(moving, format="WEBP", quality=88, save_all=True, append_images=others, duration=times, loop=0)
    with output_errors(f"cannot create {path.parent}"):
        path.parent.mkdir(parents=True, exist_ok=True)
    replace_bytes(path, still.getvalue())
    replace_bytes(path.with_suffix(".webp"), moving.getvalue())


def read_strip(path: Path) -> Strip:
    """The strip that `save_strip` wrote.

    Raises:
        OSError: the file cannot be read; ValueError: it holds no strip.
    """
    with Image.open(path) as image:
        text = image.info.get(STRIP_KEY)
        if text is None:
            raise ValueError(f"{path}: this picture is no strip")
        whole, found = image.convert("RGB"), json.loads(text)

    def cut(box: list[int] | None) -> Image.Image | None:
        if box is None:
            return None
        x, y, width, height, own_width, own_height = box
        part = whole.crop((x, y, x + width, y + height))
        return part.resize((own_width, own_height), Image.Resampling.NEAREST)

    rows = [
        StripRow(
            row["label"],
            [cut(box) for box in row["latents"]],
            [cut(box) for box in row["pictures"]],
            [_number(value) for value in row["rewards"]],
            [_number(value) for value in row["gains"]],
        )
        for row in found["rows"]
    ]
    return Strip(found["prompt"], found["note"], found["columns"], rows, found["gain"])


def _draw(strip: Strip) -> tuple[Image.Image, dict[str, Any]]:
    """The strip as one picture, and its numbers with the places of its parts (see `_paste`)."""
    font, small = ImageFont.load_default(_FONT), ImageFont.load_default(_SMALL)
    labels = max(small.getlength(text) for text in ("latent", "predicted", "reward", strip.gain)) + 10
    width = int(_MARGIN * 2 + labels + len(strip.columns) * (_CELL + _GAP))
    note = _wrapped(strip.note, small, width - 2 * _MARGIN)
    has_latents = any(latent is not None for row in strip.rows for latent in row.latents)
    block = _SMALL + 8 + (_CELL + _GAP if has_latents else 0) + _CELL + 2 * (_SMALL + 7) + 14
    head = _MARGIN + _FONT + 10 + _SMALL + 8
    height = head + len(strip.rows) * block + len(note) * (_SMALL + 4) + _MARGIN
    image = Image.new("RGB", (width, height), _PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, _MARGIN - 2), strip.prompt, fill=_INK, font=font)
    lefts = [int(_MARGIN + labels + column * (_CELL + _GAP)) for column in range(len(strip.columns))]
    for x, column in zip(lefts, strip.columns, strict=True):
        draw.text((x + _CELL / 2, head - _SMALL - 8), column, fill=_SOFT, font=small, anchor="ma")
    rows, y = [], head
    for row in strip.rows:
        draw.text((_MARGIN, y), row.label, fill=_INK, font=small)
        y += _SMALL + 8
        places: dict[str, Any] = {"label": row.label}
        for name, title, pictures in (("latents", "latent", row.latents), ("pictures", "predicted", row.pictures)):
            places[name] = [None] * len(lefts)
            if name == "latents" and not has_latents:
                continue
            draw.text((_MARGIN, y + _CELL / 2), title, fill=_SOFT, font=small, anchor="lm")
            places[name] = [_paste(image, picture, x, y) for x, picture in zip(lefts, pictures, strict=True)]
            y += _CELL + _GAP
        for title, values, form in (("reward", row.rewards, ".3f"), (strip.gain, row.gains, "+.3f")):
            draw.text((_MARGIN, y), title, fill=_SOFT, font=small)
            for x, value in zip(lefts, values, strict=True):
                colour = _INK if title == "reward" else _colour(value)
                text = _text(value, form)
                draw.text((x + _CELL / 2, y), text, fill=colour, font=small, anchor="ma")
            y += _SMALL + 7
        y += 14 - _GAP
        rows.append(places | {"rewards": _json(row.rewards), "gains": _json(row.gains)})
    for number, line in enumerate(note):
        draw.text((_MARGIN, y + number * (_SMALL + 4)), line, fill=_SOFT, font=small)
    about = {"prompt": strip.prompt, "note": strip.note, "columns": list(strip.columns), "gain": strip.gain}
    return image, about | {"rows": rows}


def _frame(strip: Strip, now: int) -> Image.Image:
    """One column large, with the rewards up to there as a line of bars: a frame of the animation."""
    font, small = ImageFont.load_default(_FONT), ImageFont.load_default(_SMALL)
    side, bars = 2 * _CELL, 3 * _CELL
    width, block = 2 * _MARGIN + 2 * side + _GAP + 20 + bars, side + _SMALL + 24
    image = Image.new("RGB", (width, _MARGIN + _FONT + 14 + len(strip.rows) * block), _PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((_MARGIN, _MARGIN - 2), f"{strip.prompt}   {strip.columns[now]}", fill=_INK, font=font)
    known = [value for row in strip.rows for value in row.rewards if math.isfinite(value)]
    low, high = min([0.0, *known]), max([0.0, *known]) or 1.0
    y = _MARGIN + _FONT + 12
    for row in strip.rows:
        draw.text((_MARGIN, y), row.label, fill=_SOFT, font=small)
        top = y + _SMALL + 6
        _paste(image, row.latents[now], _MARGIN, top, side)
        _paste(image, row.pictures[now], _MARGIN + side + _GAP, top, side)
        left, step = _MARGIN + 2 * side + _GAP + 20, bars / len(strip.columns)
        for column, (reward, gain) in enumerate(zip(row.rewards, row.gains, strict=True)):
            if column > now or not math.isfinite(reward):
                continue
            x, room = left + column * step, side - 40
            zero = top + 20 + room * high / (high - low)
            end = top + 20 + room * (high - reward) / (high - low)
            box = (x + 2, min(zero, end), x + step - 2, max(zero, end) + 1)
            draw.rectangle(box, fill=_colour(gain) if column else _SOFT)
            if column == now:
                draw.text((x + step / 2, min(zero, end) - 16), f"{reward:.2f}", fill=_INK, font=small, anchor="ma")
                words = f"{strip.gain} {_text(gain, '+.3f')}" if math.isfinite(gain) else ""
                draw.text((left, top + side - 14), words, fill=_colour(gain), font=small)
        y += block
    return image


def _paste(image: Image.Image, picture: Image.Image | None, x: int, y: int, side: int = _CELL) -> list[int] | None:
    """Put a picture into its cell, or mark the cell as empty; where it is: x, y, width, height, own width, height."""
    if picture is None:
        ImageDraw.Draw(image).rectangle((x, y, x + side - 1, y + side - 1), fill=_EMPTY)
        return None
    scale = side / max(picture.size)
    width, height = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    # small pictures show their pixels
    shrinks = scale < 1
    shown = picture.resize((width, height), Image.Resampling.LANCZOS if shrinks else Image.Resampling.NEAREST)
    x, y = x + (side - width) // 2, y + (side - height) // 2
    image.paste(shown, (x, y))
    own = shown.size if shrinks else picture.size
    return [x, y, width, height, *own]


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: float) -> list[str]:
    """The text in lines of at most `width` pixels, broken between words."""
    words, lines = text.split(), [""]
    for before, word in pairwise(["", *words]):
        longer = f"{lines[-1]} {word}" if before else word
        if font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def _colour(gain: float) -> tuple[int, int, int]:
    """Green for what raises the reward, red for what lowers it."""
    return _SOFT if not math.isfinite(gain) or abs(gain) < 5e-4 else _UP if gain > 0 else _DOWN


def _text(value: float, form: str) -> str:
    """A number without the sign of a zero; Pillow's own font knows no long dash."""
    return format(value, form).replace("-0.000", "0.000").replace("+0.000", "0.000") if math.isfinite(value) else "-"


def _json(values: Sequence[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def _number(value: float | None) -> float:
    return math.nan if value is None else value
