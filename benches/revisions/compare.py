"""Does this checkout still compute what an older revision computed? Runs both and compares every number, bit for bit.

    python -m benches.revisions.compare --keep ../comparison                      everything
    python -m benches.revisions.compare --keep ../comparison --only ops configs   seconds instead of minutes
    python -m benches.revisions.compare --keep ../comparison --only presets --presets embedded_dense embedded_paper

The old revision gets a worktree and an environment of its own. Both sides run on this machine's CPU, one thread per
process, on the old revision's embedded weights. With --keep what the old side wrote is used again, so that a second
comparison runs this checkout alone. What is compared:

    configs   the resolved options of every preset
    presets   a short training run of every embedded preset, and of `VARIANTS`: metrics without seconds and memory,
              evaluation scores, pictures, checkpoints and adapter; of the other presets what a dry run prints
    ops       step, log-probability, KL, jump and loss with their gradients: dynamics, dtypes, implementations, guidance
    resume    runs that the old revision began, continued by either

What only this checkout has is listed and is no difference; `RENAMED` says what changed its name. Exit code 1 if
anything differs or fails. This checkout is imported from where it stands, whatever is installed; the compiled library
of both sides is brought up to date first.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PROBE = Path(__file__).with_name("op_outputs.py")
KINDS = ("configs", "presets", "ops", "resume")

RENAMED: dict[str, str] = {
    "lookahead.guard_every": "lookahead.monitor_every",
    "lookahead.guard_alarm": "lookahead.monitor_alarm",
    **{
        f"guard/{name}": f"monitor/{name}"
        for name in ("spearman_rewards", "spearman_gains", "spearman_gains_worst_step", "sign_agreement")
    },
    **{f"{kind}/guard": f"{kind}/monitor" for kind in ("nfe", "nfe_guided", "nfe_unguided", "flops")},
}
"""Old name -> new name of an option, a metric, a tensor, or a file of a run directory."""

PHASES = {"guard": "monitor"}
"""Old name -> new name of a phase, as a dry run prints it."""

IGNORED = ("time/", "memory/", "cpu_seconds", "metrics_position", "metrics_digest", "run.output_dir", "lookahead.head")
"""Beginnings of names that are measured, that say where a run is, or of options that are gone and had no effect."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "bfloat16": ("embedded_dense", {"model.dtype": "bfloat16", "credit.smoothing": 1.0}),
    "cheap": (
        "embedded_paper",
        {
            "lookahead.plan": "nodes",
            "lookahead.nodes": "[4,7]",
            "lookahead.guidance": "cond_only",
            "lookahead.decoder": "preview",
            "lookahead.cache": "text:own",
            "reward.overlap": "true",
            "lookahead.chunk": 8,
        },
    ),
    "copy": ("embedded_dense", {"lookahead.copy_dtype": "bfloat16", "sampler.shared_noise": "true", "ema.every": 0}),
    "calibrated": ("embedded_branched", {"calibration.every": 1, "model.gradient_checkpointing": "true"}),
    "drawn": ("embedded_paper", {"objective.trained_steps": 3, "objective.kl_scale": "paper", "optimizer.warmup": 4}),
}
"""Further runs: name -> preset, and options that no preset has."""

RESUMED = ("embedded_dense", "embedded_branched", "embedded_calibrated", "embedded_paper", "embedded_mixgrpo")

LIBRARIES = ("torch", "diffusers", "transformers", "peft", "numpy", "scipy", "safetensors", "pillow")


@dataclass(frozen=True)
class Side:
    """A checkout and the interpreter that runs it."""

    name: str
    root: Path
    python: str

    def run(self, *arguments: str) -> str:
        """Standard output of a Python command in this checkout.

        Raises:
            RuntimeError: it fails; with its last words.
        """
        single = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        environment = os.environ | single | {"OMP_WAIT_POLICY": "PASSIVE", "PYTHONPATH": str(self.root)}
        environment |= {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "DENSEGRPO_IMPLEMENTATION": "auto"}
        command = [self.python, *arguments]
        done = subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, timeout=1800)
        if done.returncode:
            words = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()
            raise RuntimeError(f"the {self.name} side fails with exit code {done.returncode}: {words[-1]}")
        return done.stdout

    def facts(self) -> dict[str, str]:
        """Versions of what the numbers depend on. Builds the compiled library, and checks what is imported.

        Raises:
            RuntimeError: the package is imported from elsewhere, or there is no compiled library.
        """
        self.run("setup.py", "-q", "build_ext", "--inplace")
        if not list((self.root / "densegrpo_fast").glob("_native.*")):
            raise RuntimeError(f"{self.root}: the compiled library could not be built")
        code = (
            "import json, importlib.metadata as m, densegrpo_fast, torch; print(json.dumps({'file': "
            "densegrpo_fast.__file__, 'cpu': torch.backends.cpu.get_cpu_capability(), "
            f"**{{name: m.version(name) for name in {LIBRARIES}}}, 'torch': torch.__version__}}))"
        )
        facts = json.loads(self.run("-c", code))
        imported = Path(facts.pop("file")).resolve()
        if self.root.resolve() not in imported.parents:
            raise RuntimeError(f"the {self.name} side imports {imported}, not {self.root}")
        return facts


