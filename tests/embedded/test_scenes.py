"""The prompt grammar and the renderer of the embedded model's world."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from densegrpo_fast.embedded import scenes
from densegrpo_fast.embedded.scenes import CATEGORIES, COLOURS, Item, Scene

ALL = [scene for category in CATEGORIES for scene in scenes.all_scenes(category)]


@pytest.mark.parametrize(
    ("category", "count"),
    [
        # 4 shapes x 6 colours
        ("single", 24),
        # ordered pairs of different shapes
        ("two", 4 * 3),
        # two or three of each object
        ("counting", 2 * 24),
        # ordered pairs that differ in shape and colour
        ("color_attr", 24 * 3 * 5),
        ("position", 24 * 3 * 5 * 4),
        # ordered triples of different shapes and of different colours
        ("three", 4 * 3 * 2 * 6 * 5 * 4),
    ],
)
def test_the_number_of_scenes(category: str, count: int) -> None:
    found = scenes.all_scenes(category)
    assert len(found) == count
    assert len({scene.prompt for scene in found}) == count
    assert {scene.category for scene in found} == {category}


def test_an_unknown_category_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown category 'pair', expected one of single"):
        scenes.all_scenes("pair")


RED_CIRCLE, BLUE_SQUARE, CYAN_CROSS = Item("circle", "red"), Item("square", "blue"), Item("cross", "cyan")


@pytest.mark.parametrize(
    ("scene", "prompt"),
    [
        (Scene("single", (RED_CIRCLE,)), "a red circle"),
        (Scene("two", (Item("cross", None), Item("circle", None))), "a cross and a circle"),
        (Scene("counting", (CYAN_CROSS,) * 2), "two cyan crosses"),
        (Scene("counting", (RED_CIRCLE,) * 3), "three red circles"),
        (Scene("color_attr", (RED_CIRCLE, BLUE_SQUARE)), "a red circle and a blue square"),
        (Scene("position", (RED_CIRCLE, BLUE_SQUARE), "above"), "a red circle above a blue square"),
        (
            Scene("three", (RED_CIRCLE, BLUE_SQUARE, CYAN_CROSS)),
            "a red circle, a blue square and a cyan cross",
        ),
    ],
)
def test_the_sentences(scene: Scene, prompt: str) -> None:
    assert scene.prompt == prompt
    assert scene in scenes.all_scenes(scene.category)


def test_a_fifth_of_the_sentences_is_held_out() -> None:
    training, held_out = scenes.split(held_out=False), scenes.split(held_out=True)
    for category in CATEGORIES:
        sentences = {scene.prompt for scene in scenes.all_scenes(category)}
        ours, theirs = ({scene.prompt for scene in part[category]} for part in (training, held_out))
        assert ours | theirs == sentences
        assert not ours & theirs
        assert theirs, f"no held-out sentence in {category}"
    # 2382 different meanings: four standard errors of a fifth are 0.033
    assert sum(scene.held_out for scene in ALL) / len(ALL) == pytest.approx(0.2, abs=0.035)


def test_sentences_of_one_meaning_are_on_one_side() -> None:
    sides: dict[tuple, set[bool]] = {}
    for scene in ALL:
        items = scene.items
        if scene.relation in ("to the left of", "above"):
            direction = {"to the left of": "to the right of", "above": "below"}[scene.relation]
            meaning = (direction, items[1], items[0])
        elif scene.relation is not None:
            meaning = (scene.relation, *items)
        else:
            meaning = (scene.category, frozenset(Counter(items).items()))
        sides.setdefault(meaning, set()).add(scene.held_out)
    assert len(sides) < len(ALL)
    assert all(len(side) == 1 for side in sides.values())


def test_mirrored_relations_by_example() -> None:
    pairs = scenes.all_scenes("position")
    by_prompt = {scene.prompt: scene.held_out for scene in pairs}
    left = "a red circle to the left of a blue square"
    assert by_prompt[left] == by_prompt["a blue square to the right of a red circle"]
    # yet the other way round is another meaning, and some of those fall on the other side
    swapped = [
        Scene("position", scene.items[::-1], scene.relation).held_out != scene.held_out
        for scene in pairs
        if scene.relation == "to the left of"
    ]
    assert any(swapped)


def test_prompts_are_repeatable_distinct_and_mixed() -> None:
    chosen = scenes.prompts(held_out=True, count=60)
    assert chosen == scenes.prompts(held_out=True, count=60)
    assert chosen != scenes.prompts(held_out=True, count=60, seed=1)
    assert len(set(chosen)) == 60
    category = {scene.prompt: scene.category for scene in ALL}
    assert [category[prompt] for prompt in chosen[:12]] == [*CATEGORIES, *CATEGORIES]
    # a shorter list is the beginning of a longer one
    assert scenes.prompts(held_out=True, count=7) == chosen[:7]


def test_prompts_never_cross_the_split_and_run_out() -> None:
    held_out, training = (scenes.prompts(held_out=side, count=10**6) for side in (True, False))
    assert not set(held_out) & set(training)
    assert sorted([*held_out, *training]) == sorted(scene.prompt for scene in ALL)


def test_sampled_scenes_follow_shares_and_split() -> None:
    drawn = scenes.sample_scenes(4000, np.random.default_rng(0))
    assert drawn == scenes.sample_scenes(4000, np.random.default_rng(0))
    assert not any(scene.held_out for scene in drawn)
    counts = Counter(scene.category for scene in drawn)
    assert sum(scenes.TRAINING_SHARES.values()) == pytest.approx(1)
    for category, share in scenes.TRAINING_SHARES.items():
        # five standard errors of a share below 0.26 in 4000 draws
        assert counts[category] / 4000 == pytest.approx(share, abs=0.035)
    assert all(scene.held_out for scene in scenes.sample_scenes(50, np.random.default_rng(0), held_out=True))


def objects(image: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Mask, centre (x, y) in pixels and mean colour of everything that stands out from the corner's colour."""
    distance = np.linalg.norm(image - image[:, :1, :1], axis=0)
    labels, count = ndimage.label(distance > 0.3)
    found = []
    for label in range(1, count + 1):
        mask = labels == label
        y, x = np.nonzero(mask)
        core = ndimage.binary_erosion(mask)
        found.append((mask, np.array([x.mean(), y.mean()]), image[:, core if core.any() else mask].mean(1)))
    return found


