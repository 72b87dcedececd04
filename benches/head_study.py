"""How far more data carries a completion head, and whether it goes stale while the policy learns.

    python benches/head_study.py --work runs/heads

Heads of each plan are trained on more and more trajectories of the starting policy, and judged on held-out groups.
Then a run is trained with the best-taught head of the last plan, which the lookahead monitor keeps fresh; every few
iterations the policy of the moment is completed without a head, by the head as it was before the run, and by the
refreshed one, and each is judged. All of it by the commands a user has. A study that was stopped goes on where it was.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import process_time
from typing import Any

from _record import RESULTS, portable, provenance, write_json

from densegrpo_fast.common.errors import OutputError, SetupError
from densegrpo_fast.common.exit_codes import EXIT_CODES, ExitCode, user_errors_exit

Command = Callable[[Sequence[str]], int]
"""A command's `main`: from its arguments to its exit code."""

KEPT = (
    "spearman_rewards_mean",
    "spearman_gains_mean",
    "spearman_gains_worst_step",
    "sign_agreement",
    "iteration_flops_ratio",
    "forwards",
)
"""What is kept of a fidelity record."""


@dataclass(frozen=True)
class Commands:
    """What the study is done with."""

    completion: Command
    fidelity: Command
    train: Command


@dataclass(frozen=True)
class Study:
    """What is measured.

    Attributes:
        config: preset or file of the policy, its sampler and its run.
        plans: as the fidelity command takes them.
        trajectories: that heads learn from, increasing.
        steps: optimiser steps of every head.
        iterations: of the run; 0 = none.
        every: iterations between two measurements of it.
        monitor_every, refresh: of the run's lookahead monitor, and its optimiser steps.
        groups, group_size: held-out groups, and trajectories of each.
    """

    config: str
    plans: tuple[str, ...]
    trajectories: tuple[int, ...]
    steps: int
    iterations: int
    every: int
    monitor_every: int
    refresh: int
    groups: int
    group_size: int


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    options = vars(_parser().parse_args(arguments))
    work, output = options.pop("work"), options.pop("output")
    study = Study(**{name: tuple(value) if isinstance(value, list) else value for name, value in options.items()})
    with user_errors_exit():
        from densegrpo_fast import completion, train
        from densegrpo_fast.fidelity.__main__ import main as fidelity

        document = conduct(study, work, output, Commands(completion.main, fidelity, train.main))
        print(summary(document))
    return ExitCode.OK


def conduct(study: Study, work: Path, output: Path, commands: Commands) -> dict[str, Any]:
    """Measure what `output` does not hold yet, and write it after each measurement; returns what it holds.

    Raises:
        UserError: a command failed, or `output` holds a study of other settings.
    """
    settings = portable(vars(study))
    document = {"settings": settings, "data": [], "run": []}
    if output.exists():
        document = json.loads(output.read_text(encoding="utf-8"))
        # older studies have another name for the monitor
        known = {name.replace("guard_", "monitor_"): value for name, value in document["settings"].items()}
        if known != settings:
            raise OutputError(f"{output} holds a study of other settings; give another --output")
    work.mkdir(parents=True, exist_ok=True)

    def keep(part: str, record: dict[str, Any]) -> None:
        document[part].append(record)
        write_json(output, document | provenance())

    for plan in study.plans:
        for count in study.trajectories:
            if any((done["plan"], done["trajectories"]) == (plan, count) for done in document["data"]):
                continue
            head = head_file(work, plan, count)
            start = process_time()
            _done(
                "completion",
                commands.completion(
                    ["--output", str(head), "--trajectories", str(count), "--steps", str(study.steps)]
                    + _policy(study, plan)
                ),
            )
            spent = process_time() - start
            found = _judged(study, commands, plan, {"with": head}, work, adapter=None)
            keep("data", {"plan": plan, "trajectories": count, "cpu_seconds": spent} | found)
    for done in range(0, study.iterations + 1, study.every) if study.iterations else ():
        if any(record["iteration"] == done for record in document["run"]):
            continue
        keep("run", {"iteration": done} | _of_the_run(study, commands, work, done))
    return document