@dataclass(frozen=True)
class Job:
    """One comparison: `produce` fills a directory for a side; `settings` is what its content depends on."""

    name: str
    settings: Any
    produce: Callable[[Side, Path], object]


class Comparison:
    """The two sides, and the directory that keeps what the old one wrote."""

    def __init__(self, old: Side, new: Side, kept: Path) -> None:
        self.old, self.new, self.kept = old, new, kept
        self.versions, found = old.facts(), new.facts()
        for name, version in self.versions.items():
            if found[name] != version:
                print(f"note: the old side has {name} {version}, this one {found[name]}: numbers may differ by it")

    def of_old(self, job: Job) -> Path:
        """What the old side wrote for a job, now or earlier."""
        key = json.dumps([job.settings, self.versions, str(self.old.root)], sort_keys=True)
        target = self.kept / f"{job.name.replace('/', '-')}-{hashlib.sha256(key.encode()).hexdigest()[:10]}"
        if not target.exists():
            self.kept.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.kept, prefix="unfinished-") as directory:
                stage = Path(directory) / "stage"
                stage.mkdir()
                job.produce(self.old, stage)
                if not target.exists():
                    stage.rename(target)
        return target

    def lines(self, job: Job) -> list[str]:
        """What is to be said of a job; the first word of a line is `equal`, `differs`, `fails` or `note`."""
        try:
            expected = self.of_old(job)
            with tempfile.TemporaryDirectory(prefix="compare-") as directory:
                started = time.monotonic()
                job.produce(self.new, Path(directory))
                seconds = time.monotonic() - started
                differences, added, count = compare(read(expected), read(Path(directory)))
        except (RuntimeError, OSError, ValueError, subprocess.SubprocessError) as error:
            return [f"fails    {job.name}: {error}"]
        notes = [f"note     {job.name}: only new: {', '.join(added)}"] if added else []
        if not differences:
            return [f"equal    {job.name}: {count} values ({seconds:.0f} s)", *notes]
        more = f" (and {len(differences) - 1} more)" if len(differences) > 1 else ""
        return [f"differs  {job.name}: {differences[0]}{more}", *notes]

    def jobs(self, kinds: Sequence[str], wanted: Sequence[str]) -> Iterator[Job]:
        """The comparisons of these kinds; `wanted` presets, or all."""
        presets = sorted(path.stem for path in (self.old.root / "densegrpo_fast" / "configs").glob("*.yaml"))
        if unknown := set(wanted) - set(presets):
            raise SystemExit(f"--presets: the old revision has no {', '.join(sorted(unknown))}")
        presets = [name for name in presets if not wanted or name in wanted]
        configs = {name: Job(f"configs/{name}", name, partial(print_config, name)) for name in presets}
        if "configs" in kinds:
            yield from configs.values()
        if "ops" in kinds:
            yield Job("ops", PROBE.read_text(), run_probe)
        for name in presets:
            if not name.startswith("embedded"):
                if "presets" in kinds:
                    yield Job(f"presets/{name}", ["dry", name], partial(dry_run, name))
                continue
            [options] = read(self.of_old(configs[name])).values()
            short = shortened(options) | {"model.path": str(self.old.root / "densegrpo_fast/embedded/weights")}
            variants = {f"{name}+{variant}": more for variant, (preset, more) in VARIANTS.items() if preset == name}
            if "presets" in kinds:
                for label, more in ({name: {}} | variants).items():
                    yield Job(f"presets/{label}", [name, short | more], partial(train, name, short | more))
            if "resume" in kinds and name in RESUMED:
                begun = short | {"run.iterations": 2}
                start = Job(f"begun/{name}", [name, begun], partial(train, name, begun))
                yield Job(f"resume/{name}", start.settings, partial(self.resume, start))

    def resume(self, start: Job, side: Side, directory: Path) -> None:
        """Continue a copy of what the old side began."""
        shutil.copytree(self.of_old(start), directory, dirs_exist_ok=True)
        side.run("-m", "densegrpo_fast.train", "--resume", str(directory), "--run.iterations", "4")


