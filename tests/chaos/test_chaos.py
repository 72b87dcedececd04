"""Faults by the seed: kills, signals, full disks, flipped bits, bad files and bad code. Nothing may pass in silence.

Whatever happens, a command ends within a minute, with a documented status and without a traceback; a run that goes on
ends with the very weights and records of an undisturbed one; and what was damaged is refused, or was of no influence.
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from densegrpo_fast.calibration import report
from densegrpo_fast.calibration.rules import Limits, Staircase
from densegrpo_fast.common.exit_codes import ExitCode
from densegrpo_fast.common.files import replace_bytes
from densegrpo_fast.config.cli import load_config
from densegrpo_fast.config.yaml_files import dump_yaml
from densegrpo_fast.models.prompt_cache import PromptCache
from densegrpo_fast.models.tiny import tiny_model

sys.path.insert(0, str(Path(__file__).parent))

import inputs  # noqa: E402

DOCUMENTED = {int(code) for code in ExitCode} - {ExitCode.FAULT, ExitCode.PROBLEM}
WAITS = 40
"""A run of two iterations waits for the disk about so often."""
SECONDS = 1.5
"""A run of two iterations computes about so long."""
TOGETHER = 20
"""Changed files, requests or replies of one case."""
AGAIN = 4
"""Most kills or signals of one case."""
FEW = 5
"""Adapter or model directories, or flips, of one case."""


KILLED = (-signal.SIGKILL, -signal.SIGVTALRM)


def saved_pipelines(directory: Path) -> list[Path]:
    """Small random pipelines of several families, saved as diffusers does."""
    found = []
    for kind in ("StableDiffusion3Pipeline", "StableDiffusionXLPipeline", "FluxPipeline"):
        model = tiny_model(kind)
        model.pipeline.save_pretrained(directory / kind)
        found.append(directory / kind)
    return found


class Warm:
    """The process of warm.py, and its references: what undisturbed runs leave behind."""

    def __init__(self, arguments: list[str], model: Path, directory: Path):
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
        self.pipelines = [model, *saved_pipelines(directory)]

    @cached_property
    def of_all_weights(self) -> Warm:
        """The same for runs that train the whole network."""
        other = copy(self)
        other.arguments = [word for word in self.arguments if not word.startswith("--lora.")] + ["--model.train=full"]
        other.finished = self.directory / "finished of all weights"
        other.ends(other.train(other.finished), 0)
        other.expected = left_by(other.finished)
        return other

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
    warm = Warm([word for word in arguments if not word.startswith("--run.output_dir")], train.model, directory)
    yield warm
    assert warm.process.stdin is not None
    warm.process.stdin.close()
    warm.process.wait(30)


def left_by(run: Path) -> dict[str, Any]:
    """The weights that a run has exported, and its records without what the clock says."""
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "memory/", "cpu_seconds")
    weights = {file.name: file.read_bytes() for file in run.glob("*/*.safetensors")}
    assert weights, f"{run} has exported nothing"
    return {
        "weights": weights,
        "records": [{k: v for k, v in record.items() if not k.startswith(timed)} for record in records],
        "before": json.loads((run / "evaluation-before.json").read_text()),
    }


def goes_on(warm: Warm, run: Path) -> None:
    """A run that ended early goes on to the end of an undisturbed one."""
    begun = (run / "config.yaml").exists()
    warm.ends(warm.train(run, *(["--resume"] if begun else [])), 0)
    assert left_by(run) == warm.expected


def killed(draw: random.Random) -> dict[str, Any]:
    if draw.random() < 0.5:
        return {"kind": "kill", "signal": int(signal.SIGKILL), "at": draw.randint(1, WAITS)}
    return {"kind": "clock", "after": draw.uniform(0.01, SECONDS)}


def ended(warm: Warm, run: Path, fault: dict[str, Any], *statuses: int) -> bool:
    """Start or continue a run with a fault; whether that ended it early."""
    begun = (run / "config.yaml").exists()
    return warm.ends(warm.train(run, *(["--resume"] if begun else []), fault=fault), *statuses, 0)["status"] != 0


def kill(warm: Warm, draw: random.Random, path: Path) -> int:
    """A run that is killed at any moment, and killed again whenever it goes on, goes on to the same end."""
    run, kills = path / "run", 0
    while kills < AGAIN and ended(warm, run, killed(draw), *KILLED):
        kills += 1
    goes_on(warm, run)
    return kills


def stop(warm: Warm, draw: random.Random, path: Path) -> int:
    """A signal ends a run in order, again and again, and it goes on to the same end."""
    signals, early = 0, True
    while signals < AGAIN and early:
        number = draw.choice([signal.SIGTERM, signal.SIGINT])
        orderly = {signal.SIGTERM: 75, signal.SIGINT: 130}[number]
        fault = {"kind": "signal", "signal": int(number), "at": draw.randint(2, WAITS)}
        early = ended(warm, path / "run", fault, orderly, -number)
        signals += early
    goes_on(warm, path / "run")
    return signals


def fill(warm: Warm, draw: random.Random, path: Path) -> int:
    """A disk that is full or fails ends a run with status 7, and with room again it goes on to the same end."""
    number = draw.choice([errno.ENOSPC, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
    fault: dict[str, Any] = {"kind": "full", "at": draw.randint(1, WAITS), "errno": number}
    if draw.random() < 0.4:
        fault = {"kind": "limit", "bytes": int(10 ** draw.uniform(0, 5))}
    found = warm.train(path / "run", fault=fault)
    warm.ends(found, 7, 0)
    # a small limit is one of what is printed, too
    assert found["status"] == 0 or fault["kind"] == "limit" or os.strerror(number) in found["output"]
    goes_on(warm, path / "run")
    return 1


def whole(warm: Warm, draw: random.Random, path: Path) -> int:
    """Any of these to a run that trains all weights of the network."""
    return draw.choice([kill, stop, fill, delete, flip_run])(warm.of_all_weights, draw, path)


def mute(warm: Warm, draw: random.Random, path: Path) -> int:
    """A terminal, pipe or log that is gone ends nothing."""
    fault = {"kind": "mute", "how": draw.choice(["full", "pipe", "closed"]), "streams": draw.choice([[1], [2], [1, 2]])}
    warm.ends(warm.train(path / "run", fault=fault), 0)
    assert left_by(path / "run") == warm.expected
    return 1


def flip_run(warm: Warm, draw: random.Random, path: Path) -> int:
    """One flipped bit in a run: refused, said, or of no influence."""
    run = shutil.copytree(warm.finished, path / "run")
    file = draw.choice(sorted(file for file in run.rglob("*") if file.is_file() and file.stat().st_size))
    file.write_bytes(inputs.flipped(file.read_bytes(), draw))
    found = warm.train(run, "--resume")
    warm.ends(found, *DOCUMENTED)
    if found["status"] == 0:
        noted = file.name == "metrics.jsonl" and "are not what was written" in found["output"]
        assert noted or left_by(run) == warm.expected, file
    return 1


def flip(warm: Warm, draw: random.Random, path: Path) -> int:
    """One flipped bit in a run, and some in other artefacts."""
    flip_run(warm, draw, path)
    for number in range(FEW - 1):
        kind, original = artefact(warm, draw, path / str(number))
        copied = shutil.copytree(original.parent.parent, path / f"{number}-flipped")
        damaged = copied / original.relative_to(original.parent.parent)
        damaged = draw.choice(sorted(file for file in damaged.parent.iterdir() if file.is_file()))
        damaged.write_bytes(inputs.flipped(damaged.read_bytes(), draw))
        read = str(damaged.with_name(original.name))
        warm.ends(warm.run(do="read", kind=kind, files=[read], same=str(original)), 0, 2)
    return FEW


def artefact(warm: Warm, draw: random.Random, path: Path) -> tuple[str, Path]:
    """An artefact that carries a digest: its kind and a file of it, in a directory of its own two levels deep."""
    kind = draw.choice(["adapter", "cache", "calibration", "preview"])
    directory = path / "artefact"
    directory.mkdir(parents=True)
    if kind == "adapter":
        shutil.copytree(warm.finished / "adapter", directory, dirs_exist_ok=True)
        return kind, directory / "pytorch_lora_weights.safetensors"
    if kind == "preview":
        for file in (warm.pipelines[0] / "preview_decoder").iterdir():
            replace_bytes(directory / file.name, file.read_bytes(), digest=True)
        return kind, directory / "config.json"
    if kind == "cache":
        cache = PromptCache(directory, {})
        cache.keep("a cat", {"embeds": torch.randn(3, 4), "pooled": torch.randn(4)})
        return kind, cache.path("a cat")
    calibration(directory / "calibration.json")
    return kind, directory / "calibration.json"


def calibration(path: Path) -> int:
    sampler = {"dynamics": "cps", "num_steps": 2, "steps": [0], "sigmas": [1.0, 0.5, 0.0]}
    rule = Staircase([0.7, 0.0], Limits(0.1, 1.0))
    report.write_document(path, report.document(rule, sampler, [], {}, {}, {}))


def delete(warm: Warm, draw: random.Random, path: Path) -> int:
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
    return 1


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
    "os.fork(); raise ValueError('twice')",
    "f = lambda: f(); f()",
    "sys.stdout.close(); sys.stderr.close(); raise ValueError('mute')",
    "sys.exit([10**5000])",
    "raise ExceptionGroup('g', [SystemExit(0), ValueError()]) if 0 else BaseExceptionGroup('g', [SystemExit(0)])",
]
RETURNED = [
    "return None",
    "return 'good'",
    "return [1.0]",
    "return [float('nan')] * 4",
    "return [10**400] * 4",
    "return [object()] * 4",
    "return args[0]",
    "return {}",
    "return iter([1.0] * 4)",
    "return torch.zeros(4, dtype=torch.complex64)",
    "return torch.zeros(4, device='meta')",
    "return (x for x in [1 / 0])",
    "return [[1.0]] * 4",
    "os.chdir('/'); return [1.0] * 99",
    "del args[0][:]",
    "torch.set_default_dtype(torch.float64); return [1.0] * 99",
]
HANGING = ["import time; time.sleep(600)", "while True: pass"]
REWARD, CREDIT = "--reward.terms={{{}:score: 1.0}}", "--credit.method={}:METHOD"
OWN = {
    "reward": (REWARD, "def score(*args, **kw):\n    {act}\n    return args[0].mean((1, 2, 3))\n"),
    "later": (REWARD, "async def score(*args, **kw):\n    {act}\n    return args[0].mean((1, 2, 3))\n"),
    "making": (REWARD, "class score:\n    def __init__(self):\n        os.environ['x'] = 'y'\n        {do}\n"),
    "import": (REWARD, "{do}\ndef score(*args):\n    return args[0].mean((1, 2, 3))\n"),
    "credit": (
        CREDIT,
        "from densegrpo_fast.credit.registry import CreditMethod\n"
        "def credit(*, rewards, **kw):\n    args = [rewards]\n    {act}\n    return rewards\n"
        "METHOD = CreditMethod(credit, needs=('rewards',))\n",
    ),
}
"""Where code of one's own comes in -> the option that names it, and the code."""


