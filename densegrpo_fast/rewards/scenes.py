"""Scenes reward: does the picture show the coloured shapes that the sentence asks for?

The sentence is parsed; the picture is examined by image analysis alone: chroma tells object from background, connected
components find the objects, a component's hue names its colour, and the overlap of its outline with ideal figures
names its shape. Nothing here knows how pictures are rendered. In the spirit of GenEval (arXiv 2310.11513), with a
graded score beside the strict one so that small improvements count.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

SHAPES = ("circle", "square", "triangle", "cross")
HUES = {"red": 0.0, "yellow": 55.0, "green": 130.0, "cyan": 187.0, "blue": 230.0, "purple": 280.0}
"""Hue in degrees at the heart of each colour word."""
COLOURS = tuple(HUES)
_NUMBERS = {"a": 1, "two": 2, "three": 3}
_DIRECTIONS = {
    "to the left of": (-1.0, 0.0),
    "to the right of": (1.0, 0.0),
    "above": (0.0, -1.0),
    "below": (0.0, 1.0),
}

_MIN_CHROMA = 0.30
_MIN_AREA_SHARE = 24 / 64**2
_MAX_COMPONENTS = 6
_GRID = 12
_STRICT_OVERLAP = 0.70
_STRICT_PURITY = 0.75
_STRICT_CLUTTER = 0.06


@dataclass(frozen=True)
class Request:
    """What a sentence asks for: (shape, colour or None) per object, and the first one's direction from the second."""

    objects: tuple[tuple[str, str | None], ...]
    direction: tuple[float, float] | None = None


@dataclass(frozen=True)
class Finding:
    """One object found in a picture.

    Attributes:
        colour: [6] share of its pixels in each colour of `COLOURS`.
        overlap: [4] intersection over union with each ideal shape of `SHAPES`, both fitted to the bounding box.
        centre: [2] x, y in [0, 1], y pointing down.
    """

    colour: np.ndarray
    overlap: np.ndarray
    centre: np.ndarray


@lru_cache(maxsize=4096)
def parse(prompt: str) -> Request:
    """Read a sentence such as "a red circle to the left of a blue square" or "two green crosses".

    Raises:
        ValueError: a word or the form is not understood.
    """
    text = " ".join(prompt.lower().split()).rstrip(".")
    for words, direction in _DIRECTIONS.items():
        first, found, second = text.partition(f" {words} ")
        if found:
            return Request((*_noun(first, prompt), *_noun(second, prompt)), direction)
    phrases = re.split(r", and |, | and ", text)
    return Request(tuple(item for phrase in phrases for item in _noun(phrase, prompt)))


def _noun(phrase: str, prompt: str) -> tuple[tuple[str, str | None], ...]:
    words = phrase.split()
    number = _NUMBERS.get(words[0]) if words else None
    if number is None or len(words) not in (2, 3):
        raise ValueError(f"scenes reward cannot read {phrase!r} in the prompt {prompt!r}: expected 'a red circle'")
    shape = (
        words[-1].removesuffix("es") if words[-1] == "crosses" else words[-1].removesuffix("s" if number > 1 else "")
    )
    colour = words[1] if len(words) == 3 else None
    if shape not in SHAPES or colour not in (*COLOURS, None):
        raise ValueError(f"scenes reward does not know {phrase!r} in the prompt {prompt!r}")
    return ((shape, colour),) * number


