"""Faults by the seed: kills, signals, full disks, flipped bits, bad files and bad code. Nothing may pass in silence.

Whatever happens, a command ends within a minute, with a documented status and without a traceback; a run that goes on
ends with the very weights and records of an undisturbed one; and what was damaged is refused, or was of no influence.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save

from densegrpo_fast.calibration import report
from densegrpo_fast.calibration.rules import Limits, Staircase
from densegrpo_fast.common.exit_codes import ExitCode
from densegrpo_fast.config.cli import load_config
from densegrpo_fast.config.yaml_files import dump_yaml

QUICK, ALL = 50, 500
DOCUMENTED = {int(code) for code in ExitCode} - {ExitCode.FAULT, ExitCode.PROBLEM}
WAITS = 40
"""A run of two iterations waits for the disk about so often."""


class Warm:
    """The process of warm.py, and its references: what undisturbed runs leave behind."""

    def __init__(self, arguments: list[str], directory: Path):
        self.arguments, self.directory = arguments, directory
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("warm.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        assert self._reply() == {"ready": True}
        self.finished = directory / "finished"
        self.ends(self.train(self.finished), 0)
        self.expected = left_by(self.finished)

    def run(self, **case: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        print(json.dumps(case), file=self.process.stdin, flush=True)
        return self._reply()

    def train(self, output: Path, *more: str, **case: Any) -> dict[str, Any]:
        return self.run(do="train", arguments=[*self.arguments, f"--run.output_dir={output}", *more], **case)

    def ends(self, found: dict[str, Any], *statuses: int) -> dict[str, Any]:
        """Check how a case ended: without a traceback or a hang, and with one of these statuses."""
        assert not found["hung"], found["output"]
        assert "Traceback" not in found["output"], found["output"]
        assert found["status"] in statuses, f"status {found['status']}, expected {statuses}: {found['output']}"
        return found

    def _reply(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="session")
def warm(train: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    directory = tmp_path_factory.mktemp("chaos")
    settings = {
        "reward.observed": "[]",
        "evaluation.every": 0,
        "run.iterations": 2,
        "data.num_prompts": 1,
        "sampler.micro_batch": 1,
        "optimizer.updates_per_iteration": 1,
    }
    arguments = train.arguments(directory / "unused", **settings)
    warm = Warm([word for word in arguments if not word.startswith("--run.output_dir")], directory)
    yield warm
    assert warm.process.stdin is not None
    warm.process.stdin.close()
    warm.process.wait(30)


def left_by(run: Path) -> dict[str, Any]:
    """The weights that a run has exported, and its records without what the clock says."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "memory/", "cpu_seconds")
    return {
        "adapter": (run / "adapter" / "pytorch_lora_weights.safetensors").read_bytes(),
        "records": [{k: v for k, v in record.items() if not k.startswith(timed)} for record in records],
        "before": json.loads((run / "evaluation-before.json").read_text()),
    }


def kill(warm: Warm, draw: random.Random, path: Path) -> None:
    """A run that is killed at any moment goes on to the same end."""
    fault = {"kind": "kill", "signal": int(signal.SIGKILL), "at": draw.randint(1, WAITS)}
    found = warm.train(path / "run", fault=fault)
    warm.ends(found, -signal.SIGKILL, 0)
    if found["status"] == 0:
        return
    begun = (path / "run" / "config.yaml").exists()
    warm.ends(warm.train(path / "run", *(["--resume"] if begun else [])), 0)
    assert left_by(path / "run") == warm.expected


def stop(warm: Warm, draw: random.Random, path: Path) -> None:
    """A signal ends a run in order, and it goes on to the same end."""
    number = draw.choice([signal.SIGTERM, signal.SIGINT])
    orderly = {signal.SIGTERM: 75, signal.SIGINT: 130}[number]
    found = warm.train(path / "run", fault={"kind": "signal", "signal": int(number), "at": draw.randint(2, WAITS)})
    warm.ends(found, orderly, -number, 0)
    if found["status"] != 0:
        begun = (path / "run" / "config.yaml").exists()
        warm.ends(warm.train(path / "run", *(["--resume"] if begun else [])), 0)
    assert left_by(path / "run") == warm.expected


def fill(warm: Warm, draw: random.Random, path: Path) -> None:
    """A full disk ends a run with status 7, and with room again it goes on to the same end."""
    found = warm.train(path / "run", fault={"kind": "full", "at": draw.randint(1, WAITS)})
    warm.ends(found, 7, 0)
    if found["status"] == 7:
        assert "No space left" in found["output"]
        begun = (path / "run" / "config.yaml").exists()
        warm.ends(warm.train(path / "run", *(["--resume"] if begun else [])), 0)
    assert left_by(path / "run") == warm.expected