def misbehave(warm: Warm, draw: random.Random, path: Path) -> int:
    """Code of one's own does something: status 5, its name, and what there was stays."""
    own, calls, where = path / "own.py", path / "calls", draw.choice([*OWN, "reward", "reward"])
    option, source = OWN[where]
    behaviour = draw.choice(
        BEHAVIOUR + (RETURNED if where in ("reward", "later", "credit") else []) + HANGING * (where == "reward")
    )
    # a few calls go well
    well = 4 if where in ("reward", "later") else 1
    act = (
        f"open({str(calls)!r}, 'a').write('x')\n    if os.path.getsize({str(calls)!r}) >= {well}:\n        {behaviour}"
    )
    own.write_text("import os, sys, torch\n" + source.replace("{act}", act).replace("{do}", behaviour))
    replaced = [word for word in warm.arguments if not word.startswith("--reward.terms") or option != REWARD]
    options = [option.format(own), "--reward.timeout=2"]
    found = warm.run(do="train", arguments=[*replaced, f"--run.output_dir={path / 'run'}", *options])
    # a file of one's own that fails as it is read is a wrong option
    # that raises what a Ctrl-C does is taken for one
    warm.ends(found, *({"import": [2, 5, 130], "making": [5, 130]}.get(where, [5])))
    missing = "of the scores are missing" in found["output"] or "has no score" in found["output"]
    mute = "close()" in behaviour
    assert str(own) in found["output"] or missing or mute, found["output"]
    return 1