def examine(images: np.ndarray) -> tuple[list[list[Finding]], np.ndarray]:
    """Find the objects in pictures.

    Args:
        images: [N, 3, H, W] float in [0, 1].

    Returns:
        Per picture the objects found, largest first (at most six), and [N] the share of coloured area that belongs to
        none of them (1 where there is no object).
    """
    count, _, height, width = images.shape
    red, green, blue = images[:, 0], images[:, 1], images[:, 2]
    # the plane perpendicular to grey: its length is chroma, its angle hue
    alpha, beta = red - 0.5 * (green + blue), np.float32(np.sqrt(0.75)) * (green - blue)
    coloured = alpha * alpha + beta * beta > _MIN_CHROMA**2
    colour = _nearest_colour(alpha, beta)
    mask = coloured & ~_borders(coloured, colour)
    in_plane = np.zeros((3, 3, 3), bool)
    in_plane[1] = ndimage.generate_binary_structure(2, 1)
    labels, total = ndimage.label(mask, structure=in_plane)
    areas = np.bincount(labels.ravel(), minlength=total + 1)
    large = np.flatnonzero(areas >= max(_MIN_AREA_SHARE * height * width, 8))
    large = large[large > 0]
    boxes = ndimage.find_objects(labels)
    found: list[list[tuple[int, Finding]]] = [[] for _ in range(count)]
    for label in large:
        picture, rows, columns = boxes[label - 1]
        inside = labels[picture.start, rows, columns] == label
        shares = np.bincount(colour[picture.start, rows, columns][inside], minlength=len(COLOURS)) / areas[label]
        y, x = np.nonzero(inside)
        centre = np.array([(columns.start + x.mean() + 0.5) / width, (rows.start + y.mean() + 0.5) / height])
        found[picture.start].append((int(areas[label]), Finding(shares, _overlaps(inside), centre)))
    area_coloured = mask.reshape(count, -1).sum(1)
    kept, clutter = [], np.ones(count)
    for index, findings in enumerate(found):
        findings.sort(key=lambda pair: -pair[0])
        kept.append([finding for _, finding in findings[:_MAX_COMPONENTS]])
        if findings:
            clutter[index] = 1.0 - sum(area for area, _ in findings[:_MAX_COMPONENTS]) / area_coloured[index]
    return kept, clutter


def score(request: Request, findings: list[Finding], clutter: float) -> tuple[float, bool]:
    """Graded score in [0, 1] and strict pass for one examined picture."""
    if not findings:
        return 0.0, False
    wanted, direction = request.objects, request.direction
    quality = np.array([[_quality(finding, *item) for finding in findings] for item in wanted])
    match = _assign(quality)
    graded = sum(quality[i, j] for i, j in match) / len(wanted)
    if direction is not None:
        graded *= 0.7
        if len(match) == len(wanted):
            both = min(quality[i, j] for i, j in match)
            graded += 0.3 * both * _placed(direction, findings, match)
    extra = max(len(findings) - len(wanted), 0)
    graded *= (1.0 - clutter) / (1.0 + 0.5 * extra)
    strict = (
        len(findings) == len(wanted)
        and clutter <= _STRICT_CLUTTER
        and all(_is(findings[j], *wanted[i]) for i, j in match)
        and (direction is None or _placed(direction, findings, match) >= 0.5)
    )
    return float(graded), bool(strict)


class ScenesReward:
    """`reward(images, prompts, metadata) -> list[float]`: the graded score (or the strict one) of each picture.

    A prompt outside the grammar raises `ValueError`: such a run is misconfigured, not badly aligned.
    """

    def __init__(self, strict: bool = False):
        self.strict = strict

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None) -> list[float]:
        graded, strict = self.both(images, prompts)
        return strict if self.strict else graded

    def both(self, images: Tensor, prompts: list[str]) -> tuple[list[float], list[float]]:
        """Graded and strict scores from one look at the pictures. images [N, 3, H, W] in [0, 1]."""
        requests = [parse(prompt) for prompt in prompts]
        findings, clutter = examine(images.detach().to("cpu", torch.float32).numpy())
        scores = [score(r, f, c) for r, f, c in zip(requests, findings, clutter, strict=True)]
        return [graded for graded, _ in scores], [float(strict) for _, strict in scores]


def _nearest_colour(alpha: np.ndarray, beta: np.ndarray) -> np.ndarray:
    best = np.full(alpha.shape, -np.inf, np.float32)
    index = np.zeros(alpha.shape, np.int8)
    for number, hue in enumerate(HUES.values()):
        # angle in the (alpha, beta) plane equals HSV's hue to within about a degree
        along = np.float32(np.cos(np.deg2rad(hue))) * alpha + np.float32(np.sin(np.deg2rad(hue))) * beta
        better = along > best
        np.copyto(best, along, where=better)
        index[better] = number
    return index


