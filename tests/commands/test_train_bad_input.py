"""What the training command says to bad input, and the status it ends with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from densegrpo_fast.train import main
from densegrpo_fast.training.trainer import Trainer

Train = Callable[..., int]


def dry_run(*arguments: str) -> int:
    """The status that a dry run of the embedded model is refused with."""
    with pytest.raises(SystemExit) as stop:
        main(["--dry-run", "--config=embedded_dense", *arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_nothing_to_resume(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "none", "--resume") == 4
    assert "holds no run to continue" in capsys.readouterr().err


def test_a_missing_model_is_named(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, problem in (
        (tmp_path / "nowhere", f"'{tmp_path / 'nowhere'}' is no directory"),
        (tmp_path, f"{tmp_path} has no model_index.json"),
    ):
        assert train(tmp_path / "run", **{"model.path": path}) == 3
        assert f"error: model.path: {problem}" in capsys.readouterr().err


@pytest.fixture
def damaged_pipeline(pipeline_directory: Path, tmp_path: Path) -> Path:
    """A copy of the pipeline directory, to be damaged."""
    return shutil.copytree(pipeline_directory, tmp_path / "pipeline")


def test_a_pipeline_of_another_class_is_refused(
    train: Train, damaged_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    index = damaged_pipeline / "model_index.json"
    index.write_text(index.read_text().replace("StableDiffusion3Pipeline", "HunyuanDiTPipeline"))
    assert train(tmp_path / "run", **{"model.path": damaged_pipeline}) == 3
    assert (
        f"{damaged_pipeline}: HunyuanDiTPipeline is not supported; supported are StableDiffusion3Pipeline"
        in capsys.readouterr().err
    )
    index.write_text("{")
    assert train(tmp_path / "run", **{"model.path": damaged_pipeline}) == 3
    assert "its model_index.json is not a JSON object" in capsys.readouterr().err


def test_a_missing_component_is_named(
    train: Train, damaged_pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(damaged_pipeline / "vae")
    shutil.rmtree(damaged_pipeline / "tokenizer_2")
    assert train(tmp_path / "run", **{"model.path": damaged_pipeline}) == 3
    assert f"{damaged_pipeline} lacks vae, tokenizer_2" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["cut", "absent"])
def test_damaged_weights_are_named(
    train: Train,
    damaged_pipeline: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    damage: str,
) -> None:
    weights = damaged_pipeline / "transformer" / "diffusion_pytorch_model.safetensors"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    else:
        weights.unlink()
    assert train(tmp_path / "run", **{"model.path": damaged_pipeline}) == 3
    assert f"model.path: cannot load {damaged_pipeline}" in capsys.readouterr().err


def test_broken_prompt_files_are_refused_with_the_line(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\n")
    assert train(tmp_path / "run", **{"data.prompts": prompts}) == 2
    assert f"error: data.prompts: {prompts}: line 2: empty" in capsys.readouterr().err
    prompts.write_text("")
    assert train(tmp_path / "run", **{"data.eval_prompts": prompts}) == 2
    assert f"error: data.eval_prompts: {prompts}: this prompt file is empty" in capsys.readouterr().err
    assert train(tmp_path / "run", **{"data.prompts": tmp_path / "none.txt"}) == 2
    assert "cannot read this prompt file" in capsys.readouterr().err
    # a dry run looks for them as well, though it evaluates nothing
    assert dry_run("--data.eval_prompts", str(tmp_path / "none.txt")) == 2
    assert "error: data.eval_prompts: " in capsys.readouterr().err


@pytest.mark.ci
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--lookahead.graphs true", "lookahead.graphs: CUDA graphs need a CUDA device, the model is on cpu; set it"),
        ("--lookahead.memory_gb 1e-9", "lookahead.memory_gb: 1e-09 is too small for one row, for which a forward"),
        ("--lora.targets [attn.none]", "lora.targets: 'attn.none' matches no module of SD3Transformer2DModel"),
        ("--sampler.calibration none.json", "sampler.calibration: cannot read none.json: No such file"),
    ],
)
def test_what_the_model_or_the_device_cannot_do_is_refused_before_anything_is_drawn(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: str, expected: str
) -> None:
    def drawn(*arguments: object, **options: object) -> None:
        raise AssertionError("a trajectory is drawn")

    monkeypatch.setattr(Trainer, "sample", drawn)
    assert dry_run(*arguments.split()) == 2
    assert f"error: {expected}" in capsys.readouterr().err


def test_an_unknown_reward_is_refused(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", **{"reward.terms": "{scens: 1.0}"}) == 2
    message = capsys.readouterr().err
    assert "reward.terms" in message and 'unknown reward "scens"' in message and "scenes" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("raise RuntimeError('no judge today')", "raised RuntimeError: no judge today"),
        ("return [0.5]", "must return 2 scores, one per image, got 1"),
        ("return ['good'] * len(prompts)", "must return a number or None per image, got 'good' for image 0"),
        ("return [None] * len(prompts)", "evaluation before training has no score of 'reward': all are missing"),
    ],
)
def test_a_reward_that_fails_stops_the_run(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], body: str, problem: str
) -> None:
    reward = tmp_path / "own.py"
    reward.write_text(f"def score(images, prompts, metadata):\n    {body}\n")
    assert train(tmp_path / "run", **{"reward.terms": f"{{{reward}:score: 1.0}}"}) == 5
    assert problem in capsys.readouterr().err


def test_prompts_outside_the_grammar_are_refused(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a photo of a cat\n")
    options = {"reward.terms": "{scenes: 1.0}", "reward.observed": "[]", "data.eval_prompts": prompts}
    assert train(tmp_path / "run", **options) == 5
    assert "cannot read 'a photo of a cat'" in capsys.readouterr().err


def test_prompts_that_a_reward_cannot_read_are_refused_before_anything_is_loaded(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    own = tmp_path / "own.txt"
    own.write_text("a red circle\na cat\n")
    # nor does it come to the model, which is not there
    options = {"model.path": tmp_path / "nowhere", "data.eval_prompts": own, "reward.observed": "[scenes_strict]"}
    assert train(tmp_path / "run", **options) == 5
    told = capsys.readouterr().err
    assert "error: reward.observed: reward 'scenes_strict': scenes reward does not know 'a cat'" in told
    assert "--reward.observed '[]'" in told and not (tmp_path / "run").exists()
    assert train(tmp_path / "run", **{**options, "reward.observed": "[]", "data.prompts": own}) == 3
    assert not (tmp_path / "run").exists()
    assert train(tmp_path / "run", **{**options, "data.prompts": own, "reward.terms": "{scenes: 1.0}"}) == 5
    assert "error: reward.terms: reward 'scenes': scenes reward does not know 'a cat'" in capsys.readouterr().err
    assert train(tmp_path / "run", **{"reward.terms": f"{{{tmp_path}/none.py:f: 1.0}}"}) == 2
    assert f"error: reward.terms: {tmp_path}/none.py:f: there is no file" in capsys.readouterr().err
    # held-out prompts that were not chosen are mentioned
    own.write_text("a red circle\n")
    caplog.clear()
    assert train(tmp_path / "run", **{"model.path": tmp_path / "nowhere", "data.prompts": own}) == 3
    assert "data.eval_prompts: held-out pictures are of the built-in prompts 'scenes'" in caplog.text
