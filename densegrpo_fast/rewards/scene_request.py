"""What a sentence about coloured shapes asks for: its objects, and where the first one stands."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from densegrpo_fast.rewards.scene_analysis import COLOURS, SHAPES

_NUMBERS = {"a": 1, "two": 2, "three": 3}
_DIRECTIONS = {
    "to the left of": (-1.0, 0.0),
    "to the right of": (1.0, 0.0),
    "above": (0.0, -1.0),
    "below": (0.0, 1.0),
}


@dataclass(frozen=True)
class Request:
    """What a sentence asks for: (shape, colour or None) per object, and the first one's direction from the second."""

    objects: tuple[tuple[str, str | None], ...]
    direction: tuple[float, float] | None = None


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


def placed(direction: tuple[float, float], offset: np.ndarray) -> float:
    """How well an `offset` [2], in pictures, stands in `direction`: 0 wrong, 0.5 just right, 1 clearly right."""
    along = float(offset @ np.array(direction))
    across = float(np.abs(offset @ np.array(direction)[::-1]))
    return float(np.clip(0.5 + (along - 0.6 * across - 0.05) / 0.4, 0.0, 1.0))
