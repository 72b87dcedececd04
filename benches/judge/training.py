"""Trains the judge on renders of the embedded model's scenes, deterministically, in some minutes of one core.

The model's pictures are not renders: they are decoded, blurred, faint in places, and wrong in ways that no sentence
describes. So half of the scenes are of random objects instead of a sentence's, a third of the pictures went through the
autoencoder with noise in their latents, and all are shifted, dimmed, tinted, blurred and made noisy at random.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benches.judge.network import KINDS, MOST, PAIRS, SIDE, Judge, Seen, probability
from densegrpo_fast.embedded import scenes
from densegrpo_fast.embedded.scenes import COLOURS, IMAGE_SIZE, RELATIONS, SHAPES, Item, Scene

NO_RELATION = len(RELATIONS)
UNKNOWN = -100
"""Relation of a pair of which one shape is not there, or more than once, and colour of no object: not learnt from."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the judge but the autoencoder.

    Attributes:
        seed: of all random numbers.
        steps, batch: of the optimiser.
        lr: highest learning rate of Adam, with a warm-up and a cosine.
        decoded: pictures that go through the autoencoder, from which a third of each batch is drawn.
        latent_noise: largest standard deviation of the noise in their latents, whose own is 1.
        held_out: renders of held-out sentences that the judge is tested on.
    """

    seed: int = 0
    steps: int = 500
    batch: int = 48
    lr: float = 2e-3
    decoded: int = 2000
    latent_noise: float = 0.25
    held_out: int = 600


class Truth(NamedTuple):
    """What N pictures show: `kinds` [N, 24] and `shapes` [N, 4] numbers; `relations` [N, 12] indices (`UNKNOWN` where a
    shape of the pair is not there exactly once); and `objects` [N, 3, 3]: kind and centre (x, y) in [-1, 1] of each
    object, NaN for fewer."""

    kinds: Tensor
    shapes: Tensor
    relations: Tensor
    objects: Tensor

    def select(self, rows: Tensor) -> Truth:
        """Some of the pictures."""
        return Truth(*(part[rows] for part in self))


def trained(file: Path, vae: Any, recipe: Recipe) -> tuple[Judge, dict[str, Any]]:
    """The judge from its file, or a new one that is then stored there; and what is known of it, as JSON data.

    Args:
        file: safetensors; made anew if it is of another recipe.
        vae: the embedded model's autoencoder.
        recipe: how it is trained.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    judge, wanted = Judge(), asdict(recipe)
    if file.is_file():
        with safe_open(file, "pt") as stored:
            about = json.loads((stored.metadata() or {}).get("about", "{}"))
        if about.get("recipe") == wanted:
            judge.load_state_dict(load_file(file))
            return judge.eval(), about
    train(judge, vae, recipe)
    about = {"recipe": wanted, "held_out_renders": accuracy(judge, vae, recipe), "sha256": weights_fingerprint(judge)}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), file, {"about": json.dumps(about)})
    return judge, about


def weights_fingerprint(judge: Judge) -> str:
    """SHA-256 over the names and values of all weights."""
    digest = hashlib.sha256()
    for name, value in sorted(judge.state_dict().items()):
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.contiguous().numpy().tobytes())
    return digest.hexdigest()


def train(judge: Judge, vae: Any, recipe: Recipe) -> None:
    """Initialise the judge anew and train it; it is in evaluation mode afterwards."""
    drawn, generator = np.random.default_rng([recipe.seed, 0]), torch.Generator().manual_seed(recipe.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        judge.load_state_dict(Judge().state_dict())
    images, truth = render(draw_scenes(recipe.decoded, drawn), drawn)
    pool = through(vae, images, recipe.latent_noise, generator)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=recipe.lr, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, recipe.steps, pct_start=0.1)
    judge.train()
    decoded = recipe.batch // 3
    for _ in range(recipe.steps):
        rows = torch.randint(len(pool), (decoded,), generator=generator)
        fresh, about = render(draw_scenes(recipe.batch - decoded, drawn), drawn)
        known = Truth(*(torch.cat(both) for both in zip(truth.select(rows), about, strict=True)))
        pictures, known = augmented(torch.cat([pool[rows], fresh]), known, generator)
        optimizer.zero_grad(set_to_none=True)
        loss(judge(pictures), known).backward()
        optimizer.step()
        schedule.step()
    judge.eval()


