"""One page of what `gpu_suite.sh` measured: the project's bars on a GPU, each reached, not reached, or not measured.

python -m benches.gpu.summary DIRECTORY      writes DIRECTORY/gpu_summary.md and prints it
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree


class Bar(NamedTuple):
    """A bar of the project.

    Attributes:
        name: for the table.
        wanted: the bar in words.
        file: what it is read from.
        value: of the document (or of the root of an XML file).
        reached: whether a value is good enough.
        shown: the value for people.
    """

    name: str
    wanted: str
    file: str
    value: Callable[[Any], float]
    reached: Callable[[float], bool]
    shown: str = "{:.2f}"


def of_copy(document: Any) -> float:
    """Time of the Triton implementation in that of a plain copy of as many bytes: the bandwidth floor."""
    return 1 / document["variants"]["triton"]["share_of_copy_bandwidth"]


def faster(document: Any) -> float:
    """How many times faster Triton is than the eager form under torch.compile."""
    return document["variants"]["triton"]["times_faster_than_eager_compiled"]


def failures(suites: Any) -> float:
    """Tests that failed, or 1 if none ran."""
    counts = [{key: int(suite.get(key, 0)) for key in ("tests", "failures", "errors", "skipped")} for suite in suites]
    ran = sum(each["tests"] - each["skipped"] for each in counts)
    return sum(each["failures"] + each["errors"] for each in counts) if ran else 1


def skipped_cuda(suites: Any) -> float:
    """Tests of the compiled CUDA library that did not run."""
    cases = [case for case in suites.iter("testcase") if "test_cuda_kernels" in case.get("classname", "")]
    return sum(case.find("skipped") is not None for case in cases) if cases else 1


def share(phase: str) -> Callable[[Any], float]:
    """Share of the matrix products' rate that a phase reaches."""
    return lambda document: document["share_of_matmul"][phase]


BARS = [
    Bar("GPU tests", "none fails", "gpu_tests.xml", failures, lambda n: n == 0, "{:.0f} failed"),
    Bar(
        "tests of the CUDA library", "none left out", "gpu_tests.xml", skipped_cuda, lambda n: n == 0, "{:.0f} left out"
    ),
    *(
        Bar(f"{op}, 64 MiB a tensor", "<= 1.10 x a copy", f"{op}_large_gpu.json", of_copy, lambda x: x <= 1.1)
        for op in ("sde_step", "sde_log_prob", "euler_jump")
    ),
    *(
        Bar(f"{op}, nine samples", "faster than torch.compile", f"{op}_gpu.json", faster, lambda x: x > 1, "{:.2f} x")
        for op in ("sde_step", "sde_log_prob", "sde_log_prob_kl", "euler_jump", "grpo_loss")
    ),
    Bar(
        "price of DenseGRPO",
        "<= 1.30 x replayed sparse",
        "iteration_gpu.json",
        lambda document: document["ratios"]["dense_trajectories/sparse"],
        lambda x: x <= 1.3,
    ),
    *(
        Bar(f"{phase}, rate", ">= 45% of matmul", "gpu_rehearsal_gpu.json", share(phase), lambda x: x >= 0.45, "{:.0%}")
        for phase in ("rollout", "update")
    ),
    Bar(
        "memory estimate",
        "peak <= 1.1 x estimate",
        "gpu_rehearsal_gpu.json",
        lambda document: document["memory"]["peak_bytes"] / document["memory"]["estimate_bytes"],
        lambda x: x <= 1.1,
    ),
    Bar(
        "waits for the GPU",
        "few lines",
        "gpu_rehearsal_gpu.json",
        lambda document: len(document["host_syncs"]),
        lambda n: n <= 8,
        "{:.0f} lines",
    ),
]


def summary(folder: Path) -> str:
    """The page, in Markdown."""
    hardware, rows = "unknown", []
    for bar in BARS:
        path = folder / bar.file
        try:
            if path.suffix == ".xml":
                document: Any = ElementTree.parse(path).getroot()
            else:
                document = json.loads(path.read_text(encoding="utf-8"))
                hardware = f"{document['hardware']['gpu']}, commit {document['commit']}"
            value = bar.value(document)
            found, verdict = bar.shown.format(value), "reached" if bar.reached(value) else "**not reached**"
        except FileNotFoundError:
            found, verdict = "", "not measured"
        except (KeyError, TypeError, ValueError, ZeroDivisionError, ElementTree.ParseError) as error:
            found, verdict = "", f"not measured: {type(error).__name__}: {error}"
        rows.append(f"| {bar.name} | {bar.wanted} | {found} | {verdict} |")
    lines = ["# What ran on a GPU", "", hardware, "", "| what | bar | found | |", "|---|---|---|---|", *rows, ""]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Command line entry; returns the exit code."""
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: gpu_summary.py DIRECTORY", file=sys.stderr)
        return 2
    page = summary(Path(arguments[0]))
    Path(arguments[0], "gpu_summary.md").write_text(page, encoding="utf-8")
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
