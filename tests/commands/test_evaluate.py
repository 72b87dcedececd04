"""The evaluation command: subjects, pairing with a run's own evaluation, picture files, bad input."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from densegrpo_fast.common.fingerprint import canonical_json
from densegrpo_fast.evaluate import main
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.lora import save_lora
from densegrpo_fast.models.tiny import tiny_sd3
from densegrpo_fast.run_files.images import save_picture

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "--reward.terms={jpeg_incompressibility: 1.0}",
    "--reward.observed=[scenes]",
    "--evaluation.num_prompts=3",
    "--evaluation.num_steps=2",
]


@pytest.fixture(scope="module")
def run(train: Callable[..., int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two iterations, whose adapter differs from its running average."""
    output = tmp_path_factory.mktemp("evaluated") / "run"
    assert train(output, **{"run.iterations": 2, "optimizer.lr": 0.02, "evaluation.every": 0}) == 0
    return output


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline of SD3.5's classes with random weights, as diffusers saves it."""
    directory = tmp_path_factory.mktemp("tiny") / "sd35"
    tiny_sd3().pipeline.save_pretrained(directory)
    return directory


def command(*arguments: object) -> int:
    try:
        return main([str(argument) for argument in arguments])
    except SystemExit as stop:
        return int(stop.code or 0)


