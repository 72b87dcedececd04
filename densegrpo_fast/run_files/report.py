"""The run's report: one HTML file with everything inside, to be opened anywhere, offline, years later.

It is made from the files of a run directory alone (`run_data.py`), finished or not. This file makes the values of the
page; `templates/report.html.j2` words them, `report.css` and `report.js` beside it are put inside. A content security
policy in the page allows that one script and forbids every request.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.files import replace_text
from densegrpo_fast.config.cli import load_config
from densegrpo_fast.rewards.registry import bounds
from densegrpo_fast.run_files.alarms import alarms_for, iterations_by_alarm
from densegrpo_fast.run_files.charts import Chart, Points, heat_map, line_chart, says_something, stacked_chart
from densegrpo_fast.run_files.grids import data_url, read_captions, read_grid
from densegrpo_fast.run_files.rendering import TEMPLATES, figure, number, render
from densegrpo_fast.run_files.run_data import RunData, read_run
from densegrpo_fast.run_files.run_directory import CONFIG_FILE, REPORT_FILE
from densegrpo_fast.run_files.statistics import Bounds, Interval, mean_interval, or_missing, paired_interval
from densegrpo_fast.run_files.strip import read_strip

Record = Mapping[str, Any]

_GAIN, _POSITIVE, _SPREAD, _LEVEL = "gain/step_", "gain_positive/step_", "branch_spread/step_", "noise_level/step_"
_CURVES = (
    ("Training reward", ("reward",), "mean over the iteration's samples, drawn with exploration noise"),
    ("Reward spread", ("reward_std",), "standard deviation within a group, mean over groups; 0 teaches nothing"),
    (
        "Agreement with the exact lookahead",
        ("monitor/spearman_rewards", "monitor/spearman_gains"),
        "rank correlation within one prompt's samples, of the iterations that are scored again exactly",
    ),
    ("KL to the reference policy", ("kl",), "how far the adapter has moved the model"),
    ("Gradient norm", ("grad_norm",), "before clipping"),
    (
        "Clip fraction",
        ("clip_fraction", "clip_ratio/region_mean"),
        "ratios outside the clip range, and those whose gradient it cuts off; steadily above 0.5 is too high",
    ),
    (
        "Ratio deviation",
        ("ratio_deviation", "first_ratio_deviation"),
        "largest |ratio - 1|, of all updates and of the first, which is rounding only",
    ),
    ("KL to the sampling policy", ("approx_kl",), "mean of ratio - 1 - log ratio"),
    (
        "Zero-spread share",
        ("frac_reward_zero_std",),
        "groups (or group steps) without a preference; their advantage is 0",
    ),
    ("Missing scores", ("reward_missing",), "share of the scores that the reward could not give"),
    ("Skipped updates", ("skipped_updates",), "loss or gradient not finite"),
    ("Learning rate", ("learning_rate",), ""),
)
"""Title, metrics and note of each chart, in the order of the page; one whose series never change is left out."""
_WORK = (
    ("decodes/full", "{} full decodes"),
    ("decodes/preview", "{} preview decodes"),
    ("pictures_scored", "{} pictures scored"),
    ("flops/iteration", "{} GFLOP"),
    ("flops/over_sparse", "{} times the operations of one with a single reward per image"),
)
_MOST_STRIPS, _MOST_TIMES, _MOST_PROMPTS = 6, 8, 24
_STRIP_SIDE, _PICTURE_SIDE = 128, 256


def write_report(run_dir: Path) -> Path:
    """Write `report.html` into a run directory, from what is in it.

    Returns:
        Path of the file, which replaces an older one atomically.

    Raises:
        SetupError: there is no run there, or a file of it is damaged; OutputError: it cannot be written.
    """
    path = run_dir / REPORT_FILE
    replace_text(path, render_report(read_run(run_dir)))
    return path


def render_report(run: RunData, live: str | None = None) -> str:
    """The page of a run.

    Args:
        run: its data.
        live: what `watch` says when it is asked for the version of this page, which then renews itself; None = a file.

    Raises:
        OSError: a picture cannot be read.
    """
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    spans = alarm_spans(run.records)
    phases = {
        name.removeprefix("time/"): _points(run.records, name)
        for name in dict.fromkeys(key for record in run.records for key in record if key.startswith("time/"))
    }
    seconds = {phase: sum(y for _, y in points) for phase, points in phases.items()}
    busy = {phase: points for phase, points in phases.items() if seconds[phase] > 0}
    charts, flat = _charts(run, spans)
    return render(
        "report.html.j2",
        run=run,
        live=live,
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii"),
        time=duration(sum(seconds.values())),
        strips=_strips(run),
        results=_results(run),
        pictures=_pictures(run),
        alarms=iterations_by_alarm(run.records),
        advice=_advice(run),
        held_out=_held_out_chart(run, spans),
        steps=_per_step(run),
        heat=_heat(run, spans),
        charts=charts,
        flat=flat,
        costs=stacked_chart("Seconds of each iteration", busy, "by phase, one on top of the other", "s", spans=spans),
        phases=[
            {"name": phase, "seconds": seconds[phase], "nfe": _mean(run.records, f"nfe/{phase}")} for phase in seconds
        ],
        total=sum(seconds.values()),
        work=[words.format(number(mean)) for key, words in _WORK if (mean := _mean(run.records, key))],
    )


def alarm_spans(records: Sequence[Record]) -> list[tuple[float, float, str]]:
    """First iteration, last iteration and name of every stretch in which an alarm was on."""
    spans = []
    for name, iterations in iterations_by_alarm(records).items():
        start: float = iterations[0]
        before: float = iterations[0]
        for iteration in [*iterations[1:], math.inf]:
            if iteration != before + 1:
                spans.append((float(start), float(before), f"alarm {name}"))
                start = iteration
            before = iteration
    return spans


def curve(run: RunData, name: str) -> list[tuple[int, Interval]]:
    """Iterations and 95% intervals over prompts of a reward's held-out evaluations; those without a score left out."""
    return [
        (iteration, mean_interval(found.scores[name], bounds=reward_bounds(run).get(name)))
        for iteration, found in run.evaluations.items()
        if name in found.scores and np.isfinite(found.scores[name]).any()
    ]


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """At most so many of the items, evenly spread, among them the first and the last."""
    if len(items) <= most:
        return list(items)
    return [items[round(index * (len(items) - 1) / (most - 1))] for index in range(most)]