def print_config(preset: str, side: Side, directory: Path) -> None:
    """Write the resolved options of a preset."""
    text = side.run("-m", "densegrpo_fast.train", "--config", preset, "--print-config")
    (directory / "config.yaml").write_text(text)


def train(preset: str, options: Mapping[str, Any], side: Side, directory: Path) -> None:
    """A run in `directory`."""
    given = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    side.run("-m", "densegrpo_fast.train", "--config", preset, *given, "--run.output_dir", str(directory))


def dry_run(preset: str, side: Side, directory: Path) -> None:
    """Write what a dry run prints, without its seconds."""
    text = side.run("-m", "densegrpo_fast.train", "--config", preset, "--dry-run")
    lines = re.sub(r" +[\d.]+ s ", " ", text).splitlines()
    (directory / "dry_run.json").write_text(json.dumps(lines))


def run_probe(side: Side, directory: Path) -> None:
    """Write the outputs of the ops."""
    side.run(str(PROBE), str(directory / "ops.safetensors"))


def shortened(options: Mapping[str, Any]) -> dict[str, Any]:
    """What makes a run of a preset short: options by name, from all of its options by name."""
    updates = options["optimizer.updates_per_iteration"]
    prompts = 1 if options["sampler.guidance_scale"] > 1 else 2  # guided steps cost twice
    rows = prompts * options["sampler.group_size"] // (options["sampler.branches"] or 1)
    short = {"run.iterations": 2, "data.num_prompts": prompts, "sampler.micro_batch": rows // (2 * updates) or 1}
    short |= {"evaluation.num_prompts": 6, "evaluation.samples_per_prompt": 1, "evaluation.every": 1}
    short |= {"window.every": 1, "calibration.samples": 8, "calibration.rounds": 1, "run.memory_check": "off"}
    return short | {
        key: 1
        for key in ("calibration.every", "lookahead.guard_every")
        if options.get(key, options.get(RENAMED.get(key, key)))
    }


def read(directory: Path) -> dict[str, dict[str, Any]]:
    """The values of every file of a directory that holds some, by name; the metrics first, which tell most."""
    files = [path for path in directory.rglob("*") if path.is_file() and path.name != "manifest.json"]
    files.sort(key=lambda path: (path.name != "metrics.jsonl", path))
    found = {str(path.relative_to(directory)): values(path) for path in files}
    return {name: content for name, content in found.items() if content is not None}


def values(path: Path) -> dict[str, Any] | None:
    """Name -> number, text or tensor; None for a file of another kind."""
    if path.suffix == ".jsonl":
        records = [json.loads(line) for line in path.read_text().splitlines()]
        return {f"{number}: {key}": value for number, record in enumerate(records, 1) for key, value in record.items()}
    if path.suffix == ".json":
        return flat(json.loads(path.read_text()))
    if path.suffix == ".yaml":
        import yaml

        return flat(yaml.safe_load(path.read_text()))
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return dict(load_file(path))
    if path.suffix == ".png":
        import numpy
        import torch
        from PIL import Image

        return {"pixels": torch.from_numpy(numpy.array(Image.open(path)))}
    return None


def flat(value: Any, name: str = "") -> dict[str, Any]:
    """Nested data by dotted names; what is empty stays."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    inner = {key: found for k, v in items for key, found in flat(v, f"{name}.{k}" if name else str(k)).items()}
    return inner or {name: value}


def compare(
    old: Mapping[str, Mapping[str, Any]], new: Mapping[str, Mapping[str, Any]]
) -> tuple[list[str], list[str], int]:
    """Differences, names that only `new` has, and the number of values compared."""
    differences, added, count = [], [], 0
    names = {RENAMED.get(name, name) for name in old}
    added += [name for name in new if name not in names]
    for file, content in old.items():
        there = new.get(RENAMED.get(file, file))
        if there is None:
            differences.append(f"{file} is missing")
            continue
        known = set()
        for key, value in content.items():
            place, colon, name = key.rpartition(": ")
            renamed = place + colon + RENAMED.get(name, name)
            # what the old side wrote before a run was resumed keeps its names
            renamed = renamed if renamed in there else key
            known.add(renamed)
            if name.startswith(IGNORED):
                continue
            count += 1
            if file == "dry_run.json":
                value = re.sub(r"\w+", lambda word: PHASES.get(word[0], word[0]), str(value))
            if renamed not in there:
                differences.append(f"{file}: {key}: old {shown(value)}, new has none")
            elif problem := unequal(value, there[renamed]):
                differences.append(f"{file}: {key}: {problem}")
        extra = dict.fromkeys(key.rpartition(": ")[2] for key in there if key not in known)
        added += [f"{file}: {name}" for name in extra if not name.startswith(IGNORED)]
    return differences, added, count


def unequal(old: Any, new: Any) -> str:
    """How two values differ in a bit; empty if they do not."""
    if hasattr(old, "dtype") and hasattr(new, "dtype"):
        if (old.dtype, old.shape) != (new.dtype, new.shape):
            return f"old {old.dtype} {list(old.shape)}, new {new.dtype} {list(new.shape)}"
        import torch

        bits = [tensor.flatten()[:, None].view(torch.uint8) for tensor in (old, new)]
        apart = (bits[0] != bits[1]).any(dim=1).nonzero().flatten().tolist()
        if not apart:
            return ""
        first, second = (tensor.flatten()[apart[0]].item() for tensor in (old, new))
        return f"element {apart[0]}: old {first!r}, new {second!r} ({len(apart)} of {old.numel()} differ)"
    numbers = [isinstance(value, int | float) and not isinstance(value, bool) for value in (old, new)]
    same = float(old).hex() == float(new).hex() if all(numbers) else type(old) is type(new) and old == new
    return "" if same else f"old {shown(old)}, new {shown(new)}"


def shown(value: Any) -> str:
    """A value in few characters."""
    text = f"{value.dtype} {list(value.shape)}" if hasattr(value, "dtype") else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


@contextmanager
def old_side(revision: str, keep: Path | None, python: str | None) -> Iterator[tuple[Side, Path]]:
    """The old revision's side and the directory for what it writes; without `keep` all of it goes at the end."""
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.check_output([*git, "rev-parse", f"{revision}^{{commit}}"], text=True).strip()
    place = Path(tempfile.mkdtemp(prefix="compare-")) if keep is None else keep.resolve() / commit[:12]
    tree, environment = place / "tree", place / "environment"
    try:
        if not tree.exists():
            place.mkdir(parents=True, exist_ok=True)
            subprocess.run([*git, "worktree", "add", "-q", "--detach", str(tree), commit], check=True)
        if python is None:
            python = str(environment / "bin" / "python")
            if not (environment / "complete").exists():
                print(f"making an environment in {environment}", flush=True)
                make_environment(environment, tree)
        yield Side("old", tree, python), place / "results"
    finally:
        if keep is None:
            subprocess.run([*git, "worktree", "remove", "--force", str(tree)], check=False)
            shutil.rmtree(place, ignore_errors=True)


def make_environment(environment: Path, tree: Path) -> None:
    """Install what the old revision needs, in the versions that are installed here."""
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
    installed = {item.metadata["Name"]: item.version.partition("+")[0] for item in metadata.distributions()}
    pins = environment / "constraints.txt"
    pins.write_text("".join(f"{name}=={number}\n" for name, number in installed.items() if name != "densegrpo-fast"))
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "-q", "-c", str(pins)]
    subprocess.run([*pip, f"torch=={installed['torch']}", "setuptools"], check=True)
    subprocess.run([*pip, "-e", f"{tree}[train]"], check=True)
    (environment / "complete").touch()


def main() -> int:
    """Compare; 0 if nothing differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", default="f883293", metavar="REVISION", help="what to compare with (default f883293)")
    parser.add_argument("--only", nargs="+", choices=KINDS, default=KINDS, help="kinds of comparison (default all)")
    parser.add_argument("--presets", nargs="+", default=(), metavar="NAME", help="only these, with their variants")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="comparisons at a time, one core each")
    parser.add_argument("--old-python", metavar="PATH", help="interpreter with what the old revision needs")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the old side here, or use what is there")
    options = parser.parse_args()
    with old_side(options.old, options.keep, options.old_python) as (old, kept):
        comparison = Comparison(old, Side("new", ROOT, sys.executable), kept)
        said: list[str] = []
        with ThreadPoolExecutor(options.jobs) as pool:
            for lines in pool.map(comparison.lines, comparison.jobs(options.only, options.presets)):
                print("\n".join(lines), flush=True)
                said += lines
    counts = {word: sum(line.startswith(word) for line in said) for word in ("equal", "differs", "fails")}
    print(", ".join(f"{count} {word}" for word, count in counts.items()))
    return int(counts["differs"] + counts["fails"] > 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, subprocess.SubprocessError) as error:
        sys.exit(f"error: {error}")
