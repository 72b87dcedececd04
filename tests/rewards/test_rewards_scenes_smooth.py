"""The scenes reward without thresholds: right on rendered scenes, and continuous in the picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from densegrpo_fast.embedded import scenes
from densegrpo_fast.embedded.scenes import Item, Scene
from densegrpo_fast.rewards.registry import create
from densegrpo_fast.rewards.scenes_smooth import ScenesSmooth, memberships

REWARD = ScenesSmooth()


def rendered(drawn: list[Scene], seed: int) -> Tensor:
    return torch.from_numpy(scenes.render_batch(drawn, np.random.default_rng(seed)))


@pytest.mark.parametrize("category", scenes.CATEGORIES)
def test_rendered_scenes_score_high_for_their_own_sentences_alone(category: str) -> None:
    generator = np.random.default_rng(1)
    deck = scenes.all_scenes(category)
    drawn = [deck[i] for i in generator.choice(len(deck), 10, replace=False)]
    prompts = [scene.prompt for scene in drawn]
    images = rendered(drawn, seed=2)
    own = REWARD(images, prompts)
    assert np.mean(own) >= 0.8 and 0.5 <= min(own) and max(own) <= 1
    assert np.mean(REWARD(images, prompts[1:] + prompts[:1])) <= np.mean(own) - 0.3


@pytest.mark.parametrize("shape", scenes.SHAPES)
def test_other_shapes_colours_numbers_and_places_score_lower(shape: str) -> None:
    def score(scene: Scene, prompt: str) -> float:
        return float(np.mean(REWARD(rendered([scene] * 6, seed=3), [prompt] * 6)))

    red, other = Item(shape, "red"), Item(next(s for s in scenes.SHAPES if s != shape), "blue")
    single = Scene("single", (red,))
    right = score(single, single.prompt)
    assert right > 0.85
    for another in scenes.SHAPES:
        if another != shape:
            assert score(single, f"a red {another}") < 0.65 * right
    assert score(single, f"a blue {shape}") < 0.05
    assert score(Scene("counting", (red, red)), single.prompt) < 0.85 * right
    assert score(single, Scene("counting", (red, red)).prompt) < 0.85 * right
    left = Scene("position", (red, other), "to the left of")
    assert score(left, left.prompt) > score(left, left.prompt.replace("left", "right")) + 0.15


@pytest.mark.ci
def test_a_small_change_of_the_picture_is_a_small_change_of_the_score() -> None:
    first, second = ([scenes.all_scenes(name)[index] for name in scenes.CATEGORIES] for index in (5, 9))
    ways = torch.linspace(0, 1, 201)[:, None, None, None]
    for scene, start, end in zip(first, rendered(first, seed=4), rendered(second, seed=5), strict=True):
        scores = np.array(REWARD(start * (1 - ways) + end * ways, [scene.prompt] * 201))
        assert np.abs(np.diff(scores)).max() < 0.1
        assert np.ptp(scores) > 0.3


def test_pictures_without_colour_and_of_other_sizes() -> None:
    assert create("scenes_smooth")(torch.full((1, 3, 64, 64), 0.5), ["a red circle"], None) == [0.0]
    assert memberships(torch.rand(1, 1, 8, 8).expand(1, 3, 8, 8)).max() == 0
    images, prompts = rendered([scenes.all_scenes("single")[0]], seed=6), [scenes.all_scenes("single")[0].prompt]
    large = F.interpolate(images, scale_factor=4, mode="nearest")
    np.testing.assert_allclose(REWARD(large, prompts), REWARD(images, prompts), atol=1e-5)
    with pytest.raises(ValueError, match="cannot read"):
        REWARD(images, ["some red circle"])
