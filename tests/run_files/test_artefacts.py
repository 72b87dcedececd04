"""What a run writes is whole, carries a digest, and is refused by name when it is not what was written."""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from densegrpo_fast.calibration import report
from densegrpo_fast.calibration.rules import Limits, Staircase
from densegrpo_fast.calibration.store import read_calibration
from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.files import SUMS, read_verified, replace_bytes
from densegrpo_fast.common.pretrained import load_network
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.models.adapter_formats import read_lora
from densegrpo_fast.run_files.checkpoint import CheckpointManager
from densegrpo_fast.run_files.metrics import read_metrics

Train = Callable[..., int]
QUIET = {"reward.observed": "[]", "evaluation.every": 0}


def flips(data: bytes, count: int, seed: int = 0) -> Iterator[bytes]:
    """The data with one bit changed, in places all over it."""
    draw = random.Random(seed)
    for number in range(count):
        changed = bytearray(data)
        place = draw.randrange(len(data)) if number % 4 else draw.randrange(min(len(data), 200))
        changed[place] ^= 1 << draw.randrange(8)
        yield bytes(changed)


def test_a_digest_is_that_of_sha256sum(tmp_path: Path) -> None:
    for name in ("a.txt", "b"):
        replace_bytes(tmp_path / name, name.encode(), digest=True)
    replace_bytes(tmp_path / "a.txt", b"again", digest=True)
    subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=tmp_path, check=True, capture_output=True)
    assert read_verified(tmp_path / "a.txt") == b"again"
    (tmp_path / "c").write_text("of somebody else")
    assert read_verified(tmp_path / "c") == b"of somebody else"
    (tmp_path / "b").write_text("c")
    with pytest.raises(OSError, match="not what was written, by SHA256SUMS beside it"):
        read_verified(tmp_path / "b")
    # whatever happens to the digests, what is intact reads the same or is refused
    for changed in flips((tmp_path / SUMS).read_bytes(), 40):
        (tmp_path / SUMS).write_bytes(changed)
        try:
            assert read_verified(tmp_path / "a.txt") == b"again"
        except OSError:
            pass


