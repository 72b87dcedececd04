"""Checkpoints that are written while training goes on: what they hold, and what a disk that is full does."""

from __future__ import annotations

import errno
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from densegrpo_fast import Callback, Trainer
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.run_files.checkpoint import CheckpointManager, newest_settings
from densegrpo_fast.run_files.shared_tensors import read_shared

FULL = {"model.train": "full", "optimizer.lr": 1e-3, "run.checkpoint_every": 1, "evaluation.every": 0}


class Watch(Callback):
    """Keeps the weights after each iteration, and says when the second one is over."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []
        self.second = threading.Event()

    def on_iteration_end(self, trainer: Any, record: dict[str, Any]) -> None:
        self.weights.append({name: p.detach().clone() for name, p in trainer.model.trainable_parameters().items()})
        if len(self.weights) == 2:
            self.second.set()


@pytest.mark.ci
def test_training_goes_on_while_a_checkpoint_is_written(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from densegrpo_fast.training import saver

    watch, written = Watch(), saver.save_shared

    def late(*arguments: Any) -> None:
        assert watch.second.wait(60)
        written(*arguments)

    monkeypatch.setattr(saver, "save_shared", late)
    run = tmp_path / "run"
    config, _ = parse_arguments(train.arguments(run, **FULL))
    Trainer(config, callbacks=[watch]).run()
    for step, weights in enumerate(watch.weights, 1):
        saved = read_shared(run / "checkpoints" / f"step-{step:08d}" / "shared", "adapter")
        assert saved.keys() == weights.keys() and all(torch.equal(saved[name], weights[name]) for name in saved)
    assert not torch.equal(*(torch.cat([t.flatten() for t in own.values()]) for own in watch.weights[:2]))


@pytest.mark.ci
def test_a_disk_that_is_full_meanwhile_ends_the_run_and_the_checkpoint_before_stays(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, calls = dcp.HuggingFaceStorageWriter.write_data, []

    def full(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(*arguments)

    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", full)
    run = tmp_path / "run"
    assert train(run, **FULL) == 7
    assert "No space left on device" in capsys.readouterr().err
    checkpoints = run / "checkpoints"
    assert CheckpointManager(checkpoints, 2, newest_settings(checkpoints)).load_latest().step == 1
    assert train(run, "--resume", **FULL) == 0
