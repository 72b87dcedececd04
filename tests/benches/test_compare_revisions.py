"""benches/revisions/compare.py tells one bit, a missing name and a new one apart from equal values."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benches.revisions import compare as revisions
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.config.yaml_files import preset_names


def run_directory(directory: Path, **changes: float) -> Path:
    (directory / "adapter").mkdir(parents=True)
    records = [{"iteration": 1, "loss": 0.1, "time/update": 1.0}, {"iteration": 2, "loss": 0.2, "kl": None} | changes]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    save_file({"a": torch.arange(3.0), "empty": torch.empty(0)}, directory / "adapter" / "lora.safetensors")
    (directory / "report.html").write_text(str(directory))
    return directory


def compared(old: Path, new: Path) -> tuple[list[str], list[str]]:
    differences, added, count = revisions.compare(revisions.read(old), revisions.read(new))
    assert count > 0
    return differences, added


def test_seconds_do_not_count(tmp_path: Path) -> None:
    old, new = (run_directory(tmp_path / name, **{"time/update": s}) for name, s in (("old", 1.0), ("new", 2.0)))
    assert compared(old, new) == ([], [])


def test_the_last_bit_counts(tmp_path: Path) -> None:
    old, new = run_directory(tmp_path / "old"), run_directory(tmp_path / "new", loss=0.2 + 2**-55)
    assert compared(old, new) == (["metrics.jsonl: 2: loss: old 0.2, new 0.20000000000000004"], [])
    a, b = torch.ones(2, 3), torch.ones(2, 3)
    b[1, 0] = b[1, 0].nextafter(torch.tensor(2.0))
    assert revisions.unequal(a, b).startswith("element 3: old 1.0, new 1.00000011")
    assert revisions.unequal(torch.zeros(1), -torch.zeros(1)) and revisions.unequal(0.0, -0.0)
    assert revisions.unequal(torch.zeros(1), torch.zeros(1).double())
    assert not revisions.unequal(torch.full([2], torch.nan), torch.full([2], torch.nan))


def test_what_is_missing_counts_and_what_is_new_is_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = run_directory(tmp_path / "old", lr=1.0), run_directory(tmp_path / "new", learning_rate=1.0)
    missing = ["metrics.jsonl: 2: lr: old 1.0, new has none"]
    assert compared(old, new) == (missing, ["metrics.jsonl: learning_rate"])
    monkeypatch.setitem(revisions.RENAMED, "lr", "learning_rate")
    assert compared(old, new) == ([], [])
    (new / "adapter" / "lora.safetensors").unlink()
    assert compared(old, new) == (["adapter/lora.safetensors is missing"], [])


@pytest.mark.parametrize("preset", [name for name in preset_names() if name.startswith("embedded")])
def test_short_runs_are_possible_settings(preset: str) -> None:
    config, _ = parse_arguments(["--config", preset])
    short = revisions.shortened(revisions.flat(config.model_dump(mode="json")))
    variants = [options for name, options in revisions.VARIANTS.values() if name == preset]
    for options in ({}, *variants):
        parse_arguments(["--config", preset, *(f"{key}={value}" for key, value in (short | options).items())])
