"""Whole runs of the training command on a random pipeline: what it writes, how it stops, goes on and refuses."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors.torch import load_file

from densegrpo_fast.config.yaml_files import preset_names
from densegrpo_fast.embedded import EMBEDDED
from densegrpo_fast.train import main

ROOT = Path(__file__).resolve().parents[2]
Train = Callable[..., int]


@pytest.fixture(scope="module")
def whole_run(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an uninterrupted run of three iterations."""
    output = tmp_path_factory.mktemp("whole") / "run"
    assert train(output) == 0
    return output


def records(output: Path) -> list[dict[str, object]]:
    """Metrics without seconds and bytes."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    measured = ("time/", "memory/", "cpu_seconds")
    return [{key: value for key, value in line.items() if not key.startswith(measured)} for line in lines]


def checkpoint(output: Path, step: int) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    files = sorted((output / "checkpoints" / f"step-{step:08d}").glob("*.safetensors"))
    assert [file.stem for file in files] == ["adapter", "ema", "optimizer", "rng"]
    return {f"{file.stem}/{name}": tensor for file in files for name, tensor in load_file(file).items()}


def assert_same_run(one: Path, two: Path, step: int) -> None:
    """Equal to the bit after `step` iterations: weights, moments, averages, generator, metrics."""
    first, second = checkpoint(one, step), checkpoint(two, step)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []
    states = [
        json.loads((path / f"checkpoints/step-{step:08d}/state.json").read_text())["learner"] for path in (one, two)
    ]
    assert states[0] == states[1]
    assert records(one)[:step] == records(two)[:step]


@pytest.mark.ci
def test_a_run_writes_its_directory(whole_run: Path) -> None:
    files = {str(path.relative_to(whole_run)) for path in whole_run.rglob("*") if path.is_file()}
    expected = {
        "config.yaml",
        "metrics.jsonl",
        "report.html",
        "evaluation-before.json",
        "evaluation-after.json",
        "evaluation-iteration-00002.json",
        "adapter/pytorch_lora_weights.safetensors",
        "adapter/README.md",
        "samples/before.png",
        "samples/iteration-00002.png",
        "samples/after.png",
        *(f"strips/iteration-{done:05d}.{kind}" for done in (1, 2, 3) for kind in ("png", "webp")),
    }
    assert expected <= files
    rest = {name for name in files - expected if not name.startswith("checkpoints/")}
    assert rest <= {"run.lock", "SHA256SUMS", "adapter/SHA256SUMS"}
    assert [path.name for path in sorted((whole_run / "checkpoints").iterdir())] == [
        f"step-{step:08d}" for step in (1, 2, 3)
    ]
    report = (whole_run / "report.html").read_text()
    assert "jpeg_incompressibility" in report and "data:image/webp;base64," in report


def test_the_policy_moves(whole_run: Path) -> None:
    first, last = checkpoint(whole_run, 1), checkpoint(whole_run, 3)
    assert any("lora_B" in name and tensor.abs().max() > 0 for name, tensor in first.items())
    moved = [name for name in first if name.startswith("adapter/") and not torch.equal(first[name], last[name])]
    assert moved


def test_metrics(whole_run: Path) -> None:
    lines = records(whole_run)
    assert [line["iteration"] for line in lines] == [1, 2, 3]
    common = {
        *("iteration", "reward", "reward_std", "reward_missing", "frac_reward_zero_std"),
        *(f"rewards/jpeg_incompressibility/{name}" for name in ("mean", "std")),
        *(f"gain/step_{step}" for step in range(3)),
        *(f"gain_positive/step_{step}" for step in range(2)),
        "gain_correlation",
        *("loss", "policy_loss", "kl", "clip_fraction", "approx_kl", "ratio_deviation", "grad_norm"),
        *("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"),
        *("first_ratio_deviation", "learning_rate"),
        *("skipped_updates", "micro_batch", "decodes/full", "decodes/preview", "pictures_scored"),
        *(
            f"{nfe}/{phase}"
            for nfe in ("nfe", "nfe_guided", "nfe_unguided")
            for phase in ("rollout", "lookahead", "update")
        ),
        *("flops/iteration", "flops/over_sparse"),
    }
    evaluated = {f"eval/{name}" for name in ("reward", "jpeg_incompressibility", "scenes")}
    # of the noisy steps 0 and 1 one is drawn; step 1 needs no completion of state 0
    drawn = [0 if "gain/step_0" in line else 1 for line in lines]
    assert set(drawn) == {0, 1}
    keys = {0: common, 1: common - {"gain/step_0", "gain_positive/step_0", "gain_correlation"}}
    first, second, third = (keys[step] for step in drawn)
    assert [set(line) for line in lines] == [first, second | evaluated, third]
    timed = json.loads((whole_run / "metrics.jsonl").read_text().splitlines()[0])
    assert timed["cpu_seconds"] > 0
    assert {key for key in timed if key.startswith("time/")} == {
        "time/calibration",
        "time/rollout",
        "time/lookahead",
        "time/reward",
        "time/monitor",
        "time/update",
    }
    for line, step in zip(lines, drawn, strict=True):
        # 4 samples x 3 steps; completions from states 0 and 1 evaluate 2 and 1 times; 4 samples x 1 trained step
        assert (line["nfe/rollout"], line["nfe/lookahead"], line["nfe/update"]) == (12, 4 if step else 12, 4)
        # previews of 4 samples' states 0, 1 and 2, which the last step joins to the end without noise; ends in full
        assert (line["decodes/preview"], line["decodes/full"]) == (8 if step else 12, 4)
        assert line["pictures_scored"] == line["decodes/preview"] + 4
        assert line["reward_std"] > 0 and line["grad_norm"] > 0 and line["frac_reward_zero_std"] < 0.5
        assert line["first_ratio_deviation"] < 1e-5 <= line["ratio_deviation"]


@pytest.mark.ci
def test_forwards_are_counted_with_guidance_and_reference(train: Train, tmp_path: Path) -> None:
    options = {"run.iterations": 1, "sampler.guidance_scale": 2.0, "objective.kl_coef": 0.01}
    assert train(tmp_path / "run", **options) == 0
    (line,) = records(tmp_path / "run")
    # every evaluation is two forwards, and in training the reference takes as many again
    assert (line["nfe/rollout"], line["nfe/lookahead"], line["nfe/update"]) == (24, 24, 16)
    assert (line["nfe_guided/rollout"], line["nfe_guided/lookahead"], line["nfe_guided/update"]) == (12, 12, 8)
    assert line["ratio_deviation"] < 1e-3
    assert train(tmp_path / "plain", **options, **{"lookahead.guidance": "cond_only"}) == 0
    (plain,) = records(tmp_path / "plain")
    assert (plain["nfe/lookahead"], plain["nfe_guided/lookahead"], plain["nfe_unguided/lookahead"]) == (12, 0, 12)
    assert 1 < plain["flops/over_sparse"] < line["flops/over_sparse"]


@pytest.mark.ci
def test_a_sparse_run(train: Train, tmp_path: Path) -> None:
    assert train(tmp_path / "run", "--config=embedded_sparse", **{"run.iterations": 1}) == 0
    (line,) = records(tmp_path / "run")
    assert line["nfe/lookahead"] == 0 and line["flops/over_sparse"] == 1
    assert not any(key.startswith("gain/") for key in line)


def test_a_continued_run_is_the_uninterrupted_one(train: Train, whole_run: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert train(output, **{"run.iterations": 1}) == 0
    assert train(output, "--resume") == 0
    assert_same_run(output, whole_run, 3)
    assert len(records(output)) == 3
    adapters = [load_file(path / "adapter/pytorch_lora_weights.safetensors") for path in (output, whole_run)]
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[1])
    before = [(path / "evaluation-before.json").read_text() for path in (output, whole_run)]
    assert before[0] == before[1]


def test_a_finished_run_can_be_resumed_and_stays_as_it_is(train: Train, whole_run: Path, tmp_path: Path) -> None:
    output = shutil.copytree(whole_run, tmp_path / "run")
    assert train(output, "--resume") == 0
    assert_same_run(output, whole_run, 3)


def test_a_run_cannot_be_shortened(
    train: Train, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(whole_run, tmp_path / "run")
    assert train(output, "--resume", **{"run.iterations": 2}) == 2
    assert "run.iterations" in capsys.readouterr().err
    assert_same_run(output, whole_run, 3)


@pytest.mark.ci
def test_a_corrupt_newest_checkpoint_is_passed_over(
    train: Train, whole_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    output = tmp_path / "run"
    assert train(output, **{"run.iterations": 2}) == 0
    damaged = output / "checkpoints" / "step-00000002" / "adapter.safetensors"
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    with caplog.at_level(logging.WARNING):
        assert train(output, "--resume") == 0
    assert "step-00000002 is corrupt (adapter.safetensors" in caplog.text
    assert_same_run(output, whole_run, 3)
    assert len(records(output)) == 3


def test_other_settings_are_refused_by_name(
    train: Train, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = shutil.copytree(whole_run, tmp_path / "run")
    # nothing is loaded before
    monkeypatch.setattr("densegrpo_fast.training.trainer.build_model", None)
    assert train(output, "--resume", **{"optimizer.lr": 2e-3, "sampler.noise_level": 0.5}) == 4
    message = capsys.readouterr().err
    assert f"`--resume {output}` goes on with the run's own" in message
    assert "optimizer.lr: 0.001 in the checkpoint, 0.002 now" in message
    assert "sampler.noise_level: 0.7 in the checkpoint, 0.5 now" in message
    assert_same_run(output, whole_run, 3)


@pytest.mark.ci
def test_another_run_is_not_overwritten(
    train: Train, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = shutil.copytree(whole_run, tmp_path / "run")
    assert train(output) == 7
    assert "already holds a run; continue it with --resume" in capsys.readouterr().err
    assert_same_run(output, whole_run, 3)
    assert train(output, **{"run.overwrite": "true", "run.iterations": 1}) == 0
    assert_same_run(tmp_path / "run.old-1", whole_run, 3)
    assert len(records(output)) == 1


@pytest.mark.ci
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_run_goes_on(train: Any, tmp_path: Path, number: signal.Signals, code: int) -> None:
    output = tmp_path / "run"
    # no checkpoint is due before the end, so the one that is found was saved because of the signal
    forever = {"run.iterations": 100_000, "run.checkpoint_every": 0}
    process = subprocess.Popen(
        [sys.executable, "-m", "densegrpo_fast.train", *train.arguments(output, **forever)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        metrics, deadline = output / "metrics.jsonl", time.monotonic() + 240
        while not (metrics.is_file() and metrics.stat().st_size) and process.poll() is None:
            assert time.monotonic() < deadline, "the run did not finish an iteration"
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == code, errors
    done = len(records(output))
    assert f"stopped after iteration {done}; continue with --resume" in errors
    assert [path.name for path in (output / "checkpoints").iterdir()] == [f"step-{done:08d}"]
    assert train(output, "--resume", **{"run.iterations": done + 1}) == 0
    assert [line["iteration"] for line in records(output)] == list(range(1, done + 2))


@pytest.mark.ci
def test_own_prompts_reach_the_reward_with_their_metadata(train: Train, tmp_path: Path) -> None:
    lines = [{"prompt": "a red circle", "wanted": 1}, {"prompt": "two red circles", "wanted": 2}]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    reward = tmp_path / "own.py"
    reward.write_text(
        "def score(images, prompts, metadata):\n"
        "    for prompt, record in zip(prompts, metadata, strict=True):\n"
        "        assert record['wanted'] == (2 if prompt.startswith('two') else 1)\n"
        "    return images.std(dim=(1, 2, 3))\n"
    )
    options = {
        "data.prompts": prompts,
        "data.eval_prompts": prompts,
        "reward.terms": f"{{{reward}:score: 1.0}}",
        "run.iterations": 1,
    }
    assert train(tmp_path / "run", **options) == 0
    assert records(tmp_path / "run")[0]["reward_std"] > 0


@pytest.mark.ci
def test_a_reward_that_fails_later_leaves_the_checkpoints(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A run scores before its first iteration, twice in each (previews, and the ends in full), and in an evaluation
    # after the second, so the third iteration begins with the seventh time. The reward draws from torch's generator,
    # which a continued run must find as it was.
    reward, broken = tmp_path / "own.py", tmp_path / "broken"
    reward.write_text(
        "from pathlib import Path\n"
        "import torch\n"
        "calls = []\n"
        "def score(images, prompts, metadata):\n"
        "    calls.append(len(prompts))\n"
        f"    if len(calls) > 6 and Path({str(broken)!r}).exists():\n"
        "        raise OSError('out of order')\n"
        "    return images.std(dim=(1, 2, 3)) + torch.rand(len(images))\n"
    )
    options = {"reward.terms": f"{{{reward}:score: 1.0}}", "reward.observed": "[]"}
    broken.touch()
    assert train(tmp_path / "run", **options) == 5
    assert "raised OSError: out of order" in capsys.readouterr().err
    assert len(records(tmp_path / "run")) == 2
    broken.unlink()
    torch.manual_seed(99)
    assert train(tmp_path / "run", "--resume", **options) == 0
    assert train(tmp_path / "other", **options) == 0
    assert_same_run(tmp_path / "run", tmp_path / "other", 3)


@pytest.mark.ci
@pytest.mark.parametrize(
    "preset",
    # the presets of the embedded model's methods have an iteration in tests/config/test_presets.py
    ["embedded_branched", "embedded_words", *(name for name in preset_names() if not name.startswith("embedded"))],
)
def test_a_dry_run_writes_nothing(
    preset: str,
    pipeline_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if preset == "embedded_words":
        pytest.importorskip("rapidocr")
    monkeypatch.setattr("densegrpo_fast.models.loading.EMBEDDED", dict.fromkeys(EMBEDDED, pipeline_directory))
    monkeypatch.chdir(tmp_path)
    assert main(["--config", preset, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert f"dry run of {preset}" in output
    stands_in = "a tiny random one in the place of stabilityai/stable-diffusion-3.5-medium"
    assert (stands_in in output) == preset.startswith("sd35")
    assert ("SD3Transformer2DModel of 2,243 million parameters" in output) == preset.startswith("sd35")
    assert ("jpeg_compressibility in the place of pickscore" in output) == ("pickscore" in preset)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ci
def test_a_dry_run_looks_at_the_network_of_a_directory(
    pipeline_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = shutil.copytree(pipeline_directory, tmp_path / "pipeline")
    arguments = ["--config", "embedded_dense", "--model.path", str(other), "--dry-run"]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert f"a tiny random one in the place of {other}" in output
    network = SD3Transformer2DModel.from_pretrained(pipeline_directory, subfolder="transformer")
    assert f"SD3Transformer2DModel of {network.num_parameters() / 1e6:,.0f} million parameters" in output
    (other / "transformer" / "config.json").write_text("{}")
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 3
    assert "transformer/config.json describes no network" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--help", "--print-config", "--list-presets"])
def test_help_never_imports_torch(flag: str) -> None:
    code = (
        "import sys\n"
        "from densegrpo_fast import train\n"
        "try:\n"
        f"    train.main([{flag!r}])\n"
        "except SystemExit as stop:\n"
        "    assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "embedded_branched" in result.stdout


def test_another_kind_of_model_is_refused_without_torch(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "HunyuanDiTPipeline"}')
    code = (
        "import sys\n"
        "from densegrpo_fast import train\n"
        "try:\n"
        f"    train.main(['--model.path', {str(tmp_path)!r}])\n"
        "finally:\n"
        "    assert 'torch' not in sys.modules and 'diffusers' not in sys.modules\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert result.returncode == 3, result.stderr
    assert f"error: model.path: {tmp_path}: HunyuanDiTPipeline is not supported" in result.stderr