def loss(seen: Seen, truth: Truth) -> Tensor:
    """Cross-entropies of numbers, relations and cells: summed over a picture, mean over pictures."""
    shapes, colours = _cells(truth.objects)
    heads = [
        (seen.kinds, truth.kinds, 1.0),
        (seen.shapes, truth.shapes, 1.0),
        (seen.relations, truth.relations, 0.2),
        (seen.cell_shapes, shapes, 1.0),
        (seen.cell_colours, colours, 1.0),
    ]
    losses = [
        weight * F.nll_loss(found.flatten(0, 1), wanted.flatten(), reduction="sum") for found, wanted, weight in heads
    ]
    return torch.stack(losses).sum() / len(seen.kinds)


def _cells(objects: Tensor) -> tuple[Tensor, Tensor]:
    """[N, 64] shape of the object that has its centre in each cell, or none, and its colour, or `UNKNOWN`."""
    shapes = torch.full((len(objects), SIDE * SIDE), len(SHAPES))
    colours = torch.full_like(shapes, UNKNOWN)
    picture, number = torch.nonzero(~objects[..., 0].isnan(), as_tuple=True)
    kind, x, y = objects[picture, number].unbind(-1)
    column, row = (((place + 1) * (SIDE / 2)).long().clamp(0, SIDE - 1) for place in (x, y))
    shapes[picture, row * SIDE + column] = kind.long() // len(COLOURS)
    colours[picture, row * SIDE + column] = kind.long() % len(COLOURS)
    return shapes, colours