def originals(kind: str, draw: random.Random, path: Path) -> tuple[str, bytes]:
    """The end of a name and the content of a sound file."""
    if kind == "adapter":
        return ".safetensors", inputs.lora_file(draw)
    if kind == "picture":
        return inputs.picture(draw, path)
    if kind == "prompts":
        return inputs.prompts(draw)
    if kind == "calibration":
        calibration(path / "c.json")
        return ".json", (path / "c.json").read_bytes()
    if kind == "metrics":
        return ".jsonl", b'{"iteration": 1, "reward": 0.5}\n{"iteration": 2, "reward": null}\n'
    return ".yaml", dump_yaml(load_config(draw.choice(["embedded_dense", "embedded_branched"]))).encode()


def misread(kind: str) -> Callable[[Warm, random.Random, Path], int]:
    """Many files of one kind, most of them changed: each is read or refused in words, and nothing else."""

    def case(warm: Warm, draw: random.Random, path: Path) -> int:
        files = []
        for number in range(TOGETHER):
            suffix, data = originals(kind, draw, path)
            file = path / f"{number}{suffix}"
            file.write_bytes(inputs.changed(data, draw) if draw.random() < 0.8 else data)
            files.append(str(file))
        warm.ends(warm.run(do="read", kind=kind, files=files), 0, 2)
        return TOGETHER

    return case


