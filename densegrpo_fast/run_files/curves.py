"""Line charts as inline SVG: no plotting library, no script, colours from the page's own style sheet."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]
Place = Callable[[tuple[float, float]], str]

_WIDTH, _HEIGHT = 560, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 12, 14, 30
_SMOOTHING_ABOVE = 20


def line_chart(title: str, series: Mapping[str, Points], note: str = "", *, ordered: bool = False) -> str:
    """A figure with one line per series over a common axis.

    A series of more than 20 points gets a smoothed line (see `smooth`) over its pale raw one.

    Args:
        title: heading of the figure.
        series: label -> points (x, y), x increasing; points with a y that is not finite are left out.
        note: one line below the heading: what is healthy, what the unit is.
        ordered: the series are steps of one sequence: colours run through a scale, and the raw lines are left
            out.

    Returns:
        HTML of a <figure>; empty where no series has a point.
    """
    lines = {label: [(float(x), float(y)) for x, y in points if math.isfinite(y)] for label, points in series.items()}
    lines = {label: points for label, points in lines.items() if points}
    if not lines:
        return ""
    # the axis fits what is drawn: of ordered series, only the smoothed lines
    drawn = [smooth(points) if ordered and _is_long(points) else points for points in lines.values()]
    everything = [point for points in drawn for point in points]
    x_low, x_high = min(x for x, _ in everything), max(x for x, _ in everything)
    ticks = nice_ticks(min(y for _, y in everything), max(y for _, y in everything))
    y_low, y_high = ticks[0], ticks[-1]

    def place(point: tuple[float, float]) -> str:
        x = _LEFT + (point[0] - x_low) / ((x_high - x_low) or 1.0) * (_WIDTH - _LEFT - _RIGHT)
        y = _TOP + (y_high - point[1]) / (y_high - y_low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for tick in ticks:
        y = float(place((x_low, tick)).split(",")[1])
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{_LEFT - 7}" y="{y + 3.5:.1f}" text-anchor="end">{_tick(tick)}</text>')
    for x, anchor in ((x_low, "start"), (x_high, "end")) if x_high > x_low else ((x_low, "start"),):
        left = place((x, y_low)).split(",")[0]
        parts.append(f'<text class="tick" x="{left}" y="{_HEIGHT - 9}" text-anchor="{anchor}">{x:g}</text>')
    parts.append(f'<text class="tick" x="{_WIDTH // 2}" y="{_HEIGHT - 9}" text-anchor="middle">iteration</text>')
    colours = {label: _colour(index, len(lines), ordered) for index, label in enumerate(lines)}
    for label, points in lines.items():
        parts.extend(_line(label, points, colours[label], place, raw=not ordered))

    remark = f"<small>{escape(note)}</small>" if note else ""
    legend = "".join(
        f'<span><i style="background:{colours[label]}"></i>{escape(label)}</span>' for label in lines if len(lines) > 1
    )
    return (
        f"<figure><figcaption><b>{escape(title)}</b>{remark}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">'
        f"{''.join(parts)}</svg>" + (f'<div class="legend">{legend}</div>' if legend else "") + "</figure>"
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


def _is_long(points: Points) -> bool:
    return len(points) > _SMOOTHING_ABOVE


def _line(label: str, points: Points, colour: str, place: Place, *, raw: bool) -> list[str]:
    title = f"<title>{escape(label)}: {points[0][1]:.4g} to {points[-1][1]:.4g}</title>"
    if not _is_long(points):
        dots = "".join(
            '<circle cx="{}" cy="{}" r="2.5" style="fill:{}"/>'.format(*place(point).split(","), colour)
            for point in points
        )
        return [_polyline(points, colour, place, "line", title), dots]
    pale = [_polyline(points, colour, place, "raw", "")] if raw else []
    return [*pale, _polyline(smooth(points), colour, place, "line", title)]


def _polyline(points: Points, colour: str, place: Place, kind: str, title: str) -> str:
    path = " ".join(place(point) for point in points)
    return f'<polyline class="{kind}" points="{path}" style="stroke:{colour}">{title}</polyline>'


def _colour(index: int, total: int, ordered: bool) -> str:
    if not ordered:
        return f"var(--line-{index % 4})"
    # violet to orange through blue and green: ordered to the eye, and legible on light and on dark paper
    return f"hsl({265 - 235 * index / max(total - 1, 1):.0f} 62% 52%)"


def _tick(value: float) -> str:
    text = f"{value:.6g}"
    return "0" if float(text) == 0 else text
