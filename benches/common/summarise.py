"""Write what the repository keeps of a document: all but the scores of single pictures, or the times of single calls.

    python -m benches.common.summarise runs/study.json benches/results/study.json

Documents of `study.py`, `judge.py` and `densegrpo_fast.evaluate --json` hold such scores. Means and paired 95%
intervals take their place, and `raw_sha256` is the digest of the whole document. Of `--benchmark-json`
the medians stay.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benches.common.record import write_json
from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.run_files.statistics import mean_interval, paired_interval


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benches.common.summarise", description=__doc__)
    parser.add_argument("raw", type=Path, help="the document")
    parser.add_argument("summary", type=Path, help="the file to write")
    options = parser.parse_args(arguments)
    with user_errors_exit():
        try:
            raw = options.raw.read_bytes()
            found = summary(json.loads(raw))
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UsageError(f"{options.raw}: no document of study.py, judge.py, evaluate or pytest") from None
        write_json(options.summary, found | {"raw_sha256": hashlib.sha256(raw).hexdigest()})
    return ExitCode.OK


def summary(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document without the scores of single pictures.

    A study's run gets `before` and `after`, the mean of each score, and `change`, its paired interval; of a judge's
    document the base's scores become their means, and those of its runs, whose intervals it has, are left out, as are
    an evaluation's with their prompts. Of pytest-benchmark's a benchmark's median, spread and rounds.

    Raises:
        KeyError, TypeError: it is no such document.
    """
    if "benchmarks" in document:
        machine = document["machine_info"]["cpu"]
        return {
            "command": "pytest benches --benchmark-only",
            "commit": document["commit_info"]["id"],
            "hardware": {"cpu": machine["brand_raw"], "cores": machine["count"]},
            "seconds": {
                each["name"]: {key: each["stats"][key] for key in ("median", "iqr", "rounds")}
                for each in document["benchmarks"]
            },
        }
    if "subjects" in document:
        return {key: value for key, value in document.items() if key not in ("scores", "prompts")}
    if "judge" in document:
        runs = [{key: value for key, value in run.items() if key != "after"} for run in document["runs"]]
        return {**document, "before": _means(document["before"]), "runs": runs}
    runs = []
    for run in document["runs"]:
        before, after = run["before"], run["after"]
        change = {name: paired_interval(before[name], after[name])._asdict() for name in before}
        runs.append({**run, "before": _means(before), "after": _means(after), "change": change})
    return {**document, "runs": runs}


def _means(scores: Mapping[str, Any]) -> dict[str, float]:
    return {name: mean_interval(values).mean for name, values in scores.items()}


if __name__ == "__main__":
    sys.exit(main())
