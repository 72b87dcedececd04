"""Runs side by side, from their directories alone: curves, paired intervals, pictures, and the cost to a reward."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from itertools import accumulate, pairwise
from typing import Any

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.run_files.charts import Chart, Points, line_chart
from densegrpo_fast.run_files.grids import data_url, read_captions, read_grid
from densegrpo_fast.run_files.rendering import TEMPLATES, figure, lookup, render
from densegrpo_fast.run_files.report import curve, reward_bounds
from densegrpo_fast.run_files.run_data import RunData
from densegrpo_fast.run_files.statistics import compare, plain, tables

_MEASURES = {
    "iterations": "iterations",
    "seconds": "seconds of the phases",
    "cpu_seconds": "CPU seconds",
    "gflop": "GFLOP",
}
"""What a run spends, by its name in the data, in words."""
_PICTURES, _SIDE = 24, 256


def compare_runs(runs: Mapping[str, RunData], reward: float | None = None) -> dict[str, Any]:
    """Compare runs at their last evaluations.

    Args:
        runs: at least two, by their names.
        reward: whose cost is asked for; None = the highest that all of them reach.

    Returns:
        JSON data: what `statistics.compare` returns, and
        by: the reward of curves and costs: the weighted sum, or where runs have different ones the first in common;
        runs: name -> {iterations, finished, iterations at the last evaluation, settings that differ};
        curves: name -> [{mean, low, high, and what was spent: iterations, seconds, cpu_seconds, gflop}];
        cost: {reward, runs: name -> what was spent until then; None if it was not reached}; None where no reward was
            asked for and all of them reach none above their start;
        notes: what to know before reading on, in sentences.

    Raises:
        UsageError: a run has no evaluation yet, or they were evaluated on other prompts or pictures.
    """
    for name, run in runs.items():
        if not run.evaluations:
            raise UsageError(f"{name}: this run has no held-out evaluation yet")
    last = {name: run.evaluations[max(run.evaluations)] for name, run in runs.items()}
    first_name, first = next(iter(last.items()))
    for name, found in last.items():
        same = found.prompts == first.prompts
        if not same or found.scores["reward"].shape != first.scores["reward"].shape:
            raise UsageError(
                f"{name} and {first_name} were evaluated on different held-out prompts or numbers of pictures "
                "(data.eval_prompts, evaluation.num_prompts, evaluation.samples_per_prompt), so they cannot be "
                "compared prompt by prompt; python -m densegrpo_fast.evaluate draws new pictures of both",
            )
    common = [known for known in first.scores if all(known in found.scores for found in last.values())]
    terms = [lookup(run.settings, "reward.terms") for run in runs.values()]
    if any(other != terms[0] for other in terms):
        # weighted sums of different rewards
        common.remove("reward")
    elif len(terms[0] or {}) == 1:
        common = [known for known in common if known not in terms[0]]
    if not common:
        raise UsageError(
            "these runs have no reward in common; python -m densegrpo_fast.evaluate scores both by any reward",
        )
    scores = {name: {known: found.scores[known] for known in common} for name, found in last.items()}
    curves = {name: _curve(run, common[0]) for name, run in runs.items()}
    for name, points in curves.items():
        if not points:
            raise UsageError(f"{name}: all held-out scores of {common[0]} are missing")
    best = min(max(point["mean"] for point in points) for points in curves.values())
    notes, wanted = [], best if reward is None else reward
    lengths = {name: max(run.evaluations) for name, run in runs.items()}
    if len({*lengths.values()}) > 1:
        listed = ", ".join(f"{name} after {length}" for name, length in lengths.items())
        notes.append(f"the runs differ in length, so these differences are not of the method alone: evaluated {listed}")
    cost = {"reward": wanted, "runs": {name: cost_to(points, wanted) for name, points in curves.items()}}
    known = reward is not None or any(points[0]["mean"] < best for points in curves.values())
    if not known:
        notes.append(
            f"not all runs rose above their start ({figure(best)}), so no cost is shown; --reward R asks for one"
        )
    return compare(scores, reward_bounds(next(iter(runs.values())))) | {
        "by": common[0],
        "runs": {
            name: {
                "iterations": run.done,
                "finished": run.finished,
                "evaluated": max(run.evaluations),
                "settings": _differences(run, runs),
            }
            for name, run in runs.items()
        },
        "curves": curves,
        "cost": cost if known else None,
        "notes": notes,
    }


def comparison_text(comparison: Mapping[str, Any]) -> str:
    """What `compare_runs` returned, as text."""
    lines = []
    for name, about in comparison["runs"].items():
        state = "finished" if about["finished"] else "so far"
        differing = ", ".join(f"{key} {value}" for key, value in about["settings"].items())
        when = f"{about['iterations']} iterations {state}, evaluated after {about['evaluated']}"
        lines.append(f"{name}: {when}{'; ' if differing else ''}{differing}")
    lines += [f"note: {note}" for note in comparison["notes"]]
    lines += ["", tables(comparison)]
    if cost := comparison["cost"]:
        rows = [("run", *_MEASURES.values()), *((name, *_spent_cells(spent)) for name, spent in cost["runs"].items())]
        lines += ["", f"Cost to a held-out {comparison['by']} of {figure(cost['reward'])}:", "", plain(rows)]
    return "\n".join(lines)


def comparison_page(runs: Mapping[str, RunData], comparison: Mapping[str, Any]) -> str:
    """What `compare_runs` returned, as one HTML page with pictures of the same noise side by side.

    Raises:
        OSError: a picture cannot be read.
    """
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    charts = [_chart(comparison, measure, words) for measure, words in _MEASURES.items()]
    charts.append(line_chart("Training reward", {name: _training(run) for name, run in runs.items()}, "smoothed"))
    return render(
        "compare.html.j2",
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        comparison=comparison,
        measures=_MEASURES,
        spent={name: _spent_cells(found) for name, found in (comparison["cost"] or {"runs": {}})["runs"].items()},
        charts=[chart for chart in charts if chart is not None],
        pictures=_side_by_side(runs, comparison["by"]),
    )


def cost_to(points: list[dict[str, Any]], reward: float) -> dict[str, float | None] | None:
    """What a run had spent when its curve first reached a reward; None if it never did.

    Args:
        points: of the curve, as `compare_runs` has them.
        reward: a held-out mean.
    """
    if points[0]["mean"] >= reward:
        return {measure: points[0][measure] for measure in _MEASURES}
    for before, after in pairwise(points):
        if after["mean"] >= reward:
            share = (reward - before["mean"]) / (after["mean"] - before["mean"])
            ends = {measure: (before[measure], after[measure]) for measure in _MEASURES}
            return {
                measure: None if start is None or end is None else start + share * (end - start)
                for measure, (start, end) in ends.items()
            }
    return None


def _curve(run: RunData, name: str) -> list[dict[str, Any]]:
    """Held-out mean and interval of a run's evaluations, with what it had spent by then."""
    done = [int(record["iteration"]) for record in run.records]
    each = {
        "seconds": [sum(value for key, value in record.items() if key.startswith("time/")) for record in run.records],
        "cpu_seconds": [record.get("cpu_seconds") for record in run.records],
        "gflop": [record.get("flops/iteration") for record in run.records],
    }
    spent: dict[str, dict[int, float]] = {measure: {} for measure in each}
    for measure, values in each.items():
        if all(isinstance(value, (int, float)) for value in values):
            spent[measure] = {0: 0.0} | dict(zip(done, accumulate(map(float, values)), strict=True))
    return [
        {
            "iterations": iteration,
            "mean": interval.mean,
            "low": interval.low if math.isfinite(interval.low) else None,
            "high": interval.high if math.isfinite(interval.high) else None,
        }
        | {measure: known.get(iteration) for measure, known in spent.items()}
        for iteration, interval in curve(run, name)
    ]


