"""The run's report: one HTML file with everything inside, to be opened anywhere, offline, years later.

It reads a run's numbers and pictures and shows: what was run, the held-out reward before and after, curves, where time
and network evaluations went, pictures before and after, and the settings. No script and no request: a content security
policy in the page forbids both. This file makes the numbers of the page, `templates/report.html.j2` shows them.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import yaml

from densegrpo_fast.common.files import replace_text
from densegrpo_fast.run_files.alarms import iterations_by_alarm
from densegrpo_fast.run_files.images import read_captions
from densegrpo_fast.run_files.rendering import number, render
from densegrpo_fast.run_files.statistics import Interval

Record = Mapping[str, Any]
Points = Sequence[tuple[float, float]]

_GAIN = "gain/step_"
_CURVES = (
    ("Training reward", ("reward",), "mean over the iteration's samples, drawn with exploration noise"),
    ("Held-out reward", ("eval/reward", "eval/strict"), "prompts never trained on, noise-free sampler"),
    (
        "Reward gain per step",
        (_GAIN,),
        "what each denoising step adds to the reward of the lookahead image; step 0 starts from pure noise",
    ),
    ("Reward spread", ("reward_std",), "standard deviation within a group, mean over groups; 0 teaches nothing"),
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
    ("Approximate KL to the sampling policy", ("approx_kl",), "mean of ratio - 1 - log ratio"),
    ("KL to the reference policy", ("kl",), "how far the adapter has moved the model"),
    ("Gradient norm", ("grad_norm",), "before clipping"),
    (
        "Zero-spread share",
        ("frac_reward_zero_std",),
        "groups (or group steps) without a preference; their advantage is 0",
    ),
    (
        "Agreement with the exact lookahead",
        ("monitor/spearman_rewards", "monitor/spearman_gains"),
        "rank correlation within one prompt's samples, of the iterations that are scored again exactly",
    ),
    ("Missing scores", ("reward_missing",), "share of the scores that the reward could not give"),
)
"""Title, metrics and note of each chart, in the order of the page; `gain/step_` stands for all steps."""
_WORK = (
    ("decodes/full", "{} full decodes"),
    ("decodes/preview", "{} preview decodes"),
    ("pictures_scored", "{} pictures scored"),
    ("flops/iteration", "{} GFLOP"),
    ("flops/over_sparse", "{} times the operations of one with a single reward per image"),
)
_SMOOTHING_ABOVE = 20


def write_report(
    run_dir: str | Path,
    *,
    config_yaml: str,
    metrics: Sequence[Record],
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    images: Mapping[str, str | Path],
    phases: Mapping[str, float],
    change: Mapping[str, Any] | None = None,
    advice: Mapping[str, str] | None = None,
) -> Path:
    """Write `report.html` into a run directory.

    Args:
        run_dir: the run directory; its name is the title.
        config_yaml: the resolved settings as YAML text.
        metrics: one record per iteration, as in metrics.jsonl; absent keys leave their curve or cell out.
            docs/metrics.md has their meaning.
        before: held-out metric -> (mean, low, high) as `mean_interval` gives them, or a plain mean.
        after: the same metrics after training.
        images: title -> PNG file of `save_grid`, shown in this order with the prompts stored in it.
        phases: phase -> seconds over the whole run, in display order. A phase's network evaluations are the
            mean of nfe/PHASE over the records.
        change: metric -> (mean, low, high) of after - before as `paired_interval` gives it.
        advice: alarm -> what it means and what to do, for the alarms in the records.

    Returns:
        Path of the file, which replaces an older one atomically.

    Raises:
        OutputError: if it cannot be written.
    """
    run_dir, change = Path(run_dir), change or {}
    total = sum(phases.values())
    page = render(
        "report.html.j2",
        name=run_dir.resolve().name,
        # records of an evaluation alone, as before the first iteration, have no training reward
        iterations=sum("reward" in record for record in metrics),
        time=_duration(total),
        settings=yaml.safe_load(config_yaml),
        results=[
            (
                name,
                _interval(before.get(name)),
                _interval(after.get(name)),
                _interval(change[name]) if name in change else None,
            )
            for name in dict.fromkeys([*before, *after])
        ],
        alarms=iterations_by_alarm(metrics),
        advice=advice or {},
        charts=_charts(metrics),
        total=total,
        phases=[
            {"name": phase, "seconds": seconds, "nfe": _mean(metrics, f"nfe/{phase}")}
            for phase, seconds in phases.items()
        ],
        work=[words.format(number(mean)) for key, words in _WORK if (mean := _mean(metrics, key))],
        pictures=[
            {
                "title": title,
                "png": base64.b64encode(Path(path).read_bytes()).decode("ascii"),
                "prompts": read_captions(path),
            }
            for title, path in images.items()
        ],
        config_yaml=config_yaml,
    )
    path = run_dir / "report.html"
    replace_text(path, page)
    return path


@dataclass(frozen=True)
class Line:
    """One series of a chart.

    Attributes:
        label: what it is.
        colour: as CSS.
        first, last: its values at both ends.
        points: of the line, as SVG has them.
        raw: the same of the pale line of a smoothed series, else empty.
        dots: places (x, y) of single points, of a short series.
    """

    label: str
    colour: str
    first: float
    last: float
    points: str
    raw: str
    dots: list[tuple[str, str]]


@dataclass(frozen=True)
class Chart:
    """Series over a common axis, ready to be drawn: places are in units of the picture, y downwards.

    Attributes:
        title: heading.
        note: one line below it: what is healthy, what the unit is.
        grid: height and label of each horizontal line.
        axis: place, label and SVG anchor of each text below the axis.
        lines: the series.
    """

    width: ClassVar[int] = 560
    height: ClassVar[int] = 250
    left: ClassVar[int] = 58
    right: ClassVar[int] = 548
    top: ClassVar[int] = 14
    bottom: ClassVar[int] = 220

    title: str
    note: str
    grid: list[tuple[float, str]]
    axis: list[tuple[str, str, str]]
    lines: list[Line]


def line_chart(title: str, series: Mapping[str, Points], note: str = "", *, ordered: bool = False) -> Chart | None:
    """A chart with one line per series.

    A series of more than 20 points gets a smoothed line (see `smooth`) over its pale raw one.

    Args:
        title: heading of the figure.
        series: label -> points (x, y), x increasing; points with a y that is not finite are left out.
        note: one line below the heading.
        ordered: the series are steps of one sequence: colours run through a scale, and the raw lines are left
            out.

    Returns:
        The chart; None where no series has a point.
    """
    lines = {label: [(float(x), float(y)) for x, y in points if math.isfinite(y)] for label, points in series.items()}
    lines = {label: points for label, points in lines.items() if points}
    if not lines:
        return None
    smoothed = {label: smooth(points) if len(points) > _SMOOTHING_ABOVE else points for label, points in lines.items()}
    # the axis fits what is drawn: of ordered series, only the smoothed lines
    drawn = [point for points in (smoothed if ordered else lines).values() for point in points]
    x_low, x_high = min(x for x, _ in drawn), max(x for x, _ in drawn)
    ticks = nice_ticks(min(y for _, y in drawn), max(y for _, y in drawn))
    y_low, y_high = ticks[0], ticks[-1]

    def place_x(x: float) -> str:
        return f"{Chart.left + (x - x_low) / ((x_high - x_low) or 1.0) * (Chart.right - Chart.left):.1f}"

    def place_y(y: float) -> str:
        return f"{Chart.top + (y_high - y) / (y_high - y_low) * (Chart.bottom - Chart.top):.1f}"

    def path(points: Points) -> str:
        return " ".join(f"{place_x(x)},{place_y(y)}" for x, y in points)

    def colour(index: int) -> str:
        if not ordered:
            return f"var(--line-{index % 4})"
        # violet to orange through blue and green: ordered to the eye, and legible on light and on dark paper
        return f"hsl({265 - 235 * index / max(len(lines) - 1, 1):.0f} 62% 52%)"

    ends = [(x_low, "start"), (x_high, "end")] if x_high > x_low else [(x_low, "start")]
    return Chart(
        title,
        note,
        grid=[(float(place_y(tick)), f"{tick:.6g}") for tick in ticks],
        axis=[*((place_x(x), f"{x:g}", anchor) for x, anchor in ends), (f"{Chart.width // 2}", "iteration", "middle")],
        lines=[
            Line(
                label,
                colour(index),
                points[0][1],
                points[-1][1],
                points=path(smoothed[label]),
                raw="" if ordered or smoothed[label] is points else path(points),
                dots=[(place_x(x), place_y(y)) for x, y in points] if smoothed[label] is points else [],
            )
            for index, (label, points) in enumerate(lines.items())
        ],
    )


def nice_ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round, evenly spaced numbers, at least two, that enclose [low, high]; steps are 1, 2 or 5 * 10^k."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, last + 1)]


def smooth(points: Points) -> list[tuple[float, float]]:
    """Each point moved onto the straight line that fits its neighbourhood, about a tenth of all points, best.

    A straight line stays as it is, up to both ends: no lag, and the last value is not one noisy point.
    """
    reach = max(len(points) // 20, 1)
    moved = []
    for index, (x, _) in enumerate(points):
        window = points[max(index - reach, 0) : index + reach + 1]
        x_mean = sum(near_x for near_x, _ in window) / len(window)
        y_mean = sum(near_y for _, near_y in window) / len(window)
        spread = sum((near_x - x_mean) ** 2 for near_x, _ in window)
        together = sum((near_x - x_mean) * (near_y - y_mean) for near_x, near_y in window)
        moved.append((x, y_mean + (x - x_mean) * (together / spread if spread else 0.0)))
    return moved


def _charts(metrics: Sequence[Record]) -> list[Chart]:
    charts = []
    for title, keys, note in _CURVES:
        if keys == (_GAIN,):
            names = {key for record in metrics for key in record if key.startswith(_GAIN)}
            steps = sorted(int(name.removeprefix(_GAIN)) for name in names)
            series = {f"step {step}": _points(metrics, f"{_GAIN}{step}") for step in steps}
        else:
            series = {key: _points(metrics, key) for key in keys}
        charts.append(line_chart(title, series, note, ordered=keys == (_GAIN,)))
    return [chart for chart in charts if chart is not None]


def _points(metrics: Sequence[Record], key: str) -> list[tuple[float, float]]:
    return [
        (record.get("iteration", index), record[key])
        for index, record in enumerate(metrics)
        if isinstance(record.get(key), (int, float))
    ]


def _mean(metrics: Sequence[Record], key: str) -> float | None:
    """Mean over the records that have a number; None without any."""
    values = [y for _, y in _points(metrics, key)]
    return sum(values) / len(values) if values else None


def _interval(value: Any) -> Interval:
    if isinstance(value, Iterable):
        return Interval(*map(float, value))
    return Interval(math.nan if value is None else float(value), math.nan, math.nan)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
