"""Does a dense reward learn more than a sparse one? Paired runs from equal starts.

    OMP_WAIT_POLICY=PASSIVE python benches/study.py --seeds 0 1 2 --work runs/study

Runs of one seed share start, prompts and all noise, whatever their variant. Held-out scores are taken every few
iterations; time is that of the training phases alone. A study that was stopped goes on where it was: finished runs
are kept in the output, and with --work also the checkpoints of the unfinished one.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# what is measured is the checkout around this file
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import argparse
import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from _comparison import Run, compare, pairs, seconds_of
from _record import NOISY_SPREAD, RESULTS, hardware, load_average, portable, provenance, spread, write_json

from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import load_config
from densegrpo_fast.exit_codes import ExitCode, UserError, user_errors_exit
from densegrpo_fast.runtime.metrics import read_metrics
from densegrpo_fast.runtime.run_directory import holds_run

Train = Callable[..., int]
"""`train(config, resume=...)`, returning the exit code: `densegrpo_fast.train.train`."""


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        variants: presets or configuration files; the first is compared with each of the others.
        seeds: one run of every variant for each.
        evaluate_every: iterations between held-out evaluations.
        overrides: options of all variants, as `key=value`.
    """

    variants: tuple[str, ...]
    seeds: tuple[int, ...]
    evaluate_every: int
    overrides: tuple[str, ...] = ()

    def order(self) -> Iterator[tuple[int, str]]:
        """Seed and variant of every run: variants take turns, and which one begins alternates."""
        for index, seed in enumerate(self.seeds):
            for variant in self.variants if index % 2 == 0 else reversed(self.variants):
                yield seed, variant

    def config(self, variant: str, seed: int, directory: Path) -> Config:
        """The configuration of one run.

        Raises:
            UserError: exit code 2, naming what is wrong.
        """
        own = [f"seed={seed}", f"evaluation.every={self.evaluate_every}", f"run.output_dir={directory}"]
        return load_config(["--config", variant, *self.overrides, *own])[0]

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
    plan = Plan(tuple(options.variants), tuple(options.seeds), options.evaluate_every, (*options.override, *iterations))
    scratch = tempfile.TemporaryDirectory(prefix="study-") if options.work is None else nullcontext(options.work)
    with user_errors_exit(), scratch as work:
        from densegrpo_fast.train import train

        return int(conduct(plan, options.output, Path(work).resolve(), train))


def conduct(plan: Plan, output: Path, work: Path, train: Train) -> int:
    """Do the runs that `output` does not hold yet, and write it and its plot after each.

    Args:
        plan: the runs.
        output: JSON file; the plot lies beside it, with the ending .png.
        work: the run directories go here.
        train: does one run.

    Returns:
        exit code; that of an interrupted run ends the study.

    Raises:
        UserError: an option is wrong, a run failed, or `output` holds something that these runs cannot be added to.
    """
    document = _opened(output, plan)
    for seed, variant in plan.order():
        name = _name(variant)
        if any((run["variant"], run["seed"]) == (name, seed) for run in document["runs"]):
            continue
        directory, load = work / f"{name}-{seed}", load_average()
        print(f"study: {name}, seed {seed}", file=sys.stderr)
        code = train(plan.config(variant, seed, directory), resume=holds_run(directory))
        if code != ExitCode.OK:
            return code
        about = {"variant": name, "seed": seed, "load_average": {"start": load, "end": load_average()}}
        _add(document, about | read_run(directory))
        _write(document, plan, output)
    print(summary(document))
    return ExitCode.OK


def read_run(directory: Path) -> dict[str, Any]:
    """What the study keeps of a finished run directory: `points`, `before` and `after`, as in `_comparison`."""
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
    lines = []
    for comparison in document["comparisons"]:
        lines.append(f"{comparison['first']} minus {comparison['second']}, {len(comparison['seeds'])} seeds, 95%:")
        for score, result in comparison["scores"].items():
            kinds = {
                "equal iterations": result["equal_iterations"][-1],
                "equal seconds": result["equal_seconds"],
                "equal iterations, over prompts": result["equal_iterations_over_prompts"],
            }
            lines += [
                f"  {score:16} {kind:31} {value['mean']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"
                for kind, value in kinds.items()
            ]
    if document["noisy"]:
        lines.append("  timings are noisy: repeat on a quieter machine before quoting equal seconds")
    return "\n".join(lines)


