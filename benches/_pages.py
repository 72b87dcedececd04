"""Writes measurements of the drop-ins into the pages of `densegrpo_fast/compat`: `python benches/_pages.py`.

They are those of `bench_dropin.py` and `bench_turning_point.py`.

A test holds the pages to the recorded result, so that neither changes without the other.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
START, END = "<!-- measured: python benches/_pages.py -->", "<!-- end of what was measured -->"


def page_of(host: str) -> Path:
    """A host's page."""
    return ROOT / "densegrpo_fast" / "compat" / host / "README.md"


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


def with_table(page: str, host: str, document: Mapping[str, Any]) -> str:
    """A page with the table between its two marks.

    Raises:
        ValueError: it has no such marks.
    """
    before, start, rest = page.partition(START)
    _, end, after = rest.partition(END)
    if not start or not end:
        raise ValueError(f"the page of {host} needs the lines {START} and {END}")
    return f"{before}{start}\n\n{table(host, document)}\n\n{end}{after}"


def _time(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms" if seconds < 0.1 else f"{seconds:.2f} s"


def main() -> None:
    """Bring all pages up to date."""
    for host in KINDS:
        page = page_of(host)
        page.write_text(with_table(page.read_text(encoding="utf-8"), host, result_of(host)), encoding="utf-8")


if __name__ == "__main__":
    main()
