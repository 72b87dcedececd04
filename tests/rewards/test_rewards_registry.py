"""Rewards by name: the package's, registered ones, one's own."""

from __future__ import annotations

import pytest
import torch

from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.rewards.registry import create, names, register

IMAGES = torch.linspace(0, 1, 3 * 3 * 4 * 4).reshape(3, 3, 4, 4)
PROMPTS = ["a red circle", "a blue square", "two green crosses"]


def test_a_registered_factory_is_created_with_its_options(monkeypatch):
    monkeypatch.setattr("densegrpo_fast.rewards.registry._REGISTERED", {})

    @register("constant")
    def constant(value):
        return lambda images, prompts, metadata: [value] * len(prompts)

    assert "constant" in names()
    assert create("constant", value=0.25)(IMAGES, PROMPTS, [{}] * 3) == [0.25] * 3
    for taken in ("constant", "scenes", "a:b"):
        with pytest.raises(ValueError, match="must be new and without a colon"):
            register(taken)


def test_an_unknown_name_suggests_and_lists_the_known_ones():
    with pytest.raises(
        ValueError, match=r"unknown reward 'secnes'; did you mean 'scenes'\? known: aesthetic, clipscore, jpeg_compress"
    ):
        create("secnes")
    with pytest.raises(ValueError, match="unknown reward 'zzz'; known: "):
        create("zzz")


def test_every_built_in_name_makes_a_reward_that_keeps_the_contract():
    images = torch.full((1, 3, 64, 64), 0.5)
    # the others need weights, an extra or a server; each has its own test file
    for name in set(names()) - {"pickscore", "clipscore", "aesthetic", "ocr", "remote", "vlm_judge"}:
        assert RewardMixture({name: (create(name), 1.0)})(images, ["a red circle"]).missing_share == 0.0, name


def test_ones_own_reward_is_loaded_only_in_the_explicit_form(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(
        "def brightness(images, prompts, metadata, gain=1.0):\n    return gain * images.mean((1, 2, 3))\n"
        "class Fixed:\n"
        "    def __init__(self, value=3):\n        self.value = value\n"
        "    def __call__(self, images, prompts, metadata):\n        return [self.value] * len(prompts)\n"
    )
    mean = IMAGES.mean((1, 2, 3))
    torch.testing.assert_close(create(f"{path}:brightness")(IMAGES, PROMPTS, []), mean)
    torch.testing.assert_close(create(f"{path}:brightness", gain=2.0)(IMAGES, PROMPTS, []), 2 * mean)
    assert create(f"{path}:Fixed", value=7)(IMAGES, PROMPTS, []) == [7, 7, 7]
    assert create("densegrpo_fast.rewards.jpeg:JpegCompressibility")(IMAGES[:1], PROMPTS[:1], [])[0] < 0
    for name in (str(path), "my_rewards.brightness"):
        with pytest.raises(ValueError, match="unknown reward"):
            create(name)
    with pytest.raises(ValueError, match="holds no 'darkness'"):
        create(f"{path}:darkness")
    with pytest.raises(ValueError, match=r"cannot load .*absent\.py: FileNotFoundError"):
        create(f"{tmp_path / 'absent.py'}:f")
    with pytest.raises(ValueError, match="cannot load no_such_module: ModuleNotFoundError"):
        create("no_such_module:f")


def test_a_missing_import_inside_ones_own_module_is_told(tmp_path, monkeypatch):
    (tmp_path / "needs_more.py").write_text("import package_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ValueError, match="ModuleNotFoundError: .*package_that_is_not_installed"):
        create("needs_more:f")
