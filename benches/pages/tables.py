"""Recorded measurements as Markdown: of lookaheads (fidelity, `chunk_gains.py`) and calibrations.

`TABLES` has all tables that a page may name (`write.py`), those of `measured.py` and `methods.py` too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

from benches.pages import measured, methods

RESULTS = Path(__file__).resolve().parents[1] / "results"
_LINK = "@results"
"""Stands in a table for where the results are, seen from the page."""

_CORRELATIONS = ("spearman_rewards_mean", "spearman_gains_mean", "spearman_gains_worst_step")
_MARKED = re.compile(r"(<!-- table: (?P<name>\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def agreement(stem: str) -> str:
    """Every variant of a fidelity record, the dearest first, and the line that made it.

    Columns in which nothing differs are left out.
    """
    document = read(stem)
    records = sorted(document["plans"].values(), key=lambda record: -(record["iteration_flops_ratio"] or 0.0))
    named: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "plan": lambda record: record["plan"].replace("{", " {"),
        "guidance": lambda record: record["guidance"],
        "decoder": lambda record: record["decoder"] + (f", {record['vae']}" if record.get("vae") else ""),
        "with": extras,
    }
    shown = {
        name: cell for name, cell in named.items() if name == "plan" or len({cell(record) for record in records}) > 1
    }
    header = [*shown, "iteration / sparse, operations", "rewards", "gains", "worst step"]
    lines = []
    for record in records:
        cells = [cell(record) for cell in shown.values()]
        lines.append([*cells, f"{record['iteration_flops_ratio']:.2f}", *map(short, correlations(record, document))])
    return f"{source(stem, document)}\n\n{table(header, lines)}"


def extras(record: Mapping[str, Any]) -> str:
    """What a variant's completions are helped by, such as "bfloat16 copy, cache text"."""
    parts = []
    if copied := record["copy"]:
        parts.append("copy" if copied is True else f"{copied} copy")
    return ", ".join([*parts, f"cache `{record['cache']}`"] if record["cache"] else parts)


def search(stem: str) -> str:
    """What a search has chosen, in and out of sample, and the best candidate of every cost."""
    document = read(stem)
    found = document["search"]
    candidates = sorted(found["candidates"].items(), key=lambda item: item[1]["iteration_flops_ratio"])
    header = ["candidate", "iteration / sparse, operations", "rewards", "gains", "worst step"]
    front, best = [], -1.0
    for name, record in candidates:
        # the Pareto front by the gains
        if record["spearman_gains_mean"] > best:
            best = record["spearman_gains_mean"]
            mark = " (chosen)" if name == found["chosen"] else ""
            numbers = [short(record[key]) for key in _CORRELATIONS]
            front.append([f"{name}{mark}", f"{record['iteration_flops_ratio']:.2f}", *numbers])
    if found["chosen"] is not None:
        own = document["plans"][found["chosen"]]
        outside = [f"{own['iteration_flops_ratio']:.2f}", *map(short, correlations(own, document))]
        front.append(["the chosen one on the other half", *outside])
    return f"{source(stem, document)}\n\n{table(header, front)}"


def chunks(stem: str) -> str:
    """How well gains of several steps stand for those of single ones."""
    document = read(stem)
    lines = [
        [size, str(found["evaluations"]), *(short(found[key]) for key in _CORRELATIONS[1:])]
        for size, found in document["chunks"].items()
    ]
    return f"{source(stem, document)}\n\n{table(['steps of a chunk', 'evaluations', 'gains', 'worst step'], lines)}"


def calibration(stem: str) -> str:
    """Levels and signs of every calibrated step before and after; * = beyond two standard deviations of fair signs."""
    document = read(stem)
    # records of an earlier version call it hopeless
    unbalanceable = document.get("unbalanceable", document.get("hopeless", []))
    lines = []
    for step in document["steps"]:
        cells = [str(step)]
        for state in (document["before"], document["after"]):
            up, down = state["positive"][step], state["negative"][step]
            mark = "*" if abs(up - down) > 2 * (up + down) ** 0.5 else ""
            cells += [f"{state['noise_level'][step]:.2f}", f"{up} / {down}{mark}"]
        lines.append([*cells, "no" if step in unbalanceable else "yes"])
    header = ["step", "level before", "gains up / down", "level after", "gains up / down", "a level balances it"]
    return f"{source(stem, document)}\n\n{table(header, lines)}"


def layouts() -> str:
    """Memory, bytes sent and simulated seconds of an iteration by model and number of GPUs."""
    document = read("layouts")
    lines = []
    for preset, found in document["layouts"].items():
        for row in sorted(found, key=lambda row: row["gpus"]):
            spread = "whole" if row["shard"] == "none" else f"spread ({row['shard']})"
            trained = "adapter" if row["train"] == "lora" else "all weights"
            sent = [row["gathered_gb"], row["reduced_gb"]]
            lines.append(
                [
                    preset,
                    str(row["gpus"]),
                    f"{trained}, {spread}",
                    f"{row['memory_gib']:.0f}",
                    *(f"{size:,.0f}" if size >= 10 else f"{size:.2g}" for size in sent),
                    f"{sum(row['seconds'].values()):,.0f}",
                    f"{row['seconds']['waiting']:.1f}",
                    f"{row['efficiency']:.3f}",
                ]
            )
    header = ["preset", "GPUs", "network", "GiB each", "GB gathered", "GB reduced", "seconds", "waiting", "efficiency"]
    return f"{source('layouts', document | {'settings': {}})}\n\n{table(header, lines)}"


