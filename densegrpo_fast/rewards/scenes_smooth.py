"""A scenes reward without thresholds: soft counts by matched filters.

`scenes` finds objects first, so a picture that changes a little may have one object more. Here no object is ever
decided on. Each wanted kind has a map of how much every pixel is of its colour; the map is compared with the ideal
figure at all places and a few sizes, and what matches is added up to a soft number of objects and the area that they
explain. The score is the harmonic mean of how much of the sentence is there and how much of the coloured area the
sentence explains: continuous in the picture, as learned scores of preference are.
"""

from __future__ import annotations

from collections import Counter
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional as F

from densegrpo_fast.rewards.scene_analysis import COLOURS, HUE_SHARPNESS, HUES, SHAPES
from densegrpo_fast.rewards.scene_request import parse, placed

_SIZE, _PADDED = 64, 96
"""Pictures are brought to 64x64; a margin keeps the filters from wrapping around."""
_RADII = (8.0, 9.0, 10.1, 11.4, 12.8, 14.4)
_FAINT, _FULL = 0.1, 0.5
"""Chroma from which a pixel begins to be coloured, and wholly is."""
_ALIKE, _SAME = 0.6, 0.92
"""Intersection over union from which a place begins to match a figure, and wholly does."""
_SPECK = 0.005
"""Share of the picture that is added to the coloured area, so that next to no colour explains next to nothing."""


class ScenesSmooth:
    """`reward(images, prompts, metadata) -> list[float]` in [0, 1], for the sentences that `scenes` reads."""

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict] | None = None) -> list[float]:
        """Scores of images [N, 3, H, W] in [0, 1].

        Raises:
            ValueError: a prompt is outside the grammar.
        """
        requests = [parse(prompt) for prompt in prompts]
        colours = memberships(F.interpolate(images.detach().to("cpu", torch.float32), (_SIZE, _SIZE), mode="area"))
        kinds = [Counter(request.objects) for request in requests]
        rows = [(row, *kind) for row, counted in enumerate(kinds) for kind in counted]
        maps = [colours[row].sum(0) if name is None else colours[row, COLOURS.index(name)] for row, _, name in rows]
        found = iter(_match(torch.stack(maps), [SHAPES.index(shape) for _, shape, _ in rows]))
        coloured = colours.mean((1, 2, 3)) * len(COLOURS)
        scores = []
        for request, counted, area in zip(requests, kinds, coloured.tolist(), strict=True):
            matches = [next(found) for _ in counted]
            # a kind explains the area of as many objects as are wanted
            enough = [min(1.0, want / max(m[0], 1e-6)) for m, want in zip(matches, counted.values(), strict=True)]
            there = sum(m[0] * e for m, e in zip(matches, enough, strict=True)) / len(request.objects)
            explained = sum(m[1] * e for m, e in zip(matches, enough, strict=True)) / (area + _SPECK)
            score = 2 * there * min(1.0, explained) / (there + min(1.0, explained) + 1e-6)
            if request.direction is not None:
                first, second = (torch.tensor(matches[i][2:]).numpy() for i in (0, -1))
                score *= 0.7 + 0.3 * placed(request.direction, first - second)
            scores.append(float(score))
        return scores


def memberships(images: Tensor) -> Tensor:
    """How much each pixel is of each colour of `HUES`: [N, 6, H, W] in [0, 1], whose sum is how coloured it is."""
    red, green, blue = images.unbind(1)
    alpha, beta = red - 0.5 * (green + blue), 0.75**0.5 * (green - blue)
    chroma = (alpha * alpha + beta * beta).sqrt()
    angles = torch.tensor(list(HUES.values())).deg2rad()[:, None, None]
    along = alpha[:, None] * angles.cos() + beta[:, None] * angles.sin()
    fit = (HUE_SHARPNESS * along / chroma.clamp(min=1e-6)[:, None]).softmax(1)
    return fit * ((chroma - _FAINT) / (_FULL - _FAINT)).clamp(0, 1)[:, None]