def duration(seconds: float) -> str:
    """Seconds in words."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _strips(run: RunData) -> list[dict[str, Any]]:
    """Some of the run's strips, ready to be shown."""
    shown = []
    for iteration, path in evenly(list(run.strips().items()), _MOST_STRIPS):
        strip = read_strip(path)
        rows = []
        for row in strip.rows:
            urls = (
                [None if picture is None else data_url(picture, _STRIP_SIDE) for picture in pictures]
                for pictures in (row.latents, row.pictures)
            )
            cells = zip(strip.columns, *urls, row.rewards, row.gains, strict=True)
            rows.append({"label": row.label, "cells": list(cells)})
        about = {"iteration": iteration, "prompt": strip.prompt, "note": strip.note, "gain": strip.gain}
        shown.append(about | {"rows": rows})
    return shown


def reward_bounds(run: RunData) -> dict[str, Bounds]:
    """Between what the scores of a run's rewards lie, of those that are known to be bounded."""
    own = run.settings.get("reward", {})
    terms = dict.fromkeys(own.get("observed") or (), 0.0) | (own.get("terms") or {})
    # a trainer may have been given another reward than the configuration's
    if any(not terms.keys() <= found.scores.keys() for found in run.evaluations.values()):
        return {}
    return bounds(terms, own.get("options") or {})


def reward_names(run: RunData) -> list[str]:
    """The rewards of a run's evaluations; where a single one is trained, the weighted sum stands for it."""
    names = dict.fromkeys(name for found in run.evaluations.values() for name in found.scores)
    terms = run.settings.get("reward", {}).get("terms") or {}
    return [name for name in names if len(terms) > 1 or name not in terms]


def _results(run: RunData) -> list[tuple[str, Interval, Interval, Interval]]:
    """For each reward its name, held-out interval of the first and of the last evaluation, and that of the change."""
    evaluations = list(run.evaluations.values())
    if len(evaluations) < 2:
        return []
    before, after, known = evaluations[0].scores, evaluations[-1].scores, reward_bounds(run)
    return [
        (
            name,
            or_missing(mean_interval, before[name], bounds=known.get(name)),
            or_missing(mean_interval, after[name], bounds=known.get(name)),
            or_missing(paired_interval, before[name], after[name], bounds=known.get(name)),
        )
        for name in reward_names(run)
        if name in before and name in after
    ]


def _pictures(run: RunData) -> dict[str, Any] | None:
    """Held-out pictures over time with their rewards, the prompts sorted by the last change; None without two times."""
    grids = {iteration: read_grid(path) for iteration, path in evenly(list(run.samples().items()), _MOST_TIMES)}
    grids = {iteration: pictures for iteration, pictures in grids.items() if pictures}
    if len(grids) < 2:
        return None
    captions = read_captions(run.samples()[min(grids)])
    count = min([_MOST_PROMPTS, len(captions), *map(len, grids.values())])
    rewards = {}
    for iteration in grids:
        found = run.evaluations.get(iteration)
        known = found is not None and "reward" in found.scores and found.prompts[:count] == captions[:count]
        rewards[iteration] = found.scores["reward"][:count, 0].tolist() if found and known else [math.nan] * count
    before = rewards[min(grids)]
    change = [after - start for start, after in zip(before, rewards[max(grids)], strict=True)]
    order = sorted(range(count), key=lambda i: -change[i] if math.isfinite(change[i]) else math.inf)
    times = []
    for iteration, pictures in grids.items():
        changes = [value - start for value, start in zip(rewards[iteration], before, strict=True)]
        times.append(
            {
                "name": "before training" if iteration == 0 else f"iteration {iteration}",
                "urls": [data_url(picture, _PICTURE_SIDE) for picture in pictures[:count]],
                "rewards": [figure(value) for value in rewards[iteration]],
                "changes": [figure(value, sign=True) for value in changes],
                "signs": [_sign(value) for value in changes],
            }
        )
    return {"prompts": captions[:count], "order": order, "times": times}