def _borders(coloured: np.ndarray, colour: np.ndarray) -> np.ndarray:
    """Pixels where one colour touches another, so that touching objects of two colours stay two."""
    border = np.zeros_like(coloured)
    border[:, :-1] |= coloured[:, :-1] & coloured[:, 1:] & (colour[:, :-1] != colour[:, 1:])
    border[:, :, :-1] |= coloured[:, :, :-1] & coloured[:, :, 1:] & (colour[:, :, :-1] != colour[:, :, 1:])
    return border


@lru_cache(maxsize=1)
def _ideal_shapes() -> np.ndarray:
    """[4, 144] the ideal figures on a grid over their bounding box, the triangle standing on its base.

    The triangle is a little blunt: soft edges shorten its tip first, and with it the bounding box.
    """
    y, x = (np.mgrid[0:_GRID, 0:_GRID] + 0.5) / _GRID
    circle = np.hypot(x - 0.5, y - 0.5) <= 0.5
    square = np.ones_like(circle)
    triangle = abs(x - 0.5) <= 0.05 + 0.48 * y
    cross = (abs(x - 0.5) <= 1 / 6) | (abs(y - 0.5) <= 1 / 6)
    return np.stack([circle, square, triangle, cross]).reshape(4, -1)


def _overlaps(inside: np.ndarray) -> np.ndarray:
    height, width = inside.shape
    rows = ((np.arange(_GRID) + 0.5) * height / _GRID).astype(int)
    columns = ((np.arange(_GRID) + 0.5) * width / _GRID).astype(int)
    figure = inside[rows[:, None], columns].reshape(-1)
    ideal = _ideal_shapes()
    # a sliver fits no figure however it is stretched
    squareness = min(1.0, 1.5 * min(height, width) / max(height, width))
    return (ideal & figure).sum(1) / (ideal | figure).sum(1) * squareness


def _quality(finding: Finding, shape: str, colour: str | None) -> float:
    overlap = finding.overlap
    odds = np.exp((overlap - overlap.max()) / 0.06)
    index = SHAPES.index(shape)
    right_shape = odds[index] / odds.sum() * np.clip((overlap[index] - 0.45) / 0.40, 0.0, 1.0)
    right_colour = 1.0 if colour is None else finding.colour[COLOURS.index(colour)]
    return 0.5 * right_shape * right_colour + 0.25 * (right_shape + right_colour)


def _assign(quality: np.ndarray) -> list[tuple[int, int]]:
    """(wanted, found) pairs with the greatest total quality; as many pairs as the smaller side."""
    wanted, found = quality.shape
    if wanted <= found:
        orders = (list(enumerate(order)) for order in permutations(range(found), wanted))
    else:
        orders = ([(i, j) for j, i in enumerate(order)] for order in permutations(range(wanted), found))
    return max(orders, key=lambda pairs: sum(quality[i, j] for i, j in pairs))


def _placed(direction: tuple[float, float], findings: list[Finding], match: list[tuple[int, int]]) -> float:
    """How well the first object stands in `direction` from the second: 0 wrong, 0.5 just right, 1 clearly right."""
    position = {i: findings[j].centre for i, j in match}
    offset = position[0] - position[1]
    along = float(offset @ np.array(direction))
    across = float(np.abs(offset @ np.array(direction)[::-1]))
    return float(np.clip(0.5 + (along - 0.6 * across - 0.05) / 0.4, 0.0, 1.0))


def _is(finding: Finding, shape: str, colour: str | None) -> bool:
    index = SHAPES.index(shape)
    return bool(
        finding.overlap.argmax() == index
        and finding.overlap[index] >= _STRICT_OVERLAP
        and (colour is None or finding.colour[COLOURS.index(colour)] >= _STRICT_PURITY)
    )
