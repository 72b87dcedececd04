"""What a run directory says of its run, finished or not: the one source of the report, `watch` and `compare`."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from densegrpo_fast.common.errors import SetupError
from densegrpo_fast.run_files.metrics import read_metrics
from densegrpo_fast.run_files.run_directory import CONFIG_FILE, METRICS_FILE, SAMPLES, STRIPS

Record = Mapping[str, Any]

_ITERATION = re.compile(r"iteration-([0-9]+)")


@dataclass(frozen=True)
class HeldOutScores:
    """One held-out evaluation.

    Attributes:
        prompts: N sentences.
        scores: reward -> [N, S] float64, NaN = missing; "reward" is the weighted sum.
    """

    prompts: list[str]
    scores: dict[str, np.ndarray]


@dataclass(frozen=True)
class RunData:
    """A run, as its directory has it now.

    Attributes:
        directory: of the run.
        config_yaml, settings: the resolved configuration, as text and read.
        records: one per iteration, as in metrics.jsonl.
        evaluations: iterations done -> what was found then, in increasing order; 0 is before training.
        finished: whether the evaluation after training is there.
    """

    directory: Path
    config_yaml: str
    settings: dict[str, Any]
    records: list[dict[str, Any]]
    evaluations: dict[int, HeldOutScores]
    finished: bool

    @property
    def name(self) -> str:
        return self.directory.resolve().name

    @property
    def total(self) -> int:
        """Iterations of the whole run."""
        return int(self.settings["run"]["iterations"])

    @property
    def done(self) -> int:
        """Iterations done."""
        return max((int(record["iteration"]) for record in self.records), default=0)

    def samples(self) -> dict[int, Path]:
        """Grids of held-out pictures by iterations done, in increasing order."""
        return self._pictures(SAMPLES)

    def strips(self) -> dict[int, Path]:
        """Strips by iterations done, in increasing order."""
        return self._pictures(STRIPS)

    def _pictures(self, folder: str) -> dict[int, Path]:
        named = {path: self._iteration(path.stem) for path in (self.directory / folder).glob("*.png")}
        # a run that was resumed from an earlier checkpoint may have left later ones
        found = {iteration: path for path, iteration in named.items() if iteration is not None}
        return {iteration: found[iteration] for iteration in sorted(found) if iteration <= self.done}

    def _iteration(self, stem: str) -> int | None:
        return _iteration(stem, self.done if self.finished else None)


def read_run(directory: Path) -> RunData:
    """Read a run directory, also while the run goes on.

    Raises:
        SetupError: there is no run in it, or a file of it is damaged.
    """
    config, metrics = directory / CONFIG_FILE, directory / METRICS_FILE
    if not config.is_file():
        raise SetupError(f"{directory}: there is no run here (no {CONFIG_FILE})")
    try:
        text = config.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
        records = read_metrics(metrics) if metrics.is_file() else []
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise SetupError(f"{directory}: the run cannot be read: {error}") from None
    run = settings.get("run") if isinstance(settings, dict) else None
    if not isinstance(run, dict) or not isinstance(run.get("iterations"), int):
        raise SetupError(f"{config}: expected the settings of a run, with run.iterations")
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get("iteration"), int):
            raise SetupError(f"{metrics} is damaged: line {number} has no whole number as iteration")
    done = max((record["iteration"] for record in records), default=0)
    found: dict[int, HeldOutScores] = {}
    finished = False
    for path in sorted(directory.glob("evaluation-*.json")):
        stem = path.stem.removeprefix("evaluation-")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            own = document.get("iteration", _iteration(stem, run["iterations"]))
            scores = {name: np.array(_numbers(rows), dtype=float) for name, rows in document["scores"].items()}
            evaluation = HeldOutScores(list(document["prompts"]), scores)
            if not (own is None or isinstance(own, int)):
                raise ValueError(f"expected a whole number as iteration, got {own!r}")
            if own is None or own > done:
                continue
            if "reward" not in scores or any(len(rows) != len(evaluation.prompts) for rows in scores.values()):
                raise ValueError("expected scores of every prompt, also by the weighted sum (reward)")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise SetupError(f"{path} is damaged: {error}") from None
        finished |= stem == "after"
        found[own] = evaluation
    return RunData(directory, text, settings, records, {key: found[key] for key in sorted(found)}, finished)


def version(directory: Path) -> str:
    """A text that changes whenever a file of `read_run` or a picture of the run does."""
    files = [directory / CONFIG_FILE, directory / METRICS_FILE, *directory.glob("evaluation-*.json")]
    files += [*directory.glob(f"{SAMPLES}/*.png"), *directory.glob(f"{STRIPS}/*.png")]
    digest = hashlib.sha256()
    for path in sorted(files):
        try:
            state = path.stat()
        except OSError:
            continue
        digest.update(f"{path.name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]


def _iteration(stem: str, after: int | None) -> int | None:
    """Iterations done that a file's name tells of."""
    if stem in ("before", "after"):
        return 0 if stem == "before" else after
    match = _ITERATION.fullmatch(stem)
    return int(match[1]) if match else None


def _numbers(rows: list[list[float | None]]) -> list[list[float]]:
    return [[math.nan if value is None else value for value in row] for row in rows]