def _differences(run: RunData, runs: Mapping[str, RunData]) -> dict[str, Any]:
    """A run's settings that are not the same in all runs, by dotted key."""
    keys = sorted({key for other in runs.values() for key in _dotted(other.settings)})
    found = {}
    for key in keys:
        values = [lookup(other.settings, key) for other in runs.values()]
        if key != "run.output_dir" and any(value != values[0] for value in values):
            found[key] = lookup(run.settings, key)
    return found


def _dotted(settings: Mapping[str, Any]) -> list[str]:
    """Keys of options: section.option."""
    keys = []
    for name, value in settings.items():
        keys += [f"{name}.{option}" for option in value] if isinstance(value, dict) else [name]
    return keys


def _chart(comparison: Mapping[str, Any], measure: str, words: str) -> Chart | None:
    """The curves over what was spent; those of which that is not known are left out."""
    curves = {
        name: points
        for name, points in comparison["curves"].items()
        if all(point[measure] is not None for point in points)
    }
    return line_chart(
        f"Held-out {comparison['by']} over {words}",
        {name: [(point[measure], point["mean"]) for point in points] for name, points in curves.items()},
        "prompts never trained on, noise-free sampler; 95% interval over prompts",
        bands={
            name: [(point[measure], _or_nan(point["low"]), _or_nan(point["high"])) for point in points]
            for name, points in curves.items()
        },
        x_name=words,
    )


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def _training(run: RunData) -> Points:
    return [
        (float(record["iteration"]), float(record["reward"]))
        for record in run.records
        if isinstance(record.get("reward"), (int, float))
    ]


def _spent_cells(spent: Mapping[str, float | None] | None) -> list[str]:
    """What was spent as text."""
    if spent is None:
        return ["not reached", *["-"] * (len(_MEASURES) - 1)]
    return ["-" if value is None else f"{value:,.4g}" for value in spent.values()]


def _side_by_side(runs: Mapping[str, RunData], name_of_reward: str) -> list[dict[str, Any]]:
    """For each of the first held-out prompts a picture before training and the last of every run, with its reward."""
    columns: list[tuple[str, list[str], list[str]]] = []
    captions: list[str] = []
    first = next(iter(runs.values()))
    shown = [("before training", first, 0), *((name, run, max(run.samples(), default=0)) for name, run in runs.items())]
    for title, run, iteration in shown:
        path, found = run.samples().get(iteration), run.evaluations.get(iteration)
        if path is None:
            continue
        pictures, captions = read_grid(path)[:_PICTURES], read_captions(path)
        scores = found.scores[name_of_reward][:, 0].tolist() if found else [math.nan] * len(pictures)
        columns.append((title, [data_url(picture, _SIDE) for picture in pictures], [figure(value) for value in scores]))
    count = min([len(captions), *(len(urls) for _, urls, _ in columns)])
    return [
        {
            "prompt": captions[index],
            "cells": [(title, urls[index], rewards[index]) for title, urls, rewards in columns],
        }
        for index in range(count)
    ]