def refused(code: int, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert command(*arguments) == code
    return capsys.readouterr().err


def document(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


@pytest.mark.ci
def test_a_run_is_scored_as_it_scored_itself(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("base", run, "--json", tmp_path / "out.json") == 0
    found = document(tmp_path / "out.json")
    for name, when in (("base", "before"), (str(run), "after")):
        own = json.loads((run / f"evaluation-{when}.json").read_text())
        assert found["prompts"] == own["prompts"]
        for reward in ("reward", "jpeg_incompressibility"):
            np.testing.assert_allclose(found["scores"][name][reward], own["scores"][reward], rtol=1e-4)
    assert found["adapters"]["base"]["sha256"] is None
    assert found["adapters"][str(run)]["origin"] == "exported adapter"
    difference = next(item for item in found["differences"] if item["reward"] == "reward")
    own = [
        np.mean(json.loads((run / f"evaluation-{when}.json").read_text())["scores"]["reward"])
        for when in ("before", "after")
    ]
    assert difference["mean"] == pytest.approx(own[1] - own[0], rel=1e-3)
    assert {"command", "commit", "hardware", "versions"} <= found.keys()
    assert f"{run} - base" in capsys.readouterr().out


@pytest.mark.ci
def test_an_unfinished_run_is_its_newest_average(run: Path, tmp_path: Path) -> None:
    unfinished = tmp_path / "run"
    shutil.copytree(run, unfinished)
    shutil.rmtree(unfinished / "adapter")
    assert command(run, unfinished, unfinished / "checkpoints", "--json", tmp_path / "out.json") == 3
    assert command(run, unfinished, run / "adapter", "--json", tmp_path / "out.json") == 0
    found = document(tmp_path / "out.json")
    assert found["adapters"][str(unfinished)]["origin"] == "running average at iteration 2"
    # the same adapter three times: nothing differs
    assert {about["sha256"] for about in found["adapters"].values()} == {found["adapters"][str(run)]["sha256"]}
    assert {item["mean"] for item in found["differences"] if item["reward"] == "reward"} == {0.0}
    for name in ("ema.safetensors", "manifest.json"):
        newest = shutil.copytree(unfinished, tmp_path / name)
        (newest / "checkpoints" / "step-00000002" / name).write_bytes(b"")
        assert command(newest, "--json", tmp_path / "out.json") == 0
        assert document(tmp_path / "out.json")["adapters"][str(newest)]["origin"] == "running average at iteration 1"


def test_subjects_on_a_saved_pipeline(
    tiny_directory: Path, tiny_policy: Callable[..., FlowModel], tmp_path: Path
) -> None:
    for name, spread in (("one", 0.0), ("two", 0.3)):
        save_lora(tiny_policy(spread=spread).network, tmp_path / name, rank=2, alpha=4)
    subjects = ("base", tmp_path / "one", tmp_path / "two" / "pytorch_lora_weights.safetensors")
    model = f"--model.path={tiny_directory}"
    assert command(*subjects, model, *SMALL, "--json", tmp_path / "out.json") == 0
    base, one, two = document(tmp_path / "out.json")["scores"].values()
    assert base["reward"] == one["reward"], "an adapter that changes nothing"
    assert base["reward"] != two["reward"]
    # order and company change nothing: an adapter leaves no trace in the model
    assert command(subjects[2], "base", model, *SMALL, "--json", tmp_path / "again.json") == 0
    again = document(tmp_path / "again.json")["scores"]
    assert list(again.values()) == [two, base]


def test_an_adapter_of_another_model_is_refused(
    tiny_policy: Callable[..., FlowModel], pipeline_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_lora(tiny_policy().network, tmp_path / "tiny", rank=2, alpha=4)
    message = refused(3, capsys, tmp_path / "tiny", f"--model.path={pipeline_directory}", *SMALL)
    assert f"{tmp_path / 'tiny'}: the adapter's layer 'transformer_blocks.0.attn" in message


@pytest.mark.ci
def test_another_base_than_the_runs_is_noticed(
    run: Path,
    pipeline_directory: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert "this run trained the model" in refused(2, capsys, run, "--model.path=embedded")
    moved = shutil.copytree(run, tmp_path / "run")
    manifest = moved / "checkpoints" / "step-00000002" / "manifest.json"
    content = json.loads(manifest.read_text())
    del content["sha256"]
    content["settings"]["base_weights"] = "0"
    manifest.write_text(json.dumps(content | {"sha256": hashlib.sha256(canonical_json(content)).hexdigest()}))
    with caplog.at_level(logging.WARNING):
        assert command(run) == 0
        assert "not the one that this run trained" not in caplog.text
        assert command(moved) == 0
    assert "not the one that this run trained" in caplog.text


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["nowhere"], 3, "nowhere: there is no such file or directory; expected base"),
        (["tests"], 3, "tests: it holds no pytorch_lora_weights.safetensors"),
        (["base", "base"], 2, "every subject once"),
        (["base", "--json", "absent/out.json"], 7, "--json: there is no directory absent"),
        (["--prompt", "a cat"], 2, "--data.eval_prompts"),
        (["base", "--evaluation.num_promts=3"], 2, 'did you mean "evaluation.num_prompts"'),
        (["base", "--evaluation.num_prompts=0"], 2, "evaluation.num_prompts: expected a number >= 1"),
        (["--reward", "scenes"], 2, "expected picture files"),
        (["--reward", "scenes", "README.md"], 2, "README.md cannot be read: it is no picture"),
        (["--reward", "scenes", "absent.png"], 2, "absent.png cannot be read: No such file"),
        (
            ["--reward", "scenes", "a.png", "--reward.observed=[]"],
            2,
            "but reward.options, got reward.observed",
        ),
    ],
)
def test_bad_input(
    arguments: list[str], code: int, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    assert words in refused(code, capsys, *arguments)


def test_an_unknown_reward_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_picture(torch.rand(3, 8, 8), tmp_path / "a.png", {})
    message = refused(2, capsys, "--reward", "scene", tmp_path / "a.png")
    assert 'unknown reward "scene"; did you mean "scenes"?' in message


def test_files_are_scored_in_order_whatever_their_sizes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    reward = tmp_path / "own.py"
    reward.write_text(
        "def score(images, prompts, metadata):\n"
        "    return [image.mean().item() + len(prompt) + record.get('more', 0)\n"
        "            for image, prompt, record in zip(images, prompts, metadata, strict=True)]\n"
    )
    sizes, greys = ((8, 8), (4, 6), (8, 8)), (0, 51, 255)
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file, size, grey in zip(files, sizes, greys, strict=True):
        save_picture(torch.full((3, *size), grey / 255), file, {"prompt": "own"})
    score = ["--reward", f"{reward}:score", *files, "--json", tmp_path / "out.json"]

    def scores(*more: object) -> list[float]:
        assert command(*score, *more) == 0
        return next(iter(document(tmp_path / "out.json")["scores"].values()))

    # brightness 0, .2, 1 and the length of the prompt: "own" in the files, "four", then one each with its record
    assert scores() == pytest.approx([3.0, 3.2, 4.0])
    assert scores("--prompt", "four") == pytest.approx([4.0, 4.2, 5.0])
    lines = [{"prompt": "a" * n, "more": 10 * n} for n in (1, 2, 3)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert scores("--prompts", tmp_path / "prompts.jsonl") == pytest.approx([11.0, 22.2, 34.0])
    capsys.readouterr()
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    assert "one prompt for each of the 3 pictures" in refused(
        2, capsys, *score, "--prompts", tmp_path / "prompts.jsonl"
    )
    save_picture(torch.rand(3, 8, 8), files[0], {})
    assert command(*score) == 0
    assert "1 of 3 pictures have no prompt" in caplog.text


def test_several_rewards_are_scored_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flat, noise = tmp_path / "flat.png", tmp_path / "noise.png"
    save_picture(torch.zeros(3, 32, 32), flat, {"prompt": "black"})
    save_picture(torch.rand(3, 32, 32), noise, {"prompt": "noise"})
    assert command("--reward", "jpeg_compressibility", flat, noise, "--reward=jpeg_incompressibility") == 0
    header, first, second, *_ = capsys.readouterr().out.splitlines()
    assert header.split() == ["jpeg_compressibility", "jpeg_incompressibility"]
    assert float(first.split()[1]) > float(second.split()[1]) and float(first.split()[2]) < float(second.split()[2])


@pytest.mark.parametrize("command", ["evaluate", "sample"])
def test_help_and_errors_never_import_torch(command: str) -> None:
    code = (
        "import sys, importlib\n"
        f"module = importlib.import_module('densegrpo_fast.{command}')\n"
        "for arguments in (['--help'], ['x', '--adapter.x=1'], ['x', '--output=y', '--sampler.num_steps=0']):\n"
        "    try:\n"
        "        module.main(arguments)\n"
        "    except SystemExit as stop:\n"
        "        print(stop.code)\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-3:][0].strip() == "0" and result.stdout.splitlines()[-1] == "2"
