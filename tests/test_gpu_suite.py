"""benches/gpu_suite.sh calls what exists, goes on after a failure, and says so at its end."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "benches" / "gpu_suite.sh"
STAND_IN = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in *"$FAILS"*) exit 1;; esac
"""


def run(tmp_path: Path, parts: str = "", fails: str = "nothing fails") -> tuple[subprocess.CompletedProcess, list[str]]:
    """The suite with a stand-in for Python, which notes how it is called and fails where it is told to."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name in ("python", "nvidia-smi"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(calls), "FAILS": fails}
    environment |= {"PARTS": parts} if parts else {}
    command = ["bash", str(SUITE), str(tmp_path / "results")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    return result, calls.read_text().splitlines()


def test_all_parts_run_and_leave_a_file_each(tmp_path: Path) -> None:
    result, calls = run(tmp_path)
    assert result.returncode == 0, result.stderr
    scripts = [call.split()[0] for call in calls if call.startswith("benches/")]
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    outputs = [re.search(r"(?:--output|--junitxml) (\S+)", call)[1] for call in calls if "results" in call]
    assert len(outputs) == len(set(outputs)) == len(scripts) + 1
    assert {Path(output).parent for output in outputs} == {tmp_path / "results"}
    ops = ("sde_step", "sde_log_prob", "sde_log_prob_kl", "euler_jump", "grpo_loss")
    assert all(f"benches/bench_{op}.py" in scripts for op in ops)


def test_its_tests_are_those_for_a_gpu(tmp_path: Path) -> None:
    _, calls = run(tmp_path, "tests")
    (call,) = [call for call in calls if "pytest" in call]
    named = {Path(word) for word in call.split() if word.startswith("tests/")}
    assert {Path("tests/triton"), Path("tests/test_native_cuda.py"), Path("tests/test_graphs.py")} <= named
    assert Path("tests/test_noise.py") not in named
    assert all((ROOT / path).exists() for path in named)


def test_a_failure_stops_nothing_and_is_told(tmp_path: Path) -> None:
    result, calls = run(tmp_path, "steps large", fails="bench_sde_step.py")
    assert result.returncode == 1
    assert result.stderr.splitlines() == ["failed: steps", "failed: large"]
    assert any("bench_grpo_loss.py" in call for call in calls)
    assert not any("bench_iteration.py" in call for call in calls)


@pytest.mark.parametrize("parts", ["", "tests"])
def test_without_a_gpu_nothing_is_started(tmp_path: Path, parts: str) -> None:
    result, calls = run(tmp_path, parts, fails="cuda.is_available")
    assert result.returncode == 2
    assert result.stderr == "no CUDA device\n"
    assert len(calls) == 1
