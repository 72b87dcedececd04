"""The report and the live page in a real browser: no error, sliders, scrubbers, charts, and a page that renews itself.

Skipped where there is no playwright or no Chromium.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from densegrpo_fast.run_files.report import write_report
from densegrpo_fast.watch import HOST, serve

playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@pytest.fixture
def page() -> Iterator[Any]:
    """A page of a phone's width, whose errors fail the test."""
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page, errors = browser.new_page(viewport={"width": 375, "height": 800}), []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        browser.close()
    assert not errors


def move(page: Any, selector: str, value: int) -> None:
    page.locator(selector).first.evaluate(
        "(it, value) => { it.value = value; it.dispatchEvent(new Event('input', {bubbles: true})); }", str(value)
    )


def test_a_reader_can_use_the_report(tmp_path: Path, page: Any, fill_run: Callable[..., Path]) -> None:
    page.goto(write_report(fill_run(tmp_path / "run")).as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than a phone"
    # before and after in one place, by keyboard
    cut = page.locator("input.cut").first
    cut.focus()
    page.keyboard.press("Home")
    style = "getComputedStyle(document.querySelector('.compare .over')).clipPath"
    assert page.evaluate(style) in ("inset(0px 0px 0px 0%)", "inset(0px)", "inset(0px 0px 0px 0px)")
    page.keyboard.press("End")
    assert "100%" in page.evaluate(style)
    # pictures over time
    over, last = page.locator(".over").first, page.locator(".over").first.get_attribute("src")
    move(page, "#scrub-pictures", 1)
    assert over.get_attribute("src") != last and over.get_attribute("alt").startswith("iteration 20: ")
    move(page, "#scrub-pictures", 2)
    assert over.get_attribute("src") == last
    page.locator("#sort").select_option("up")
    assert page.locator("article").first.get_attribute("data-index") == "1", "the largest loss first"
    # strips over time
    frames = page.locator("[data-frame]")
    assert [frames.nth(i).is_visible() for i in (0, 1)] == [False, True]
    move(page, "#scrub-strips", 0)
    assert [frames.nth(i).is_visible() for i in (0, 1)] == [True, False]
    # a chart tells its values, by pointer and by keyboard
    chart = page.locator("svg[data-stops]").first
    output = chart.locator("xpath=../output")
    chart.hover()
    assert "reward" in output.inner_text()
    chart.focus()
    page.keyboard.press("Home")
    assert output.inner_text().startswith("iteration 0: reward 0.750")
    page.keyboard.press("ArrowRight")
    assert output.inner_text().startswith("iteration 20: reward")


def test_the_live_page_renews_itself_and_stays_where_the_reader_was(
    tmp_path: Path, page: Any, fill_run: Callable[..., Path], run_record: Callable[[int], object]
) -> None:
    run = fill_run(tmp_path / "run", done=30, times=("before", "iteration-00020"))
    server = serve(run, 0)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        page.goto(f"http://{HOST}:{server.server_address[1]}/")
        assert "Iteration 30 of 40" in page.locator("header").inner_text()
        move(page, "input.cut", 80)
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(run_record(31)) + "\n")
        page.get_by_text("Iteration 31 of 40").wait_for()
        assert page.locator("input.cut").first.input_value() == "80"
    finally:
        server.shutdown()
        server.server_close()
