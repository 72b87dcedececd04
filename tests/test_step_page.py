"""csrc/README.md quotes what was recorded of the step ops on the CPU, and that meets what is asked of them."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest

from densegrpo_fast.flow import backends

ROOT = Path(__file__).resolve().parent.parent


def load_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_pages", ROOT / "benches" / "_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = load_pages()
RESULTS = {op: PAGES.step_result_of(op) for op in PAGES.STEPS}


def test_the_page_quotes_what_was_recorded() -> None:
    page = PAGES.STEP_PAGE.read_text(encoding="utf-8")
    assert PAGES.with_step_table(page, RESULTS) == page
    own = RESULTS["sde_step"]["variants"]["csrc"]
    assert f"{own['times_faster_than_eager']:.1f}x | {own['times_faster_than_eager_compiled']:.1f}x" in page
    changed = {**RESULTS, "sde_step": RESULTS["sde_log_prob"]}
    assert PAGES.with_step_table(page, changed) != page


def test_a_page_without_its_marks() -> None:
    with pytest.raises(ValueError, match="the page of csrc needs the lines"):
        PAGES.with_step_table("# csrc\n", RESULTS)


def test_every_op_with_a_compiled_form_is_there() -> None:
    forms = {"guided_sde_step", "sde_step_outputs", "guided_sde_log_prob"}
    assert set(PAGES.STEPS) == {op for op, names in backends.OPS.items() if "cpu" in names} - forms


@pytest.mark.parametrize("op", PAGES.STEPS)
def test_what_was_recorded_says_how(op: str) -> None:
    document = RESULTS[op]
    assert document["settings"]["shape"] == ([16] if op == "grpo_loss" else [16, 16, 64, 64])
    assert (document["settings"]["dtype"], document["settings"]["threads"]) == ("float32", 2)
    assert document["command"].split(" --rounds ")[0] == f"python benches/bench_{op}.py"
    assert document["noisy"] == any(variant["spread"] > 0.2 for variant in document["variants"].values())
    assert {"csrc", "reference", "eager", "eager_compiled", "copy"} == set(document["variants"])
    own, eager = document["variants"]["csrc"], document["variants"]["eager"]
    medians = eager["median_seconds"] / own["median_seconds"]
    assert math.isclose(own["times_faster_than_eager"], medians, rel_tol=0.3), "another run's ratio"


@pytest.mark.parametrize(
    ("op", "over", "least"),
    [
        ("sde_step", "eager", 3.0),
        ("sde_step", "eager_compiled", 1.5),
        ("sde_log_prob", "eager", 3.0),
        ("grpo_loss", "eager", 1.0),
    ],
)
def test_what_was_recorded_meets_the_bars(op: str, over: str, least: float) -> None:
    assert RESULTS[op]["variants"]["csrc"][f"times_faster_than_{over}"] >= least
