"""A small network that tells what a 64-pixel picture shows, and how probable it is that a sentence describes it.

It shares nothing with the training reward (`densegrpo_fast/rewards/scenes.py`, hand-written image analysis) but the
scenes' grammar, and was never trained on. Its heads are what a sentence of that grammar asks for:

* of each of the 24 kinds (shape, colour) how many the picture shows, 0 to 3; of each of the 4 shapes likewise, for
  sentences without colours;
* where each shape is, and from two such places their relation: one of the four of the grammar, or none.

Two scores in [0, 1]. `probability` is that of the whole sentence and nothing else, the product over the numbers of all
kinds (or shapes) and the relation: its mean over pictures is the share of right pictures that the judge expects.
`graded` is the mean over single statements, so that it moves with a picture that gets one more thing right; it is the
headline, because a product is next to 0 for most pictures and says little about them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from itertools import permutations, product
from typing import NamedTuple

import torch
from torch import Tensor, nn

from densegrpo_fast.embedded.scenes import CATEGORIES, COLOURS, RELATIONS, SHAPES, Scene, all_scenes

KINDS = tuple(product(SHAPES, COLOURS))
"""(shape, colour), a shape's colours in a row."""
MOST = 3
"""Most objects of one kind."""
PAIRS = tuple(permutations(range(len(SHAPES)), 2))
"""Ordered pairs of shapes, whose first one stands in a relation to the second."""
SIDE = 8
"""Cells along each side of a picture; no two objects are so close that they share one."""


class Seen(NamedTuple):
    """What the network says of N pictures.

    Attributes:
        kinds: [N, 24, 4] log-probability of each kind's number of objects.
        shapes: [N, 4, 4] the same of each shape in any colour.
        relations: [N, 12, 5] log-probability of each pair's relation, in the order of `RELATIONS`, then none.
        cell_shapes: [N, 64, 5] log-probability that each of 8x8 cells, row by row, has the centre of an object of each
            shape, then of none.
        cell_colours: [N, 64, 6] log-probability of that object's colour.
    """

    kinds: Tensor
    shapes: Tensor
    relations: Tensor
    cell_shapes: Tensor
    cell_colours: Tensor


class Judge(nn.Module):
    """The network: 0.35M parameters. Pictures [N, 3, 64, 64] in [0, 1].

    Convolutions find what has its centre in each of 8x8 cells. A number of objects is read from the sum of the cells'
    probabilities, so that one between two cells counts once; a relation from the difference of two shapes' mean places.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = [(3, 32, 5, 2), (32, 64, 3, 2), (64, 96, 3, 1), (96, 128, 3, 2), (128, 128, 3, 1)]
        layers: list[nn.Module] = []
        for entering, leaving, size, stride in widths:
            layers += [nn.Conv2d(entering, leaving, size, stride, size // 2, bias=False)]
            layers += [nn.GroupNorm(8, leaving), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.cell_shapes = nn.Conv2d(widths[-1][1], len(SHAPES) + 1, 1)
        self.cell_colours = nn.Conv2d(widths[-1][1], len(COLOURS), 1)
        self.kind_number, self.shape_number = Number(), Number()
        self.relation = nn.Sequential(nn.Linear(2, 32), nn.ReLU(), nn.Linear(32, len(RELATIONS) + 1))
        with torch.no_grad():
            # next to all cells have no object's centre
            self.cell_shapes.bias[-1] += 4.0

    def forward(self, images: Tensor) -> Seen:
        maps = self.trunk(images.sub(0.5).mul(4.0))
        shapes = self.cell_shapes(maps).flatten(2).transpose(1, 2).log_softmax(-1)
        colours = self.cell_colours(maps).flatten(2).transpose(1, 2).log_softmax(-1)
        of_shapes = shapes[..., : len(SHAPES)].exp()
        of_kinds = (of_shapes[..., None] * colours.exp()[..., None, :]).flatten(2)
        places = centres(of_shapes)
        first, second = (torch.tensor(side) for side in zip(*PAIRS, strict=True))
        return Seen(
            self.kind_number(of_kinds.sum(1)),
            self.shape_number(of_shapes.sum(1)),
            self.relation(places[:, first] - places[:, second]).log_softmax(-1),
            shapes,
            colours,
        )


class Number(nn.Module):
    """Log-probabilities [N, M, 4] of the numbers 0 to 3 from expected ones [N, M].

    A discrete normal distribution around them; its width, and an offset for each number, are learnt.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = nn.Parameter(torch.tensor(1.5))
        self.offset = nn.Parameter(torch.zeros(MOST + 1))

    def forward(self, expected: Tensor) -> Tensor:
        distance = expected[..., None] - torch.arange(MOST + 1, device=expected.device)
        return (self.offset - self.sharpness.exp() * distance.square()).log_softmax(-1)


