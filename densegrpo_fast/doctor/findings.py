"""Findings: one fact about the machine each, its judgement, and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "problem"]


@dataclass(frozen=True)
class Finding:
    """One fact.

    Attributes:
        group: heading that it stands under.
        name: what it is about.
        status: "ok"; "warn" = works, but slower or less safely than it could; "problem" = something will fail.
        value: what was found.
        advice: what to do; empty for "ok".
    """

    group: str
    name: str
    status: Status
    value: str
    advice: str = ""

    def __post_init__(self) -> None:
        if (self.status == "ok") == bool(self.advice):
            raise ValueError(f"{self.name}: a finding has advice if and only if it is not ok")


def healthy(findings: Sequence[Finding]) -> bool:
    """Whether none of the findings is a problem."""
    return all(finding.status != "problem" for finding in findings)


def text(findings: Sequence[Finding]) -> str:
    """The findings as a table in their order, a heading for each group, advice below its finding."""
    width = max((len(finding.name) for finding in findings), default=0)
    lines: list[str] = []
    group = None
    for finding in findings:
        if finding.group != group:
            group = finding.group
            lines += ["", group] if lines else [group]
        lines.append(f"  {finding.status:8}{finding.name:{width}}  {finding.value}")
        if finding.advice:
            lines.append(f"  {'':8}{'':{width}}  -> {finding.advice}")
    counts = [(sum(f.status == status for f in findings), status) for status in ("problem", "warn")]
    worst = ", ".join(f"{count} {name}{'s' * (count > 1)}" for count, name in counts if count)
    return "\n".join([*lines, "", worst or "all is well"])
