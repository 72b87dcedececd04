"""Does a dense reward learn more than a sparse one? Paired runs from equal starts.

    OMP_WAIT_POLICY=PASSIVE python -m benches.learning.study --seeds 0 1 2 --work runs/study

Runs of one seed share start, prompts and all noise, whatever their variant. Held-out scores are taken every few
iterations; time and operations are those of the training phases alone. A study that was stopped goes on where it was:
finished runs are kept in the output, and with --work also the checkpoints of the unfinished one. The same line with
--work may be started several times at once: its processes share the runs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from time import process_time
from typing import Any

from benches.common.claim import claimed
from benches.common.record import load_average, portable
from benches.learning.study_document import CPU_BUDGET, StudyDocument, differing
from densegrpo_fast.common.errors import OutputError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.config.yaml_files import parse_yaml
from densegrpo_fast.run_files.metrics import read_metrics
from densegrpo_fast.run_files.run_directory import holds_run

Train = Callable[..., int]
"""`train(config, resume=...)`, returning the exit code: `densegrpo_fast.train.train`."""


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        variants: presets or configuration files.
        seeds: one run of every variant for each.
        evaluate_every: iterations between held-out evaluations; None = as each variant says.
        overrides: options of all variants, as `key=value`.
        against: the variant that the others are compared with, each minus it; None = the first minus each other.
    """

    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    evaluate_every: int | None
    overrides: tuple[str, ...] = ()
    against: str | None = None

    def order(self) -> Iterator[tuple[int, str]]:
        """Seed and variant of every run: variants take turns, and which one begins alternates."""
        for index, seed in enumerate(self.seeds):
            for variant in self.variants if index % 2 == 0 else reversed(self.variants):
                yield seed, variant

    def config(self, variant: str, seed: int, directory: Path) -> Config:
        """The configuration of one run.

        Raises:
            UsageError: naming what is wrong.
        """
        own = [f"seed={seed}", f"run.output_dir={directory}"]
        own += [] if self.evaluate_every is None else [f"evaluation.every={self.evaluate_every}"]
        return parse_arguments(["--config", variant, *self.overrides, *own])[0]

    def settings(self) -> dict[str, Any]:
        """The options of every variant, without what differs between its runs."""
        found = {}
        for variant in self.variants:
            settings = self.config(variant, self.seeds[0], Path("run")).model_dump(mode="json", exclude={"seed"})
            del settings["run"]["output_dir"]
            found[_name(variant)] = portable(settings)
        return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    options = _parser().parse_args(arguments)
    iterations = [] if options.iterations is None else [f"run.iterations={options.iterations}"]
    overrides = (*options.override, *iterations)
    plan = Plan(tuple(options.variants), tuple(options.seeds), options.evaluate_every, overrides, options.against)
    scratch = tempfile.TemporaryDirectory(prefix="study-") if options.work is None else nullcontext(options.work)
    with user_errors_exit(), scratch as work:
        from densegrpo_fast.train import train

        return int(conduct(plan, options.output, Path(work).resolve(), train))


def conduct(plan: Plan, output: Path, work: Path, train: Train) -> int:
    """Do the runs that `output` does not hold yet and no other process is doing, and write it and its plot after each.

    Args:
        plan: the runs.
        output: JSON file; the plot lies beside it, with the ending .png.
        work: the run directories go here, and beside each a file by which its run is claimed.
        train: does one run.

    Returns:
        exit code; that of an interrupted run ends the study.

    Raises:
        UserError: an option is wrong, a run failed, or `output` holds something that these runs cannot be added to.
    """
    document = StudyDocument(output, plan.settings(), None if plan.against is None else _name(plan.against))
    for seed, variant in plan.order():
        name = _name(variant)
        if document.holds(name, seed):
            continue
        directory, load = work / f"{name}-{seed}", load_average()
        with claimed(work / f"{name}-{seed}.claim") as claim:
            if claim is None:
                print(f"study: {name}, seed {seed}: another process is at it", file=sys.stderr)
                continue
            if document.holds(name, seed):  # that process has just finished it
                continue
            print(f"study: {name}, seed {seed}", file=sys.stderr)
            config, goes_on = plan.config(variant, seed, directory), holds_run(directory)
            before, start = claim.cpu_seconds if goes_on else 0.0, process_time()
            try:
                code = ExitCode.OK if goes_on and finished(directory, config) else train(config, resume=goes_on)
            finally:
                spent = None if before is None else before + process_time() - start
                claim.keep(spent)
            if code != ExitCode.OK:
                return code
            about = {"variant": name, "seed": seed, "load_average": {"start": load, "end": load_average()}}
            document.add(about | {"cpu_seconds": spent} | read_run(directory))
    print(summary(document.refresh()))
    return ExitCode.OK


