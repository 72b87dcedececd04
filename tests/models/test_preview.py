"""The command that fits a preview decoder to the full one on the policy's own pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from densegrpo_fast.models.tiny import tiny_sd3
from densegrpo_fast.preview import collect, main
from densegrpo_fast.training.preview_training import Pictures, agreement, decoded, train_preview

SMALL = {"sampler.num_steps": 2, "objective.trained_steps": 1}


def mean_color(images: torch.Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> torch.Tensor:
    return images.flatten(1).mean(1)


def pictures(model: Any, count: int) -> Pictures:
    latents = torch.randn(count, *model.latent_shape)
    return Pictures(latents, decoded(model, latents, "full", 3), ["a cat"] * count, [{}] * count)


@pytest.mark.ci
def test_the_decoder_learns_what_the_full_one_does() -> None:
    from densegrpo_fast.rewards.base import RewardMixture

    model, reward = tiny_sd3(), RewardMixture({"test": (mean_color, 1.0)})
    learned = pictures(model, 8)
    before = agreement(model, learned, reward, 4, 3)
    train_preview(model, learned, steps=60, batch=8, seed=0)
    after = agreement(model, learned, reward, 4, 3)
    assert after.pixel_error < 0.7 * before.pixel_error
    assert not any(p.requires_grad for p in model.preview_decoder.parameters())
    # against itself nothing is left to learn
    own = replace(learned, images=decoded(model, learned.latents, "preview", 8))
    itself = agreement(model, own, reward, 4, 8)
    assert itself.pixel_error <= 1e-3 and itself.spearman_rewards == pytest.approx(1.0)


@pytest.mark.ci
def test_training_and_held_out_pictures_differ(train: Any, tmp_path: Path) -> None:
    from densegrpo_fast.config.cli import parse_arguments
    from densegrpo_fast.training.trainer import Trainer

    config, _ = parse_arguments(train.arguments(tmp_path / "unused", **SMALL))
    trainer = Trainer(config)
    model = trainer.model
    training, held_out = collect(trainer, 9, trainer.schedule.turns(), 4)
    # batches of 2 prompts with 2 samples each
    assert (len(training), len(held_out)) == (12, 4)
    assert len(torch.cat([training.latents, held_out.latents]).unique(dim=0)) == 16
    assert torch.equal(held_out.images, model.decode(held_out.latents).half())
    # groups are whole
    assert all(len(set(training.prompts[k : k + 2])) == 1 for k in range(0, 12, 2))


def test_a_policy_alone_needs_nothing_that_completions_do(train: Any, tmp_path: Path) -> None:
    from densegrpo_fast.config.cli import parse_arguments
    from densegrpo_fast.training.meter import underlying
    from densegrpo_fast.training.policy_samples import policy_alone

    own = {"lookahead.copy_dtype": "float32", "lookahead.cache": "text:own"}
    trainer = policy_alone(parse_arguments(train.arguments(tmp_path / "unused", **SMALL, **own))[0])
    assert trainer.lookahead is not None and trainer.lookahead.cache is None
    assert underlying(trainer.lookahead.model) is trainer.model


@pytest.mark.ci
def test_the_command_writes_a_decoder_that_a_model_takes(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from densegrpo_fast.config.cli import parse_arguments
    from densegrpo_fast.training.models import build_model

    output, own = tmp_path / "preview", ["--pictures", "4", "--steps", "30", "--batch", "4"]
    # fitted in float32 all the same
    arguments = train.arguments(tmp_path / "unused", **SMALL, **{"model.preview_dtype": "bfloat16"})
    assert main(["--output", str(output), *own, *arguments]) == 0
    (weights,) = output.glob("*.safetensors")
    assert {tensor.dtype for tensor in load_file(weights).values()} == {torch.float32}
    shown = capsys.readouterr().out
    numbers = next(line for line in shown.splitlines() if "pixel error" in line).split()
    assert float(numbers[-1]) < float(numbers[-3])
    found = []
    for options in ({}, {"model.preview_decoder": output}):
        config, _ = parse_arguments(train.arguments(tmp_path / "unused", **SMALL, **options))
        found.append(build_model(config, torch.device("cpu")))
    latents = torch.randn(2, *found[0].latent_shape)
    assert not torch.allclose(*(model.decode(latents, "preview") for model in found))
    assert [path.name for path in tmp_path.iterdir()] == ["preview"]
    # what is there is never overwritten
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(output), *own, *arguments])
    assert stopped.value.code == 7 and "--output" in capsys.readouterr().err


def test_a_model_without_a_preview_decoder_is_refused(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = tmp_path / "model"
    tiny_sd3().pipeline.save_pretrained(directory)
    options = {"model.path": directory, "model.max_sequence_length": 8, "lookahead.decoder": "full"}
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path / "preview"), *train.arguments(tmp_path / "unused", **SMALL | options)])
    assert stopped.value.code == 2 and "model.preview_decoder" in capsys.readouterr().err
    assert not (tmp_path / "preview").exists()