def _sign(value: float) -> int:
    return 0 if not math.isfinite(value) or abs(value) < 5e-4 else 1 if value > 0 else -1


def _held_out_chart(run: RunData, spans: Sequence[tuple[float, float, str]]) -> Chart | None:
    if len(run.evaluations) < 2:
        return None
    curves = {name: curve(run, name) for name in reward_names(run)}
    return line_chart(
        "Held-out reward",
        {name: [(x, interval.mean) for x, interval in points] for name, points in curves.items()},
        "prompts never trained on, noise-free sampler; 95% interval over prompts",
        bands={name: [(x, interval.low, interval.high) for x, interval in points] for name, points in curves.items()},
        spans=spans,
    )


def _heat(run: RunData, spans: Sequence[tuple[float, float, str]]) -> Chart | None:
    """Gains of each step over the iterations, or where there are branches how far their rewards spread."""
    gains = {f"step {step}": _points(run.records, f"{_GAIN}{step}") for step in _steps(run.records, _GAIN)}
    if any(says_something(points) for points in gains.values()):
        note = "what each denoising step adds to the reward of the predicted picture; step 0 starts from noise"
        return heat_map("Gain of each step", gains, note, spans=spans)
    spread = {f"step {step}": _points(run.records, f"{_SPREAD}{step}") for step in _steps(run.records, _SPREAD)}
    note = "standard deviation of the rewards of the branches of one state: how much the noise of that step decides"
    return heat_map("Spread over the branches of each step", spread, note, spans=spans)


def _per_step(run: RunData) -> dict[str, Any] | None:
    """For each step its noise level, and gains (or spread) in the first and last tenth of the iterations."""
    prefix = _GAIN if _steps(run.records, _GAIN) else _SPREAD
    steps = _steps(run.records, prefix)
    if not steps:
        return None
    levels = run.settings.get("sampler", {}).get("noise_level")
    tenth = max(1, len(run.records) // 10)
    rows = []
    for step in steps:
        level = levels[step] if isinstance(levels, list) and step < len(levels) else levels
        calibrated = [record[f"{_LEVEL}{step}"] for record in run.records if f"{_LEVEL}{step}" in record]
        rows.append(
            {
                "step": step,
                "level": calibrated[-1] if calibrated else level,
                "first": _mean(run.records[:tenth], f"{prefix}{step}"),
                "last": _mean(run.records[-tenth:], f"{prefix}{step}"),
                "positive": _mean(run.records[-tenth:], f"{_POSITIVE}{step}"),
            }
        )
    balance = any(row["positive"] is not None for row in rows)
    return {"rows": rows, "gains": prefix == _GAIN, "balance": balance}


def _charts(run: RunData, spans: Sequence[tuple[float, float, str]]) -> tuple[list[Chart], list[str]]:
    """The curves that change, and the others in words."""
    charts, flat = [], []
    for title, keys, note in _CURVES:
        series = {key: points for key in keys if (points := _points(run.records, key))}
        if not any(says_something(points) for points in series.values()):
            if series:
                flat.append(f"{title.lower()} {figure(next(iter(series.values()))[-1][1])}")
            continue
        chart = line_chart(title, series, note, spans=spans)
        if chart is not None:
            charts.append(chart)
    return charts, flat


def _advice(run: RunData) -> dict[str, str]:
    """What the alarms mean and what to do; nothing where the settings cannot be read any more."""
    try:
        alarms = alarms_for(load_config(str(run.directory / CONFIG_FILE)))
    except UserError:
        return {}
    return {alarm.name: f"{alarm.meaning}: {alarm.advice}." for alarm in alarms}


def _steps(records: Sequence[Record], prefix: str) -> list[int]:
    """The steps that have such a metric, other than 0 in all iterations (a step without noise gains nothing)."""
    names = {key for record in records for key in record if key.startswith(prefix) and record[key]}
    return sorted(int(name.removeprefix(prefix)) for name in names)


def _points(records: Sequence[Record], key: str) -> Points:
    return [
        (float(record.get("iteration", index)), float(record[key]))
        for index, record in enumerate(records)
        if isinstance(record.get(key), (int, float))
    ]


def _mean(records: Sequence[Record], key: str) -> float | None:
    """Mean over the records that have a number; None without any."""
    values = [y for _, y in _points(records, key)]
    return sum(values) / len(values) if values else None
