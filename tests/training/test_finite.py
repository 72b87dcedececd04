"""A number that is not finite never becomes a picture, a score or an average; what made it is named."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from densegrpo_fast.common.errors import NonFiniteError, RewardError, SetupError
from densegrpo_fast.common.pictures import to_bytes, to_unit
from densegrpo_fast.models.adapter_formats import read_lora
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.loading import load_pipeline
from densegrpo_fast.rewards.base import RewardMixture, Scores
from densegrpo_fast.run_files.images import save_grid
from densegrpo_fast.training.pictures import draw, picture_sampler
from densegrpo_fast.training.rewarding import check_missing

BROKEN = [math.nan, math.inf, -math.inf]


@pytest.mark.parametrize("number", BROKEN)
def test_a_broken_picture_is_no_picture_and_has_no_score(number: float, tmp_path: Path) -> None:
    images = torch.rand(3, 3, 8, 8)
    images[1, 2, 3, 4] = number
    unit = to_unit(images)
    assert unit[1, 2, 3, 4].isnan() and torch.equal(unit[::2], images[::2])
    with pytest.raises(ValueError, match="finite pictures"):
        to_bytes(unit)
    seen = []

    def reward(images: torch.Tensor, prompts: list[str], metadata: list[dict]) -> torch.Tensor:
        seen.append(images)
        return images.mean((1, 2, 3))

    scores = RewardMixture({"mean": (reward, 1.0), "other": (reward, 0.0)})(unit, ["a"] * 3)
    assert seen[0].isfinite().all() and torch.equal(seen[0][::2], images[::2])
    assert [scores.values.isnan().tolist(), scores.per_reward["other"].isnan().tolist()] == [[False, True, False]] * 2
    assert (scores.not_finite, scores.select(torch.tensor([1, 1, 0])).not_finite) == (1, 2)
    joined = Scores.joined([scores, Scores(torch.zeros(2), {"mean": torch.zeros(2), "other": torch.zeros(2)})])
    assert joined.not_finite == 1
    with pytest.raises(NonFiniteError, match="20% .* 1 of 5 pictures hold numbers that are not finite"):
        check_missing(joined, 0.0)
    with pytest.raises(RewardError, match="100% of the scores are missing"):
        check_missing(Scores(torch.tensor([math.nan]), {}), 0.5)
    # where it is shown, it is neither black nor white
    save_grid(unit, tmp_path / "grid.png", columns=3)


@pytest.mark.parametrize("number", BROKEN)
@pytest.mark.parametrize("part", ["transformer", "vae", "preview_decoder", "text_encoder"])
def test_broken_weights_are_named(pipeline_directory: Path, tmp_path: Path, part: str, number: float) -> None:
    directory = tmp_path / "pipeline"
    shutil.copytree(pipeline_directory, directory)
    (file,) = (directory / part).glob("*.safetensors")
    weights = safetensors.torch.load_file(file)
    name = sorted(weights)[-1]
    weights[name].flatten()[-1] = number
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    with pytest.raises(NonFiniteError, match=f"{part}: .*{name} holds numbers that are not finite"):
        load_pipeline(str(directory), device=torch.device("cpu"), dtype=torch.float32, max_sequence_length=0)


def test_a_broken_adapter_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pytorch_lora_weights.safetensors"
    name = "transformer.transformer_blocks.0.attn.to_q.lora_B.weight"
    safetensors.torch.save_file({name: torch.tensor([[1.0], [math.nan]])}, path)
    with pytest.raises(NonFiniteError, match=f"{path}: {name} holds"):
        read_lora(path)


def test_broken_pictures_are_not_drawn(tiny_policy: Callable[..., FlowModel]) -> None:
    """A model may be broken without a single broken weight: by overflow."""
    from densegrpo_fast.config.cli import load_config

    model = tiny_policy()
    with torch.no_grad():
        model.pipeline.vae.decoder.conv_out.weight.fill_(3e38)
    sampler = picture_sampler(load_config("embedded_dense"), "ode", num_steps=1)
    with pytest.raises(NonFiniteError, match="2 of 2 pictures hold numbers that are not finite"):
        draw(model, [("a", 0), ("b", 0)], sampler, 2)


def test_a_run_on_a_broken_model_ends_and_says_so(
    train: Callable[..., int], pipeline_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "pipeline"
    shutil.copytree(pipeline_directory, directory)
    file = directory / "vae" / "diffusion_pytorch_model.safetensors"
    weights = safetensors.torch.load_file(file)
    weights["decoder.conv_out.weight"] = torch.full(weights["decoder.conv_out.weight"].shape, 3e38)
    safetensors.torch.save_file(weights, file, {"format": "pt"})
    assert train(tmp_path / "run", **{"model.path": directory, "reward.observed": "[]"}) == 6
    assert "pictures of the model hold numbers that are not finite" in capsys.readouterr().err


@pytest.mark.parametrize("part", ["text_encoder_3", "tokenizer_3"])
def test_a_listed_t5_that_is_gone_is_missed(pipeline_directory: Path, tmp_path: Path, part: str) -> None:
    directory = tmp_path / "pipeline"
    shutil.copytree(pipeline_directory, directory)
    index = directory / "model_index.json"
    parts = json.loads(index.read_text())
    parts[part] = ["transformers", "T5EncoderModel" if part == "text_encoder_3" else "T5TokenizerFast"]
    index.write_text(json.dumps(parts))
    with pytest.raises(SetupError, match=f"lacks {part}; to use it without T5, set these to"):
        load_pipeline(str(directory), device=torch.device("cpu"), dtype=torch.float32, max_sequence_length=0)
    # one half of the two, though the index lists neither
    del parts[part]
    index.write_text(json.dumps(parts))
    shutil.copytree(directory / part[:-2], directory / part)
    other = {"text_encoder_3": "tokenizer_3", "tokenizer_3": "text_encoder_3"}[part]
    with pytest.raises(SetupError, match=f"lacks {other}, though it has {part}"):
        load_pipeline(str(directory), device=torch.device("cpu"), dtype=torch.float32, max_sequence_length=0)