def nearest_colour(rgb: np.ndarray) -> str:
    return min(COLOURS, key=lambda name: float(np.linalg.norm(np.array(COLOURS[name]) - rgb)))


def assert_drawn(scene: Scene, image: np.ndarray) -> None:
    found = objects(image)
    assert len(found) == len(scene.items)
    colours = [nearest_colour(colour) for _, _, colour in found]
    if all(item.colour for item in scene.items):
        assert sorted(colours) == sorted(str(item.colour) for item in scene.items)
    for mask, _, _ in found:
        assert not (mask[0].any() or mask[-1].any() or mask[:, 0].any() or mask[:, -1].any())
        assert mask.sum() >= 40
    for number, (mask, _, _) in enumerate(found):
        near = ndimage.binary_dilation(mask, iterations=2)
        assert not any((near & other).any() for other, _, _ in found[number + 1 :])
    if scene.relation is not None:
        first, second = (found[colours.index(str(item.colour))][1] for item in scene.items)
        along = (first - second) @ np.array(scenes.RELATIONS[scene.relation])
        assert along > 10
        assert along == np.abs(first - second).max()


@settings(deadline=None, max_examples=120)
@given(number=st.integers(0, len(ALL) - 1), seed=st.integers(0, 2**32 - 1))
def test_a_picture_shows_its_scene(number: int, seed: int) -> None:
    scene = ALL[number]
    image = scenes.render(scene, np.random.default_rng(seed))
    assert image.shape == (3, 64, 64)
    assert image.dtype == np.float32
    assert image.min() >= 0 and image.max() <= 1
    assert_drawn(scene, image)


@pytest.mark.parametrize("category", CATEGORIES)
def test_edges_are_covered_by_area(category: str) -> None:
    # The same picture drawn eight times finer and averaged is what anti-aliasing approximates; one pixel in sixty-four
    # of the fine picture is what a picture without it would show.
    scene = scenes.all_scenes(category)[5]
    smooth, hard = 0.0, 0.0
    for seed in range(5):
        image = scenes.render(scene, np.random.default_rng(seed))
        fine = scenes.render(scene, np.random.default_rng(seed), size=512)
        assert fine.shape == (3, 512, 512)
        covered = fine.reshape(3, 64, 8, 64, 8).mean((2, 4))
        assert np.abs(image - covered).max() < 0.3  # at a sharp corner
        smooth += float(np.abs(image - covered).mean())
        hard += float(np.abs(fine[:, 4::8, 4::8] - covered).mean())
    assert smooth < hard / 4


def test_pictures_are_repeatable_and_varied() -> None:
    drawn = scenes.sample_scenes(8, np.random.default_rng(0))
    batch = scenes.render_batch(drawn, np.random.default_rng(1))
    assert batch.shape == (8, 3, 64, 64)
    assert np.array_equal(batch, scenes.render_batch(drawn, np.random.default_rng(1)))
    one = [scenes.render(Scene("single", (RED_CIRCLE,)), np.random.default_rng(seed)) for seed in range(20)]
    backgrounds = np.array([image[:, 0, 0].mean() for image in one])
    (sizes, places) = zip(*((objects(image)[0][0].sum(), objects(image)[0][1]) for image in one), strict=True)
    assert np.ptp(backgrounds) > 0.1
    assert max(sizes) > 1.8 * min(sizes)
    assert np.ptp(np.array(places), axis=0).min() > 15


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown shape 'star', expected one of circle"):
        scenes.render(Scene("single", (Item("star", "red"),)), np.random.default_rng(0))
