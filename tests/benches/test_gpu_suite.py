"""benches/gpu_suite.sh calls what exists, goes on after a failure, and says so at its end."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from benches.gpu import smoke, summary
from densegrpo_fast.flow import backends

ROOT = Path(__file__).resolve().parents[2]

SUITE = ROOT / "benches" / "gpu_suite.sh"
STAND_IN = """#!/bin/sh
echo "$@" >> "$CALLS"
case "$*" in *"$FAILS"*) exit 1;; *"$HANGS"*) exec sleep 60;; esac
"""


def run(
    tmp_path: Path, parts: str = "", fails: str = "nothing fails", budget: int = 600, hangs: str = "nothing hangs"
) -> tuple[subprocess.CompletedProcess, list[str]]:
    """The suite with a stand-in for Python, which notes how it is called and fails where it is told to."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()
    for name in ("python", "nvidia-smi"):
        (folder / name).write_text(STAND_IN)
        (folder / name).chmod(0o755)
    environment = os.environ | {
        "BUDGET": str(budget),
        "PATH": f"{folder}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "FAILS": fails,
        "HANGS": hangs,
        "MOST": "1",
    }
    environment |= {"PARTS": parts} if parts else {}
    command = ["bash", str(SUITE), str(tmp_path / "results")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    return result, calls.read_text().splitlines()


def test_all_parts_run_and_leave_a_file_each(tmp_path: Path) -> None:
    result, calls = run(tmp_path)
    assert result.returncode == 0, result.stderr
    scripts = [call.split()[1] for call in calls if call.startswith("-m benches.")]
    assert scripts and all(importlib.util.find_spec(script) for script in scripts)
    assert calls[2] == "setup.py --quiet build_ext --inplace" and scripts[0] == "benches.gpu.smoke"
    assert scripts[-1] == "benches.gpu.summary"
    outputs = [found[1] for call in calls if (found := re.search(r"(?:--output|--junitxml) (\S+)", call))]
    # neither the first nor the last script has one, the tests have
    assert len(outputs) == len(set(outputs)) == len(scripts) - 1
    assert {Path(output).parent for output in outputs} == {tmp_path / "results"}
    ops = ("sde_step", "sde_log_prob", "sde_log_prob_kl", "euler_jump", "grpo_loss")
    assert all(f"benches.ops.bench_{op}" in scripts for op in ops)


def test_its_tests_are_those_for_a_gpu(tmp_path: Path) -> None:
    _, calls = run(tmp_path, "tests")
    (call,) = [call for call in calls if "-m pytest" in call]
    named = {Path(word) for word in call.split() if word.startswith("tests/")}
    assert {
        Path("tests/triton"),
        Path("tests/gpu/test_cuda_kernels.py"),
        Path("tests/sampling/test_graphs.py"),
    } <= named
    assert Path("tests/ops/test_noise.py") not in named
    assert all((ROOT / path).exists() for path in named)


def test_a_failure_stops_nothing_and_is_told(tmp_path: Path) -> None:
    result, calls = run(tmp_path, "steps large", fails="bench_sde_step")
    assert result.returncode == 1
    assert result.stderr.splitlines() == ["failed: large", "failed: steps"]
    assert any("bench_grpo_loss" in call for call in calls)
    assert not any("bench_iteration" in call for call in calls)


def test_what_has_no_time_left_is_told(tmp_path: Path) -> None:
    result, calls = run(tmp_path, "large", budget=0)
    assert result.returncode == 1 and not any("bench_" in call for call in calls)
    assert result.stderr.splitlines() == ["failed: large (no time left)"] * 3


@pytest.mark.ci
def test_what_hangs_leaves_time_to_the_others(tmp_path: Path) -> None:
    result, calls = run(tmp_path, "large", hangs="bench_sde_step")
    assert result.returncode == 1 and result.stderr.splitlines() == ["failed: large (stopped after 1 s)"]
    assert any("bench_euler_jump" in call for call in calls)


def test_a_library_that_cannot_be_built_fails_the_suite(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "build smoke", fails="build_ext")
    assert result.returncode == 1 and result.stderr.splitlines() == ["failed: build"]


def test_every_bar_of_the_summary_is_read(tmp_path: Path) -> None:
    timed = {"triton": {"share_of_copy_bandwidth": 0.95, "times_faster_than_eager_compiled": 2.0}}
    common = {"hardware": {"gpu": "a GPU"}, "commit": "abc"}
    documents = {bar.file: common | {"variants": timed} for bar in summary.BARS if bar.file.endswith("json")}
    documents["iteration_gpu.json"] = common | {"ratios": {"dense_trajectories/sparse": 1.31}}
    documents["gpu_rehearsal_gpu.json"] = common | {
        "share_of_matmul": {"rollout": 0.5, "update": 0.4},
        "memory": {"peak_bytes": 10, "estimate_bytes": 10},
        "host_syncs": {"a line": 3},
    }
    for name, document in documents.items():
        (tmp_path / name).write_text(json.dumps(document))
    ran = '<testcase classname="tests.gpu.test_cuda_kernels"/>'
    cases = ran + '<testcase classname="tests.test_graphs"><skipped/></testcase>'
    suite = f'<testsuites><testsuite tests="2" failures="0" errors="0" skipped="1">{cases}</testsuite></testsuites>'
    (tmp_path / "gpu_tests.xml").write_text(suite)
    page = summary.summary(tmp_path)
    assert "a GPU, commit abc" in page and "not measured" not in page
    missed = [line for line in page.splitlines() if "**not reached**" in line]
    assert [line.split("|")[1].strip() for line in missed] == ["price of DenseGRPO", "update, rate"]
    documents["grpo_loss_gpu.json"] |= {"hardware": {"gpu": None}}
    (tmp_path / "grpo_loss_gpu.json").write_text(json.dumps(documents["grpo_loss_gpu.json"]))
    (tmp_path / "gpu_tests.xml").write_text(suite.replace(ran, ""))
    (tmp_path / "iteration_gpu.json").unlink()
    page = summary.summary(tmp_path)
    assert "| tests of the CUDA library | none left out | 1 left out | **not reached** |" in page
    assert "| price of DenseGRPO | <= 1.30 x replayed sparse |  | not measured |" in page
    assert "| not measured: ValueError: recorded without a GPU |" in page


class OnArrival:
    """Calls a function in the process that it is sent to."""

    def __init__(self, *call: object) -> None:
        self.call = call

    def __reduce__(self) -> tuple:
        return self.call[0], self.call[1:]


@pytest.mark.ci
def test_the_smoke_test_goes_on_after_a_failure_and_a_crash(capsys: pytest.CaptureFixture[str]) -> None:
    broken = {"missing": partial(smoke.package, "no_such_package"), "crash": OnArrival(os._exit, 3)}
    checks = [*(smoke.Check(name, run, gpu=False) for name, run in broken.items()), *smoke.CHECKS]
    assert smoke.smoke(checks, torch.device("cpu")) == list(broken)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("FAIL missing: ModuleNotFoundError: No module named 'no_such_package' (")
    assert lines[1].startswith("FAIL crash: the process ended with status 3 (") and len(lines) == len(checks)
    assert sum(line.startswith("skip ") for line in lines) == sum(check.gpu for check in checks)
    assert any(line.startswith("ok   importance ratios: within") for line in lines)


@pytest.mark.ci
def test_the_smoke_test_does_not_wait_for_what_hangs(capsys: pytest.CaptureFixture[str]) -> None:
    checks = [smoke.Check("hang", OnArrival(time.sleep, 600), gpu=False)]
    assert smoke.smoke(checks, torch.device("cpu"), seconds=0.2) == ["hang"]
    assert capsys.readouterr().out.startswith("FAIL hang: no answer within 0.2 s (")


@pytest.mark.parametrize("implementation", ["reference", "cpu"])
def test_the_smoke_test_s_op_check_runs(implementation: str) -> None:
    if backends.why_not("sde_step", implementation):
        pytest.skip(backends.why_not("sde_step", implementation))
    said = smoke.op(implementation, 4099, torch.float32, torch.device("cpu"))
    assert said == "equals the reference"


@pytest.mark.parametrize("parts", ["", "tests"])
def test_without_a_gpu_nothing_is_started(tmp_path: Path, parts: str) -> None:
    result, calls = run(tmp_path, parts, fails="cuda.is_available")
    assert result.returncode == 2
    assert result.stderr == "no CUDA device\n"
    assert len(calls) == 1
