"""The plot of fidelity against cost: its front, and labels that can be read."""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.fidelity.plot import Box, pareto_front, placed, save_plot

FRAME = Box(0.0, 0.0, 280.0, 300.0)
THRESHOLDS = {"rewards": 0.95, "gains": 0.9, "worst": 0.75}


def record(cost: float | None, fidelity: float, **other: Any) -> dict[str, Any]:
    keys = ("spearman_rewards_mean", "spearman_gains_mean", "spearman_gains_worst_step")
    own = {"guidance": "full", "decoder": "full", "copy": None, "cache": None, "forwards": 3}
    return own | {"iteration_flops_ratio": cost} | dict.fromkeys(keys, fidelity) | other


def test_pareto_front_by_hand() -> None:
    points = [(5.0, 0.7), (0.0, 0.5), (3.0, 0.4), (5.0, 0.8), (9.0, 0.8), (12.0, 0.9)]
    assert pareto_front(points) == [(0.0, 0.5), (5.0, 0.8), (12.0, 0.9)]


@settings(deadline=None, max_examples=30)
@given(
    st.lists(st.tuples(st.floats(10, 270), st.floats(10, 290)), min_size=1, max_size=20),
    st.sampled_from(["7", "12", "3,14"]),
)
def test_labels_cover_neither_points_nor_each_other(points: list[tuple[float, float]], text: str) -> None:
    boxes = placed(points, [text] * len(points), FRAME)
    assert not any(one.meets(other) for one, other in combinations(boxes, 2))
    for box in boxes:
        assert FRAME.holds(box)
        assert not any(box.left < x < box.right and box.bottom < y < box.top for x, y in points)


def test_a_label_stays_near_its_point() -> None:
    (box,) = placed([(100.0, 100.0)], ["1"], FRAME)
    # up and to the right, where nothing is in the way
    assert 100 < box.left < 115 and 100 < box.bottom + 5 < 115


@pytest.mark.ci
def test_plans_are_numbered_and_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drawn, read back from the figure."""
    drawn: list[Any] = []

    save = Figure.savefig

    def keep(figure: Figure, *given: Any, **options: Any) -> None:
        drawn.append(figure)
        save(figure, *given, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    records = {
        "exact/full/full": record(2.0, 1.0),
        "one_step/full/preview": record(1.1, 0.5, decoder="preview"),
        "one_step+cache(text)/full/preview": record(1.1, 0.5, decoder="preview", cache="text"),
        "nodes{2}/full/full": record(1.5, math.nan),
    }
    search = {"candidates": {"nodes{3}/full/full": record(1.3, 0.7)}, "thresholds": THRESHOLDS}
    save_plot(tmp_path / "plot.png", records, search, THRESHOLDS)
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = drawn
    for axis, limit in zip(figure.axes, THRESHOLDS.values(), strict=True):
        assert "operations" in axis.get_xlabel()
        # the second and the third are at one place, the fourth has nothing to show
        assert [text.get_text() for text in axis.texts] == ["1", "2,3"]
        lines = {shown.get_label(): shown for shown in axis.lines}
        assert list(lines["threshold"].get_ydata()) == [limit, limit]
        assert list(lines["Pareto front"].get_xdata()) == [1.1, 2.0]
        assert list(lines["searched, in sample"].get_xdata()) == [1.3]
        edges = axis.get_window_extent()
        assert all(edges.contains(*text.get_window_extent().get_points().mean(0)) for text in axis.texts)
    listed = figure.legends[1]
    assert [text.get_text() for text in listed.get_texts()] == [f"{n}  {name}" for n, name in enumerate(records, 1)]
    assert [entry.get_marker() for entry in listed.get_lines()] == ["o", "^", "^", "o"]
    # one unknown cost, and forwards are drawn for all
    save_plot(tmp_path / "plot.png", records | {"other": record(None, 0.4)}, None, THRESHOLDS)
    assert "forwards" in drawn[1].axes[0].get_xlabel()


def test_a_plot_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot write") as caught:
        save_plot(tmp_path / "none" / "plot.png", {"exact": record(1.0, 1.0)}, None, THRESHOLDS)
    assert exit_code_of(caught.value) == ExitCode.OUTPUT