def finished(directory: Path, config: Config) -> bool:
    """Whether a run directory holds this very run, done to its end, so that there is nothing to train.

    Raises:
        OutputError: it holds a finished run of other settings.
    """
    if not (directory / "evaluation-after.json").is_file():
        return False
    made = parse_yaml((directory / "config.yaml").read_text("utf-8"), "config.yaml")
    wanted = config.self_contained().model_dump(mode="json")
    if read_metrics(directory / "metrics.jsonl")[-1]["iteration"] != config.run.iterations:
        return False
    # what only says where and how a run is written may differ
    others = [option for option in differing(made, wanted) if not option.startswith("run.")]
    if others or made["seed"] != wanted["seed"]:
        raise OutputError(f"{directory} holds a run with another {', '.join(others or ['seed'])}; move it away")
    return True


def read_run(directory: Path) -> dict[str, Any]:
    """What the study keeps of a finished run directory: `points`, `before` and `after`, as in `comparison`."""
    before, after = (_scores(directory / f"evaluation-{when}.json") for when in ("before", "after"))
    seconds, nfe = Counter[str](), Counter[str]()
    points = [{"iteration": 0, "seconds": {}, "nfe": {}, "held_out": _means(before)}]
    records = read_metrics(directory / "metrics.jsonl")
    for record in records:
        for total, prefix in ((seconds, "time/"), (nfe, "nfe/")):
            total.update({key.removeprefix(prefix): record[key] for key in record if key.startswith(prefix)})
        held_out = {key.removeprefix("eval/"): record[key] for key in record if key.startswith("eval/")}
        if record is records[-1]:
            held_out = _means(after)
        if held_out:
            totals = {"seconds": dict(seconds), "nfe": dict(nfe)}
            points.append({"iteration": record["iteration"], **totals, "held_out": held_out})
    return {"points": points, "before": before, "after": after}


def summary(document: dict[str, Any]) -> str:
    """The comparisons in words, one line per score and kind."""
    lines: list[str] = []
    if not document["runs"]:
        return "no run is finished yet"
    for comparison in document["comparisons"]:
        lines.append(f"{comparison['first']} minus {comparison['second']}, {len(comparison['seeds'])} seeds, 95%:")
        for score, result in comparison["scores"].items():
            kinds = {
                "equal iterations": result["equal_iterations"][-1],
                "equal seconds": result["equal_seconds"],
                "equal compute": result["equal_compute"],
                "equal iterations, over prompts": result["equal_iterations_over_prompts"],
            }
            lines += [
                f"  {score:16} {kind:31} {value['mean']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"
                for kind, value in kinds.items()
                if value is not None
            ]
    if document["noisy"]:
        lines.append("  timings are noisy, so nothing is compared at equal seconds: repeat on a quieter machine")
    if document["over_budget"]:
        lines.append(f"  more than {CPU_BUDGET:.0f} CPU seconds: {', '.join(document['over_budget'])}")
    if document["unknown_cpu_seconds"]:
        lines.append(f"  CPU seconds not known: {', '.join(document['unknown_cpu_seconds'])}")
    return "\n".join(lines)


def _scores(path: Path) -> dict[str, list[list[float | None]]]:
    # a missing score is NaN there, which is not JSON and does not equal itself
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)["scores"]


def _means(scores: dict[str, list[list[float | None]]]) -> dict[str, float | None]:
    present = {name: [v for row in rows for v in row if v is not None] for name, rows in scores.items()}
    return {name: sum(values) / len(values) if values else None for name, values in present.items()}


def _name(variant: str) -> str:
    return Path(variant).stem


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one pair of runs each")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["embedded_dense", "embedded_sparse"],
        help="presets or files",
    )
    parser.add_argument(
        "--against", metavar="NAME", help="compare each variant minus this one; else the first one minus each other"
    )
    parser.add_argument("--iterations", type=int, help="iterations of every run; the preset's if not given")
    parser.add_argument("--evaluate-every", type=int, default=5, help="iterations between held-out evaluations")
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="options of all variants")
    parser.add_argument(
        "--output", type=Path, default=Path("runs/study.json"), help="JSON file, with the plot beside it"
    )
    parser.add_argument("--work", type=Path, help="run directories, to go on with and to share; else temporary")
    return parser


if __name__ == "__main__":
    sys.exit(main())
