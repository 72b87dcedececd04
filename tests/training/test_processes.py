"""Runs of two processes from the outside: what they write, how they stop and fail, and what they refuse."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
from torch.distributed import TCPStore

from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.run_files.run_directory import open_run_directory
from densegrpo_fast.training.callbacks import Callback
from densegrpo_fast.training.distributed import World
from densegrpo_fast.training.trainer import Trainer

sys.path.insert(0, str(Path(__file__).parent))

from worlds import SETTINGS, brightness, commands, policy, together  # noqa: E402

REWARD = """
import os, signal, threading, time

calls = 0
if os.environ.get("RANK") == os.environ.get("KILLED_RANK", "none"):
    killer = threading.Timer(float(os.environ["KILLED_AFTER"]), os.kill, (os.getpid(), signal.SIGKILL))
    killer.daemon = True
    killer.start()

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


KILLED = {"run.iterations": 8, "run.checkpoint_every": 1, "distributed.timeout": 60}
"""Options of the runs that are killed."""
LAYOUTS: dict[str, dict[str, object]] = {
    "adapter, network whole": {},
    "adapter, network in parts": {"distributed.shard": "full"},
    "all weights, network in parts": {"model.train": "full", "distributed.shard": "full", "objective.kl_coef": 0.1},
}


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("rewards") / "mine.py"
    path.write_text(REWARD)
    return path


def run(train: Any, tmp_path: Path, reward: Path, environment: dict[str, str] | None = None, **options: object) -> Any:
    """Exit codes and what was printed of two processes."""
    settings = {"reward.terms": f"{{{reward}:reward: 1.0}}", "reward.observed": "[]", **options}
    arguments = train.arguments(tmp_path / "run", **settings)
    return commands(tmp_path, [arguments] * 2, **environment or {})


def records(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]


def errors(printed: list[tuple[int, str]]) -> list[str]:
    return [line for _, text in printed for line in text.splitlines() if line.startswith("error: ")]


def adapter(directory: Path) -> bytes:
    return (directory / "adapter" / "pytorch_lora_weights.safetensors").read_bytes()


@pytest.mark.ci
def test_a_signal_to_one_stops_all_and_any_number_resumes(train: Any, tmp_path: Path, reward: Path) -> None:
    # the store of torchrun outlives the processes that it starts, and starts again
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchrun = {"MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    stopped = run(train, tmp_path, reward, torchrun | {"FAULT": "SIGTERM"})
    assert [code for code, _ in stopped] == [75, 75]
    first = records(tmp_path)
    assert [record["iteration"] for record in first] == [1] and first[0]["processes"] == 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    # only one prints
    assert "stopped after iteration 1" in stopped[0][1] and "iteration" not in stopped[1][1]
    shutil.copytree(tmp_path / "run", tmp_path / "again" / "run")
    assert [code for code, _ in run(train, tmp_path, reward, torchrun | {"TORCHELASTIC_RESTART_COUNT": "1"})] == [0, 0]
    (tmp_path / "whole").mkdir()
    assert [code for code, _ in run(train, tmp_path / "whole", reward)] == [0, 0]
    # bit for bit what an uninterrupted run has learned
    assert adapter(tmp_path / "run") == adapter(tmp_path / "whole" / "run")
    known = records(tmp_path)
    assert [record["iteration"] for record in known] == [1, 2, 3]
    for own, other in zip(known, records(tmp_path / "whole"), strict=True):
        assert all(own[key] == other[key] for key in ("reward", "loss", "grad_norm", "nfe/update", "traffic/reduced"))
    # one goes on with what two have begun
    settings = {"reward.terms": f"{{{reward}:reward: 1.0}}", "reward.observed": "[]"}
    assert train(tmp_path / "again" / "run", "--resume", **settings) == 0
    alone = safetensors.torch.load(adapter(tmp_path / "again" / "run"))
    for name, tensor in safetensors.torch.load(adapter(tmp_path / "run")).items():
        assert (alone[name] - tensor).norm() <= 0.01 * tensor.norm()


@pytest.mark.ci
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
    timeout = 20 if fault == "hang" else 300
    ended = run(train, tmp_path, reward, {"FAULT": fault}, **{"distributed.timeout": timeout})
    assert time.monotonic() - start < 200
    assert ended[0][0] == code and ended[1][0] == (-signal.SIGKILL if fault == "SIGKILL" else code)
    (line,) = errors(ended)
    assert re.search(message, line)
    # the directory is free again
    with open_run_directory(tmp_path / "run", resume=False, overwrite=True):
        pass


def trained(directory: Path) -> bytes:
    """What a run has exported."""
    (file,) = directory.glob("*/*.safetensors")
    return file.read_bytes()


@pytest.fixture(scope="module", params=LAYOUTS)
def whole(
    request: pytest.FixtureRequest, train: Any, tmp_path_factory: pytest.TempPathFactory, reward: Path
) -> tuple[dict[str, object], bytes, float]:
    """Options of a run, what it has trained if nobody stops it, and its seconds."""
    options, directory, start = KILLED | LAYOUTS[request.param], tmp_path_factory.mktemp("whole"), time.monotonic()
    assert [code for code, _ in run(train, directory, reward, **options)] == [0, 0]
    return options, trained(directory / "run"), time.monotonic() - start


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(40))
def test_a_kill_at_any_moment_loses_nothing(
    train: Any, tmp_path: Path, reward: Path, whole: tuple[dict[str, object], bytes, float], seed: int
) -> None:
    (options, expected, seconds), draw = whole, random.Random(seed)
    fate = {"KILLED_RANK": str(draw.randrange(2)), "KILLED_AFTER": str(draw.uniform(0, 0.8 * seconds))}
    start = time.monotonic()
    codes = [code for code, _ in run(train, tmp_path, reward, fate, **options)]
    # the one that lives notices, or the run was over before
    assert time.monotonic() - start < seconds + 60 and sorted(codes) in (
        [-signal.SIGKILL, 3],
        [-signal.SIGKILL, 0],
        [0, 0],
    )
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    torchrun = {
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "1",
    }
    assert [code for code, _ in run(train, tmp_path, reward, torchrun, **options)] == [0, 0]
    assert trained(tmp_path / "run") == expected