def _scores(path: Path) -> dict[str, list[list[float | None]]]:
    # a missing score is NaN there, which is not JSON and does not equal itself
    return json.loads(path.read_text(encoding="utf-8"), parse_constant=lambda _: None)["scores"]


def _means(scores: dict[str, list[list[float | None]]]) -> dict[str, float | None]:
    present = {name: [v for row in rows for v in row if v is not None] for name, rows in scores.items()}
    return {name: sum(values) / len(values) if values else None for name, values in present.items()}


def _opened(output: Path, plan: Plan) -> dict[str, Any]:
    """A new document, or the one in `output` if its runs can stand beside the plan's."""
    settings = plan.settings()
    if not output.exists():
        started = load_average()
        return provenance() | {"load_average": {"start": started}, "settings": settings, "runs": []}
    try:
        document = json.loads(output.read_text(encoding="utf-8"))
        known, machine = dict(document["settings"]), document["hardware"]
        list(document["runs"])
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{output} is no readable study; move it away or give another --output", ExitCode.OUTPUT
        ) from None
    both = known.keys() & settings.keys()
    differing = [f"{name}.{key}" for name in both for key in _differing(known[name], settings[name])]
    fixed = {key: value for key, value in hardware().items() if key != "load_average"}
    differing += [f"hardware.{key}" for key, value in fixed.items() if machine.get(key) != value]
    if differing:
        raise UserError(
            f"{output} holds runs with another {', '.join(sorted(differing))}; give another --output", ExitCode.OUTPUT
        )
    document["settings"] = known | settings
    return document


def _differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Dotted names of the options in which two sets of settings differ."""
    names = {(section, key) for section in one.keys() & other.keys() if section != "preset" for key in one[section]}
    return sorted(f"{section}.{key}" for section, key in names if one[section][key] != other[section].get(key))


def _add(document: dict[str, Any], run: Run) -> None:
    """Keep a run, which must have started where the others did: scores of other weights cannot be paired."""
    for other in document["runs"][:1]:
        if run["before"] != other["before"]:
            raise UserError(
                f"{run['variant']}, seed {run['seed']}, did not start like {other['variant']}, seed {other['seed']}: "
                "their first held-out scores differ, so model or machine changed; give another --output",
                ExitCode.OUTPUT,
            )
    made = provenance()
    document |= made
    document["runs"].append(run | {"commit": made["commit"]})


def _write(document: dict[str, Any], plan: Plan, output: Path) -> None:
    from _study_plot import save_plot

    names, runs = [_name(variant) for variant in plan.variants], document["runs"]
    document["load_average"]["end"] = load_average()
    document["noisy"] = _noisy(runs)
    document["comparisons"] = [compare(runs, names[0], other) for other in names[1:] if pairs(runs, names[0], other)]
    write_json(output, document)
    observed = document["settings"][names[0]]["reward"]["observed"]
    save_plot(output.with_suffix(".png"), runs, names, ["reward", *observed])


def _noisy(runs: Sequence[Run]) -> bool:
    """Whether the seconds per iteration of a variant vary too much, over the parts of its runs between evaluations."""
    rates: dict[str, list[float]] = {}
    for run in runs:
        iterations = [point["iteration"] for point in run["points"]]
        own = rates.setdefault(run["variant"], [])
        for elapsed, span in zip(pairwise(seconds_of(run)), pairwise(iterations), strict=True):
            own.append((elapsed[1] - elapsed[0]) / (span[1] - span[0]))
    return any(spread(values) > NOISY_SPREAD for values in rates.values())


def _name(variant: str) -> str:
    return Path(variant).stem


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one pair of runs each")
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["embedded_dense", "embedded_sparse"],
        help="presets or files; the first is compared with the others",
    )
    parser.add_argument("--iterations", type=int, help="iterations of every run; the preset's if not given")
    parser.add_argument("--evaluate-every", type=int, default=5, help="iterations between held-out evaluations")
    parser.add_argument("--override", nargs="+", default=[], metavar="KEY=VALUE", help="options of all variants")
    parser.add_argument(
        "--output", type=Path, default=RESULTS / "study.json", help="JSON file, with the plot beside it"
    )
    parser.add_argument("--work", type=Path, help="keep the run directories here; else they are temporary")
    return parser


if __name__ == "__main__":
    sys.exit(main())
