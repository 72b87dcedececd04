"""What a run looks at before its first iteration: whether there is a device for it, and what it will need there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from densegrpo_fast import train as train_command
from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.rewards.pickscore import PickScore
from densegrpo_fast.training.memory import GIB, estimate_memory
from densegrpo_fast.training.models import check_device
from densegrpo_fast.training.rewarding import build_reward


@pytest.mark.ci
def test_the_estimate_holds_the_rewards(tiny_policy: Callable[..., DiffusersModel], clip_directory: Path) -> None:
    model, config = tiny_policy(), parse_arguments([])[0]
    reward = RewardMixture({"clip": (PickScore(str(clip_directory), str(clip_directory), device="cpu"), 1.0)})
    without, found = estimate_memory(config, model), estimate_memory(config, model, reward=reward)
    assert without.weights["rewards"] == 0 < found.weights["rewards"]
    assert found.total - without.total == found.weights["rewards"]
    assert found.to_come == without.to_come


def test_rewards_that_do_not_fit_say_what_to_do(tmp_path: Path) -> None:
    own = tmp_path / "own.py"
    own.write_text(
        "import torch\nclass Large:\n    def __init__(self):\n        raise torch.OutOfMemoryError('CUDA')\n"
    )
    with pytest.raises(UserError, match="no memory for the networks of .*own.py:Large.*device: cpu") as caught:
        build_reward({f"{own}:Large": 1.0})
    assert exit_code_of(caught.value) == ExitCode.REWARD


def test_a_large_model_without_a_gpu_is_refused_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "prompts.txt").write_text("a cat\n")
    own = ["--data.prompts", str(tmp_path / "prompts.txt"), "--data.eval_prompts", str(tmp_path / "prompts.txt")]
    output = [*own, "--run.output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        train_command.main(["--config", "sd35_medium_pickscore", *output])
    assert stop.value.code == 3
    message = capsys.readouterr().err
    for words in ("there is no CUDA device", "python -m densegrpo_fast.train", "--dry-run", "run.memory_check warn"):
        assert words in message
    assert not (tmp_path / "run").exists()


def test_size_decides_about_a_directory(tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    with open(tmp_path / "transformer" / "part-1.safetensors", "wb") as file:
        file.truncate(GIB)  # takes no room on the disk

    def refused(path: Path | str, device: str = "cpu") -> bool:
        config = parse_arguments([f"model.path={path}", "run.memory_check=refuse"])[0]
        try:
            check_device(config, torch.device(device))
        except UserError as error:
            assert exit_code_of(error) == ExitCode.ENVIRONMENT
            return True
        return False

    assert not refused(tmp_path)
    (tmp_path / "transformer" / "part-2.safetensors").write_bytes(b"x")
    assert refused(tmp_path) and refused("owner/name")
    assert not refused(tmp_path, "cuda") and not refused("embedded") and not refused(tmp_path / "nowhere")
