"""Compare runs by what their directories hold: `python -m densegrpo_fast.compare A B ...`.

    python -m densegrpo_fast.compare runs/embedded_sparse-0 runs/embedded_branched-0
    python -m densegrpo_fast.compare runs/a runs/b --json compare.json --html compare.html
    python -m densegrpo_fast.compare runs/a runs/b --reward 0.85

No model is loaded: it reads the held-out scores, pictures and metrics that each run has written, also while it goes on.
Runs are compared at their last evaluation, prompt by prompt, with 95% intervals. That takes the same held-out prompts
and noise, as runs with equal `evaluation` settings have; of different trained rewards, those in common are compared.
The cost to a reward is what a run had spent (iterations, seconds and CPU seconds of its phases, operations) when its
held-out mean first reached it, by a straight line between evaluations; by default of the highest that all of them
reach. To compare models by new pictures: `python -m densegrpo_fast.evaluate A B`.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from densegrpo_fast.common.command_line import check_outputs, command_parser
from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.common.files import replace_text, write_json
from densegrpo_fast.common.progress import announce


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    with user_errors_exit():
        options = _parser().parse_args(arguments)
        check_outputs(options, "json", "html")
        announce(f"reading {len(options.run)} runs")
        return int(compare(options.run, options.reward, options.json, options.html))


def compare(runs: Sequence[Path], reward: float | None, json: Path | None, html: Path | None) -> ExitCode:
    """Print the comparison of runs, and write it.

    Args:
        runs: at least two run directories.
        reward: whose cost is asked for; None = the highest that all reach.
        json, html: files to write, or None.

    Raises:
        SetupError: a directory holds no run; UsageError: the runs cannot be compared; OutputError: a file cannot be
            written.
    """
    from densegrpo_fast.run_files.comparison import compare_runs, comparison_page, comparison_text
    from densegrpo_fast.run_files.provenance import provenance
    from densegrpo_fast.run_files.run_data import read_run

    if len(runs) < 2 or len({run.resolve() for run in runs}) != len(runs):
        raise UsageError("expected at least two different run directories")
    if reward is not None and not math.isfinite(reward):
        raise UsageError(f"--reward: expected a finite number, got {reward}")
    found = {str(run): read_run(run) for run in runs}
    comparison = compare_runs(found, reward)
    if json is not None:
        write_json(json, comparison | provenance())
    if html is not None:
        replace_text(html, comparison_page(found, comparison))
    print(comparison_text(comparison))
    return ExitCode.OK


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("compare", __doc__)
    add = parser.add_argument
    add("run", nargs="+", type=Path, metavar="RUN", help="run directories")
    add("--reward", type=float, metavar="R", help="held-out reward whose cost is shown; default: the highest of all")
    add("--json", type=Path, metavar="FILE", help="write all numbers")
    add("--html", type=Path, metavar="FILE", help="write one page: curves, pictures side by side, intervals, costs")
    return parser


if __name__ == "__main__":
    sys.exit(main())