def misfit(warm: Warm, draw: random.Random, path: Path) -> int:
    """Adapters in every form: taken with their true scale, or refused in words."""
    found = []
    for number in range(FEW):
        (path / str(number)).mkdir()
        found.append(inputs.adapter(draw, path / str(number)))
    warm.ends(warm.run(do="adapters", adapters=found), 0)
    return FEW


def mismodel(warm: Warm, draw: random.Random, path: Path) -> int:
    """Models in every state: taken for what they are, or refused in words."""
    original, found = draw.choice(warm.pipelines), []
    for number in range(FEW):
        (path / str(number)).mkdir()
        found.append(inputs.model(draw, original, path / str(number)))
    warm.ends(warm.run(do="models", original=str(original), models=found), 0)
    return FEW


def wire(do: str) -> Callable[[Warm, random.Random, Path], int]:
    """Hostile requests, or replies, over the network."""

    def case(warm: Warm, draw: random.Random, path: Path) -> int:
        warm.ends(warm.run(do=do, seed=draw.getrandbits(32), count=TOGETHER), 0)
        return TOGETHER

    return case


def misconfigure(warm: Warm, draw: random.Random, path: Path) -> int:
    """Odd values of three options: the configuration is sound, or is refused by name."""
    settings = yaml.safe_load(dump_yaml(load_config("embedded_dense")))
    for _ in range(draw.randint(1, 3)):
        section = draw.choice([name for name, value in settings.items() if isinstance(value, dict)])
        settings[section][draw.choice(list(settings[section]))] = draw.choice(inputs.ODD)
    file = path / "odd.yaml"
    file.write_text(yaml.safe_dump(settings, allow_unicode=True))
    warm.ends(warm.run(do="read", kind="configuration", files=[str(file)]), 0, 2)
    return 1


def misuse(warm: Warm, draw: random.Random, path: Path) -> int:
    """Sample and evaluate on a run with a damaged file."""
    run = shutil.copytree(warm.finished, path / "run")
    files = [run / "config.yaml", run / "adapter" / "pytorch_lora_weights.safetensors", run / "SHA256SUMS"]
    file = draw.choice([*files, *run.glob("checkpoints/*/*")])
    file.write_bytes(inputs.changed(file.read_bytes(), draw))
    if draw.random() < 0.5:
        shutil.rmtree(run / "adapter")
    few = ["--evaluation.num_steps=1", "--evaluation.num_prompts=2"]
    if draw.random() < 0.5:
        arguments = ["a red circle", f"--adapter={run}", f"--output={path / 'out'}", "--seeds=0", "--steps=1"]
        found = warm.run(do="sample", arguments=arguments)
    else:
        found = warm.run(do="evaluate", arguments=["base", str(run), *few])
    warm.ends(found, *DOCUMENTED)
    return 1


CASES: dict[str, tuple[Callable[[Warm, random.Random, Path], int], int, int]] = {
    "kill": (kill, 4, 80),
    "signal": (stop, 4, 120),
    "full disk": (fill, 3, 60),
    "deleted file": (delete, 4, 60),
    "dead terminal": (mute, 2, 20),
    "all weights": (whole, 0, 40),
    "flip": (flip, 4, 200),
    "user code": (misbehave, 6, 120),
    "adapter": (misfit, 3, 60),
    "model": (mismodel, 3, 60),
    "adapter file": (misread("adapter"), 2, 20),
    "picture": (misread("picture"), 2, 20),
    "prompts": (misread("prompts"), 2, 20),
    "calibration": (misread("calibration"), 1, 10),
    "metrics": (misread("metrics"), 1, 10),
    "configuration": (misread("configuration"), 1, 10),
    "option": (misconfigure, 3, 60),
    "damaged run": (misuse, 3, 40),
    "request": (wire("serve"), 1, 20),
    "reply": (wire("ask"), 1, 20),
}
"""Kind of fault -> what happens in a case, and how many cases there are in continuous integration, and in all."""


@pytest.mark.parametrize(
    ("kind", "seed"),
    [
        pytest.param(kind, seed, marks=pytest.mark.ci if seed < quick else pytest.mark.slow)
        for kind, (_, quick, count) in CASES.items()
        for seed in range(count)
    ],
)
def test_nothing_bad_gets_through_in_silence(
    warm: Warm, kind: str, seed: int, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("faults", CASES[kind][0](warm, random.Random(f"{kind} {seed}"), tmp_path))
