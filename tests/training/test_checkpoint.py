from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.run_files import checkpoint
from densegrpo_fast.run_files.checkpoint import CheckpointManager

SETTINGS = {"seed": 0, "sampler": {"num_steps": 8, "noise_level": [0.7, 0.5]}}


def manager(directory: Path, keep: int = 3, **changes: Any) -> CheckpointManager:
    return CheckpointManager(directory, keep, {**SETTINGS, **changes})


def tensors(step: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(step)
    weights = torch.randn(5, 3, generator=generator)
    return {
        "adapter": {"lora_A": weights, "lora_B": weights.T, "half": weights.to(torch.bfloat16)},
        "optimizer": {"step": torch.tensor(step), "rng": torch.get_rng_state()},
        "ema": {},
    }


def state(step: int) -> dict[str, Any]:
    return {"iteration": step, "best": 0.1 + 0.2, "note": "Würfel", "position": 2**62, "empty": None}


def save(checkpoints: CheckpointManager, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, tensors(step), state(step))


def snapshot(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    path = manager(tmp_path / "checkpoints").save(12, tensors(12), state(12))
    loaded = manager(tmp_path / "checkpoints").load_latest()
    assert (loaded.step, loaded.path, loaded.state) == (12, path, state(12))
    assert loaded.tensors.keys() == tensors(12).keys()
    for group, members in tensors(12).items():
        assert loaded.tensors[group].keys() == members.keys()
        for name, tensor in members.items():
            assert loaded.tensors[group][name].dtype == tensor.dtype
            assert torch.equal(loaded.tensors[group][name], tensor)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path, keep=2)
    save(checkpoints, 0, 5, 10, 15)
    assert checkpoints.steps() == [10, 15]
    assert checkpoints.load_latest().step == 15
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000010", "step-00000015"]


def test_every_flipped_bit_is_noticed_and_the_one_before_is_used(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(manager(tmp_path), 1, 2)
    generator = random.Random(0)
    for file in sorted((tmp_path / "step-00000002").iterdir()):
        good = file.read_bytes()
        for _ in range(25):
            bad = bytearray(good)
            bad[generator.randrange(len(bad))] ^= 1 << generator.randrange(8)
            file.write_bytes(bad)
            caplog.clear()
            assert manager(tmp_path).load_latest().step == 1
            assert "step-00000002 is corrupt" in caplog.text
            assert file.name in caplog.text
        file.write_bytes(good)
    assert manager(tmp_path).load_latest().step == 2


@pytest.mark.parametrize("name", ["adapter.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncated", "emptied", "deleted", "extended"])
def test_every_damaged_file_is_noticed(
    name: str, damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(manager(tmp_path), 1, 2)
    file = tmp_path / "step-00000002" / name
    content = file.read_bytes()
    if damage == "deleted":
        file.unlink()
    else:
        file.write_bytes({"truncated": content[:-1], "emptied": b"", "extended": content + b"}"}[damage])
    assert manager(tmp_path).load_latest().step == 1
    assert name in caplog.text


def test_a_checkpoint_under_another_steps_name_is_corrupt(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save(manager(tmp_path), 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000007")
    assert manager(tmp_path).load_latest().step == 1
    assert "manifest of step 1" in caplog.text


def test_without_an_intact_checkpoint_nothing_is_loaded(tmp_path: Path) -> None:
    for directory in (tmp_path / "absent", tmp_path):
        with pytest.raises(UserError, match="no checkpoint in") as caught:
            manager(directory).load_latest()
        assert exit_code_of(caught.value) == ExitCode.CHECKPOINT
    save(manager(tmp_path), 1, 2)
    for step in (1, 2):
        (tmp_path / f"step-{step:08d}" / "state.json").unlink()
    with pytest.raises(UserError, match="all 2 are corrupt") as caught:
        manager(tmp_path).load_latest()
    assert exit_code_of(caught.value) == ExitCode.CHECKPOINT


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    save(manager(tmp_path), 1)
    other = manager(tmp_path, seed=3, sampler={"num_steps": 10, "noise_level": [0.7, 0.5]}, model="x")
    with pytest.raises(UserError) as caught:
        other.load_latest()
    assert exit_code_of(caught.value) == ExitCode.CHECKPOINT
    assert [line.strip() for line in str(caught.value).splitlines()[1:-1]] == [
        'model: absent in the checkpoint, "x" now',
        "sampler.num_steps: 8 in the checkpoint, 10 now",
        "seed: 0 in the checkpoint, 3 now",
    ]


def test_the_order_of_settings_does_not_matter(tmp_path: Path) -> None:
    save(manager(tmp_path), 1)
    reordered = CheckpointManager(tmp_path, 1, dict(reversed(SETTINGS.items())))
    assert reordered.load_latest().step == 1


def test_another_format_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(manager(tmp_path), 1)
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    with pytest.raises(UserError, match="checkpoint format 1, this program reads 2") as caught:
        manager(tmp_path).load_latest()
    assert exit_code_of(caught.value) == ExitCode.CHECKPOINT


@pytest.mark.parametrize("failing_file", ["adapter.safetensors", "state.json", "manifest.json"])
def test_a_full_disk_leaves_the_earlier_checkpoints_alone(
    failing_file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints = manager(tmp_path, keep=1)
    save(checkpoints, 1)
    before = snapshot(tmp_path)
    original = checkpoint.write_durably

    def fill_up(path: Path, data: bytes) -> None:
        if path.name == failing_file:
            path.write_bytes(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        original(path, data)

    monkeypatch.setattr(checkpoint, "write_durably", fill_up)
    with pytest.raises(UserError, match="No space left on device") as caught:
        save(checkpoints, 2)
    assert exit_code_of(caught.value) == ExitCode.OUTPUT
    assert snapshot(tmp_path) == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]
    monkeypatch.undo()
    save(checkpoints, 2)
    assert checkpoints.load_latest().step == 2


def test_what_the_disk_gives_back_wrong_is_not_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = manager(tmp_path, keep=1)
    save(checkpoints, 1)
    original = checkpoint.write_durably
    monkeypatch.setattr(
        checkpoint,
        "write_durably",
        lambda path, data: original(path, data[:-1] + b"?" if path.name == "adapter.safetensors" else data),
    )
    with pytest.raises(UserError, match="adapter.safetensors") as caught:
        save(checkpoints, 2)
    assert exit_code_of(caught.value) == ExitCode.OUTPUT
    assert checkpoints.steps() == [1]


def test_an_interrupt_while_saving_leaves_no_half_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoints = manager(tmp_path)
    save(checkpoints, 1)

    def interrupt(path: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint, "sync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(checkpoints, 2)
    assert [entry.name for entry in tmp_path.iterdir()] == ["step-00000001"]


def test_a_stage_left_by_a_crash_is_cleaned_and_never_loaded(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path)
    save(checkpoints, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".stage-step-00000009")
    assert checkpoints.load_latest().step == 1
    save(checkpoints, 2)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_an_intact_step_is_not_written_again(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path)
    save(checkpoints, 4)
    before = snapshot(tmp_path)
    assert checkpoints.save(4, tensors(4), state(4)) == tmp_path / "step-00000004"
    assert snapshot(tmp_path) == before


def test_a_corrupt_step_is_saved_again_and_set_aside(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path, keep=2)
    save(checkpoints, 1, 2, 3)
    (tmp_path / "step-00000003" / "state.json").write_bytes(b"{}")
    assert checkpoints.load_latest().step == 2
    save(checkpoints, 3)
    assert checkpoints.load_latest().step == 3
    assert (tmp_path / "step-00000003.corrupt-1" / "state.json").read_bytes() == b"{}"


def test_a_corrupt_newer_step_does_not_push_good_ones_out(tmp_path: Path) -> None:
    checkpoints = manager(tmp_path, keep=2)
    save(checkpoints, 1, 5)
    (tmp_path / "step-00000005" / "state.json").unlink()
    save(checkpoints, 2)
    assert checkpoints.steps() == [1, 2, 5]


def test_tensors_that_are_not_finite_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="adapter tensor lora_A is not finite") as caught:
        manager(tmp_path / "c").save(1, {"adapter": {"lora_A": torch.tensor([1.0, float("nan")])}}, {})
    assert exit_code_of(caught.value) == ExitCode.NON_FINITE
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("group", ["", "../up", "a/b", ".hidden"])
def test_group_names_are_plain_words(group: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plain word"):
        manager(tmp_path).save(1, {group: {}}, {})


def test_impossible_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep must be at least 1"):
        manager(tmp_path, keep=0)
    with pytest.raises(ValueError, match="step must be at least 0"):
        manager(tmp_path).save(-1, {}, {})
    with pytest.raises(ValueError, match="not JSON compliant|Out of range"):
        manager(tmp_path).save(1, {}, {"loss": float("nan")})
    with pytest.raises(TypeError):
        manager(tmp_path).save(1, {}, {"path": tmp_path})


@pytest.mark.ci
def test_killing_the_process_while_it_saves_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from densegrpo_fast.run_files.checkpoint import CheckpointManager\n"
        "checkpoints = CheckpointManager(sys.argv[1], 1, {'seed': 0})\n"
        "step = int(sys.argv[2])\n"
        "while True:\n"
        "    value = torch.full((4096,), float(step))\n"
        "    checkpoints.save(step, {'adapter': {'w': value}, 'ema': {'w': value}}, {'iteration': step})\n"
        "    print(step, flush=True)\n"
        "    step += 1\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    checkpoints = CheckpointManager(tmp_path, 1, {"seed": 0})
    step = 0
    for delay in (0.0, 0.003, 0.011, 0.029):
        with subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path), str(step)],
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        ) as child:
            assert child.stdout is not None
            saved = int(child.stdout.readline())
            time.sleep(delay)
            child.send_signal(signal.SIGKILL)
            saved = max([saved, *(int(line) for line in child.stdout.read().split("\n")[:-1])])
        loaded = checkpoints.load_latest()
        # What was reported as saved is there; a later one may be complete but not yet reported.
        assert saved <= loaded.step <= saved + 1
        assert loaded.state == {"iteration": loaded.step}
        assert torch.equal(loaded.tensors["adapter"]["w"], torch.full((4096,), float(loaded.step)))
        step = loaded.step + 1