def fits() -> str:
    """Operations of a sample and rows of a forward that fit, by model and memory of a GPU."""
    document = read("fits")
    lines = []
    for found in document["models"].values():
        rows = [
            " / ".join("-" if count is None else str(count) for count in (room["kept"], room["checkpointed"]))
            for room in found["fits"].values()
        ]
        lines.append(
            [
                found["title"],
                found["preset"],
                f"{found['parameters'] / 1e9:.2f}",
                f"{found['operations']['iteration'] / 1e12:,.0f}",
                f"{found['over_replayed_sparse']:.2f} / {found['over_streamed_sparse']:.2f}",
                *rows,
            ]
        )
    sizes = [f"{size} GB" for size in next(iter(document["models"].values()))["fits"]]
    header = ["model", "settings of", "billion parameters", "TFLOP a sample", "over sparse", *sizes]
    return f"{source('fits', document)}\n\n{table(header, lines)}"


def smoothness() -> str:
    """How well cheap plans rank rewards / gains, by reward and guidance; and how much of a reward survives a step."""
    plans = ("exact_but_last", "nodes{4,7}", "one_step")
    lines = []
    for path in sorted(RESULTS.glob("fidelity_smoothness_*.json")):
        document = read(path.stem)
        records = {record["plan"]: record for record in document["plans"].values()}
        ranks = [" / ".join(map(short, correlations(records[p], document)[:2])) if p in records else "" for p in plans]
        survived = document["persistence"]
        settings = document["settings"]
        (reward,) = settings["reward"]
        cells = [f"[`{reward}`]({_LINK}/{path.name})", f"{settings['sampler']['guidance_scale']:g}"]
        cells.append(str(settings["groups_measured"]))
        lines.append([*cells, *ranks, short(fmean(survived[:5])), short(fmean(survived[5:]))])
    return table(["reward", "guidance", "groups", *plans, "across steps 0 to 4", "5 to 9"], lines)


def noise_levels() -> str:
    """What a noise level .7 and a step of .01 of it are on SD3's grid of ten steps."""
    from densegrpo_fast.flow.dynamics import STD_DEV, C, coefficients
    from densegrpo_fast.flow.schedule import sd3_sigmas

    grid = sd3_sigmas(10, shift=3.0)
    flow_sde, more, dance = (
        coefficients(grid, level, family).table.tolist()
        for level, family in ((0.7, "flow_sde"), (0.71, "flow_sde"), (0.7, "dance"))
    )
    lines = [
        [
            str(step),
            f"{grid[step]:.4f}",
            f"{a[STD_DEV]:.3f}",
            f"{a[C]:.3f}",
            f"{above[STD_DEV] - a[STD_DEV]:.3f}",
            f"{literal[STD_DEV]:.3f}",
            f"{literal[C]:.3f}",
        ]
        for step, (a, above, literal) in enumerate(zip(flow_sde, more, dance, strict=True))
    ]
    header = ["step", "t", "flow_sde .7: sigma_t", "std", "sigma_t of .01 more", "dance .7: sigma_t", "std"]
    return table(header, lines)


def price() -> str:
    """What DenseGRPO costs in its forms, in sparse iterations, and the variance of a drawn form's gradient."""
    document = read("price")
    models = [document[name] for name in ("sd35_medium", "flux1_dev", "embedded")]
    header = [
        "DenseGRPO",
        "SD3.5-M",
        "no KL",
        "over sparse without a repeated forward",
        "over sparse of as many steps",
        "FLUX.1-dev",
        "embedded",
        "seconds, embedded",
        "variance x operations",
    ]
    lines = []
    for name in (name for name in models[0] if name != "title"):
        medium, flux, own = (model[name] for model in models)
        ratios = medium["operations"]
        varied = own.get("variance")
        lines.append(
            [
                name,
                f"**{ratios['over_replayed_sparse']:.2f}**",
                f"{medium['operations_without_kl']['over_replayed_sparse']:.2f}",
                f"{ratios['over_streamed_sparse']:.2f}",
                f"{ratios['over_sparse_of_as_many_steps']:.2f}",
                f"{flux['operations']['over_replayed_sparse']:.2f}",
                f"{own['operations']['over_replayed_sparse']:.2f}",
                f"{own['seconds']['over_replayed_sparse']:.2f}" if own["seconds"] else "",
                f"{varied['variance_over_all_steps']['3']:.2f} x {varied['operations_over_all_steps']:.2f}"
                if varied and name.startswith("exact") and "streamed" not in name
                else "",
            ]
        )
    return table(header, lines)