@pytest.mark.ci
def test_what_does_not_fit_is_refused_and_said_once(train: Any, tmp_path: Path, reward: Path) -> None:
    def other(**options: object) -> list[str]:
        return list(train.arguments(tmp_path / "run", **options))

    own = other()
    cases: list[tuple[int, str, list[list[str]], dict[str, str | None]]] = [
        (2, "optimizer.lr is 0.002 and 0.001", [own, other(**{"optimizer.lr": 2e-3})], {}),
        (2, "2 processes for 1 rows", [other(**{"data.num_prompts": 1, "sampler.micro_batch": 1})] * 2, {}),
        (3, "MASTER_ADDR", [own, own], {"MASTER_ADDR": None}),
        (3, "RANK", [own, own], {"RANK": None}),
        (3, "nccl needs GPUs", [other(**{"distributed.backend": "nccl"})] * 2, {}),
    ]
    for code, message, arguments, environment in cases:
        ended = commands(tmp_path, arguments, **environment)
        assert [found for found, _ in ended] == [code, code], ended
        (line,) = errors(ended)
        assert message in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_slurm_example_starts_a_process_for_each_task(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```bash\n(#!/bin/bash\n.*?)^```", page, re.MULTILINE | re.DOTALL)
    stubs = {
        "scontrol": 'case "$1" in show) printf "one\\ntwo\\n";; *) echo "$@";; esac',
        "srun": 'shift; SLURM_PROCID=9 SLURM_LOCALID=1 SLURM_NTASKS=16 "$@"',
        "python": 'echo "$RANK/$WORLD_SIZE $LOCAL_RANK $MASTER_ADDR:$MASTER_PORT" "$@"; exit 75',
    }
    for name, body in stubs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_NODELIST": "[one-two]", "SLURM_JOB_ID": "41"}
    ended = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (75, "")
    started, requeued = ended.stdout.splitlines()
    where, _, arguments = started.partition(" -m densegrpo_fast.train ")
    assert where == "9/16 1 one:20041" and requeued == "requeue 41"
    config, flags = parse_arguments(arguments.split())
    assert config.preset == "sd35_medium_pickscore" and not flags.resume


class Stop(Callback):
    """Stops the run of the main process after its second iteration, those of the others after their first."""

    def on_iteration_end(self, trainer: Trainer, record: dict[str, Any]) -> None:
        record["seen"] = trainer.world.rank
        if trainer.world.main == (record["iteration"] == 2):
            trainer.stop("enough")


def called_back(world: World, directory: Path, split: str) -> tuple[int, str | None]:
    options = {"run.output_dir": directory / "run", "distributed.split": split, "evaluation.num_prompts": 2}
    options |= {"run.iterations": 4, "evaluation.every": 1, "evaluation.samples_per_prompt": 1}
    options |= {"data.num_prompts": 1} if split == "rows" else {}
    given = [f"{key}={value}" for key, value in {**SETTINGS, **options}.items()]
    config, _ = parse_arguments(["--config=embedded_dense", *given])
    reward = RewardMixture({"brightness": (brightness, 1.0)})
    iterations, summary, _ = Trainer(config, model=policy(), reward=reward, callbacks=[Stop()], world=world).run()
    return iterations, summary


@pytest.mark.ci
@pytest.mark.parametrize("split", ["rows", "groups"])
def test_the_main_process_ends_all_early(tmp_path: Path, split: str) -> None:
    # where a prompt's samples are in several processes, nothing is drawn of them
    main, other = together(2, called_back, tmp_path, split)
    assert main[0] == other[0] == 2 and other[1] is None
    assert main[1].startswith("ended after iteration 2 of 4: enough")
    assert [record["seen"] for record in records(tmp_path)] == [0, 0]
    assert (tmp_path / "run" / "evaluation-iteration-00001.json").exists()
    strips = [path.name for path in tmp_path.glob("run/strips/*.png")]
    assert sorted(strips) == ([] if split == "rows" else ["iteration-00001.png", "iteration-00002.png"])


@pytest.mark.ci
def test_a_second_run_in_the_directory_is_refused(train: Any, tmp_path: Path, reward: Path) -> None:
    with open_run_directory(tmp_path / "run", resume=False, overwrite=False):
        ended = run(train, tmp_path, reward)
    assert [code for code, _ in ended] == [7, 7]
    (line,) = errors(ended)
    assert "in use by another run" in line
