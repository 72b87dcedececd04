"""Writes measurements into the pages that quote them: `python benches/_pages.py`.

Those of the drop-ins (`bench_dropin.py`, `bench_turning_point.py`) go into the pages of `docs/integrations`, those
of the step ops on the CPU (`bench_sde_step.py` and its like) into `csrc/README.md`, those of `study.py` into
the project's own page (dense against sparse), and those of the methods, of fidelity and of calibration into theirs
(`_page_tables.py`). Tests hold the pages to what was recorded, so that neither changes without the other.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

# what is quoted is what the checkout around this file makes of it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _comparison import compare
from _page_tables import with_tables

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benches" / "results"
HOSTS = ("flow_grpo", "dance_grpo", "mix_grpo", "flow_factory")
KINDS = {host: ("sample", "philox", "score") for host in HOSTS} | {"turning_point": ("mixed", "batched", "shared")}
WORDS = {
    "sample": "a step of the rollout, the host's random numbers",
    "philox": 'the same, `rng="philox"`',
    "score": "a step of training: log_prob of a stored state, and its gradient",
    "mixed": "mixed sampling, ten steps, nine noisy, guided",
    "batched": "the same, `chunk=8 * B`",
    "shared": "mixed sampling and the noise-free image, `shared_noise`",
}
STEP_PAGE = ROOT / "csrc" / "README.md"
STEPS = {
    "sde_step": "`sde_step`, its noise included",
    "sde_log_prob": "`sde_log_prob`, forward and backward",
    "sde_log_prob_kl": "`sde_log_prob_kl`, forward and backward",
    "euler_jump": "`euler_jump`",
    "grpo_loss": "`grpo_loss`, forward and backward",
}
TABLE_PAGES = (
    ROOT / "benches" / "README.md",
    *(ROOT / "docs" / f"{part}.md" for part in ("fidelity", "calibration")),
)
"""Pages whose tables `_page_tables` makes."""
STUDY_PAGE = ROOT / "README.md"
REWARDED = {
    "embedded_branched": "each branch of each step (the default)",
    "branched_full": "the same, every picture decoded in full",
    "turning_point": "each step of a trajectory, as TP-GRPO adds them up",
    "branched_calibrated": "the default at calibrated noise",
    "dense": "each step of a trajectory (DenseGRPO's gains), all steps but the last, previews",
    "dense_exact": "the same, exact completions, decoded in full",
    "dense_calibrated": "the same, previews, calibrated noise",
    "sparse": "each picture (Flow-GRPO)",
}
"""Variants of the recorded study of dense against sparse, and what a reward is for in each."""
START, END = "<!-- measured: python benches/_pages.py -->", "<!-- end of what was measured -->"


def page_of(host: str) -> Path:
    """A host's page."""
    return ROOT / "docs" / "integrations" / f"{host}.md"


def result_of(host: str) -> dict[str, Any]:
    """What was recorded for a host."""
    stem = "dropin" if host in HOSTS else host
    return json.loads((RESULTS / f"{stem}_cpu.json").read_text(encoding="utf-8"))


def table(host: str, document: Mapping[str, Any]) -> str:
    """What was measured for a host, as Markdown."""
    settings, machine = document["settings"], document["hardware"]
    rows = [f"| {machine['cpu']}, {settings['threads']} thread, float32 | host | here | |", "|---|---|---|---|"]
    for kind in KINDS[host]:
        own = document["variants"][f"{host}.{kind}"]
        rows.append(
            f"| {WORDS[kind]} | {_time(own['eager_median_seconds'])} | {_time(own['median_seconds'])} "
            f"| {own['times_faster_than_eager']:.2f}x |"
        )
    return "\n".join(rows)


def step_result_of(op: str) -> dict[str, Any]:
    """What was recorded for a step op on the CPU."""
    return json.loads((RESULTS / f"{op}_cpu.json").read_text(encoding="utf-8"))


def step_table(documents: Mapping[str, Mapping[str, Any]]) -> str:
    """What was measured for the step ops, as Markdown.

    Args:
        documents: recorded result of every op of `STEPS`.
    """
    machine = documents["sde_step"]["hardware"]["cpu"]
    rows = [
        f"| {machine}, float32 | shape | threads | csrc | eager | compiled | over eager | over compiled | spread |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for op, words in STEPS.items():
        settings, variants = documents[op]["settings"], documents[op]["variants"]
        own, eager, compiled = (variants[name] for name in ("csrc", "eager", "eager_compiled"))
        cells = [words, str(settings["shape"]), settings["threads"]]
        cells += [_time(variant["median_seconds"]) for variant in (own, eager, compiled)]
        cells += [f"{own[f'times_faster_than_{name}']:.1f}x" for name in ("eager", "eager_compiled")]
        cells += [f"{max(variant['spread'] for variant in (own, eager, compiled)):.0%}"]
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)


def with_table(page: str, host: str, document: Mapping[str, Any]) -> str:
    """A host's page with the table between its two marks.

    Raises:
        ValueError: it has no such marks.
    """
    return _between_marks(page, host, table(host, document))


def with_step_table(page: str, documents: Mapping[str, Mapping[str, Any]]) -> str:
    """The page of csrc/ likewise."""
    return _between_marks(page, "csrc", step_table(documents))


def study_result() -> dict[str, Any]:
    """What was recorded of dense against sparse."""
    return json.loads((RESULTS / "study_branched.json").read_text(encoding="utf-8"))


def study_table(document: Mapping[str, Any]) -> str:
    """Dense against sparse, as Markdown: changes of the held-out reward, and paired differences over seeds."""
    runs = document["runs"]
    rows = [
        "| a reward for | held-out reward | strict | minus sparse, 95% | with the same operations | TFLOP | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for variant, words in REWARDED.items():
        own = [run["points"] for run in runs if run["variant"] == variant]
        change = {
            score: mean(points[-1]["held_out"][score] - points[0]["held_out"][score] for points in own)
            for score in ("reward", "scenes_strict")
        }
        cells = [words, f"{change['reward']:+.3f}", f"{change['scenes_strict']:+.0%}"]
        if variant == "sparse":
            cells += ["", ""]
        else:
            found = compare(runs, variant, "sparse")["scores"]["reward"]
            cells += [_interval(found["equal_iterations"][-1]), _interval(found["equal_compute"])]
        cells += [f"{mean(points[-1]['operations'] for points in own):.1f}", str(len(own))]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def with_study_table(page: str, document: Mapping[str, Any]) -> str:
    """The project's page with the table between its marks.

    Raises:
        ValueError: it has no such marks.
    """
    return _between_marks(page, "project", study_table(document))


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['mean']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]"


def _between_marks(page: str, name: str, text: str) -> str:
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the page of {name} needs the lines {START} and {END}")
    return f"{before}{start}\n\n{text}\n\n{end}{after}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def main() -> None:
    """Bring all pages up to date."""
    for host in KINDS:
        page = page_of(host)
        page.write_text(with_table(page.read_text(encoding="utf-8"), host, result_of(host)), encoding="utf-8")
    text = with_step_table(STEP_PAGE.read_text(encoding="utf-8"), {op: step_result_of(op) for op in STEPS})
    STEP_PAGE.write_text(text, encoding="utf-8")
    for page in TABLE_PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    text = with_study_table(STUDY_PAGE.read_text(encoding="utf-8"), study_result())
    STUDY_PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