def _match(maps: Tensor, shapes: list[int]) -> list[list[float]]:
    """Of maps [M, 64, 64], each with one figure: number of objects, share of the area, and mean x and y in [0, 1]."""
    density, areas = _density(maps, shapes)
    density = density / _ideal_sums()[shapes][:, :, None, None]
    best, size = density.max(1)
    number = best.sum((1, 2))
    explained = (best * areas[shapes].gather(1, size.flatten(1)).view_as(best)).sum((1, 2)) / _SIZE**2
    middle = (torch.arange(_SIZE) + 0.5) / _SIZE
    # of what is not there the place is the picture's middle
    x, y = ((best.sum(side) @ middle + 0.05 * 0.5) / (number + 0.05) for side in (1, 2))
    return torch.stack([number, explained, x, y], 1).tolist()


def _density(maps: Tensor, shapes: list[int]) -> tuple[Tensor, Tensor]:
    """How well each place of maps [M, 64, 64] matches a figure, by size: [M, 6, 64, 64]; and the figures' areas."""
    spectra, areas = _filters()
    padded = F.pad(maps, (0, _PADDED - _SIZE) * 2)
    sums = torch.fft.irfft2(torch.fft.rfft2(padded)[:, None, None] * spectra[shapes], s=(_PADDED, _PADDED))
    inside, around = sums[..., :_SIZE, :_SIZE].unbind(2)
    overlap = inside / (areas[shapes][:, :, None, None] + around.clamp(min=0))
    return ((overlap - _ALIKE) / (_SAME - _ALIKE)).clamp(0, 1) ** 3, areas


@lru_cache(maxsize=1)
def _filters() -> tuple[Tensor, Tensor]:
    """Spectra of every figure and of the rest of a box around it, [4, 6, 2, 96, 49]; and the figures' areas [4, 6]."""
    figures = torch.stack([torch.stack([_figure(shape, radius) for radius in _RADII]) for shape in SHAPES])
    offsets = (torch.arange(_PADDED) - _PADDED // 2).abs()
    boxes = torch.stack([(offsets[:, None].maximum(offsets) <= 1.3 * radius).float() for radius in _RADII])
    both = torch.stack([figures, (boxes - figures).clamp(min=0)], 2)
    spectra = torch.fft.rfft2(torch.fft.ifftshift(both, dim=(-2, -1))).conj()
    return spectra, figures.sum((-2, -1))


@lru_cache(maxsize=1)
def _ideal_sums() -> Tensor:
    """[4, 6] what an ideal figure of each size adds up to, so that it counts as one."""
    sums = []
    for index, shape in enumerate(SHAPES):
        middle = _PADDED // 2 - _SIZE // 2
        ideal = torch.stack([_figure(shape, r)[middle : middle + _SIZE, middle : middle + _SIZE] for r in _RADII])
        density, _ = _density(ideal, [index] * len(_RADII))
        sums.append(density.diagonal(dim1=0, dim2=1).sum((0, 1)))
    return torch.stack(sums)


def _figure(shape: str, radius: float) -> Tensor:
    """[96, 96] coverage of an ideal figure about the corner that four middle pixels share."""
    fine = (torch.arange(4 * _PADDED) + 0.5) / 4 - _PADDED // 2
    y, x = torch.meshgrid(fine / radius, fine / radius, indexing="ij")
    match shape:
        case "circle":
            inside = x.hypot(y) <= 1
        case "square":
            inside = x.abs().maximum(y.abs()) <= 0.88
        case "triangle":
            inside = (1.8 * x.abs() <= y + 1) & (y <= 0.8)
        case _:
            inside = (x.abs().minimum(y.abs()) <= 0.36) & (x.abs().maximum(y.abs()) <= 1)
    return F.avg_pool2d(inside.float()[None], 4)[0]