_BOARD = {
    "sparse": "Flow-GRPO (sparse)",
    "sparse_drawn": "sparse, four of nine steps drawn",
    "dense_exact": "DenseGRPO, exact completions",
    "dense_drawn": "DenseGRPO, four of nine steps drawn",
    "branches": "branches of one trajectory",
    "g2rpo": "G2RPO",
    "tempflow": "TempFlow-GRPO",
    "turning_point": "TP-GRPO",
    "stepwise": "Stepwise",
}


def board() -> str:
    """What each method of the board spent to the marks, where it ended, and what the judge says of it."""
    document = read("board")
    found, judge = document["scenes"], document["scenes"].get("judge")

    def interval(values: Mapping[str, float], digits: int) -> str:
        return "{mean:.{d}f} [{low:.{d}f}, {high:.{d}f}]".format(d=digits, **values)

    def to_mark(row: Mapping[str, Any], mark: int) -> str:
        ratio, (low, high) = row["ratio_to_sparse"][mark], row["interval"][mark]
        if low is None and high is None:
            return "never"
        shown = ["never" if value is None else f"{value:.2f}" for value in (ratio, low, high)]
        return f"{shown[0]} [{shown[1]}, {shown[2]}]"

    lines = []
    for name, label in _BOARD.items():
        if (row := found["methods"].get(name)) is None:
            continue
        rates, spent = found["tuning"][name], row["seconds_to_mark"][1]
        cells = [label, max(rates, key=lambda rate: rates[rate]), f"{row['final']['reward']:.3f}"]
        cells += [f"{row['final']['scenes_strict']:.2f}", to_mark(row, 0), to_mark(row, 1)]
        cells += ["" if spent is None else f"{spent:.0f}"]
        if judge is not None:
            own = judge["methods"][name]
            cells += [interval(own["judge/graded"], 3), interval(own["kl/flow_grpo"], 3)]
        lines.append(cells)
    header = ["method", "rate", "reward", "strict", "half of the gain", "all of it", "CPU seconds to it"]
    header += [] if judge is None else ["judge's score, change", "KL"]
    return f"{source('board', document | {'settings': {}})}\n\n{table(header, lines)}"


TABLES: dict[str, Callable[[], str]] = {
    "price": price,
    "board": board,
    "study": measured.study,
    "steps": measured.steps,
    **{f"dropin_{host}": partial(measured.dropin, host) for host in measured.KINDS},
    "methods_late": methods.late,
    "methods_early": methods.early,
    **{
        name: partial(agreement, f"fidelity_{name}")
        for name in ("embedded", "late", "cache", "cache_paper", "branched", "branched_paper", "fast")
    },
    "search_late": partial(search, "fidelity_late"),
    "chunks": partial(chunks, "chunk_gains"),
    "smoothness": smoothness,
    "layouts": layouts,
    "fits": fits,
    "noise_levels": noise_levels,
    **{name: partial(calibration, name) for name in ("calibration_late", "calibration_branched")},
}
"""What a page may name."""


def with_tables(page: str, link: str) -> str:
    """A page with all its tables as they were recorded.

    Args:
        link: of the page to the folder of results.

    Raises:
        KeyError: it names a table that is not known.
    """

    def written(found: re.Match[str]) -> str:
        text = TABLES[found["name"]]().replace(f"({_LINK}/", f"({link}/")
        return f"{found[1]}\n{text}\n\n{found[3]}"

    return _MARKED.sub(written, page)


def names_of(page: str) -> list[str]:
    """The tables that a page has."""
    return [found["name"] for found in _MARKED.finditer(page)]


def read(stem: str) -> dict[str, Any]:
    """A record."""
    return json.loads((RESULTS / f"{stem}.json").read_text(encoding="utf-8"))


def source(stem: str, document: Mapping[str, Any]) -> str:
    """Where a table's numbers are, and what made them."""
    groups = ""
    if "groups_measured" in document["settings"]:
        groups = f"{document['settings']['groups_measured']} groups of {document['settings']['group_size']}, "
    return f"[{stem}.json]({_LINK}/{stem}.json), {groups}{document['hardware']['cpu']}:\n`{document['command']}`"


def correlations(record: Mapping[str, Any], document: Mapping[str, Any]) -> tuple[float, ...]:
    """Of rewards, of gains, and of the gains in the worst step, over the states 0..T-2.

    Older records of branches hold means over all steps, but also the numbers of each step.
    """
    settings = document["settings"]
    if not settings.get("branched"):
        return tuple(record[key] for key in _CORRELATIONS)
    # step k leads to state k + 1
    counted = settings["sampler"]["num_steps"] - 2
    rewards, gains = (
        [value for value in record[key][:counted] if value is not None]
        for key in ("spearman_rewards", "spearman_gains")
    )
    return fmean(rewards), fmean(gains), min(gains)


def short(value: float, digits: int = 2) -> str:
    """Without the zero before the point, as pages have them."""
    return f"{value:.{digits}f}".replace("0.", ".", 1)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