def draw_scenes(count: int, generator: np.random.Generator) -> list[Scene]:
    """Half of them of sentences that are not held out, half of one to three objects of any kinds."""
    told = scenes.sample_scenes(count // 2, generator)
    free = []
    for _ in range(count - len(told)):
        chosen = generator.integers(len(KINDS), size=generator.integers(1, MOST + 1))
        free.append(Scene("free", tuple(Item(*KINDS[kind]) for kind in chosen)))
    return told + free


def render(drawn: list[Scene], generator: np.random.Generator) -> tuple[Tensor, Truth]:
    """Pictures [N, 3, 64, 64] of scenes, and what they show."""
    images, truths = [], []
    for scene in drawn:
        # a sentence may leave colours open; the renderer then draws them after the places
        filled = tuple(Item(i.shape, i.colour or str(generator.choice(list(COLOURS)))) for i in scene.items)
        whole = Scene(scene.category, filled, scene.relation)
        # the renderer draws the places first and does not tell them
        places = scenes._places(whole, copy.deepcopy(generator))
        images.append(torch.from_numpy(scenes.render(whole, generator)))
        truths.append(_truth(filled, places))
    return torch.stack(images), Truth(*(torch.stack(parts) for parts in zip(*truths, strict=True)))


def _truth(items: tuple[Item, ...], places: list[tuple[float, float, float]]) -> Truth:
    kinds = Counter(KINDS.index((item.shape, str(item.colour))) for item in items)
    shapes = Counter(SHAPES.index(item.shape) for item in items)
    objects, where = torch.full((MOST, 3), torch.nan), {}
    for number, (item, place) in enumerate(zip(items, places, strict=True)):
        shape = SHAPES.index(item.shape)
        centre = torch.tensor(place[:2]) * (2 / IMAGE_SIZE) - 1
        objects[number, 0], objects[number, 1:] = KINDS.index((item.shape, str(item.colour))), centre
        if shapes[shape] == 1:
            where[shape] = place
    relations = [_relation(where[a], where[b]) if a in where and b in where else UNKNOWN for a, b in PAIRS]
    return Truth(
        torch.tensor([kinds[kind] for kind in range(len(KINDS))]),
        torch.tensor([shapes[shape] for shape in range(len(SHAPES))]),
        torch.tensor(relations),
        objects,
    )


def _relation(first: tuple[float, float, float], second: tuple[float, float, float]) -> int:
    """Index of the relation in which the first of two objects (x, y, radius) is drawn to stand to the second."""
    centres, radii = np.array([first[:2], second[:2]]), np.array([first[2], second[2]])
    for index, relation in enumerate(RELATIONS):
        if scenes._related(relation, centres, radii):
            return index
    return NO_RELATION


@torch.no_grad()
def through(vae: Any, images: Tensor, noise: float, generator: torch.Generator, chunk: int = 64) -> Tensor:
    """Pictures after the autoencoder, each with noise of its own strength up to `noise` in its latents."""
    parts = []
    for part in images.split(chunk):
        latents = vae.encode(part * 2 - 1).latent_dist.mode()
        strength = noise * torch.rand(len(part), 1, 1, 1, generator=generator) / vae.config.scaling_factor
        latents = latents + strength * torch.randn(latents.shape, generator=generator)
        parts.append((vae.decode(latents).sample / 2 + 0.5).clamp(0, 1))
    return torch.cat(parts)


def augmented(images: Tensor, truth: Truth, generator: torch.Generator) -> tuple[Tensor, Truth]:
    """Pictures shifted by up to 2 pixels, blurred, dimmed, tinted and made noisy; and what they show then."""
    count = len(images)
    x, y = torch.randint(-2, 3, (2,), generator=generator).tolist()
    padded = F.pad(images, (2, 2, 2, 2), mode="replicate")
    images = padded[:, :, 2 - y : 2 - y + IMAGE_SIZE, 2 - x : 2 - x + IMAGE_SIZE]
    shift = torch.tensor([x, y]) * (2 / IMAGE_SIZE)
    moved = truth.objects + torch.cat([torch.zeros(1), shift])
    # every other picture, whether it went through the autoencoder or not
    images = images.clone()
    images[::2] = _blurred(images[::2], float(torch.rand((), generator=generator)) * 1.2)
    gain = 1 + 0.2 * (torch.rand(count, 3, 1, 1, generator=generator) - 0.5)
    offset = 0.1 * (torch.rand(count, 1, 1, 1, generator=generator) - 0.5)
    strength = 0.06 * torch.rand(count, 1, 1, 1, generator=generator)
    noise = strength * torch.randn(images.shape, generator=generator)
    return (images * gain + offset + noise).clamp(0, 1), truth._replace(objects=moved)


def _blurred(images: Tensor, sigma: float) -> Tensor:
    """By a Gaussian of this many pixels."""
    reach = torch.arange(-3, 4, dtype=torch.float32)
    row = torch.exp(-0.5 * (reach / max(sigma, 1e-3)) ** 2)
    row = (row / row.sum()).expand(3, 1, -1)
    padded = F.pad(images, (3, 3, 3, 3), mode="replicate")
    return F.conv2d(F.conv2d(padded, row[..., None, :], groups=3), row[..., :, None], groups=3)


@torch.no_grad()
def accuracy(judge: Judge, vae: Any, recipe: Recipe) -> dict[str, float]:
    """How the judge does on renders of held-out sentences that went through the autoencoder.

    Returns:
        shares of pictures whose most probable numbers of all kinds (`kinds`) and shapes (`shapes`), and of pairs whose
        relation (`relations`), are right; mean `probability` of the right sentence; and that of a sentence of the same
        category with other objects (`probability_of_another`).
    """
    drawn = np.random.default_rng([recipe.seed, 1])
    generator = torch.Generator().manual_seed(recipe.seed + 1)
    told = scenes.sample_scenes(recipe.held_out, drawn, held_out=True)
    images, truth = render(told, drawn)
    seen = look(judge, through(vae, images, recipe.latent_noise, generator))
    known = truth.relations != UNKNOWN
    others = [_another(scene, drawn) for scene in told]
    return {
        "kinds": _share((seen.kinds.argmax(-1) == truth.kinds).all(1)),
        "shapes": _share((seen.shapes.argmax(-1) == truth.shapes).all(1)),
        "relations": _share((seen.relations.argmax(-1) == truth.relations)[known]),
        "probability": float(probability(seen, told).mean()),
        "probability_of_another": float(probability(seen, others).mean()),
    }


def look(judge: Judge, images: Tensor, chunk: int = 64) -> Seen:
    """What the judge sees in many pictures."""
    with torch.no_grad():
        parts = [judge(part) for part in images.split(chunk)]
    return Seen(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _another(scene: Scene, generator: np.random.Generator) -> Scene:
    """A scene of the same category with other objects."""
    own = sorted(map(str, scene.items))
    others = [other for other in scenes.all_scenes(scene.category) if sorted(map(str, other.items)) != own]
    return others[generator.integers(len(others))]


def _share(right: Tensor) -> float:
    return float(right.float().mean())
