"""Charts of the pages, with their places worked out: `templates/chart.html.j2` draws them as SVG.

A chart has an axis of iterations (or whatever x is), and for each of its x a text that a page shows when the pointer or
the keyboard comes to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from densegrpo_fast.run_files.rendering import figure

Points = Sequence[tuple[float, float]]
Bands = Mapping[str, Sequence[tuple[float, float, float]]]
Spans = Sequence[tuple[float, float, str]]

_SMOOTHING_ABOVE, _MOST_POINTS, _MOST_STOPS = 20, 400, 200
_COLOURS = 6


@dataclass(frozen=True)
class Line:
    """One series of a chart.

    Attributes:
        label: what it is.
        colour: as CSS.
        points: of the line, as SVG has them.
        raw: the same of the pale line of a smoothed series, else empty.
        dots: places (x, y) of single points, of a short series.
        band: corners of the area of its interval, or of its part of a stack; else empty.
    """

    label: str
    colour: str
    points: str = ""
    raw: str = ""
    dots: list[tuple[str, str]] = field(default_factory=list)
    band: str = ""


@dataclass(frozen=True)
class Cell:
    """A rectangle of a heat map; its colour says the sign, its opacity the size."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    opacity: float


@dataclass(frozen=True)
class Chart:
    """A picture with an axis below it; y points downwards.

    Attributes:
        title, note: heading, and one line below it.
        grid: height and label of each horizontal line.
        axis: place, label and SVG anchor of each text below the axis.
        lines: series; cells: of a heat map.
        marks: left, width and words of what happened in a stretch of the axis, such as an alarm.
        stops: for each x its place and what the chart says there.
        summary: the chart in a sentence, for those who do not see it.
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
    lines: list[Line] = field(default_factory=list)
    cells: list[Cell] = field(default_factory=list)
    marks: list[tuple[float, float, str]] = field(default_factory=list)
    stops: list[tuple[float, str]] = field(default_factory=list)
    summary: str = ""


def line_chart(
    title: str,
    series: Mapping[str, Points],
    note: str = "",
    *,
    bands: Bands | None = None,
    spans: Spans = (),
    x_name: str = "iteration",
) -> Chart | None:
    """A chart with one line per series.

    A series of more than 20 points gets a smoothed line (see `smooth`) over its pale raw one.

    Args:
        title: heading of the figure.
        series: label -> points (x, y), x increasing; points with a y that is not finite are left out.
        note: one line below the heading.
        bands: label -> (x, low, high) of an interval around the series.
        spans: first x, last x and words of what is to be marked.
        x_name: of the axis.

    Returns:
        The chart; None where no series has a point.
    """
    lines = _finite(series)
    if not lines:
        return None
    known = {
        label: [(x, low, high) for x, low, high in band if math.isfinite(low) and math.isfinite(high)]
        for label, band in (bands or {}).items()
    }
    heights = [y for points in lines.values() for _, y in points]
    heights += [y for band in known.values() for _, low, high in band for y in (low, high)]
    scale = _Scale.of([x for points in lines.values() for x, _ in points], min(heights), max(heights))
    drawn = []
    for index, (label, points) in enumerate(lines.items()):
        smoothed = smooth(points) if len(points) > _SMOOTHING_ABOVE else points
        band, short = known.get(label, ()), smoothed is points
        corners = [(x, high) for x, _, high in band] + [(x, low) for x, low, _ in reversed(band)]
        drawn.append(
            Line(
                label,
                f"var(--line-{index % _COLOURS})",
                points=scale.path(_thin(smoothed)),
                raw="" if short else scale.path(_thin(points)),
                dots=[(scale.x(x), scale.y(y)) for x, y in points] if short else [],
                band=scale.path(corners) if band else "",
            )
        )
    within = {label: {x: f" [{figure(low)}, {figure(high)}]" for x, low, high in band} for label, band in known.items()}

    def words(label: str, x: float, y: float) -> str:
        return f"{label} {figure(y)}{within.get(label, {}).get(x, '')}"

    ends = [f"{label} from {figure(points[0][1])} to {figure(points[-1][1])}" for label, points in lines.items()]
    return Chart(
        title,
        note,
        grid=scale.grid(),
        axis=scale.axis(x_name),
        lines=drawn,
        marks=scale.marks(spans),
        stops=_stops(scale, lines, words, x_name, spans),
        summary=f"{title}: {'; '.join(ends)}",
    )


def stacked_chart(title: str, series: Mapping[str, Points], note: str, unit: str, *, spans: Spans = ()) -> Chart | None:
    """Areas on top of each other, for parts of a whole at common x; a missing or infinite y counts as 0.

    Args:
        title, note: as in `line_chart`.
        series: label -> points (x, y >= 0), from the lowest area up.
        unit: of y, in the texts.
        spans: as in `line_chart`.
    """
    lines = _finite(series)
    places = sorted({x for points in lines.values() for x, _ in points})
    if len(places) < 2:
        return None
    values = {label: dict(points) for label, points in lines.items()}
    totals = [sum(known.get(x, 0.0) for known in values.values()) for x in places]
    scale = _Scale.of(places, 0.0, max(totals))
    below = dict.fromkeys(places, 0.0)
    drawn = []
    for index, (label, known) in enumerate(values.items()):
        above = {x: below[x] + known.get(x, 0.0) for x in places}
        corners = _thin([(x, above[x]) for x in places]) + _thin([(x, below[x]) for x in places])[::-1]
        drawn.append(Line(label, f"var(--line-{index % _COLOURS})", band=scale.path(corners)))
        below = above
    means = [f"{label} {figure(sum(known.values()) / len(places))} {unit}" for label, known in values.items()]
    return Chart(
        title,
        note,
        grid=scale.grid(),
        axis=scale.axis("iteration"),
        lines=drawn,
        marks=scale.marks(spans),
        stops=_stops(scale, lines, lambda label, x, y: f"{label} {figure(y)} {unit}", "iteration", spans),
        summary=f"{title}, on average {'; '.join(means)}",
    )


def heat_map(title: str, rows: Mapping[str, Points], note: str, *, spans: Spans = ()) -> Chart | None:
    """A row of cells for each series, coloured by the sign and size of its values; many x are averaged together.

    Args:
        title, note, spans: as in `line_chart`.
        rows: label -> points (x, y), from the top.
    """
    lines = _finite(rows)
    places = sorted({x for points in lines.values() for x, _ in points})
    if not places:
        return None
    per_bin = math.ceil(len(places) / _MOST_STOPS)
    bins = [places[start : start + per_bin] for start in range(0, len(places), per_bin)]
    values = {
        label: [_mean([known[x] for x in group if x in known]) for group in bins]
        for label, known in ((label, dict(points)) for label, points in lines.items())
    }
    largest = max((abs(y) for row in values.values() for y in row if math.isfinite(y)), default=0.0) or 1.0
    width = (Chart.right - Chart.left) / len(bins)
    height = (Chart.bottom - Chart.top) / len(values)
    cells, grid = [], []
    for row, (label, ys) in enumerate(values.items()):
        top = Chart.top + row * height
        grid.append((round(top + height / 2, 1), label))
        for column, y in enumerate(ys):
            if math.isfinite(y):
                colour = "var(--up)" if y >= 0 else "var(--down)"
                left = Chart.left + column * width
                size = (round(left, 1), round(top + 1, 1), round(width + 0.3, 1), round(height - 2, 1))
                cells.append(Cell(*size, colour, round(abs(y) / largest, 3)))
    centres = [round(Chart.left + (column + 0.5) * width, 1) for column in range(len(bins))]
    stops = []
    for column, group in enumerate(bins):
        first = f"iteration {group[0]:g}" if len(group) == 1 else f"iterations {group[0]:g} to {group[-1]:g}"
        texts = [f"{label} {figure(ys[column], sign=True)}" for label, ys in values.items()]
        stops.append((centres[column], f"{first}: {', '.join(texts)}"))
    scale = _Scale(places[0], places[-1], [0.0, 1.0])
    means = [f"{label} {figure(_mean([y for y in ys if math.isfinite(y)]), sign=True)}" for label, ys in values.items()]
    return Chart(
        title,
        note,
        grid=grid,
        axis=scale.axis("iteration"),
        cells=cells,
        marks=scale.marks(spans),
        stops=stops,
        summary=f"{title}, on average {'; '.join(means)}",
    )


def says_something(points: Points) -> bool:
    """Whether a series has at least two different finite values."""
    return len({y for _, y in points if math.isfinite(y)}) > 1


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


@dataclass(frozen=True)
class _Scale:
    """Where values are in the picture."""

    low: float
    high: float
    ticks: list[float]

    @classmethod
    def of(cls, places: Sequence[float], low: float, high: float) -> _Scale:
        return cls(min(places), max(places), nice_ticks(low, high))

    def place(self, x: float) -> float:
        return Chart.left + (x - self.low) / ((self.high - self.low) or 1.0) * (Chart.right - Chart.left)

    def x(self, x: float) -> str:
        return f"{self.place(x):.1f}"

    def y(self, y: float) -> str:
        share = (self.ticks[-1] - y) / (self.ticks[-1] - self.ticks[0])
        return f"{Chart.top + share * (Chart.bottom - Chart.top):.1f}"

    def path(self, points: Points) -> str:
        return " ".join(f"{self.x(x)},{self.y(y)}" for x, y in points)

    def grid(self) -> list[tuple[float, str]]:
        step = self.ticks[1] - self.ticks[0]
        decimals = max(0, -math.floor(math.log10(step) + 1e-9))
        form = ".1e" if decimals > 5 or step >= 1e6 else f",.{decimals}f"
        return [(float(self.y(tick)), format(tick, form)) for tick in self.ticks]

    def axis(self, name: str) -> list[tuple[str, str, str]]:
        ends = [(self.low, "start"), (self.high, "end")] if self.high > self.low else [(self.low, "start")]
        texts = ((x, f"{x:,.0f}" if x >= 100 or x == round(x) else f"{x:.3g}", anchor) for x, anchor in ends)
        return [*((self.x(x), text, anchor) for x, text, anchor in texts), (f"{Chart.width // 2}", name, "middle")]

    def marks(self, spans: Spans) -> list[tuple[float, float, str]]:
        found = []
        for first, last, words in spans:
            start, end = (self.place(min(max(x, self.low), self.high)) for x in (first - 0.5, last + 0.5))
            if last >= self.low and first <= self.high:
                found.append((round(start, 1), round(max(end - start, 2.0), 1), words))
        return found


def _stops(
    scale: _Scale, lines: Mapping[str, Points], words: Callable[[str, float, float], str], x_name: str, spans: Spans
) -> list[tuple[float, str]]:
    """For each x that has a value the texts of all series there."""
    values = {label: dict(points) for label, points in lines.items()}
    places = sorted({x for points in lines.values() for x, _ in points})
    stops = []
    for x in places[:: math.ceil(len(places) / _MOST_STOPS)]:
        texts = [words(label, x, known[x]) for label, known in values.items() if x in known]
        texts += [text for first, last, text in spans if first <= x <= last]
        stops.append((round(scale.place(x), 1), f"{x_name} {x:.6g}: {', '.join(texts)}"))
    return stops


def _finite(series: Mapping[str, Points]) -> dict[str, list[tuple[float, float]]]:
    lines = {label: [(float(x), float(y)) for x, y in points if math.isfinite(y)] for label, points in series.items()}
    return {label: points for label, points in lines.items() if points}


def _thin(points: Any) -> list[tuple[float, float]]:
    """Every so many of the points, and the last, so that no more than about 400 are left."""
    every = math.ceil(len(points) / _MOST_POINTS)
    return [*points[:-1:every], points[-1]] if every > 1 else list(points)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
