"""What every method has learnt in the recorded studies, as Markdown: one seed each, the most first."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "results"
LATE_SEED = 1
"""The seed that the studies at late noise share."""
LATE_STUDIES = ("methods_late", "study_branched")
EARLY_STUDIES = {"methods": "", "methods_noise": ", flow_sde at .7"}
"""Studies at early noise, and what sets the runs of each apart."""
METHODS = {
    "embedded_branched": "branches of one state compared (the default preset)",
    "branched_full": "branches, every picture decoded in full",
    "branched_calibrated": "branches at calibrated noise",
    "held_back": "branches, bad ones held back (NTHR's analogue)",
    "tempflow": "TempFlow-GRPO",
    "g2rpo": "G2RPO",
    "turning_point": "TP-GRPO",
    "turning_point_free": "TP-GRPO without its constraint",
    "dense": "DenseGRPO (gain)",
    "dense_exact": "DenseGRPO, exact completions, decoded in full",
    "dense_calibrated": "DenseGRPO at calibrated noise",
    "smoothed": "DenseGRPO from smoothed rewards (ICRM's analogue)",
    "value": "the value of a state in place of its gain",
    "return_to_go": "sum of the gains to come (return-to-go)",
    "mixture": "terminal reward and gains mixed",
    "stepwise": "Stepwise",
    "vgpo": "VGPO",
    "sparse": "Flow-GRPO (sparse)",
    "closeness": "Flow-GRPO, closeness to the best sample added (POSG's analogue)",
    "coca": "CoCA",
    "guard": "GRPO-Guard",
    "dppo": "Flow-DPPO",
    "pcpo": "PCPO's step weights",
    "fast": "Flow-GRPO-Fast",
    "mixgrpo": "MixGRPO-Flash",
}
"""Variants, without the beginning of a preset's name, and what they are called."""


def late_runs() -> list[dict[str, Any]]:
    """The runs of one seed at late noise, of all variants that have one; the first study that has a variant counts."""
    found: dict[str, dict[str, Any]] = {}
    for study in LATE_STUDIES:
        for run in _runs(study):
            if run["seed"] == LATE_SEED:
                found.setdefault(run["variant"], run)
    return list(found.values())


def late() -> str:
    """What they learnt."""
    return table([(METHODS[run["variant"]], run) for run in late_runs()])


def early() -> str:
    """What the presets learnt at early noise."""
    named = {name.removeprefix("embedded_"): words for name, words in METHODS.items()}
    return table(
        [
            (named[run["variant"].removeprefix("embedded_")] + mark, run)
            for study, mark in EARLY_STUDIES.items()
            for run in _runs(study)
        ]
    )


def table(runs: Sequence[tuple[str, Mapping[str, Any]]]) -> str:
    """Change of the held-out reward, strictly right pictures and network forwards of named runs."""
    found = []
    for words, run in runs:
        change, strict = run["change"]["reward"], [run[when]["scenes_strict"] for when in ("before", "after")]
        forwards = sum(run["points"][-1]["nfe"].values())
        cells = [
            words,
            f"`{run['variant']}`",
            f"{change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]",
            f"{strict[0]:.0%} -> {strict[1]:.0%}",
            f"{forwards / 1000:.0f}",
        ]
        found.append((change["mean"], f"| {' | '.join(cells)} |"))
    lines = [line for _, line in sorted(found, reverse=True)]
    return "\n".join(["| method | variant | reward | strict | forwards |", "|---|---|---|---|---|", *lines])


def _runs(study: str) -> list[dict[str, Any]]:
    return json.loads((RESULTS / f"{study}.json").read_text(encoding="utf-8"))["runs"]
