"""The world of the embedded model: prompts about coloured shapes, and pictures of them.

A scene is one to three flat shapes on a plain background; its prompt falls into one of six categories, which are
GenEval's in small (arXiv 2310.11513): single object, two objects, counting, colour attribution, position, and three
objects. Sentences and pictures are drawn from a `numpy.random.Generator`, so a seed names a data set.

A fifth of all sentences (by a hash of their meaning) is *held out*: never rendered for training.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import permutations, product

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (0.90, 0.12, 0.12),
    "green": (0.10, 0.70, 0.20),
    "blue": (0.12, 0.25, 0.92),
    "yellow": (0.95, 0.85, 0.10),
    "purple": (0.60, 0.15, 0.85),
    "cyan": (0.10, 0.80, 0.90),
}
RELATIONS = {
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
"""Where the first object stands relative to the second: (x, y) with y pointing down."""
OPPOSITE = {"to the left of": "to the right of", "above": "below"}
NUMBERS = {2: "two", 3: "three"}
CATEGORIES = ("single", "two", "counting", "color_attr", "position", "three")
TRAINING_SHARES = {
    "single": 0.14,
    "two": 0.10,
    "counting": 0.18,
    "color_attr": 0.20,
    "position": 0.26,
    "three": 0.12,
}
"""How often each category is rendered for pretraining."""

IMAGE_SIZE = 64
_HELD_OUT_EVERY = 5


@dataclass(frozen=True)
class Item:
    """One object that a sentence names; `colour` None means any colour."""

    shape: str
    colour: str | None

    def __str__(self) -> str:
        return self.shape if self.colour is None else f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """The meaning of one sentence: its objects in order of mention, and how the first relates to the second."""

    category: str
    items: tuple[Item, ...]
    relation: str | None = None

    @property
    def prompt(self) -> str:
        """The sentence, e.g. "a red circle to the left of a blue square"."""
        if self.category == "counting":
            plural = "crosses" if self.items[0].shape == "cross" else f"{self.items[0].shape}s"
            return f"{NUMBERS[len(self.items)]} {self.items[0].colour} {plural}"
        names = [f"a {item}" for item in self.items]
        if self.relation is not None:
            return f"{names[0]} {self.relation} {names[1]}"
        return names[0] if len(names) == 1 else ", ".join(names[:-1]) + f" and {names[-1]}"

    @property
    def held_out(self) -> bool:
        """Whether the sentence is kept from training; the same for sentences that mean the same."""
        items, relation = self.items, self.relation
        if relation in OPPOSITE:
            items, relation = items[::-1], OPPOSITE[relation]
        names = [str(item) for item in items]
        meaning = "|".join([self.category, relation or "", *(names if relation else sorted(names))])
        return hashlib.sha256(meaning.encode()).digest()[0] % _HELD_OUT_EVERY == 0


def all_scenes(category: str) -> list[Scene]:
    """Every scene of a category, in a fixed order.

    Raises:
        ValueError: `category` is not one of `CATEGORIES`.
    """
    items = [Item(shape, colour) for shape, colour in product(SHAPES, COLOURS)]
    distinct = [(a, b) for a, b in product(items, items) if a.shape != b.shape and a.colour != b.colour]
    match category:
        case "single":
            return [Scene(category, (item,)) for item in items]
        case "two":
            return [Scene(category, (Item(a, None), Item(b, None))) for a, b in permutations(SHAPES, 2)]
        case "counting":
            return [Scene(category, (item,) * count) for count, item in product(NUMBERS, items)]
        case "color_attr":
            return [Scene(category, pair) for pair in distinct]
        case "position":
            return [Scene(category, pair, relation) for pair, relation in product(distinct, RELATIONS)]
        case "three":
            shapes, colours = permutations(SHAPES, 3), list(permutations(COLOURS, 3))
            return [
                Scene(category, tuple(Item(s, c) for s, c in zip(three_shapes, three_colours, strict=True)))
                for three_shapes, three_colours in product(shapes, colours)
            ]
    raise ValueError(f"unknown category {category!r}, expected one of {', '.join(CATEGORIES)}")


def split(held_out: bool) -> dict[str, list[Scene]]:
    """Scenes per category that are held out (or are not)."""
    return {name: [s for s in all_scenes(name) if s.held_out == held_out] for name in CATEGORIES}


def prompts(held_out: bool, count: int, seed: int = 0) -> list[str]:
    """`count` different sentences, the categories taking turns, in an order fixed by `seed`.

    A category that runs out is left out of the rest. Returns fewer than `count` when all have run out.
    """
    generator = np.random.default_rng(seed)
    decks = [[deck[i] for i in generator.permutation(len(deck))] for deck in split(held_out).values()]
    chosen: list[str] = []
    while any(decks) and len(chosen) < count:
        chosen += [deck.pop().prompt for deck in decks if deck]
    return chosen[:count]


@dataclass(frozen=True)
class Figure:
    """One drawn object: centre and radius in 64-pixel units."""

    shape: str
    colour: str
    x: float
    y: float
    radius: float


def render(scene: Scene, generator: np.random.Generator, size: int = IMAGE_SIZE) -> np.ndarray:
    """Draw one picture of `scene`: anti-aliased, of random sizes, places, shades and background.

    Returns:
        [3, size, size] float32 in [0, 1].
    """
    return compose(scene, generator, size)[0]


def compose(
    scene: Scene, generator: np.random.Generator, size: int = IMAGE_SIZE
) -> tuple[np.ndarray, tuple[Figure, ...]]:
    """`render`'s picture, and what was drawn where, in the order of the sentence."""
    places = _places(scene, generator)
    y, x = (np.mgrid[0:size, 0:size].astype(np.float32) + 0.5) * (IMAGE_SIZE / size)
    image = background(generator, y)
    colours = [item.colour or str(generator.choice(list(COLOURS))) for item in scene.items]
    figures = tuple(Figure(i.shape, c, *place) for i, c, place in zip(scene.items, colours, places, strict=True))
    for figure in figures:
        distance = signed_distance(figure.shape, x - figure.x, y - figure.y, figure.radius) * (size / IMAGE_SIZE)
        alpha = np.clip(0.5 - distance, 0.0, 1.0)
        shade = np.array(COLOURS[figure.colour], np.float32) * generator.uniform(0.86, 1.0)
        image += alpha * (shade[:, None, None] - image)
    return image.astype(np.float32), figures


