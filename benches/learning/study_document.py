"""The result file of a study: which runs it may hold together, and what is computed from them.

Several processes may add runs to one file: it is read again under a lock before each write.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benches.common.claim import locked
from benches.common.operations import operations
from benches.common.record import NOISY_SPREAD, hardware, load_average, provenance, spread, write_json
from benches.learning.comparison import Run, compare, pairs, seconds_of
from densegrpo_fast.common.aliases import comparable_settings
from densegrpo_fast.common.errors import OutputError, UsageError

CPU_BUDGET = 600.0
"""CPU seconds that a run of a study on the embedded model should stay below."""
ROUNDING = 1e-4
"""By how much scores of one model's pictures may differ between machines of one kind, which may round differently."""

Scores = dict[str, list[list[float | None]]]


class StudyDocument:
    """The JSON file, with its plot beside it (ending .png).

    Args:
        path: the file.
        settings: of the variants that are run, by name in the order of the legend.
        against: the variant that all others are compared with, each minus it, from the settings or from the file;
            None = the first of the settings minus each of the others.

    Raises:
        UsageError: there is no variant `against`; OutputError: the file cannot be read, or holds runs with other
            settings or from another machine.
    """

    def __init__(self, path: Path, settings: dict[str, Any], against: str | None = None):
        self.path, self.against = path, against
        self.settings = {name: comparable_settings(own) for name, own in settings.items()}
        self._started = load_average()
        known = self.read()["settings"]
        if against is not None and against not in known:
            raise UsageError(f"--against: expected one of {', '.join(known)}, got {against}")

    def read(self) -> dict[str, Any]:
        """What the file holds, or a new document; the operations of runs that were recorded without are filled in."""
        if not self.path.exists():
            return provenance() | {
                "load_average": {"start": self._started},
                "settings": dict(self.settings),
                "runs": [],
            }
        try:
            document = json.loads(self.path.read_text(encoding="utf-8"))
            known, machine = dict(document["settings"]), document["hardware"]
            list(document["runs"])
        except (OSError, ValueError, KeyError, TypeError):
            raise OutputError(f"{self.path} is no readable study; move it away or give another --output") from None
        known = {name: comparable_settings(own) for name, own in known.items()}
        both = known.keys() & self.settings.keys()
        others = [f"{name}.{key}" for name in both for key in differing(known[name], self.settings[name])]
        fixed = {key: value for key, value in hardware().items() if key != "load_average"}
        others += [f"hardware.{key}" for key, value in fixed.items() if machine.get(key) != value]
        if others:
            raise OutputError(
                f"{self.path} holds runs with another {', '.join(sorted(others))}; give another --output",
            )
        document["settings"] = known | self.settings
        for run in document["runs"]:
            if any("operations" not in point for point in run["points"]):
                count(run, document["settings"][run["variant"]])
        return document

    def holds(self, variant: str, seed: int) -> bool:
        """Whether the file has a run."""
        return _holds(self.read(), variant, seed)

    def add(self, run: Run) -> None:
        """Add a run, unless the file has got it meanwhile, and write the file and its plot.

        Raises:
            OutputError: the run did not start where the others did: scores of other weights cannot be paired.
        """
        with locked(self.path.parent):
            document = self.read()
            if _holds(document, run["variant"], run["seed"]):
                return
            for other in document["runs"][:1]:
                if not same_start(run["before"], other["before"]):
                    raise OutputError(
                        f"{run['variant']}, seed {run['seed']}, did not start like {other['variant']}, seed "
                        f"{other['seed']}: their first held-out scores differ, so model or machine changed; give "
                        "another --output",
                    )
            count(run, document["settings"][run["variant"]])
            made = provenance()
            document |= made
            document["runs"].append(run | {"commit": made["commit"]})
            document["load_average"]["end"] = load_average()
            self._write(document)

    def refresh(self) -> dict[str, Any]:
        """Write what is computed from the runs anew, and return the document; one without runs is not written."""
        with locked(self.path.parent):
            document = self.read()
            if document["runs"]:
                self._write(document)
        return document

    def _write(self, document: dict[str, Any]) -> None:
        from benches.learning.study_plot import save_plot

        names, runs = list(self.settings), document["runs"]
        if self.against is not None and self.against not in names:
            names.append(self.against)
        document["noisy"] = noisy(runs)
        spent = {f"{run['variant']}-{run['seed']}": run.get("cpu_seconds") for run in runs}
        document["over_budget"] = [name for name, seconds in spent.items() if seconds and seconds > CPU_BUDGET]
        document["unknown_cpu_seconds"] = [name for name, seconds in spent.items() if seconds is None]
        wanted = [(names[0], other) for other in names[1:]]
        if self.against is not None:
            wanted = [(name, self.against) for name in names if name != self.against]
        timed = not document["noisy"]
        document["comparisons"] = [compare(runs, *two, timed=timed) for two in wanted if pairs(runs, *two)]
        write_json(self.path, document)
        observed = document["settings"][names[0]]["reward"]["observed"]
        save_plot(self.path.with_suffix(".png"), runs, names, ["reward", *observed], timed=timed)


def same_start(one: Scores, other: Scores) -> bool:
    """Whether two first evaluations are of one model: the same scores up to `ROUNDING`, and the same ones missing."""
    if one.keys() != other.keys():
        return False
    values = [[value for name in sorted(scores) for row in scores[name] for value in row] for scores in (one, other)]
    return len(values[0]) == len(values[1]) and all(
        a is b or (a is not None and b is not None and abs(a - b) <= ROUNDING) for a, b in zip(*values, strict=True)
    )


def count(run: Run, settings: dict[str, Any]) -> None:
    """Put the cumulative `operations` into a run's points, TFLOP; None where they are not known."""
    found = operations(settings, run) or [None] * len(run["points"])
    for point, spent in zip(run["points"], found, strict=True):
        point["operations"] = spent


def noisy(runs: Sequence[Run]) -> bool:
    """Whether the seconds per iteration of a variant vary too much, over the parts of its runs between evaluations."""
    rates: dict[str, list[float]] = {}
    for run in runs:
        iterations = [point["iteration"] for point in run["points"]]
        own = rates.setdefault(run["variant"], [])
        for elapsed, span in zip(pairwise(seconds_of(run)), pairwise(iterations), strict=True):
            own.append((elapsed[1] - elapsed[0]) / (span[1] - span[0]))
    return any(spread(values) > NOISY_SPREAD for values in rates.values())


def _holds(document: dict[str, Any], variant: str, seed: int) -> bool:
    return any((run["variant"], run["seed"]) == (variant, seed) for run in document["runs"])


def differing(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Dotted names of the options in which two sets of settings differ; those that `one` does not know do not count."""
    sections = [name for name in one.keys() & other.keys() if isinstance(one[name], dict)]
    names = {(section, key) for section in sections for key in one[section]}
    return sorted(f"{section}.{key}" for section, key in names if one[section][key] != other[section].get(key))
