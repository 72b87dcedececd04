"""Strips show the pictures and rewards that an iteration has anyway, at the price of nothing."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import Tensor

from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.run_files.strip import Strip, StripRow, read_strip, save_strip
from densegrpo_fast.training.trainer import Trainer

pytestmark = pytest.mark.ci

COMMON = {
    "data.num_prompts": 2,
    "sampler.group_size": 4,
    "sampler.num_steps": 4,
    "sampler.micro_batch": 2,
    "window.schedule": "none",
    "window.size": "null",
    "evaluation.num_prompts": 2,
}
BRANCHES = {
    "sampler.dynamics": "flow_sde",
    "sampler.branches": 2,
    "credit.method": "branch",
    "window.schedule": "fixed",
}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "streamed": {"optimizer.update": "streamed"},
    "drawn": {"objective.trained_steps": 1},
    "sparse": {"credit.method": "sparse"},
    "branches": {
        "sampler.dynamics": "flow_sde",
        "sampler.branches": 2,
        "credit.method": "branch",
        "window.schedule": "fixed",
        "window.size": 2,
        "window.first": 1,
    },
    "shared noise": {"sampler.shared_noise": True},
}


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.flatten(1).mean(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_strip_shows_what_was_scored_and_costs_nothing(kind: str, tiny_policy: Callable[..., FlowModel]) -> None:
    settings = COMMON | KINDS[kind]
    config, _ = parse_arguments(["--config=embedded_dense", *(f"{key}={value}" for key, value in settings.items())])
    make = lambda: Trainer(config, model=tiny_policy(0.1), reward=brightness)  # noqa: E731
    plain, (record, strip) = make().step(0), make().step_with_strip(0)
    assert {name for name in plain if plain[name] != record[name]} <= {
        name for name in record if name.startswith(("time/", "cpu_", "memory/"))
    }
    assert strip is not None and len(strip.rows) in (1, 2)
    shown = 0
    for row in strip.rows:
        for picture, reward in zip(row.pictures, row.rewards, strict=True):
            assert (picture is None) == math.isnan(reward)
            if picture is not None:
                assert np.asarray(picture).mean() / 255 == pytest.approx(reward, abs=2e-3)
                shown += 1
        assert all(latent is not None for latent in row.latents)
    if kind == "branches":
        assert strip.gain == "above mean" and "leave one noise-free trajectory in steps 1, 2" in strip.note
        assert all(best >= 0 >= worst for best, worst in zip(*(row.gains for row in strip.rows), strict=True))
    elif kind in ("dense", "streamed", "shared noise"):
        for row in strip.rows:
            assert sum(row.gains[1:]) == pytest.approx(row.rewards[-1] - row.rewards[0], abs=1e-5)
        assert strip.rows[0].rewards[-1] >= strip.rows[-1].rewards[-1]
    elif kind == "drawn":
        assert 0 < shown < len(strip.rows) * len(strip.columns) and "did not complete" in strip.note
    else:
        assert shown == len(strip.rows) and "only the image at the end" in strip.note


def test_a_strip_reads_back_from_its_picture(tmp_path: Path) -> None:
    small, large = (
        Image.fromarray(np.random.default_rng(side).integers(0, 256, (side, side, 3), np.uint8)) for side in (32, 150)
    )
    row = StripRow(
        "ein Würfel", [small, None, small], [small, None, large], [0.25, math.nan, 1.5], [math.nan, math.nan, -1e-5]
    )
    strip = Strip("a <b>cat</b> 日本", "words " * 40, ["noise", "1", "image"], [row, row], gain="above mean")
    path = tmp_path / "new" / "strip.png"
    save_strip(strip, path)
    again = read_strip(path)
    assert (again.prompt, again.note, again.columns, again.gain) == (
        strip.prompt,
        strip.note,
        strip.columns,
        strip.gain,
    )
    assert [row.label for row in again.rows] == ["ein Würfel"] * 2
    np.testing.assert_equal([again.rows[1].rewards, again.rows[1].gains], [row.rewards, row.gains])
    assert np.array_equal(again.rows[0].pictures[0], small), "a small picture keeps its pixels"
    assert again.rows[0].pictures[1] is None and again.rows[0].pictures[2].size == (96, 96)
    with Image.open(path.with_suffix(".webp")) as animation:
        assert animation.n_frames == 3
    small.save(tmp_path / "other.png")
    with pytest.raises(ValueError, match="no strip"):
        read_strip(tmp_path / "other.png")
