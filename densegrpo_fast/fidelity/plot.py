"""Fidelity of lookahead plans drawn against their cost, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

from densegrpo_fast.common.errors import SetupError
from densegrpo_fast.common.files import replace_bytes

_PANELS = {
    "rewards": ("spearman_rewards_mean", "rewards"),
    "gains": ("spearman_gains_mean", "gains"),
    "worst": ("spearman_gains_worst_step", "gains, worst step"),
}
_MARKERS = {"full": "o", "preview": "^"}
_COLOURS = {"full": "#0072b2", "cond_only": "#009e73", "reuse": "#cc79a7"}
_WIDTH = 13.0
_FONT = 7.0
"""Size of the points' numbers and of their list, in points."""


class Box(NamedTuple):
    """A rectangle, in points."""

    left: float
    bottom: float
    right: float
    top: float

    def meets(self, other: Box) -> bool:
        """Whether the two share more than an edge."""
        return (
            self.left < other.right and other.left < self.right and self.bottom < other.top and other.bottom < self.top
        )

    def holds(self, other: Box) -> bool:
        """Whether the other one lies within."""
        return (
            self.left <= other.left
            and other.right <= self.right
            and self.bottom <= other.bottom
            and other.top <= self.top
        )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The (cost, fidelity) points that no other one beats: cost increasing, fidelity strictly increasing."""
    front: list[tuple[float, float]] = []
    for cost, fidelity in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or fidelity > front[-1][1]:
            front.append((cost, fidelity))
    return front


def save_plot(
    path: Path,
    records: Mapping[str, dict[str, Any]],
    search: dict[str, Any] | None,
    thresholds: Mapping[str, float],
) -> None:
    """Draw fidelity against cost, with the Pareto front, as a PNG: correlation of rewards, of gains, in the worst step.

    The cost is that of the whole iteration in operations where all of them are known, else the lookahead's forwards.
    Points are numbered, the list below says by what; plans at the same place share it.

    Args:
        path: the file.
        records: as from `plan_record`.
        search: as from `search_record`, drawn as small dots; None without a search.
        thresholds: `rewards`, `gains` and `worst`, drawn as lines.

    Raises:
        UserError: matplotlib is missing, or the file cannot be written.
    """
    figure_class, line = _matplotlib()
    known = all(record["iteration_flops_ratio"] is not None for record in records.values())
    cost = "iteration_flops_ratio" if known else "forwards"
    columns = max(1, int(_WIDTH / (0.062 * max((len(name) for name in records), default=1) + 0.8)))
    rows = math.ceil(len(records) / columns)
    figure = figure_class(figsize=(_WIDTH, 4.8 + 0.155 * rows), layout="constrained")
    axes = figure.subplots(1, len(_PANELS), sharex=True)
    for axis, (name, (key, title)) in zip(axes, _PANELS.items(), strict=True):
        if search is not None:
            candidates = search["candidates"].values()
            axis.plot(*_points(candidates, cost, key), ".", color="#c4c9cf", markersize=4, label="searched, in sample")
        axis.axhline(thresholds[name], color="#9aa0a6", linestyle=":", label="threshold")
        front = pareto_front(list(zip(*_points(records.values(), cost, key), strict=True)))
        if front:
            axis.plot(*zip(*front, strict=True), drawstyle="steps-post", color="#d55e00", label="Pareto front")
        for record in records.values():
            axis.plot(*_points([record], cost, key), **_style(record))
        if not known:
            axis.set_xscale("symlog", linthresh=5)
        title = f"{title}\nmean in-group Spearman correlation"
        axis.set(xlabel="iteration / sparse, operations" if known else "lookahead forwards per trajectory")
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.08, y=0.08)
        axis.grid(alpha=0.25)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside upper center", ncols=4)
    entries = [line([], [], **_style(record)) for record in records.values()]
    names = [f"{number}  {name}" for number, name in enumerate(records, start=1)]
    figure.legend(entries, names, frameon=False, loc="outside lower center", ncols=columns, fontsize=_FONT)
    figure.draw_without_rendering()
    for axis, (key, _) in zip(axes, _PANELS.values(), strict=True):
        _number(axis, [(record[cost], record[key]) for record in records.values()], 72 / figure.dpi)
    buffer = BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    replace_bytes(path, buffer.getvalue())


def placed(points: Sequence[tuple[float, float]], texts: Sequence[str], frame: Box) -> list[Box]:
    """Where labels of points go so that they cover neither each other nor a point, as near as there is room.

    Args:
        points: their places, in points (1/72 inch).
        texts: the labels.
        frame: what all labels must stay in.

    Returns:
        A box for each label; centred on its point where there is no room at all.
    """
    occupied = [_around(x, y, 6.0, 6.0) for x, y in points]
    boxes = []
    for (x, y), text in zip(points, texts, strict=True):
        width, height = 0.62 * _FONT * len(text) + 1, 1.1 * _FONT
        box = next(
            (
                box
                for across, up in _offsets()
                if frame.holds(box := _around(x + across * (1 + width / 12), y + up, width, height))
                and not any(box.meets(other) for other in occupied)
            ),
            _around(x, y, width, height),
        )
        occupied.append(box)
        boxes.append(box)
    return boxes


def _offsets() -> Iterator[tuple[float, float]]:
    """Steps away from a point, nearest first, in points."""
    for distance in range(8, 120, 3):
        for turn in (1, 7, 3, 5, 0, 4, 2, 6):
            yield distance * math.cos(turn * math.pi / 4), distance * math.sin(turn * math.pi / 4)


def _around(x: float, y: float, width: float, height: float) -> Box:
    return Box(x - width / 2, y - height / 2, x + width / 2, y + height / 2)


def _number(axis: Any, values: Sequence[tuple[float, float]], scale: float) -> None:
    """Write the numbers of points beside them, those at the same place as one label; `scale` from pixels to points."""
    at: dict[tuple[float, float], list[int]] = {}
    for number, (x, y) in enumerate(values, start=1):
        if not math.isnan(y):
            across, up = axis.transData.transform((x, y)) * scale
            # what is closer than the marker is wide cannot be told apart
            near = [key for key in at if abs(key[0] - across) < 2 and abs(key[1] - up) < 2]
            at.setdefault(near[0] if near else (float(across), float(up)), []).append(number)
    points, texts = list(at), [",".join(map(str, numbers)) for numbers in at.values()]
    corners = axis.get_window_extent().get_points() * scale
    boxes = placed(points, texts, Box(*map(float, corners.flatten())))
    for (x, y), text, box in zip(points, texts, boxes, strict=True):
        offset = (box.left + box.right) / 2 - x, (box.bottom + box.top) / 2 - y
        far = math.hypot(*offset) > 14
        axis.annotate(
            text,
            axis.transData.inverted().transform((x / scale, y / scale)),
            offset,
            textcoords="offset points",
            fontsize=_FONT,
            ha="center",
            va="center",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": "#6b7075"} if far else None,
        ).set_in_layout(False)


def _style(record: Mapping[str, Any]) -> dict[str, Any]:
    """Marker by decoder, colour by guidance; filled where the model itself computes everything."""
    colour = _COLOURS[record["guidance"]]
    plain = not (record["copy"] or record["cache"])
    return {
        "marker": _MARKERS[record["decoder"]],
        "linestyle": "none",
        "color": colour,
        "markerfacecolor": colour if plain else "white",
        "markersize": 5,
    }


def _points(records: Any, cost: str, key: str) -> tuple[list[float], list[float]]:
    present = [record for record in records if not math.isnan(record[key])]
    return [record[cost] for record in present], [record[key] for record in present]


def _matplotlib() -> tuple[Any, Any]:
    """Its classes of a figure and of a line."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ModuleNotFoundError:
        raise SetupError("--plot needs matplotlib: pip install densegrpo-fast[train], or leave --plot out") from None
    return Figure, Line2D
