"""Runs of two processes from the outside: what they write, how they stop and fail, and what they refuse."""

from __future__ import annotations

import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from worlds import commands  # noqa: E402

REWARD = """
import os, signal, time

calls = 0

def reward(images, prompts, metadata):
    global calls
    calls += 1
    fault = os.environ.get("FAULT") if os.environ.get("RANK") == "1" and calls == 3 else None
    if fault == "raise":
        raise RuntimeError("out of order")
    if fault == "hang":
        time.sleep(1000)
    if fault:
        os.kill(os.getpid(), getattr(signal, fault))
    return [float((image * image[0, 0, 0]).mean()) for image in images]
"""


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(REWARD)
    return path


def run(train: Any, tmp_path: Path, reward: Path, *flags: str, fault: str | None = None, **options: object) -> Any:
    """Exit codes and what was printed of two processes."""
    settings = {"reward.terms": f"{{{reward}:reward: 1.0}}", "reward.observed": "[]", **options}
    arguments = train.arguments(tmp_path / "run", *flags, **settings)
    return commands(tmp_path, [arguments, arguments], FAULT=fault)


def records(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def errors(printed: list[tuple[int, str]]) -> list[str]:
    return [line for _, text in printed for line in text.splitlines() if line.startswith("error: ")]


def test_a_signal_to_one_stops_all_and_one_process_resumes(train: Any, tmp_path: Path, reward: Path) -> None:
    stopped = run(train, tmp_path, reward, fault="SIGTERM")
    assert [code for code, _ in stopped] == [75, 75]
    first = records(tmp_path)
    assert [record["iteration"] for record in first] == [1] and first[0]["processes"] == 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    # only one prints
    assert "stopped after iteration 1" in stopped[0][1] and "iteration" not in stopped[1][1]
    settings = {"reward.terms": f"{{{reward}:reward: 1.0}}", "reward.observed": "[]"}
    assert train(tmp_path / "run", "--resume", **settings) == 0
    whole = records(tmp_path)
    assert whole[:1] == first and [record["iteration"] for record in whole] == [1, 2, 3]
    assert (tmp_path / "run" / "adapter" / "pytorch_lora_weights.safetensors").exists()
    # and the other way round: two go on with what one has begun
    assert [code for code, _ in run(train, tmp_path, reward, "--resume", **{"run.iterations": 4})] == [0, 0]
    assert [record["iteration"] for record in records(tmp_path)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("fault", "code", "message"),
    [
        ("raise", 5, "process 1 of 2: .*out of order"),
        ("SIGKILL", 3, "another process of the run has ended"),
        ("hang", 3, "has not answered within distributed.timeout"),
    ],
)
def test_one_that_fails_ends_all(train: Any, tmp_path: Path, reward: Path, fault: str, code: int, message: str) -> None:
    start = time.monotonic()
    ended = run(train, tmp_path, reward, fault=fault, **{"distributed.timeout": 20 if fault == "hang" else 300})
    assert time.monotonic() - start < 200
    assert ended[0][0] == code and ended[1][0] == (-signal.SIGKILL if fault == "SIGKILL" else code)
    (line,) = errors(ended)
    assert re.search(message, line)
    # nothing is lost, and the directory is free
    assert [record["iteration"] for record in records(tmp_path)] == []
    assert not (tmp_path / "run" / "run.lock").read_text()


def test_what_does_not_fit_is_refused_and_said_once(train: Any, tmp_path: Path, reward: Path) -> None:
    own = train.arguments(tmp_path / "run")
    cases: list[tuple[int, str, list[list[str]], dict[str, str | None]]] = [
        (2, "optimizer.lr", [own, [*own, "--optimizer.lr=2e-3"]], {}),
        (2, "2 processes for 1 rows", [[*own, "--data.num_prompts=1", "--sampler.micro_batch=1"]] * 2, {}),
        (3, "MASTER_ADDR", [own, own], {"MASTER_ADDR": None}),
        (3, "RANK", [own, own], {"RANK": None}),
        (3, "nccl needs GPUs", [[*own, "--distributed.backend=nccl"]] * 2, {}),
    ]
    for code, message, arguments, environment in cases:
        ended = commands(tmp_path, arguments, **environment)
        assert [found for found, _ in ended] == [code, code], ended
        (line,) = errors(ended)
        assert message in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_second_run_in_the_directory_is_refused(train: Any, tmp_path: Path, reward: Path) -> None:
    from densegrpo_fast.run_files.run_directory import open_run_directory

    with open_run_directory(tmp_path / "run", resume=False, overwrite=False):
        ended = run(train, tmp_path, reward)
    assert [code for code, _ in ended] == [7, 7]
    (line,) = errors(ended)
    assert "in use by another run" in line
