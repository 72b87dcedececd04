"""The sampling command: what it writes, that a picture is its prompt and seed, both samplers, bad input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from densegrpo_fast.flow.noise import Stream
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.lora import save_lora
from densegrpo_fast.models.tiny import tiny_sd3
from densegrpo_fast.run_files.grids import read_captions
from densegrpo_fast.run_files.images import read_picture
from densegrpo_fast.run_files.strip import read_strip
from densegrpo_fast.sample import main
from densegrpo_fast.sampling.rollout import initial_noise, sample_ode
from densegrpo_fast.training.pictures import PictureSampler, draw

FAST = ["--steps", "2", "--seeds", "0,7"]
PROMPTS = ("a red circle", "two blue squares")
ROUNDING = 1.01 / 255
"""Two forwards of other batch sizes may fall on either side of an 8-bit step."""


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of SD3.5's classes with random weights, as diffusers saves it."""
    directory = tmp_path_factory.mktemp("tiny") / "sd35"
    tiny_sd3().pipeline.save_pretrained(directory)
    return directory


@pytest.fixture
def command(tiny_directory: Path) -> Callable[..., int]:
    """The command on the saved pipeline; returns its exit code."""

    def call(*arguments: object) -> int:
        try:
            return main([f"--model.path={tiny_directory}", *(str(argument) for argument in arguments)])
        except SystemExit as stop:
            return int(stop.code or 0)

    return call


def pictures(output: Path) -> dict[tuple[str, int], Tensor]:
    settings = json.loads((output / "settings.json").read_text())
    return {(item["prompt"], item["seed"]): read_picture(output / item["file"])[0] for item in settings["images"]}


def settings_of(output: Path) -> dict[str, Any]:
    return json.loads((output / "settings.json").read_text())


def test_what_is_written(command: Callable[..., int], tiny_directory: Path, tmp_path: Path) -> None:
    output = tmp_path / "new" / "out"
    assert command(*PROMPTS, *FAST, "--guidance", 3, "--output", output) == 0
    names = ["0000-seed0.png", "0000-seed7.png", "0001-seed0.png", "0001-seed7.png"]
    assert sorted(str(path.relative_to(output)) for path in output.rglob("*.png")) == [
        "grid.png",
        *(f"images/{name}" for name in names),
    ]
    assert read_captions(output / "grid.png") == [prompt for prompt in PROMPTS for _ in range(2)]
    image, texts = read_picture(output / "images" / names[3])
    assert image.shape == (3, 64, 64) and texts == {"prompt": PROMPTS[1], "seed": "7"}
    settings = settings_of(output)
    assert settings["model"]["path"] == str(tiny_directory) and settings["seeds"] == [0, 7]
    assert settings["sampler"] == {"kind": "ode", "num_steps": 2, "guidance_scale": 3.0}
    assert settings["adapter"] == {"name": "base", "origin": "the model as it comes", "sha256": None}
    assert [item["file"] for item in settings["images"]] == [f"images/{name}" for name in names]
    assert {"command", "commit", "versions", "noise_layout"} <= settings.keys()


def test_the_picture_is_eulers_from_the_seeds_noise(command: Callable[..., int], tmp_path: Path) -> None:
    assert command(PROMPTS[0], *FAST, "--guidance=2", "--output", tmp_path / "out") == 0
    model = tiny_sd3()
    model.family.max_sequence_length = 0
    noise = initial_noise(model, torch.tensor([7]), seed=0, iteration=0, stream=Stream.EVALUATION)
    latents = sample_ode(model, noise, model.encode([PROMPTS[0]]), model.sigmas(2), guidance_scale=2.0)
    expected = model.decode(latents)[0]
    assert (pictures(tmp_path / "out")[PROMPTS[0], 7] - expected).abs().max() <= ROUNDING


@pytest.mark.parametrize("sampler", ["ode", "sde"])
def test_a_picture_is_its_prompt_and_seed(command: Callable[..., int], tmp_path: Path, sampler: str) -> None:
    whole, again, alone = tmp_path / "whole", tmp_path / "again", tmp_path / "alone"
    for output in (whole, again):
        assert command(*PROMPTS, *FAST, f"--sampler={sampler}", "--output", output) == 0
    assert command(PROMPTS[1], "--steps=2", "--seeds=7", f"--sampler={sampler}", "--output", alone) == 0
    files = sorted(path.relative_to(whole) for path in whole.rglob("*.png"))
    assert all((whole / file).read_bytes() == (again / file).read_bytes() for file in files)
    one = pictures(whole)[PROMPTS[1], 7]
    assert (pictures(alone)[PROMPTS[1], 7] - one).abs().max() <= ROUNDING
    assert (pictures(whole)[PROMPTS[1], 0] - one).abs().max() > 0.05


def test_the_sde_sampler_is_that_of_training(command: Callable[..., int], tmp_path: Path) -> None:
    own = ("--sampler.noise_level=0.8", "--sampler.dynamics=dance", "--sampler.guidance_scale=2")
    assert command(PROMPTS[0], "--seeds=3", "--steps=2", "--sampler=sde", *own, "--output", tmp_path / "out") == 0
    expected = {"kind": "sde", "num_steps": 2, "guidance_scale": 2.0, "dynamics": "dance", "noise_level": 0.8}
    assert settings_of(tmp_path / "out")["sampler"] == expected


