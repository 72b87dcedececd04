"""Draws a study: held-out scores against iterations and, where they are known, training seconds and operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle, product
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benches.learning.comparison import Run, held_out_of, operations_of, seconds_of

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_STYLES = ("-", "--", ":", "-.")


def save_plot(
    path: Path, runs: Sequence[Run], variants: Sequence[str], scores: Sequence[str], *, timed: bool = True
) -> None:
    """Write a PNG with one row per score; a thin line per run, a thick one for the mean of a variant.

    Args:
        path: the file.
        runs: as in `comparison`.
        variants: in the order of the legend; one without a run is left out.
        scores: held-out scores, such as "reward".
        timed: whether seconds of different runs can be compared.
    """
    panels: dict[str, Callable[[Run], np.ndarray | None]] = {"iterations": _iterations}
    if timed:
        panels["training seconds (evaluation not counted)"] = seconds_of
    if all(operations_of(run) is not None for run in runs if run["variant"] in variants):
        panels["training operations, TFLOP (evaluation not counted)"] = operations_of
    figure = Figure(figsize=(5 * len(panels), 3.4 * len(scores)), layout="constrained")
    axes = figure.subplots(len(scores), len(panels), squeeze=False, sharey="row")
    for row, score in zip(axes, scores, strict=True):
        for look, variant in zip(cycle(product(_STYLES, _COLOURS)), variants, strict=False):
            own = [run for run in runs if run["variant"] == variant]
            if own:
                for axis, position in zip(row, panels.values(), strict=True):
                    _draw(axis, [np.asarray(position(run)) for run in own], own, score, variant, look)
        row[0].set(ylabel=f"held-out {score}")
        for axis, label in zip(row, panels, strict=True):
            axis.set(xlabel=label)
            axis.grid(alpha=0.25)
    axes[0, 0].legend(frameon=False)
    figure.savefig(path, dpi=120)


def _iterations(run: Run) -> np.ndarray:
    return np.array([point["iteration"] for point in run["points"]])


def _draw(
    axis: Axes, positions: list[np.ndarray], runs: list[Run], score: str, variant: str, look: tuple[str, str]
) -> None:
    style, colour = look
    heights = [held_out_of(run, score) for run in runs]
    for x, y in zip(positions, heights, strict=True):
        axis.plot(x, y, style, color=colour, alpha=0.35, linewidth=0.8)
    seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    label = f"{variant}, {seeds}"
    axis.plot(np.mean(positions, 0), np.mean(heights, 0), style, color=colour, linewidth=2.2, label=label)
