"""The scenes reward: right on rendered scenes, on pictures drawn by hand, and graded in between."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from torch import Tensor

from densegrpo_fast.embedded import scenes
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.rewards.registry import create
from densegrpo_fast.rewards.scene_analysis import COLOURS, examine
from densegrpo_fast.rewards.scene_request import Request, parse
from densegrpo_fast.rewards.scenes import ScenesReward

RED, GREEN, BLUE = (0.9, 0.1, 0.1), (0.1, 0.75, 0.2), (0.15, 0.2, 0.9)
REWARD = ScenesReward()


def canvas(size: int = 64, grey: float = 0.5) -> np.ndarray:
    return np.full((3, size, size), grey, np.float32)


def paint(image: np.ndarray, shape: str, rgb: tuple[float, float, float], x: float, y: float, r: float) -> np.ndarray:
    """A hard-edged figure of half width r around (x, y), in pixels; returns the picture."""
    rows, columns = np.mgrid[0 : image.shape[1], 0 : image.shape[2]]
    dx, dy = columns + 0.5 - x, rows + 0.5 - y
    mask = {
        "square": np.maximum(abs(dx), abs(dy)) <= r,
        "circle": np.hypot(dx, dy) <= r,
        "triangle": (abs(dx) <= (dy + r) / 2) & (dy <= r),
        "cross": (np.minimum(abs(dx), abs(dy)) <= r / 3) & (np.maximum(abs(dx), abs(dy)) <= r),
    }[shape]
    image[:, mask] = np.array(rgb, np.float32)[:, None]
    return image


def judge(image: np.ndarray, prompt: str) -> tuple[float, float]:
    (graded,), (strict,) = REWARD.both(torch.from_numpy(image)[None], [prompt])
    return graded, strict


def rendered(count: int, seed: int) -> tuple[Tensor, list[str]]:
    generator = np.random.default_rng(seed)
    decks = [scenes.all_scenes(name) for name in scenes.CATEGORIES]
    drawn = [deck[generator.integers(len(deck))] for deck in decks for _ in range(count)]
    return torch.from_numpy(scenes.render_batch(drawn, generator)), [scene.prompt for scene in drawn]


IMAGES, PROMPTS = rendered(60, seed=7)


def test_rendered_scenes_pass() -> None:
    graded, strict = REWARD.both(IMAGES, PROMPTS)
    assert np.mean(strict) >= 0.98
    assert np.mean(graded) >= 0.9
    # in every category
    assert np.array(strict).reshape(len(scenes.CATEGORIES), -1).mean(1).min() >= 0.93


def test_mismatched_prompts_fail() -> None:
    # pictures against the sentences of others; equal sentences are left out, others may still happen to fit
    strict, graded, count = 0.0, 0.0, 0
    right = np.mean(REWARD(IMAGES, PROMPTS))
    for shift in (60, 97, 180):
        moved = PROMPTS[shift:] + PROMPTS[:shift]
        different = [i for i, (a, b) in enumerate(zip(PROMPTS, moved, strict=True)) if a != b]
        scores, passes = REWARD.both(IMAGES[different], [moved[i] for i in different])
        strict, graded, count = strict + sum(passes), graded + sum(scores), count + len(different)
    assert strict / count <= 0.05
    assert graded / count < right / 2


@pytest.mark.parametrize("noise", ["uniform", "gaussian"])
def test_noise_scores_nothing(noise: str) -> None:
    shape = (120, 3, 64, 64)
    images = torch.rand(shape) if noise == "uniform" else (0.5 + 0.3 * torch.randn(shape)).clamp(0, 1)
    graded, strict = REWARD.both(images, (PROMPTS * 2)[:: len(PROMPTS) * 2 // 120][:120])
    assert max(strict) == 0
    assert np.mean(graded) < 0.02


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_an_empty_picture_scores_zero(value: float) -> None:
    assert judge(canvas(grey=value), "a red circle") == (0.0, 0.0)


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 10_000), smooth=st.floats(0, 6), prompt=st.sampled_from(PROMPTS))
def test_any_picture_scores_within_zero_and_one(seed: int, smooth: float, prompt: str) -> None:
    image = np.random.default_rng(seed).normal(0.5, 1.0, (3, 64, 64))
    image = ndimage.gaussian_filter(image, (0, smooth, smooth))
    image = (image - image.min()) / np.ptp(image)
    graded, strict = judge(image.astype(np.float32), prompt)
    assert 0.0 <= graded <= 1.0
    assert strict in (0.0, 1.0)
    assert strict <= graded * 2


def test_a_square_drawn_by_hand() -> None:
    image = paint(canvas(), "square", RED, 30, 34, 10)
    (objects,) = examine(image[None])
    assert len(objects) == 1
    # rows 24..43 and columns 20..39 are red: the middle of the square is (30, 34) of 64
    np.testing.assert_allclose(objects.centre, [[30 / 64, 34 / 64]])
    np.testing.assert_array_equal(objects.purity, [[float(name == "red") for name in COLOURS]])
    assert objects.colour[0, COLOURS.index("red")] > 0.99
    assert objects.overlap.argmax() == 1
    assert objects.overlap[0, 1] > 0.9
    assert objects.presence == 1.0
    assert objects.clutter == 0.0
    graded, strict = judge(image, "a red square")
    assert strict == 1.0
    assert graded > 0.95


@pytest.mark.parametrize("shape", ["circle", "square", "triangle", "cross"])
@pytest.mark.parametrize("colour", [RED, GREEN, BLUE], ids=["red", "green", "blue"])
def test_figures_drawn_by_hand(shape: str, colour: tuple[float, float, float]) -> None:
    name = {RED: "red", GREEN: "green", BLUE: "blue"}[colour]
    image = paint(canvas(grey=0.2), shape, colour, 25, 38, 11)
    assert judge(image, f"a {name} {shape}")[1] == 1.0
    others = [
        judge(image, f"a {name} {other}") for other in ("circle", "square", "triangle", "cross") if other != shape
    ]
    assert all(strict == 0.0 for _, strict in others)
    assert max(graded for graded, _ in others) < judge(image, f"a {name} {shape}")[0] - 0.2


def two_objects(swap: bool = False) -> np.ndarray:
    left, right = (16, 48) if not swap else (48, 16)
    return paint(paint(canvas(), "circle", RED, left, 32, 9), "square", BLUE, right, 32, 9)


SENTENCE = "a red circle to the left of a blue square"


def test_a_wrong_colour_costs() -> None:
    right = judge(paint(canvas(), "circle", RED, 32, 32, 12), "a red circle")
    wrong = judge(paint(canvas(), "circle", BLUE, 32, 32, 12), "a red circle")
    assert right[1] == 1.0 and wrong[1] == 0.0
    assert 0.0 < wrong[0] < right[0] / 2
    half = paint(canvas(), "circle", RED, 32, 32, 12)
    half[:, :, 38:][:, (half[:, :, 38:] != 0.5).any(0)] = np.array(BLUE, np.float32)[:, None]
    assert judge(half, "a red circle")[0] < right[0]


def test_an_extra_object_costs() -> None:
    alone = judge(two_objects(), SENTENCE)
    crowded = judge(paint(two_objects(), "cross", GREEN, 32, 54, 8), SENTENCE)
    assert alone[1] == 1.0 and crowded[1] == 0.0
    # one object too many divides by 1.5
    assert crowded[0] == pytest.approx(alone[0] / 1.5, rel=0.02)


def test_a_missing_object_costs() -> None:
    single = judge(paint(canvas(), "circle", RED, 16, 32, 9), SENTENCE)
    assert single[1] == 0.0
    assert 0.2 < single[0] < 0.5 * judge(two_objects(), SENTENCE)[0]


def test_the_wrong_side_costs() -> None:
    right, wrong = judge(two_objects(), SENTENCE), judge(two_objects(swap=True), SENTENCE)
    assert right[1] == 1.0 and wrong[1] == 0.0
    # the objects keep their 0.7, the 0.3 for the place is lost
    assert wrong[0] == pytest.approx(0.7 * right[0], rel=0.05)
    assert judge(two_objects(swap=True), "a red circle to the right of a blue square") == pytest.approx(right)


def test_colours_on_the_wrong_shapes_cost() -> None:
    swapped = paint(paint(canvas(), "circle", BLUE, 16, 32, 9), "square", RED, 48, 32, 9)
    graded, strict = judge(swapped, "a red circle and a blue square")
    assert strict == 0.0
    assert graded < 0.6 * judge(two_objects(), "a red circle and a blue square")[0]


def test_counting() -> None:
    image = canvas()
    scores = []
    for x in (12, 32, 52):
        scores.append(judge(paint(image, "triangle", GREEN, x, 30, 8), "three green triangles"))
    assert [strict for _, strict in scores] == [0.0, 0.0, 1.0]
    assert scores[0][0] < scores[1][0] < scores[2][0]
    assert judge(image, "two green triangles")[1] == 0.0


def test_a_place_half_right_scores_between() -> None:
    # the further to the side, the better the place
    def place(x: float) -> float:
        return judge(paint(paint(canvas(), "circle", RED, x, 12, 8), "square", BLUE, 46, 48, 8), SENTENCE)[0]

    scores = [place(x) for x in (46, 30, 22, 14)]
    assert all(a <= b for a, b in zip(scores, scores[1:], strict=False))
    assert scores[0] < scores[-1]


def test_shrinking_overlap_lowers_the_score_gradually() -> None:
    # corners cut off step by step: less and less of a square
    scores = []
    for cut in (0, 4, 8):
        image = paint(canvas(), "square", RED, 32, 32, 12)
        y, x = np.mgrid[0:64, 0:64]
        image[:, (abs(x - 31.5) + abs(y - 31.5)) > 24 - cut] = 0.5
        scores.append(judge(image, "a red square")[0])
    assert all(a >= b for a, b in zip(scores, scores[1:], strict=False))
    assert scores[0] > scores[-1] + 0.1


@pytest.mark.ci
@pytest.mark.parametrize("size", [48, 128, 256])
def test_other_sizes(size: int) -> None:
    generator = np.random.default_rng(3)
    drawn = scenes.sample_scenes(60, generator)
    images = np.stack([scenes.render(scene, generator, size=size) for scene in drawn])
    _, strict = REWARD.both(torch.from_numpy(images), [scene.prompt for scene in drawn])
    assert np.mean(strict) >= (0.95 if size > 64 else 0.85)


@pytest.mark.parametrize(
    ("name", "shades"),
    [
        ("red", [(1.0, 0.0, 0.0), (0.7, 0.1, 0.15), (0.95, 0.35, 0.3)]),
        ("green", [(0.0, 1.0, 0.0), (0.0, 0.5, 0.1), (0.3, 0.8, 0.35)]),
        ("blue", [(0.0, 0.0, 1.0), (0.1, 0.2, 0.6), (0.3, 0.45, 0.95)]),
        ("yellow", [(1.0, 1.0, 0.0), (0.9, 0.75, 0.2), (0.7, 0.65, 0.1)]),
        ("purple", [(0.5, 0.0, 0.8), (0.7, 0.3, 0.9), (0.6, 0.0, 0.75)]),
        ("cyan", [(0.0, 1.0, 1.0), (0.1, 0.65, 0.7), (0.4, 0.9, 0.95)]),
    ],
)
def test_other_shades(name: str, shades: list[tuple[float, float, float]]) -> None:
    for shade in shades:
        for grey in (0.1, 0.5, 0.9):
            assert judge(paint(canvas(grey=grey), "circle", shade, 32, 32, 12), f"a {name} circle")[1] == 1.0


def test_touching_objects_of_two_colours_stay_two() -> None:
    image = paint(paint(canvas(), "square", RED, 22, 32, 10), "square", GREEN, 42, 32, 10)
    assert judge(image, "a red square and a green square")[1] == 1.0


def test_specks_are_no_objects_but_clutter() -> None:
    image = paint(canvas(), "square", RED, 32, 32, 10)
    clean = judge(image, "a red square")
    image[:, 4:6, 4:6] = np.array(GREEN, np.float32)[:, None, None]
    # 4 of 404 coloured pixels belong to no object
    assert judge(image, "a red square") == (pytest.approx(clean[0] * (1 - 4 / 404)), 1.0)


def test_a_small_change_of_the_picture_changes_the_score_little_and_evenly() -> None:
    # blurred pictures with a faint second one in them, near many thresholds, then smooth noise of 0.5% added and taken
    generator = np.random.default_rng(4)
    drawn = scenes.sample_scenes(150, generator)
    prompts = [scene.prompt for scene in drawn]
    first, second = scenes.render_batch(drawn, generator), scenes.render_batch(drawn, generator)
    images = 0.75 * ndimage.gaussian_filter(first, (0, 0, 1.5, 1.5)) + 0.25 * second
    noise = ndimage.gaussian_filter(generator.normal(size=images.shape), (0, 0, 2, 2))
    noise = 0.005 * (noise / noise.std()).astype(np.float32)
    middle, up, down = (
        np.array(REWARD(torch.from_numpy(x), prompts)) for x in (images, images + noise, images - noise)
    )
    assert np.sqrt(np.mean((up - middle) ** 2)) < 0.02
    assert abs(up - middle).max() < 0.15
    # a score that jumped would change by unrelated amounts in both directions
    odd, even = (up - down) / 2, (up + down) / 2 - middle
    assert odd.var() > 1.5 * even.var()


def test_an_object_fades_in() -> None:
    # a red square that grows from 2 to 12 pixels in width, beside the one that is asked for
    scores = []
    for half in range(1, 7):
        crowded = paint(paint(canvas(), "square", RED, 20, 32, 10), "square", RED, 50, 32, half)
        scores.append(judge(crowded, "a red square")[0])
    assert all(-0.02 < a - b < 0.15 for a, b in zip(scores, scores[1:], strict=False))
    assert scores[-1] == pytest.approx(scores[0] / 1.5, rel=0.1)


def test_every_sentence_of_the_grammar_is_understood() -> None:
    for category in scenes.CATEGORIES:
        for scene in scenes.all_scenes(category):
            request = parse(scene.prompt)
            assert request.objects == tuple((item.shape, item.colour) for item in scene.items)
            expected = None if scene.relation is None else scenes.RELATIONS[scene.relation]
            assert request.direction == expected


def test_parsing_is_lenient_about_form() -> None:
    assert parse("  A  red circle. ") == Request((("circle", "red"),))
    assert parse("a red circle, a blue square, and a cyan cross") == parse(
        "a red circle, a blue square and a cyan cross"
    )
    assert parse("two circles and a cross") == Request((("circle", None), ("circle", None), ("cross", None)))


@pytest.mark.parametrize(
    "prompt", ["", "a cat", "red circle", "a pink circle", "four red circles", "a red circle beside a blue square", "a"]
)
def test_other_sentences_are_refused(prompt: str) -> None:
    with pytest.raises(ValueError, match="scenes reward"):
        REWARD(torch.zeros(1, 3, 64, 64), [prompt])


def test_batches_equal_single_pictures() -> None:
    batch = REWARD.both(IMAGES[::40], PROMPTS[::40])
    single = [REWARD.both(image[None], [prompt]) for image, prompt in zip(IMAGES[::40], PROMPTS[::40], strict=True)]
    assert batch == ([graded[0] for graded, _ in single], [strict[0] for _, strict in single])


def test_by_name_in_a_mixture() -> None:
    mixture = RewardMixture({"scenes": (create("scenes"), 1.0), "scenes_strict": (create("scenes_strict"), 0.0)})
    scores = mixture(IMAGES[:6], PROMPTS[:6])
    graded, strict = REWARD.both(IMAGES[:6], PROMPTS[:6])
    assert scores.per_reward["scenes_strict"].tolist() == strict
    torch.testing.assert_close(scores.values, torch.tensor(graded))