def centres(cells: Tensor) -> Tensor:
    """[N, M, 2] mean places of what is in the cells with probability [N, 64, M]: (x, y) in [-1, 1], y pointing down."""
    side = torch.arange(SIDE) * (2 / SIDE) + (1 / SIDE - 1)
    places = torch.stack([side.repeat(SIDE), side.repeat_interleave(SIDE)], -1).to(cells)
    weight = cells / cells.sum(1, keepdim=True).clamp_min(1e-6)
    return weight.transpose(1, 2) @ places


@lru_cache
def scene_of(prompt: str) -> Scene:
    """The scene that a sentence of the grammar means.

    Raises:
        ValueError: it is none.
    """
    known = _scenes()
    if prompt not in known:
        raise ValueError(f"the judge knows sentences such as 'a red circle and a blue square', got {prompt!r}")
    return known[prompt]


def probability(seen: Seen, scenes: Sequence[Scene]) -> Tensor:
    """[N] probability that each picture shows its scene and nothing else: all numbers as asked, and the relation."""
    return torch.stack([_log_probability(seen, row, scene) for row, scene in enumerate(scenes)]).exp()


def graded(seen: Seen, scenes: Sequence[Scene]) -> Tensor:
    """[N] mean probability of what a scene states.

    A statement is: each object, half for its shape (at least as many of it as the sentence has named so far) and half
    for its kind; the relation, of objects that are both there; and that there is nothing else.
    """
    return torch.stack([_graded(seen, row, scene) for row, scene in enumerate(scenes)])


def _log_probability(seen: Seen, row: int, scene: Scene) -> Tensor:
    numbers, wanted = _numbers(seen, row, scene)
    total = numbers.gather(1, wanted[:, None]).sum()
    if scene.relation is not None:
        total = total + _relation(seen, row, scene)
    return total


def _graded(seen: Seen, row: int, scene: Scene) -> Tensor:
    shapes, kinds, statements = Counter[str](), Counter[tuple[str, str]](), []
    for item in scene.items:
        shapes[item.shape] += 1
        there = _at_least(seen.shapes[row, SHAPES.index(item.shape)], shapes[item.shape])
        if item.colour is not None:
            kind = (item.shape, item.colour)
            kinds[kind] += 1
            there = 0.5 * (there + _at_least(seen.kinds[row, KINDS.index(kind)], kinds[kind]))
        statements.append(there)
    if scene.relation is not None:
        statements.append(statements[0] * statements[1] * _relation(seen, row, scene).exp())
    numbers, wanted = _numbers(seen, row, scene)
    none_more = [number[: most + 1].exp().sum() for number, most in zip(numbers, wanted.tolist(), strict=True)]
    return torch.stack([*statements, torch.stack(none_more).prod()]).mean()


def _numbers(seen: Seen, row: int, scene: Scene) -> tuple[Tensor, Tensor]:
    """Log-probabilities [M, 4] of the numbers that a scene determines, of kinds or else shapes, and the numbers [M]."""
    if any(item.colour is None for item in scene.items):
        named = Counter(SHAPES.index(item.shape) for item in scene.items)
        return seen.shapes[row], torch.tensor([named[shape] for shape in range(len(SHAPES))])
    named = Counter(KINDS.index((item.shape, str(item.colour))) for item in scene.items)
    return seen.kinds[row], torch.tensor([named[kind] for kind in range(len(KINDS))])


def _relation(seen: Seen, row: int, scene: Scene) -> Tensor:
    """Log-probability of a scene's relation."""
    first, second = (SHAPES.index(item.shape) for item in scene.items[:2])
    return seen.relations[row, PAIRS.index((first, second)), list(RELATIONS).index(str(scene.relation))]


def _at_least(number: Tensor, count: int) -> Tensor:
    return number[count:].exp().sum()


@lru_cache
def _scenes() -> dict[str, Scene]:
    return {scene.prompt: scene for category in CATEGORIES for scene in all_scenes(category)}