@pytest.fixture(scope="module")
def finished(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two iterations."""
    output = tmp_path_factory.mktemp("finished") / "run"
    assert train(output, **QUIET, **{"run.iterations": 2}) == 0
    return output


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, to be damaged."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.mark.ci
def test_files_are_plain_and_readable_by_others(finished: Path) -> None:
    files = [path for path in finished.rglob("*") if path.is_file()]
    mask = os.umask(0)
    os.umask(mask)
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o644 & ~mask}
    assert not [path for path in files if path.suffix == ".stage"]
    for directory in (finished, finished / "adapter"):
        subprocess.run(["sha256sum", "--check", "--strict", SUMS], cwd=directory, check=True, capture_output=True)


@pytest.mark.ci
def test_a_damaged_adapter_is_refused(run: Path) -> None:
    path = run / "adapter" / "pytorch_lora_weights.safetensors"
    for changed in flips(path.read_bytes(), 40):
        path.write_bytes(changed)
        with pytest.raises(ValueError, match="cannot be read: .*not what was written"):
            read_lora(path)


def test_a_damaged_preview_decoder_is_refused(pipeline_directory: Path, tmp_path: Path) -> None:
    import torch
    from diffusers import AutoencoderTiny

    directory = shutil.copytree(pipeline_directory / "preview_decoder", tmp_path / "preview")
    for file in list(directory.iterdir()):
        replace_bytes(file, file.read_bytes(), digest=True)
    assert load_network(AutoencoderTiny, directory, torch.float32)
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        good = (directory / name).read_bytes()
        for changed in flips(good, 10):
            (directory / name).write_bytes(changed)
            with pytest.raises(OSError, match=f"{name}: it is not what was written"):
                load_network(AutoencoderTiny, directory, torch.float32)
        (directory / name).write_bytes(good)


@pytest.mark.ci
def test_a_damaged_calibration_is_refused(tmp_path: Path) -> None:
    sampler = {"dynamics": "cps", "num_steps": 3, "steps": [0, 1], "sigmas": [1.0, 0.6666666666666666, 1 / 3, 0.0]}
    rule = Staircase([0.7, 0.1 + 0.2, 0.0], Limits(0.1, 1.0))
    content = report.document(rule, sampler, [], {"noise_level": [0.7]}, {"spread": float("nan")}, {"seed": 1})
    path = tmp_path / "calibration.json"
    report.write_document(path, content)
    good = path.read_bytes()
    levels = read_calibration(path).noise_level
    same = 0
    for changed in flips(good, 300):
        path.write_bytes(changed)
        try:
            assert read_calibration(path).noise_level == levels
            same += 1
        except UserError as error:
            assert str(path) in str(error)
    # blanks are the only bytes that may be others
    assert same < 60
    # one of an earlier version has no digest
    document = json.loads(good)
    del document["sha256"]
    path.write_text(json.dumps(document))
    assert read_calibration(path).noise_level == levels
    path.write_text(json.dumps(document | {"noise_level": [10**400, 1, 1]}))
    with pytest.raises(UserError, match="is broken"):
        read_calibration(path)


@pytest.mark.parametrize("cut", [0, 1, 400, -200, -1])
def test_a_cut_configuration_is_not_continued(run: Path, cut: int) -> None:
    path = run / "config.yaml"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match="--resume: .*config.yaml: .* not what was written") as caught:
        parse_arguments(["--resume", str(run)])
    assert type(caught.value).__name__ == "CheckpointError"
    # nor that of a run from before there were digests
    (run / SUMS).unlink()
    if cut != -1:  # the last line feed
        with pytest.raises(UserError, match="--resume") as caught:
            parse_arguments(["--resume", str(run)])
        assert type(caught.value).__name__ == "CheckpointError"


@pytest.mark.ci
def test_what_the_end_of_a_run_needs_is_looked_for_at_its_start(
    train: Train, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = QUIET | {"run.iterations": 3}
    shutil.rmtree(run / "adapter")
    (run / "evaluation-before.json").write_text('{"prompts": []')
    assert train(run, "--resume", **more) == 4
    assert "cannot be summed up at the end of the run" in capsys.readouterr().err
    (run / "evaluation-before.json").unlink()
    assert train(run, "--resume", **more) == 4
    assert len(read_metrics(run / "metrics.jsonl")) == 2


@pytest.mark.ci
def test_a_run_without_its_checkpoints_does_not_begin_again(
    train: Train, run: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    records = (run / "metrics.jsonl").read_bytes()
    shutil.rmtree(run / "checkpoints")
    assert train(run, "--resume", **QUIET, **{"run.iterations": 3}) == 4
    assert "no checkpoint, though one was saved every 1" in capsys.readouterr().err
    (run / "checkpoints").symlink_to(run / "not" / "mounted")
    assert train(run, "--resume", **QUIET, **{"run.iterations": 3}) == 4
    assert "leads nowhere" in capsys.readouterr().err
    assert (run / "metrics.jsonl").read_bytes() == records
    # one that was stopped before its first checkpoint does, and loses no record
    (run / "checkpoints").unlink()
    assert train(run, "--resume", **QUIET, **{"run.iterations": 2, "run.checkpoint_every": 5}) == 0
    assert (run / "metrics.jsonl.old-1").read_bytes() == records and "the run begins again" in caplog.text


def test_a_stray_file_disturbs_no_checkpoint(tmp_path: Path) -> None:
    import torch

    (tmp_path / ".stage-x").write_text("x")
    manager = CheckpointManager(tmp_path, 1, {})
    manager.save(1, {"adapter": {"weight": torch.ones(1)}}, {})
    assert manager.load_latest().step == 1