def _of_the_run(study: Study, commands: Commands, work: Path, done: int) -> dict[str, Any]:
    """Train the run up to so many iterations, and judge its policy without a head and with either."""
    plan = study.plans[-1]
    first = head_file(work, plan, study.trajectories[-1])
    if not done:
        return _judged(study, commands, plan, {"kept": first, "refreshed": first}, work, adapter=None)
    run = work / "run"
    options = {
        "run.output_dir": run,
        "run.iterations": done,
        "lookahead.head": first,
        "lookahead.head_refresh": study.refresh,
        "lookahead.monitor_every": study.monitor_every,
        "evaluation.every": 0,
    }
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    resume = ["--resume"] if run.exists() else []
    _done("train", commands.train([*_policy(study, plan), *arguments, *resume]))
    heads = {"kept": first, "refreshed": run / "completion_head.safetensors"}
    return _judged(study, commands, plan, heads, work, adapter=run / "adapter")


def _judged(
    study: Study, commands: Commands, plan: str, heads: dict[str, Path], work: Path, adapter: Path | None
) -> dict[str, Any]:
    """Agreement of a plan's completions with the exact ones: `without` a head, and with each of `heads` by name."""
    found: dict[str, Any] = {}
    for name, head in heads.items():
        file = work / "fidelity.json"
        arguments = ["--config", study.config, "--plans", plan, "--head", str(head), "--decoder", "full"]
        arguments += ["--groups", str(study.groups), "--group-size", str(study.group_size), "--json", str(file)]
        _done("fidelity", commands.fidelity([*arguments, *([] if adapter is None else ["--adapter", str(adapter)])]))
        for record in json.loads(file.read_text(encoding="utf-8"))["plans"].values():
            found[name if record["head"] else "without"] = {key: record[key] for key in KEPT}
    return found


def head_file(work: Path, plan: str, trajectories: int) -> Path:
    """Where the head of a plan is that learned from so many trajectories."""
    return work / f"{plan.replace(':', '-')}-{trajectories}.safetensors"


def _policy(study: Study, plan: str) -> list[str]:
    """Options of a command that trains by a plan."""
    kind, _, numbers = plan.partition(":")
    given = {"nodes": ["--lookahead.nodes", f"[{numbers}]"], "n_step": ["--lookahead.n", numbers]}
    return ["--config", study.config, "--lookahead.plan", kind, *given.get(kind, [])]


def _done(command: str, code: int) -> None:
    if code != ExitCode.OK:
        kind = next((kind for kind, own in EXIT_CODES.items() if own == code), SetupError)
        raise kind(f"{command} ended with exit code {code}")


def summary(document: dict[str, Any]) -> str:
    """Rewards, gains and worst step of every measurement, a line each."""
    lines = []
    for record in document["data"]:
        lines += [
            f"{record['plan']}, {name} head of {record['trajectories']} trajectories: {_figures(record[name])}"
            for name in ("without", "with")
        ]
    for record in document["run"]:
        lines += [
            f"after {record['iteration']} iterations, {name}: {_figures(record[name])}"
            for name in ("without", "kept", "refreshed")
        ]
    return "\n".join(lines)


def _figures(record: dict[str, float]) -> str:
    return " ".join(f"{name.removeprefix('spearman_')} {record[name]:.3f}" for name in KEPT[:3])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    variants = Path(__file__).resolve().parent / "variants"
    add("--config", default=str(variants / "dense.yaml"), help="policy, sampler and run; default: %(default)s")
    add("--plans", nargs="+", default=["one_step", "nodes:4"], help="whose last jumps heads correct")
    add("--trajectories", type=int, nargs="+", default=[1024, 4096, 16384], help="that heads learn from")
    add("--steps", type=int, default=3000, help="optimiser steps of a head")
    add("--iterations", type=int, default=60, help="of the run with the last plan and its best-taught head; 0 = none")
    add("--every", type=int, default=10, help="iterations between two measurements of the run")
    add("--monitor-every", type=int, default=5, help="of the run: iterations between two looks at exact completions")
    add("--refresh", type=int, default=50, help="of the run: optimiser steps of the head after each look")
    add("--groups", type=int, default=64, help="held-out groups")
    add("--group-size", type=int, default=16, help="trajectories of a group")
    add("--work", type=Path, default=Path("runs/heads"), help="heads and run, to go on with")
    add("--output", type=Path, default=RESULTS / "head_study.json", help="JSON file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
