"""What the embedded models draw: a world gives the pretraining its sentences and pictures, and judges the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline

from densegrpo_fast.embedded import card, scenes, signs_card, words


class Example(NamedTuple):
    """One rendered picture.

    Attributes:
        sentence: that asks for it.
        picture: [3, 64, 64] float32 in [0, 1].
        kinds: [64] uint8, what covers each token of the transformer, 8x8 pixels: 0 background, else the object's kind.
        places: [64, 3] float16, for the covered tokens where the object is, all in units of about 1.
    """

    sentence: str
    picture: np.ndarray
    kinds: np.ndarray
    places: np.ndarray


@dataclass(frozen=True)
class World:
    """One kind of picture.

    Attributes:
        kinds: how many kinds of things cover a token, background included.
        vocabulary: sentences whose words are one token each; others are spelt.
        sentences: all sentences of training.
        examples: so many pictures for sentences of training, by a generator.
        brief: few scores of a pipeline, a point of the training's curve.
        evaluate: scores of a pipeline and its preview decoder on held-out sentences.
        card: the model card's text from what is known about a training.
    """

    kinds: int
    vocabulary: Callable[[], list[str]]
    sentences: Callable[[], list[str]]
    examples: Callable[[int, np.random.Generator], Iterator[Example]]
    brief: Callable[[StableDiffusion3Pipeline], dict[str, Any]]
    evaluate: Callable[[StableDiffusion3Pipeline, AutoencoderTiny], dict[str, Any]]
    card: Callable[[dict[str, Any]], str]


def covering(figures: tuple[scenes.Figure, ...]) -> tuple[np.ndarray, np.ndarray]:
    """A scene's `kinds` and `places`: a token is covered from an eighth of it on; an object's centre and its radius.

    Both in units of 16 pixels, the centre from the token's own.
    """
    kinds, places = np.zeros(64, np.uint8), np.zeros((64, 3), np.float16)
    y, x = np.mgrid[0:64, 0:64] + 0.5
    rows, columns = (grid.reshape(-1) for grid in np.mgrid[4:64:8, 4:64:8])
    for figure in figures:
        inside = scenes.signed_distance(figure.shape, x - figure.x, y - figure.y, figure.radius) < 0
        covered = inside.reshape(8, 8, 8, 8).mean((1, 3)).reshape(-1) > 1 / 8
        kind = scenes.SHAPES.index(figure.shape) * len(scenes.COLOURS) + list(scenes.COLOURS).index(figure.colour)
        kinds[covered] = 1 + kind
        place = np.stack([figure.x - columns, figure.y - rows, np.full(64, figure.radius)], 1) / 16
        places[covered] = place[covered]
    return kinds, places


def spelling(word: str, left: int, top: int) -> tuple[np.ndarray, np.ndarray]:
    """A sign's `kinds` and `places`: the letter that covers most of a token, its cell's centre, and its number.

    The centre is in units of 16 pixels from the token's own, the number (from 0) in quarters.
    """
    kinds, places, most = np.zeros(64, np.uint8), np.zeros((64, 3), np.float16), np.zeros(64)
    rows, columns = (grid.reshape(-1) for grid in np.mgrid[0:64:8, 0:64:8])
    for number, letter in enumerate(word):
        x = left + number * words.LETTER_WIDTH
        wide = np.minimum(columns + 8, x + words.LETTER_WIDTH) - np.maximum(columns, x)
        high = np.minimum(rows + 8, top + words.LETTER_HEIGHT) - np.maximum(rows, top)
        share = np.clip(wide, 0, None) * np.clip(high, 0, None) / 64
        covered = (share > most) & (share >= 1 / 4)
        kinds[covered], most[covered] = 1 + ord(letter) - ord("A"), share[covered]
        across, down = x + words.LETTER_WIDTH / 2 - columns - 4, top + words.LETTER_HEIGHT / 2 - rows - 4
        places[covered] = np.stack([across / 16, down / 16, np.full(64, number / 4)], 1)[covered]
    return kinds, places


def _scene_sentences() -> list[str]:
    return [scene.prompt for deck in scenes.split(held_out=False).values() for scene in deck]


def _scenes(count: int, generator: np.random.Generator) -> Iterator[Example]:
    for scene in scenes.sample_scenes(count, generator):
        picture, figures = scenes.compose(scene, generator)
        yield Example(scene.prompt, picture, *covering(figures))


def _sign_sentences() -> list[str]:
    return [words.prompt(word) for word in words.training_words()]


def _signs(count: int, generator: np.random.Generator) -> Iterator[Example]:
    for word in words.sample_words(count, generator):
        picture, left, top = words.compose(word, generator)
        yield Example(words.prompt(word), picture, *spelling(word, left, top))


WORLDS = {
    "scenes": World(
        1 + len(scenes.SHAPES) * len(scenes.COLOURS),
        lambda: [scene.prompt for name in scenes.CATEGORIES for scene in scenes.all_scenes(name)],
        _scene_sentences,
        _scenes,
        card.brief,
        card.evaluate,
        card.text,
    ),
    "words": World(
        1 + 26,
        lambda: [words.prompt("").replace('"', "")],
        _sign_sentences,
        _signs,
        signs_card.brief,
        signs_card.evaluate,
        signs_card.text,
    ),
}
"""By the name that `pretrain --world` takes."""
