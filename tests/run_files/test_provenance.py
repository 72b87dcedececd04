"""Provenance: nothing of this machine but its hardware, and a commit only of this checkout."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from densegrpo_fast.run_files import provenance


def test_absolute_paths_are_shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/opt/env/bin/python", "-m", "x", "--json", "/home/me/a.json", "k=/home/b"])
    assert provenance.command() == "python -m x --json a.json k=b"


def test_a_foreign_repository_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nested = tmp_path / "site-packages"
    nested.mkdir()
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    monkeypatch.setattr(provenance, "_CHECKOUT", nested)
    assert provenance.commit() == "unknown"


def test_it_is_json_with_the_versions_that_matter() -> None:
    document = provenance.provenance()
    assert set(document) == {"command", "commit", "hardware", "versions"}
    assert json.loads(json.dumps(document)) == document
    assert document["versions"]["python"].startswith(f"{sys.version_info[0]}.{sys.version_info[1]}.")
    assert document["hardware"]["cores"] >= 1 and document["hardware"]["threads"] >= 1
