"""The report: valid, self-contained, escaped, and showing the numbers it was given."""

from __future__ import annotations

import base64
import math
from html.parser import HTMLParser

import pytest
import torch
from jinja2 import UndefinedError

from densegrpo_fast.run_files.images import save_grid
from densegrpo_fast.run_files.rendering import render
from densegrpo_fast.run_files.report import line_chart, nice_ticks, smooth, write_report

VOID = {"meta", "img", "br", "line", "circle"}
CONFIG = """preset: embedded_dense
seed: 7
model: {path: embedded}
sampler: {group_size: 8, num_steps: 2, noise_level: [0.7, 0.5]}
reward:
  terms: {"<script>alert(1)</script>": 1.0}
"""


class Page(HTMLParser):
    """Tags with their attributes, text per tag, and the check that every tag is closed in its place."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag

    def handle_data(self, data):
        self.text.append((self.open[-1] if self.open else "", data))

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def texts(self, tag):
        return [data for name, data in self.text if name == tag]


def record(iteration):
    return {
        "iteration": iteration,
        "reward": 0.5 + 0.01 * iteration,
        "gain/step_0": 0.1,
        "gain/step_1": -0.02,
        "gain/step_10": 0.03,
        "clip_fraction": 0.2,
        "ratio_deviation": 1e-4,
        "approx_kl": 1e-8,
        "grad_norm": math.nan if iteration == 3 else 0.4,
        "kl": None,
        "nfe/rollout": 80,
        "nfe/lookahead": 110.0,
        **({"eval/reward": 0.6, "eval/strict": 0.5} if iteration % 10 == 0 else {}),
    }


@pytest.fixture
def run(tmp_path):
    run_dir = tmp_path / "run <one> & two"
    grids = {}
    for name in ("before", "after"):
        pictures = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(len(name)))
        grids[name] = save_grid(
            pictures, run_dir / f"{name}.png", columns=2, captions=["a <b>red</b> circle", "two & two"]
        )
    path = write_report(
        run_dir,
        config_yaml=CONFIG,
        metrics=[record(i) for i in range(40)],
        before={"reward": (0.5312, 0.51, 0.5524), "strict": 0.4},
        after={"reward": (0.6157, 0.6, 0.6314), "strict": 0.5},
        change={"reward": (0.0845, 0.07, 0.099)},
        images=grids,
        phases={"rollout": 30.0, "lookahead": 10.0, "update": 60.0},
    )
    return path, Page(path.read_text(encoding="utf-8")), grids


def test_the_page_is_balanced_and_titled_after_the_run(run):
    path, page, _ = run
    assert path.name == "report.html" and path.read_text(encoding="utf-8").startswith("<!DOCTYPE html>\n<html lang=")
    assert page.texts("h1") == ["run <one> & two"] == page.texts("title")[:1]
    assert [name.name for name in path.parent.glob("report*")] == ["report.html"]


def test_nothing_is_requested_from_anywhere(run):
    path, page, _ = run
    html = path.read_text(encoding="utf-8")
    for _, attributes in page.tags:
        assert "href" not in attributes and not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
    assert page.all("script") == page.all("link") == page.all("iframe") == []
    assert "url(" not in html and "@import" not in html and "http://" not in html and "https://" not in html
    policies = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_pictures_are_inside_the_file_with_their_prompts(run):
    _, page, grids = run
    data = [base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) for image in page.all("img")]
    assert data == [grids["before"].read_bytes(), grids["after"].read_bytes()]
    assert page.texts("li") == ["a <b>red</b> circle", "two & two"] * 2


def test_text_is_escaped_and_the_settings_are_whole(run):
    _, page, _ = run
    assert page.texts("pre") == [CONFIG]
    facts = dict(zip(page.texts("dt"), page.texts("dd"), strict=True))
    assert facts["Iterations"] == "40" and facts["Time"] == "1 min 40 s"
    assert facts["Preset"] == "embedded_dense" and facts["Noise level"] == "0.7, 0.5"
    assert "Credit" not in facts, "a setting that is absent is left out"


def test_the_headline_shows_before_after_and_change_with_intervals(run):
    _, page, _ = run
    assert page.texts("strong") == ["0.5312", "0.6157", "+0.0845", "0.4", "0.5"]
    assert "95% 0.51 to 0.5524" in page.texts("small") and "95% 0.6 to 0.6314" in page.texts("small")
    assert [text.strip() for text in page.texts("p")].count("95% 0.07 to 0.099") == 1


def test_curves_appear_for_the_keys_that_are_there(run):
    _, page, _ = run
    labels = [svg["aria-label"] for svg in page.all("svg")]
    assert labels[:3] == ["Training reward", "Held-out reward", "Reward gain per step"]
    assert "Gradient norm" in labels and "KL to the reference policy" not in labels
    assert [text for text in page.texts("span") if text.startswith("step")] == ["step 0", "step 1", "step 10"]
    for line in page.all("polyline"):
        coordinates = [float(number) for pair in line["points"].split() for number in pair.split(",")]
        assert all(0 <= x <= 560 for x in coordinates[::2]) and all(0 <= y <= 250 for y in coordinates[1::2])


def test_costs_per_phase_in_seconds_share_and_network_evaluations(run):
    _, page, _ = run
    cells = page.texts("td")
    assert page.texts("th")[-3:] == ["rollout", "lookahead", "update"]
    assert cells == [
        "30.0",
        "30.0%",
        "0.750",
        "80",
        "10.0",
        "10.0%",
        "0.250",
        "110",
        "60.0",
        "60.0%",
        "1.500",
        "–",
    ]
    assert [i["style"].split(";")[0] for i in page.all("i") if "title" in i] == [
        "width:30.00%",
        "width:10.00%",
        "width:60.00%",
    ]


def test_the_work_of_an_iteration_is_a_sentence(tmp_path):
    work = [
        {"decodes/full": 4 * n, "decodes/preview": 0, "pictures_scored": 20, "flops/over_sparse": n} for n in (1, 2)
    ]
    metrics = [record(n) | own for n, own in enumerate(work)]
    options = {"config_yaml": "seed: 1\n", "before": {}, "after": {}, "images": {}, "phases": {"rollout": 1.0}}
    page = Page(write_report(tmp_path, metrics=metrics, **options).read_text(encoding="utf-8"))
    told = "An iteration has on average 6 full decodes, 20 pictures scored, 1.5 times the operations of one with a "
    assert told + "single reward per image." in page.texts("small")[-1]
    plain = Page(write_report(tmp_path, metrics=[record(1)], **options).read_text(encoding="utf-8"))
    assert "on average" not in plain.texts("small")[-1]


def test_an_empty_run_still_gives_a_page(tmp_path):
    path = write_report(tmp_path, config_yaml="seed: 1\n", metrics=[], before={}, after={}, images={}, phases={})
    page = Page(path.read_text(encoding="utf-8"))
    assert page.texts("h2") == ["Settings"] and page.all("svg") == []


def test_a_flat_or_single_point_series_has_a_chart(tmp_path):
    for points in ([(0, 0.25)], [(0, 0.0), (1, 0.0)], [(0, 1e-12), (1, 3e-12)]):
        metrics = [{"iteration": x, "reward": y} for x, y in points]
        options = {"config_yaml": "seed: 1\n", "before": {}, "after": {}, "images": {}, "phases": {}}
        page = Page(write_report(tmp_path, metrics=metrics, **options).read_text(encoding="utf-8"))
        (svg,) = page.all("svg")
        assert svg["aria-label"] == "Training reward" and len(page.all("circle")) == len(points)
    assert line_chart("none", {"a": [(0, math.nan), (1, math.inf)], "b": []}) is None


@pytest.mark.parametrize(
    ("low", "high"), [(0.0, 1.0), (0.48, 0.63), (-3e-7, 2e-6), (5.0, 5.0), (0.0, 0.0), (-9e5, 12.0)]
)
def test_ticks_are_round_even_and_enclose(low, high):
    ticks = nice_ticks(low, high)
    step = ticks[1] - ticks[0]
    assert ticks[0] <= low + 1e-9 * step and ticks[-1] >= high - 1e-9 * step and 2 <= len(ticks) <= 7
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-9)
    assert min(abs(mantissa - round_number) for round_number in (1, 2, 5)) < 1e-6


def test_smoothing_keeps_a_straight_line_and_the_ends():
    line = [(x, 2.0 * x) for x in range(60)]
    assert [y for _, y in smooth(line)] == pytest.approx([y for _, y in line])
    jagged = [(x, float(x % 2)) for x in range(60)]
    assert [x for x, _ in smooth(jagged)] == list(range(60))
    assert all(abs(y - 0.5) <= 0.31 for _, y in smooth(jagged)), "the ends are smoothed as well"


def test_alarms_are_listed_with_advice(tmp_path):
    metrics = [record(n) | ({"alarms": ["zero_spread"]} if n in (3, 4) else {}) for n in range(1, 6)]
    path = write_report(
        tmp_path, config_yaml="seed: 1\n", metrics=metrics, before={}, after={}, images={}, phases={},
        advice={"zero_spread": "no <spread>"},
    )  # fmt: skip
    page = Page(path.read_text(encoding="utf-8"))
    assert "Alarms" in page.texts("h2") and page.texts("b")[0] == "zero_spread"
    assert page.texts("li") == [": 2 of 5 iterations, first in iteration 3. no <spread>"]


def test_a_value_that_nobody_gave_is_an_error():
    with pytest.raises(UndefinedError):
        render("report.html.j2", name="run")
