"""The bench of what text features depend on: its arithmetic, a tiny run, and what was recorded."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benches"))

import bench_text_features as bench  # noqa: E402

from densegrpo_fast.flow.dynamics import coefficients  # noqa: E402
from densegrpo_fast.models.base import FlowModel  # noqa: E402
from densegrpo_fast.models.cache_spec import CacheSpec  # noqa: E402
from densegrpo_fast.models.feature_cache import FeatureCache  # noqa: E402
from densegrpo_fast.sampling.rollout import initial_noise, rollout  # noqa: E402

T, G, PROMPTS = 5, 2, ["a cat"] * 2 + ["the moon"] * 2


def test_a_relative_difference_by_hand() -> None:
    """Features 3 and 4 against 3 and 1: differences 0 and 3, so sqrt(9 / 25) = .6."""
    found, other = (torch.tensor(values).expand(1, 2, 1, 1, 3, 2) for values in ([3.0, 4.0], [3.0, 1.0]))
    sums = bench.squares(found, other)
    assert sums.shape == (1, 2, 2) and bench.relative(sums) == [0.6, 0.6]
    # over two steps the squares are added, 9 + 0 of 25 + 25: .42426
    steps = torch.stack([sums, bench.squares(found, found)])
    summary = bench.summary({"same_prompt": list(steps)})
    assert summary["keys"] == {"by_block": {"same_prompt": [0.4243]}, "by_step": {"same_prompt": [0.6, 0.0]}}
    assert summary["values"] == summary["keys"]


@torch.no_grad()
def test_who_is_compared_with_whom(tiny_policy: Callable[..., FlowModel]) -> None:
    model, index = tiny_policy(spread=0.3), torch.arange(len(PROMPTS))
    cache = FeatureCache(
        model.network, CacheSpec(text=True, own_text=True), nodes=range(T), rows=len(PROMPTS), group=G, halves=2
    )
    trajectory = rollout(
        model,
        initial_noise(model, index, seed=0, iteration=0),
        model.encode(PROMPTS),
        coefficients(model.sigmas(T), 0.7, "flow_sde"),
        sample_index=index,
        seed=0,
        iteration=0,
        guidance_scale=2.0,
        cache=cache,
    )
    found = bench.compare(model, trajectory, G)
    assert {name: len(steps) for name, steps in found.items()} == {
        "same_prompt": T,
        "completion": T - 3,
        "next_sigma": T - 1,
        "other_prompt": T,
    }
    # what the rollout's own forwards recorded, of the conditional half
    kept = [cache._kept[node, 0].text for node in range(T)]
    for name, others in (("same_prompt", [1, 0, 3, 2]), ("other_prompt", [2, 3, 0, 1])):
        for step, text in enumerate(kept):
            assert text is not None
            torch.testing.assert_close(found[name][step], bench.squares(text, text[:, :, others]), rtol=1e-4, atol=1e-9)
    for step, (text, after) in enumerate(zip(kept, kept[1:], strict=False)):
        assert text is not None and after is not None
        torch.testing.assert_close(found["next_sigma"][step], bench.squares(text, after), rtol=1e-4, atol=1e-9)
    # the first block has only seen prompt and sigma
    assert max(float(step[0, :, 0].max()) for name in ("same_prompt", "completion") for step in found[name]) < 1e-10
    assert min(float(step[1, :, 0].min()) for name in bench.COMPARED for step in found[name]) > 1e-6


def test_the_command(pipeline_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "found.json"
    arguments = ["--model", str(pipeline_directory), "--prompts", "2", "--group-size", "2", "--output", str(out)]
    assert bench.main(arguments) == 0
    document = json.loads(out.read_text())
    assert {"command", "commit", "hardware", "versions", "settings", "keys", "values"} == set(document)
    assert document["settings"]["model"] == pipeline_directory.name
    assert len(capsys.readouterr().out.splitlines()) == 1 + 6
    with pytest.raises(SystemExit):
        bench.main(["--prompts", "1"])


def test_what_was_recorded() -> None:
    """Text features differ less between a sample's rollout and its completion than between a prompt's samples."""
    document = json.loads((ROOT / "benches" / "results" / "text_features.json").read_text())
    assert not document["commit"].endswith("+changes") and document["settings"]["model"] == "embedded"
    for kind in bench.KINDS:
        found = document[kind]["by_block"]
        assert [found[name][0] for name in ("same_prompt", "completion")] == [0, 0]
        for block in range(1, 6):
            assert found["completion"][block] < found["same_prompt"][block] < found["other_prompt"][block] / 2