def flip(warm: Warm, draw: random.Random, path: Path) -> None:
    """One flipped bit in a file of a run: refused, or of no influence on what comes of it."""
    run = shutil.copytree(warm.finished, path / "run")
    files = sorted(file for file in run.rglob("*") if file.is_file() and file.stat().st_size)
    file = draw.choice(files)
    data = bytearray(file.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    file.write_bytes(data)
    found = warm.train(run, "--resume")
    warm.ends(found, *DOCUMENTED)
    if found["status"] == 0 and file.name != "metrics.jsonl":
        assert left_by(run) == warm.expected, file


def delete(warm: Warm, draw: random.Random, path: Path) -> None:
    """A file or directory of a run that is gone, cut off, or in the place of which something else stands."""
    run = shutil.copytree(warm.finished, path / "run")
    place = draw.choice(sorted(run.iterdir()))
    how = draw.choice(["gone", "cut", "link", "fifo", "directory"])
    size = place.stat().st_size if place.is_file() else 0
    data = place.read_bytes() if place.is_file() else b""
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    outside = path / "outside"
    outside.write_text("precious")
    if how == "cut":
        place.write_bytes(data[: draw.randrange(size + 1)])
    elif how == "link":
        place.symlink_to(outside)
    elif how == "fifo":
        os.mkfifo(place)
    elif how == "directory":
        place.mkdir()
    found = warm.train(run, "--resume")
    assert outside.read_text() == "precious", (place, how)
    warm.ends(found, *DOCUMENTED)
    if found["status"] == 0 and place.name not in ("metrics.jsonl", "evaluation-before.json"):
        assert left_by(run) == warm.expected, (place, how)


BEHAVIOUR = [
    "sys.exit(0)",
    "sys.exit()",
    "raise KeyboardInterrupt",
    "raise GeneratorExit",
    "raise BaseException('x')",
    "raise StopIteration",
    "raise MemoryError",
    "raise RecursionError",
    "raise OSError(28, 'No space left on device')",
    "raise type('Odd', (Exception,), {'__str__': lambda self: 1 / 0})",
    "return None",
    "return 'good'",
    "return [1.0]",
    "return [float('nan')] * len(images)",
    "return [10**400] * len(images)",
    "return [object()] * len(images)",
    "return images",
    "return {}",
    "return iter([1.0] * len(images))",
    "return torch.zeros(len(images), dtype=torch.complex64)",
    "import time; time.sleep(600)",
    "while True: pass",
    "os.chdir('/'); return [1.0] * 99",
    "os.fork(); raise ValueError('twice')",
    "f = lambda: f(); return f()",
    "del images[:]",
]


def misbehave(warm: Warm, draw: random.Random, path: Path) -> None:
    """Code of one's own does something at its third call: status 5, its name, and what there was stays."""
    own, calls = path / "own.py", path / "calls"
    behaviour = draw.choice(BEHAVIOUR)
    own.write_text(
        "import os, sys, torch\n"
        "def score(images, prompts, metadata):\n"
        f"    with open({str(calls)!r}, 'a') as file:\n        file.write('x')\n"
        f"    if os.path.getsize({str(calls)!r}) >= 4:\n        {behaviour}\n"
        "    return images.mean((1, 2, 3))\n"
    )
    options = [f"--reward.terms={{{own}:score: 1.0}}", "--reward.timeout=2"]
    replaced = [word for word in warm.arguments if not word.startswith("--reward.terms")]
    found = warm.run(do="train", arguments=[*replaced, f"--run.output_dir={path / 'run'}", *options])
    warm.ends(found, 5)
    missing = "of the scores are missing" in found["output"] or "has no score" in found["output"]
    assert str(own) in found["output"] or missing, found["output"]


def changed(data: bytes, draw: random.Random) -> bytes:
    """Data after a few changes of single bytes, cuts and repetitions."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 6)):
        if not found:
            break
        place, kind = draw.randrange(len(found)), draw.randrange(4)
        if kind == 0:
            found[place] = draw.randrange(256)
        elif kind == 1:
            del found[place : place + draw.randint(1, 20)]
        elif kind == 2:
            found[place:place] = found[place : place + draw.randint(1, 20)]
        else:
            del found[place:]
    return bytes(found)


def originals(kind: str, draw: random.Random, path: Path) -> tuple[str, bytes]:
    """The end of a name and the content of a sound file."""
    if kind == "adapter":
        own, original = "transformer.transformer_blocks.0.attn.to_q", "diffusion_model.joint_blocks.0.x_block.attn.qkv"
        module = draw.choice([own, original])
        outputs = 6 if "qkv" in module else 2
        layers = {f"{module}.lora_A.weight": torch.randn(2, 4), f"{module}.lora_B.weight": torch.randn(outputs, 2)}
        settings = json.dumps({"transformer.r": 2, "transformer.lora_alpha": 3})
        return ".safetensors", save(layers, {"lora_adapter_metadata": settings} if draw.random() < 0.5 else None)
    if kind == "picture":
        file = path / draw.choice(["p.png", "p.jpg", "p.webp", "p.tiff", "p.bmp", "p.gif"])
        Image.fromarray(np.arange(8 * 9 * 3, dtype=np.uint8).reshape(8, 9, 3)).save(file)
        return file.suffix, file.read_bytes()
    if kind == "prompts":
        return draw.choice(
            [
                (".txt", "a cat\nan “é” dog\n".encode()),
                (".jsonl", b'{"prompt": "a cat", "include": [{"class": "cat"}]}\n{"prompt": "b"}\n'),
                (".tsv", b"Prompt\tCategory\na cat\tx\n"),
                (".csv", b'prompt,x\r\n"a, cat",y\r\n'),
            ]
        )
    if kind == "calibration":
        sampler = {"dynamics": "cps", "num_steps": 2, "steps": [0], "sigmas": [1.0, 0.5, 0.0]}
        rule = Staircase([0.7, 0.0], Limits(0.1, 1.0))
        report.write_document(path / "c.json", report.document(rule, sampler, [], {}, {}, {}))
        return ".json", (path / "c.json").read_bytes()
    if kind == "metrics":
        return ".jsonl", b'{"iteration": 1, "reward": 0.5}\n{"iteration": 2, "reward": null}\n'
    return ".yaml", dump_yaml(load_config(draw.choice(["embedded_dense", "embedded_branched"]))).encode()


def misread(warm: Warm, draw: random.Random, path: Path) -> None:
    """Twenty changed files of one kind: each is read or refused in words, and nothing else."""
    kind = draw.choice(["adapter", "picture", "prompts", "calibration", "metrics", "configuration"])
    suffix, data = originals(kind, draw, path)
    files = []
    for number in range(20):
        file = path / f"{number}{suffix}"
        file.write_bytes(changed(data, draw))
        files.append(str(file))
    warm.ends(warm.run(do="read", kind=kind, files=files), 0, 2)


ODD = [
    None,
    True,
    -1,
    0,
    10**30,
    1e308,
    float("inf"),
    float("nan"),
    "",
    "x" * 5000,
    [],
    {},
    [[]],
    {"a": {"b": []}},
    "\0",
]


def misconfigure(warm: Warm, draw: random.Random, path: Path) -> None:
    """Odd values of three options: the configuration is sound, or is refused by name."""
    settings = yaml.safe_load(dump_yaml(load_config("embedded_dense")))
    for _ in range(draw.randint(1, 3)):
        section = draw.choice([name for name, value in settings.items() if isinstance(value, dict)])
        settings[section][draw.choice(list(settings[section]))] = draw.choice(ODD)
    file = path / "odd.yaml"
    file.write_text(yaml.safe_dump(settings, allow_unicode=True))
    warm.ends(warm.run(do="read", kind="configuration", files=[str(file)]), 0, 2)


def misuse(warm: Warm, draw: random.Random, path: Path) -> None:
    """Sample and evaluate on a run with a damaged file."""
    run = shutil.copytree(warm.finished, path / "run")
    files = [run / "config.yaml", run / "adapter" / "pytorch_lora_weights.safetensors", run / "SHA256SUMS"]
    file = draw.choice([*files, *run.glob("checkpoints/*/*")])
    file.write_bytes(changed(file.read_bytes(), draw))
    if draw.random() < 0.5:
        shutil.rmtree(run / "adapter")
    few = ["--evaluation.num_steps=1", "--evaluation.num_prompts=2"]
    if draw.random() < 0.5:
        arguments = ["a red circle", f"--adapter={run}", f"--output={path / 'out'}", "--seeds=0", "--steps=1"]
        found = warm.run(do="sample", arguments=arguments)
    else:
        found = warm.run(do="evaluate", arguments=["base", str(run), *few])
    warm.ends(found, *DOCUMENTED)


FAULTS = [misread, kill, misconfigure, flip, misread, misbehave, delete, misread, misuse, fill, misconfigure, stop]


@pytest.mark.parametrize(
    "seed", [pytest.param(seed, marks=pytest.mark.ci if seed < QUICK else pytest.mark.slow) for seed in range(ALL)]
)
def test_nothing_bad_gets_through_in_silence(warm: Warm, seed: int, tmp_path: Path) -> None:
    FAULTS[seed % len(FAULTS)](warm, random.Random(seed), tmp_path)
