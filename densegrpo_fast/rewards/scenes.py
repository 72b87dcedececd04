"""Scenes reward: does the picture show the coloured shapes that the sentence asks for?

The sentence is parsed; the picture is examined by image analysis alone (`scene_analysis`), which does not know how
pictures are rendered. In the spirit of GenEval (arXiv 2310.11513), with a graded score beside the strict one so that
small improvements count. The graded score moves little when the picture does: an object fades in, it does not appear.
"""

from __future__ import annotations

from itertools import permutations

import numpy as np
import torch
from torch import Tensor

from densegrpo_fast.rewards.scene_analysis import COLOURS, SHAPES, Objects, examine
from densegrpo_fast.rewards.scene_request import Request, parse, placed

_STRICT_OVERLAP = 0.72
_STRICT_PURITY = 0.75
_STRICT_CLUTTER = 0.06
_STRICT_PRESENCE = 0.2
_SHAPE_DOUBT = 0.03
"""Difference of overlaps at which one figure is e times as likely as another."""


def score(request: Request, objects: Objects) -> tuple[float, bool]:
    """Graded score in [0, 1] and strict pass for one examined picture."""
    if not len(objects):
        return 0.0, False
    wanted, direction = request.objects, request.direction
    quality = np.stack([_quality(objects, *item) for item in wanted])
    match = _assign(quality)
    graded = sum(quality[i, j] for i, j in match) / len(wanted)
    if direction is not None:
        graded *= 0.7
        if len(match) == len(wanted):
            both = min(quality[i, j] for i, j in match)
            graded += 0.3 * both * placed(direction, _offset(objects, match))
    extra = objects.presence.sum() - sum(objects.presence[j] for _, j in match)
    graded *= (1.0 - objects.clutter) / (1.0 + 0.5 * extra)
    strict = (
        (objects.presence >= _STRICT_PRESENCE).sum() == len(wanted) == len(match)
        and objects.clutter <= _STRICT_CLUTTER
        and all(_is(objects, j, *wanted[i]) for i, j in match)
        and (direction is None or placed(direction, _offset(objects, match)) >= 0.5)
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
        found = examine(images.detach().to("cpu", torch.float32).numpy())
        scores = [score(request, objects) for request, objects in zip(requests, found, strict=True)]
        return [graded for graded, _ in scores], [float(strict) for _, strict in scores]


def _quality(objects: Objects, shape: str, colour: str | None) -> np.ndarray:
    """[K] how well each object is the wanted one, in [0, 1]."""
    index = SHAPES.index(shape)
    odds = np.exp((objects.overlap - objects.overlap.max(1, keepdims=True)) / _SHAPE_DOUBT)
    alike = np.clip((objects.overlap[:, index] - 0.5) / 0.38, 0.0, 1.0)
    right_shape = odds[:, index] / odds.sum(1) * alike
    right_colour = 1.0 if colour is None else objects.colour[:, COLOURS.index(colour)]
    return objects.presence * (0.5 * right_shape * right_colour + 0.25 * (right_shape + right_colour))


def _assign(quality: np.ndarray) -> list[tuple[int, int]]:
    """(wanted, found) pairs with the greatest total quality; as many pairs as the smaller side."""
    wanted, found = quality.shape
    if wanted <= found:
        orders = (list(enumerate(order)) for order in permutations(range(found), wanted))
    else:
        orders = ([(i, j) for j, i in enumerate(order)] for order in permutations(range(wanted), found))
    return max(orders, key=lambda pairs: sum(quality[i, j] for i, j in pairs))


def _offset(objects: Objects, match: list[tuple[int, int]]) -> np.ndarray:
    """[2] from the second object's centre to the first one's."""
    position = {i: objects.centre[j] for i, j in match}
    return position[0] - position[1]


def _is(objects: Objects, j: int, shape: str, colour: str | None) -> bool:
    overlap, index = objects.overlap[j], SHAPES.index(shape)
    return bool(
        overlap.argmax() == index
        and overlap[index] >= _STRICT_OVERLAP
        and (colour is None or objects.purity[j, COLOURS.index(colour)] >= _STRICT_PURITY)
    )