def render_batch(scenes: list[Scene], generator: np.random.Generator) -> np.ndarray:
    """`render` for each scene: [N, 3, 64, 64] float32 in [0, 1]."""
    return np.stack([render(scene, generator) for scene in scenes])


def sample_scenes(count: int, generator: np.random.Generator, held_out: bool = False) -> list[Scene]:
    """Scenes drawn with the categories' `TRAINING_SHARES`, uniformly within a category."""
    decks = split(held_out)
    names = list(TRAINING_SHARES)
    categories = generator.choice(len(names), size=count, p=list(TRAINING_SHARES.values()))
    return [decks[names[c]][generator.integers(len(decks[names[c]]))] for c in categories]


def background(generator: np.random.Generator, y: np.ndarray) -> np.ndarray:
    """A nearly plain grey for pixels at heights `y`: [3, H, W]. Wider ranges cost a flow more than they show."""
    grey = generator.uniform(0.42, 0.58)
    tint = generator.uniform(-0.02, 0.02, size=3)
    slope = generator.uniform(-0.04, 0.04) * (y / IMAGE_SIZE - 0.5)
    return np.clip(grey + tint[:, None, None] + slope[None], 0.0, 1.0)


def signed_distance(shape: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance in pixels to the outline (negative inside); exact near the outline, which is all anti-aliasing needs."""
    match shape:
        case "circle":
            return np.hypot(x, y) - radius
        case "square":
            return np.maximum(abs(x), abs(y)) - 0.88 * radius
        case "triangle":
            # apex up: base y = 0.8 r, apex y = -r, half base = r
            slant = (abs(x) * 1.8 - (y + radius)) / np.hypot(1.8, 1.0)
            return np.maximum(slant, y - 0.8 * radius)
        case "cross":
            arm = 0.36 * radius
            flat = np.maximum(abs(x) - radius, abs(y) - arm)
            upright = np.maximum(abs(x) - arm, abs(y) - radius)
            return np.minimum(flat, upright)
    raise ValueError(f"unknown shape {shape!r}, expected one of {', '.join(SHAPES)}")


_RADII = {1: (11.0, 13.0, 15.0), 2: (9.0, 10.5, 12.0), 3: (8.0, 9.0)}
_LATTICE = 4
"""Centres are multiples of this many pixels, and sizes few: a small network learns such shapes much sooner."""
_GAP = 3.0


def _places(scene: Scene, generator: np.random.Generator) -> list[tuple[float, float, float]]:
    """Centres and radii [(x, y, r)] in 64-pixel units: inside the frame, apart, and obeying the relation."""
    while True:
        radii = generator.choice(_RADII[len(scene.items)], size=len(scene.items))
        if scene.category == "counting":
            radii[:] = radii[0]
        first = np.ceil((radii + 2) / _LATTICE)[:, None]
        centres = _LATTICE * generator.integers(first, IMAGE_SIZE // _LATTICE - first + 1, size=(len(radii), 2))
        if _apart(centres, radii) and _related(scene.relation, centres, radii):
            return [(float(x), float(y), float(r)) for (x, y), r in zip(centres, radii, strict=True)]


def _apart(centres: np.ndarray, radii: np.ndarray) -> bool:
    return all(
        np.abs(centres[i] - centres[j]).max() > radii[i] + radii[j] + _GAP for i in range(len(radii)) for j in range(i)
    )


def _related(relation: str | None, centres: np.ndarray, radii: np.ndarray) -> bool:
    if relation is None:
        return True
    direction = np.array(RELATIONS[relation], float)
    offset = centres[0] - centres[1]
    along = float(offset @ direction)
    across = float(np.abs(offset @ direction[::-1]))
    return along > radii[0] + radii[1] + _GAP and across < 0.8 * along
