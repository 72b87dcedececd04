"""The report: valid, self-contained, escaped, and showing the numbers of its run directory."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from jinja2 import UndefinedError

from densegrpo_fast.common.errors import SetupError
from densegrpo_fast.run_files.charts import heat_map, line_chart, nice_ticks, smooth, stacked_chart
from densegrpo_fast.run_files.rendering import figure, render
from densegrpo_fast.run_files.report import alarm_spans, curve, evenly, render_report, write_report
from densegrpo_fast.run_files.run_data import read_run

Fill = Callable[..., Path]

VOID = {"meta", "img", "br", "line", "circle", "input"}


class Page(HTMLParser):
    """Tags with their attributes, text per tag, and the check that every tag is closed in its place."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: Any) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[Any]:
        return [attributes for name, attributes in self.tags if name == tag]

    def texts(self, tag: str) -> list[str]:
        return [data for name, data in self.text if name == tag]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, fill_run: Fill) -> Path:
    return fill_run(tmp_path_factory.mktemp("report") / "run <one> & two")


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    path = write_report(run)
    assert path == run / "report.html" and path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>\n<html lang=")
    return Page(path.read_text(encoding="utf-8"))


def test_the_page_is_balanced_and_titled_after_the_run(page: Page) -> None:
    assert page.texts("h1") == ["run <one> & two"] == page.texts("title")[:1]
    assert any("Finished: 40 iterations in 1 min 38 s." in text for text in page.texts("p"))