def test_without_noise_both_samplers_agree() -> None:
    model, rows = tiny_sd3(), [(PROMPTS[0], 1), (PROMPTS[1], 2)]
    still, noisy = (
        draw(model, rows, PictureSampler("sde", 3, 2.0, "flow_sde", level), chunk=2) for level in ([0.0] * 3, 0.7)
    )
    expected = draw(model, rows, PictureSampler("ode", 3, 2.0), chunk=2)
    torch.testing.assert_close(still, expected, atol=1e-5, rtol=1e-5)
    assert (noisy - expected).abs().max() > 0.01


def test_fewer_rows_are_drawn_together_when_the_memory_runs_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, rows = tiny_sd3(), [(prompt, seed) for prompt in PROMPTS for seed in (1, 2)]
    sampler = PictureSampler("ode", num_steps=2, guidance_scale=2.0)
    expected, decode = draw(model, rows, sampler, chunk=1), model.decode

    def small(latents: Tensor) -> Tensor:
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(latents)

    monkeypatch.setattr(model, "decode", small)
    torch.testing.assert_close(draw(model, rows, sampler, chunk=4), expected, atol=1e-5, rtol=1e-5)
    assert "sampler.micro_batch); going on with 2" in caplog.text


def test_an_adapter_is_worn(command: Callable[..., int], tiny_policy: Callable[..., FlowModel], tmp_path: Path) -> None:
    policy = tiny_policy(spread=0.3)
    save_lora(policy.network, tmp_path / "adapter", rank=2, alpha=4)
    for name, adapter in (("base", "base"), ("tuned", tmp_path / "adapter")):
        assert command(PROMPTS[0], *FAST, "--adapter", adapter, "--guidance=1", "--output", tmp_path / name) == 0
    base, tuned = (pictures(tmp_path / name)[PROMPTS[0], 7] for name in ("base", "tuned"))
    policy.family.max_sequence_length = 0
    sampler = PictureSampler("ode", num_steps=2, guidance_scale=1.0)
    expected = draw(policy, [(PROMPTS[0], 7)], sampler, chunk=1)[0]
    assert (tuned - expected).abs().max() <= ROUNDING
    assert (base - tuned).abs().max() > ROUNDING
    assert len(settings_of(tmp_path / "tuned")["adapter"]["sha256"]) == 64


def test_prompts_come_from_a_file(command: Callable[..., int], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    assert command("--prompts", tmp_path / "prompts.txt", "--steps=1", "--seeds=0", "--output", tmp_path / "out") == 0
    assert list(pictures(tmp_path / "out")) == [("a cat", 0), ("a dog", 0)]


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "expected prompts: either as arguments, or in a file"),
        (["a cat", "--prompts=x.txt"], 2, "either as arguments, or in a file"),
        (["  "], 2, "not empty"),
        (["--prompts=absent.txt"], 2, "absent.txt: cannot read this prompt file"),
        (["a cat", "--seeds=3-1"], 2, "expected seeds below 2^32 such as 0-3,7, got '3-1'"),
        (["a cat", "--seeds=4294967296"], 2, "expected seeds below 2^32"),
        (["a cat", "--steps=0"], 2, "expected a number in 1..1000, got '0'"),
        (["a cat", "--guidance=nan"], 2, "expected a number in 1..100, got 'nan'"),
        (["a cat", "--adapter=absent"], 3, "absent: there is no such file or directory"),
        (["a cat", "--sampler.dynamics=cp"], 2, "sampler.dynamics"),
        (
            ["a cat", "--sampler=sde", "--steps=3", "--sampler.noise_level=[.1,.2,.3,.4,.5,.6]"],
            2,
            "--steps: sampler.noise_level holds 6 levels",
        ),
    ],
)
def test_bad_input(
    command: Callable[..., int],
    arguments: list[str],
    code: int,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(*arguments, "--output", tmp_path / "out") == code
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(
    command: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("keep")
    arguments = ("a cat", "--steps=1", "--seeds=0", "--output", tmp_path / "out")
    assert command(*arguments) == 7
    assert "is not empty" in capsys.readouterr().err
    assert command(*arguments, "--overwrite") == 0
    assert (tmp_path / "out" / "mine.txt").read_text() == "keep"
    assert command("a cat", "--output", tmp_path / "out" / "mine.txt") == 7


def test_strips_instead_of_pictures(command: Callable[..., int], tmp_path: Path) -> None:
    rewarded = ["--reward.terms", "{jpeg_compressibility: 1.0}", "--reward.observed", "[]"]
    assert command(*PROMPTS, *FAST, *rewarded, "--strip", "--output", tmp_path / "out") == 0
    assert [item["file"] for item in settings_of(tmp_path / "out")["strips"]] == ["strips/0000.png", "strips/0001.png"]
    strip = read_strip(tmp_path / "out" / "strips" / "0001.png")
    assert strip.prompt == PROMPTS[1] and [row.label for row in strip.rows] == ["seed 0", "seed 7"]
    assert strip.columns[0] == "noise" and strip.columns[-1] == "image"
    # the seed's picture, whatever else is drawn
    assert command(PROMPTS[1], "--steps", 2, "--seeds", 7, "--sampler", "sde", "--output", tmp_path / "one") == 0
    image, _ = read_picture(tmp_path / "one" / "images" / "0000-seed7.png")
    last = strip.rows[1].pictures[-1]
    assert last is not None and last.size == (64, 64)
    shown = torch.from_numpy(np.array(last)).permute(2, 0, 1) / 255
    # the strip is drawn at one and a half times the size
    assert (shown - image).abs().mean() < 0.05
    assert command(PROMPTS[0], *FAST, "--strip", "--sampler", "ode", "--output", tmp_path / "not") == 2
