"""Finding coloured objects in pictures: where they are, what colour, and how much like each ideal figure.

Chroma tells object from background and connected components find the objects; a component's hue names its colour, and
its silhouette, brought to unit spread by its moments, is compared with those of ideal figures. Measures are soft where
a threshold would make them jump: a gain is the difference of two similar pictures' scores, where a jump is noise.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import ndimage

SHAPES = ("circle", "square", "triangle", "cross")
HUES = {"red": 0.0, "yellow": 55.0, "green": 130.0, "cyan": 187.0, "blue": 230.0, "purple": 280.0}
"""Hue in degrees at the heart of each colour word."""
COLOURS = tuple(HUES)

MAX_OBJECTS = 6
_CHROMA = 0.30
_CHROMA_EDGE = 0.10
"""Chroma counts as object in full from this much above `_CHROMA`, and not at all from this much below."""
_SMALLEST, _FULL_SIZE = 12 / 64**2, 72 / 64**2
"""Shares of the picture between which a component passes from a speck to an object."""
HUE_SHARPNESS = 16.0
_REACH = 3.0
_GRID = 20
"""A silhouette is sampled at 20x20 places up to three standard deviations from its centre."""


@dataclass(frozen=True)
class Objects:
    """The objects of one picture, largest first.

    Attributes:
        presence: [K] 0 for a speck to 1 for an object of full size.
        purity: [K, 6] share of the pixels that are nearest to each colour of `COLOURS`.
        colour: [K, 6] how well the mean hue fits each colour; sums to 1.
        overlap: [K, 4] intersection over union of the silhouette with each ideal figure of `SHAPES`.
        centre: [K, 2] x, y in [0, 1], y pointing down.
        clutter: share of the coloured area that belongs to no object; 1 where there is none.
    """

    presence: np.ndarray
    purity: np.ndarray
    colour: np.ndarray
    overlap: np.ndarray
    centre: np.ndarray
    clutter: float

    def __len__(self) -> int:
        return len(self.presence)


def examine(images: np.ndarray) -> list[Objects]:
    """Find the objects in pictures, at most six in each.

    Args:
        images: [N, 3, H, W] float in [0, 1].
    """
    count, _, height, width = images.shape
    red, green, blue = images[:, 0], images[:, 1], images[:, 2]
    # the plane perpendicular to grey: its length is chroma, its angle hue
    alpha, beta = red - 0.5 * (green + blue), np.float32(np.sqrt(0.75)) * (green - blue)
    chroma = np.sqrt(alpha * alpha + beta * beta)
    soft = np.clip((chroma - (_CHROMA - _CHROMA_EDGE)) / (2 * _CHROMA_EDGE), 0.0, 1.0)
    coloured, colour = chroma > _CHROMA, _nearest_colour(alpha, beta)
    mask = coloured & ~_borders(coloured, colour)
    in_plane = np.zeros((3, 3, 3), bool)
    in_plane[1] = ndimage.generate_binary_structure(2, 1)
    labels, total = ndimage.label(mask, structure=in_plane)

    where = np.flatnonzero(labels)
    label, picture = labels.ravel()[where], where // (height * width)
    y, x = np.divmod(where % (height * width), width)

    def per_label(values: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(label, weights=values, minlength=total + 1)

    area = per_label()
    owner = np.zeros(total + 1, int)
    owner[label] = picture
    kept = _largest(area, owner, smallest=_SMALLEST * height * width)
    weight = soft.ravel()[where]
    mass = per_label(weight)[kept]
    centre = np.stack([per_label(weight * x)[kept], per_label(weight * y)[kept]], 1) / mass[:, None]
    square = np.stack([per_label(weight * x * x)[kept], per_label(weight * y * y)[kept]], 1) / mass[:, None]
    spread = np.sqrt(np.maximum(square - centre**2, 0.25))
    tone = np.stack([per_label(alpha.ravel()[where])[kept], per_label(beta.ravel()[where])[kept]], 1)
    pixels = np.bincount(label * len(COLOURS) + colour.ravel()[where], minlength=(total + 1) * len(COLOURS))
    purity = pixels.reshape(total + 1, len(COLOURS))[kept] / area[kept, None]
    presence = np.clip((area[kept] / (height * width) - _SMALLEST) / (_FULL_SIZE - _SMALLEST), 0.0, 1.0)
    overlap = _overlaps(_silhouettes(soft, labels, kept, owner[kept], centre, spread), spread)
    middle = (centre + 0.5) / np.array([width, height])
    fitting = _hue_fit(tone)

    coloured_area = np.bincount(picture, minlength=count)
    bounds = np.searchsorted(owner[kept], np.arange(count + 1))
    found = []
    for index in range(count):
        rows = slice(bounds[index], bounds[index + 1])
        own = float(presence[rows] @ area[kept][rows])
        clutter = 1.0 - own / coloured_area[index] if own else 1.0
        found.append(Objects(presence[rows], purity[rows], fitting[rows], overlap[rows], middle[rows], clutter))
    return found


def _largest(area: np.ndarray, owner: np.ndarray, smallest: float) -> np.ndarray:
    """Labels of the largest components of each picture, ordered by picture and falling area."""
    labels = np.flatnonzero(area > smallest)
    labels = labels[labels > 0]
    labels = labels[np.lexsort((labels, -area[labels], owner[labels]))]
    first = np.searchsorted(owner[labels], owner[labels])
    return labels[np.arange(len(labels)) - first < MAX_OBJECTS]


def _silhouettes(
    soft: np.ndarray, labels: np.ndarray, kept: np.ndarray, picture: np.ndarray, centre: np.ndarray, spread: np.ndarray
) -> np.ndarray:
    """[K, 400] coverage of each component on a grid in units of its spread, between pixels by bilinear interpolation.

    Soft edges around a component count as its own; other components do not.
    """
    _, height, width = soft.shape
    places = ((np.arange(_GRID) + 0.5) / _GRID * 2 - 1) * _REACH
    columns, rows = (centre[:, i : i + 1] + places * spread[:, i : i + 1] for i in (0, 1))
    left, top = np.floor(columns).astype(int), np.floor(rows).astype(int)
    covered = np.zeros((len(kept), _GRID, _GRID))
    for right, across in ((0, 1 - (columns - left)), (1, columns - left)):
        for down, along in ((0, 1 - (rows - top)), (1, rows - top)):
            i, j = top + down, left + right
            inside = ((i >= 0) & (i < height))[:, :, None] & ((j >= 0) & (j < width))[:, None, :]
            at = (picture[:, None] * height + i.clip(0, height - 1))[:, :, None] * width
            at = at + j.clip(0, width - 1)[:, None, :]
            label = labels.ravel()[at]
            own = inside & ((label == kept[:, None, None]) | (label == 0))
            covered += along[:, :, None] * across[:, None, :] * np.where(own, soft.ravel()[at], 0.0)
    return covered.reshape(-1, _GRID * _GRID)


def _overlaps(silhouettes: np.ndarray, spread: np.ndarray) -> np.ndarray:
    """[K, 4] intersection over union with each ideal figure; a figure stretched in one direction loses."""
    ideal, proportion = _ideal_figures()
    shared = np.minimum(silhouettes[:, None], ideal).sum(-1)
    either = np.maximum(silhouettes[:, None], ideal).sum(-1)
    stretch = spread[:, :1] / spread[:, 1:] / proportion
    return shared / either * np.minimum(1.0, 1.4 * np.minimum(stretch, 1 / stretch))


@lru_cache(maxsize=1)
def _ideal_figures() -> tuple[np.ndarray, np.ndarray]:
    """[4, 400] silhouettes of the ideal figures on the same grid, and [4] the ratio of their spreads, x to y."""
    fine = 400
    y, x = (np.mgrid[0:fine, 0:fine] + 0.5) / fine * 2 - 1
    figures = [
        np.hypot(x, y) <= 0.6,
        np.maximum(abs(x), abs(y)) <= 0.6,
        # a little wider than high, standing on its base
        (abs(x) * 1.8 <= y + 0.6) & (y <= 0.48),
        (np.minimum(abs(x), abs(y)) <= 0.21) & (np.maximum(abs(x), abs(y)) <= 0.6),
    ]
    silhouettes, proportions = [], []
    for figure in figures:
        middle = np.array([x[figure].mean(), y[figure].mean()])
        spread = np.array([x[figure].std(), y[figure].std()])
        # the mean over a cell of the grid, by 5x5 points
        places = ((np.arange(_GRID * 5) + 0.5) / (_GRID * 5) * 2 - 1) * _REACH
        columns, rows = ((((middle + places[:, None] * spread) + 1) / 2 * fine).astype(int).clip(0, fine - 1)).T
        cells = figure[rows[:, None], columns].reshape(_GRID, 5, _GRID, 5).mean((1, 3))
        silhouettes.append(cells.reshape(-1))
        proportions.append(spread[0] / spread[1])
    return np.stack(silhouettes), np.array(proportions)


def _hue_fit(tone: np.ndarray) -> np.ndarray:
    """[K, 6] soft choice among the colours by the angle of [K, 2] summed tones."""
    angles = np.deg2rad(np.array(list(HUES.values())))
    unit = tone / np.maximum(np.linalg.norm(tone, axis=1, keepdims=True), 1e-12)
    odds = np.exp(HUE_SHARPNESS * (unit @ np.stack([np.cos(angles), np.sin(angles)]) - 1))
    return odds / odds.sum(1, keepdims=True)


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