def test_nothing_is_requested_from_anywhere_and_only_the_own_script_runs(run: Path, page: Page) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    for _, attributes in page.tags:
        assert "href" not in attributes and not any(name.startswith("on") for name in attributes)
        assert (attributes.get("src") or "data:").startswith("data:")
    assert page.all("link") == page.all("iframe") == []
    assert "url(" not in html and "@import" not in html and "http://" not in html and "https://" not in html
    data, script = page.texts("script")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = (meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert "<" not in data, "data cannot end its script"
    live = Page(render_report(read_run(run), live="abc"))
    (policy,) = (meta["content"] for meta in live.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy.endswith("; connect-src 'self'") and live.all("html")[0]["data-live"] == "abc"


def test_everything_that_is_seen_can_be_read_out_and_reached_by_keyboard(page: Page) -> None:
    assert page.all("img") and all(image["alt"] for image in page.all("img"))
    assert page.all("svg") and all(svg["aria-label"] and svg["tabindex"] == "0" for svg in page.all("svg"))
    assert all(control["aria-label"] for control in page.all("input"))


def test_strips_follow_the_result(page: Page) -> None:
    headings = page.texts("h2")
    assert headings[0] == "Result" and headings.index("Step by step") < headings.index("Learning")
    frames = [figure for figure in page.all("figure") if "data-frame" in figure]
    assert ["hidden" in frame for frame in frames] == [True, False], "the last one is shown"
    assert page.texts("h3").count("highest & best") == 2 and "a <i>cat</i>" in page.texts("b")
    assert page.texts("span").count("not completed") == 2 and "+0.250" in page.texts("b")


def test_each_picture_has_its_reward_and_change_sorted(page: Page) -> None:
    articles = [article["data-index"] for article in page.all("article")]
    # prompt 0 stays at .5, prompt 1 falls from .9 to .5
    assert articles == ["0", "1"]
    data = json.loads(page.texts("script")[0])
    assert [time["name"] for time in data["times"]] == ["before training", "iteration 20", "iteration 40"]
    assert data["times"][1]["rewards"] == ["0.500", "0.700"] and data["times"][2]["changes"] == ["0.000", "-0.400"]
    assert data["prompts"] == ["a <b>red</b> circle", "two & two"] and all(
        len(time["urls"]) == 2 for time in data["times"]
    )


def test_the_headline_shows_before_after_and_change_with_intervals(page: Page) -> None:
    # prompt means: before .6 and .9, after .7 and .5
    assert page.texts("strong") == ["0.750", "0.600"]
    assert any("-0.150" in text for text in page.texts("b"))


def test_text_is_escaped_and_the_settings_are_whole(run: Path, page: Page) -> None:
    assert page.texts("pre") == [(run / "config.yaml").read_text()]
    facts = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert facts["Preset"] == "embedded_dense" and facts["Noise level"] == "0.7, 0.5"
    assert "Credit" not in facts, "a setting that is absent is left out"


def test_only_charts_that_say_something_are_drawn(page: Page) -> None:
    titles = [svg["aria-label"].split(":")[0].split(", on average")[0] for svg in page.all("svg")]
    assert titles[:3] == ["Held-out reward", "Gain of each step", "Training reward"]
    assert "Gradient norm" in titles and "Clip fraction" not in titles and "KL to the reference policy" not in titles
    assert any("Without any change in this run: clip fraction 0.200." in text for text in page.texts("small"))
    assert page.all("svg")[0]["aria-label"].startswith("Held-out reward: reward from 0.750 to 0.600")
    for line in page.all("polyline") + page.all("polygon"):
        coordinates = [float(number) for pair in line["points"].split() for number in pair.split(",")]
        assert coordinates and all(0 <= x <= 560 for x in coordinates[::2])


def test_costs_leave_out_phases_that_never_ran(page: Page) -> None:
    rows = [text for text in page.texts("th") if text in ("rollout", "monitor", "update")]
    assert rows == ["rollout", "update"]
    assert "1.5 times the operations of one with a single reward per image." in page.texts("small")[-1]


def test_alarms_stand_where_they_happened(run: Path, page: Page) -> None:
    assert alarm_spans(read_run(run).records) == [(3, 4, "alarm zero_spread"), (20, 20, "alarm zero_spread")]
    marks = [rect for rect in page.all("rect") if rect.get("class") == "mark"]
    assert len(marks) == 2 * len(page.all("svg"))
    stops = json.loads(page.all("svg")[2]["data-stops"])
    assert [words for _, words in stops if "zero_spread" in words][0].startswith("iteration 3: reward 0.530, alarm")
    assert any(": 3 of 40 iterations, first in iteration 3." in text for text in page.texts("li"))


def test_a_run_that_goes_on_has_a_page(tmp_path: Path, fill_run: Fill) -> None:
    run = fill_run(tmp_path / "new", done=0, times=())
    assert read_run(run).evaluations == {}
    page = Page(render_report(read_run(run)))
    assert page.texts("h2") == ["Settings"] and page.all("svg") == []
    half = fill_run(tmp_path / "half", done=30, times=("before", "iteration-00020"))
    page = Page(render_report(read_run(half)))
    assert any("Iteration 30 of 40" in text for text in page.texts("p")) and "now" in page.texts("span")
    # what a run left that was resumed from before it
    (half / "evaluation-iteration-00035.json").write_text('{"iteration": 35, "prompts": [], "scores": {}}')
    assert list(read_run(half).evaluations) == [0, 20]


@pytest.mark.parametrize(
    ("name", "text"),
    [("config.yaml", "a: [1"), ("config.yaml", "a: 1"), ("metrics.jsonl", "{\n"), ("evaluation-before.json", "{}")],
)
def test_a_damaged_file_is_named(name: str, text: str, tmp_path: Path, fill_run: Fill) -> None:
    run = fill_run(tmp_path / "run", done=2, times=("before",))
    (run / name).write_text(text)
    with pytest.raises(SetupError, match=r"run"):
        read_run(run)
    (run / "config.yaml").unlink()
    with pytest.raises(SetupError, match=r"there is no run here"):
        read_run(run)


def test_an_evaluation_without_its_iteration_is_that_of_its_name(tmp_path: Path, fill_run: Fill) -> None:
    run = fill_run(tmp_path / "run")
    for when in ("before", "after"):
        path = run / f"evaluation-{when}.json"
        document = json.loads(path.read_text())
        del document["iteration"]
        path.write_text(json.dumps(document))
    data = read_run(run)
    assert list(data.evaluations) == [0, 20, 40] == [x for x, _ in curve(data, "reward")] and data.finished
    assert list(data.samples()) == [0, 20, 40] and list(data.strips()) == [1, 40]


def test_numbers_have_the_same_digits_everywhere() -> None:
    values = (0.51234, 12.3456, 1234.56, 2e-5, 0.0, -0.25, math.nan)
    assert [figure(value) for value in values] == ["0.512", "12.35", "1,235", "2.0e-05", "0", "-0.250", "–"]
    assert [figure(value, sign=True) for value in (0.25, -0.25, 1e-5, 0.0)] == ["+0.250", "-0.250", "0.000", "0.000"]


def test_evenly_keeps_both_ends() -> None:
    assert evenly(list(range(5)), 8) == list(range(5))
    assert evenly(list(range(100)), 4) == [0, 33, 66, 99]


def test_series_without_a_point_have_no_chart() -> None:
    assert line_chart("none", {"a": [(0, math.nan), (1, math.inf)], "b": []}) is None
    assert heat_map("none", {"a": []}, "") is None and stacked_chart("none", {"a": [(0, 1.0)]}, "", "s") is None
    for points in ([(0, 0.25)], [(0, 0.0), (1, 0.0)], [(0, 1e-12), (1, 3e-12)]):
        chart = line_chart("one", {"a": points})
        assert chart is not None and len(chart.lines[0].dots) == len(points) == len(chart.stops)


def test_a_heat_map_of_a_long_run_averages_neighbours() -> None:
    chart = heat_map("gains", {"step 0": [(x, x % 2 - 0.25) for x in range(1000)]}, "")
    assert chart is not None and len(chart.cells) == 200
    assert {cell.opacity for cell in chart.cells} == {1.0, 0.429}, "means of .35 and .15"
    assert chart.stops[0][1].startswith("iterations 0 to 4: step 0 +0.150")


def test_a_stack_adds_up() -> None:
    chart = stacked_chart("s", {"a": [(0, 1.0), (1, 1.0)], "b": [(0, 2.0), (1, 3.0)]}, "", "s")
    assert chart is not None and [label for _, label in chart.grid] == ["0", "1", "2", "3", "4"]
    tops = [line.band.split()[1] for line in chart.lines]
    assert [round(float(top.split(",")[1])) for top in tops] == [168, 14], "1 and 4 of 4"


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.48, 0.63), (-3e-7, 2e-6), (5.0, 5.0), (0.0, 0.0), (-9e5, 12.0)]
)
def test_ticks_are_round_even_and_enclose(low: float, high: float) -> None:
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-9 * step and ticks[-1] >= high - 1e-9 * step and 2 <= len(ticks) <= 7
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - round_number) for round_number in (1, 2, 5)) < 1e-6


def test_smoothing_keeps_a_straight_line_and_the_ends() -> None:
    line = [(x, 2.0 * x) for x in range(60)]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line])
    jagged = [(x, float(x % 2)) for x in range(60)]
    assert [x for x, _ in smooth(jagged)] == list(range(60))
    assert all(abs(y - 0.5) <= 0.31 for _, y in smooth(jagged)), "the ends are smoothed as well"


def test_a_value_that_nobody_gave_is_an_error() -> None:
    with pytest.raises(UndefinedError):
        render("report.html.j2", name="run")
