"""The board: what every method needs to lift the held-out reward to the same marks.

    OMP_WAIT_POLICY=PASSIVE python -m benches.learning.board tune --work runs/board
    OMP_WAIT_POLICY=PASSIVE python -m benches.learning.board run --work runs/board

The protocol is README.md beside this file. `tune` does one run per method and learning rate, `run` those of five seeds
at the chosen rates; each may be started several times at once and stopped. `seconds` times all methods interleaved, and
`table` computes the board from all of these, and from WORK/judge.json (`benches.judge.judge`) if that is there.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from time import process_time
from typing import Any

from benches.common.operations import IterationOperations
from benches.common.record import RESULTS, provenance, write_json
from benches.learning.marks import board
from benches.learning.study import Plan, conduct
from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.config.yaml_files import parse_yaml

VARIANTS = Path(__file__).resolve().parent.parent / "variants" / "board"
METHODS = (
    "sparse",
    "dense_exact",
    "dense_drawn",
    "branches",
    "sparse_drawn",
    "g2rpo",
    "tempflow",
    "turning_point",
    "stepwise",
)
"""The rows; the first is what the others are compared with."""
SPARSE = METHODS[0]
RATES = (5e-4, 1e-3, 2e-3)
SEEDS = (1, 2, 3, 4, 5)
ITERATIONS, EVALUATIONS = 48, 6
"""Of a sparse run; every other run has its operations, and as many evaluations."""
TUNING_SEED, TUNING_SHARE = 0, 0.5
_COUNTED = 200
"""Iterations over which the operations of drawn steps are averaged."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    options = _parser().parse_args(arguments)
    methods = tuple(options.methods)
    study, tuning, timed = (options.work / f"{part}.json" for part in ("study", "tuning", "seconds"))
    with user_errors_exit():
        if unknown := set(methods) - set(METHODS):
            raise UsageError(f"--methods: expected some of {', '.join(METHODS)}, got {', '.join(sorted(unknown))}")
        if options.stage == "seconds":
            write_json(timed, seconds(methods, options.rounds))
            return ExitCode.OK
        if options.stage == "table":
            found = board(read(study), read(timed)["seconds"], SPARSE) | {
                "retained_over_sparse": retained_share(),
                "tuning": {method: rates(read(tuning), method) for method in methods},
            }
            if (judge := options.work / "judge.json").exists():
                found["judge"] = judged(read(judge))
            write_json(options.output, provenance() | {"runs_of": read(study)["commit"], "scenes": found})
            return ExitCode.OK
        from densegrpo_fast.train import train

        work = options.work.resolve()
        if options.stage == "tune":
            part = work / "tuning"
            files = [
                variant(method, rate, TUNING_SHARE, part, name=f"{method}_{rate:g}")
                for rate in RATES
                for method in methods
            ]
            return int(conduct(Plan(tuple(files), (TUNING_SEED,), None), tuning, part, train))
        files = [variant(method, best_rate(tuning, method), 1.0, work, name=method) for method in methods]
        return int(conduct(Plan(tuple(files), SEEDS, None, against=SPARSE), study, work, train))


def variant(method: str, rate: float, share: float, work: Path, *, name: str) -> str:
    """Write the configuration of a method's runs and return its path.

    Args:
        method: one of `METHODS`.
        rate: learning rate.
        share: of the operations and evaluations of a whole run.
        work: directory of the file.
        name: of the file.
    """
    path, evaluations = work / f"{name}.yaml", round(EVALUATIONS * share)
    settings = parse_yaml((VARIANTS / f"{method}.yaml").read_text("utf-8"), method)
    each = max(1, round(ITERATIONS * share * per_iteration(SPARSE) / per_iteration(method) / evaluations))
    settings.setdefault("optimizer", {})["lr"] = rate
    settings["run"] = {"iterations": evaluations * each}
    settings["evaluation"]["every"] = each
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
    return str(path)


def configuration(method: str) -> Config:
    """Of a method, with the rate of the preset that it extends."""
    return parse_arguments(["--config", str(VARIANTS / f"{method}.yaml")])[0]


def per_iteration(method: str) -> float:
    """Operations of a method's iteration, the mean over its draws."""
    counted = IterationOperations(configuration(method))
    return fmean(counted.iteration(iteration) for iteration in range(_COUNTED))


def retained_share() -> float:
    """Operations of a sparse iteration that repeats no forward, over those of the one that was run."""
    counted = IterationOperations(configuration(SPARSE))
    cost = counted.cost((True,) * 9 + (False,), range(9))
    return replace(cost, streamed=True).flops(counted.unit) / cost.flops(counted.unit)


def best_rate(tuning: Path, method: str) -> float:
    """The learning rate that the protocol takes.

    Raises:
        UsageError: a run of the tuning is missing.
    """
    found = rates(read(tuning), method)
    if missing := [f"{rate:g}" for rate in RATES if f"{rate:g}" not in found]:
        raise UsageError(f"{tuning} has no run of {method} at {', '.join(missing)}; finish `board.py tune` first")
    return max(RATES, key=lambda rate: found[f"{rate:g}"])


def rates(tuning: Mapping[str, Any], method: str) -> dict[str, float]:
    """Held-out reward of a method's tuning runs by learning rate, the mean of the last two evaluations."""
    points = {run["variant"]: run["points"] for run in tuning["runs"]}
    names = {f"{rate:g}": f"{method}_{rate:g}" for rate in RATES}
    return {
        rate: fmean(point["held_out"]["reward"] for point in points[name][-2:])
        for rate, name in names.items()
        if name in points
    }


def judged(document: Mapping[str, Any]) -> dict[str, Any]:
    """From the judge's document: how it measured, and every method's mean over the seeds and difference to sparse's.

    Returns:
        settings, `methods` and `minus_sparse`; in the latter two by method and measure: mean, low and high.
    """

    def rounded(values: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
        return {name: {part: round(number, 5) for part, number in own.items()} for name, own in values.items()}

    return {
        "settings": document["settings"],
        "measures": document["measures"],
        "methods": {method: rounded(values) for method, values in document["variants"].items()},
        "minus_sparse": {one["first"]: rounded(one["measures"]) for one in document["comparisons"]},
    }


def read(path: Path) -> dict[str, Any]:
    """A document of an earlier stage.

    Raises:
        UsageError: it is not there yet.
    """
    try:
        return json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        raise UsageError(
            f"{path} is not there: run `board.py tune`, `run` and `seconds` with this --work first"
        ) from None


def seconds(methods: Sequence[str], rounds: int) -> dict[str, Any]:
    """CPU seconds of a training iteration of every method, interleaved, and their medians."""
    from densegrpo_fast.training.trainer import Trainer

    trainers = {method: Trainer(configuration(method)) for method in methods}
    spent: dict[str, list[float]] = {method: [] for method in methods}
    for iteration in range(rounds + 1):
        for method, trainer in trainers.items():
            start = process_time()
            trainer.step(iteration)
            # the first one of each warms up
            spent[method] += [process_time() - start] if iteration else []
    return provenance() | {"rounds": spent, "seconds": {method: median(own) for method, own in spent.items()}}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("stage", choices=("tune", "run", "seconds", "table"), help="what to do")
    parser.add_argument("--methods", nargs="+", default=METHODS, metavar="NAME", help="some of the rows")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/board"), help="run directories, to go on with and to share"
    )
    parser.add_argument("--rounds", type=int, default=5, help="iterations of each method that are timed")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "board.json", help="the board; its parts lie beside it"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
