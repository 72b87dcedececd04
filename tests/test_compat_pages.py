"""The hosts' pages say what is true: what is replaced, which fixes there are, what was measured."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from densegrpo_fast.compat import flow_grpo
from densegrpo_fast.compat._patch import Target
from densegrpo_fast.launch import HOSTS
from densegrpo_fast.sampling import plan as plans

ROOT = Path(__file__).resolve().parent.parent


def load_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_pages", ROOT / "benches" / "_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = load_pages()


def targets_of(host: str) -> list[Target]:
    module = importlib.import_module(f"densegrpo_fast.compat.{host}")
    common: dict[str, Any] = {"rng": "host", "seed": None, "fixes": frozenset()}
    if host in ("flow_grpo", "turning_point"):
        common |= {"version": None, "tracker": True}
    if host == "turning_point":
        return module._targets(chunk=None, **common)
    return list((flow_grpo.targets if host == "flow_grpo" else module._targets)(**common))


@pytest.mark.parametrize("host", HOSTS)
def test_a_page_shows_the_line_to_add_and_what_happens(host: str) -> None:
    page = PAGES.page_of(host).read_text(encoding="utf-8")
    flag = "" if host == "flow_grpo" else f" --host {host}"
    assert f"-m densegrpo_fast.launch{flag} " in page
    assert f"import densegrpo_fast.compat.{host} as fast\n\nfast.install()" in page
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert {"What is replaced", "What changes numerically", "Measured effect"} <= set(headings)
    assert "Verified against formulas and published values" in " ".join(page.split())
    others = PAGES.page_of("flow_grpo").read_text(encoding="utf-8") if host == "turning_point" else ""
    for target in targets_of(host):
        assert f"`{target.name.rpartition('.')[2]}`" in page + others
        assert target.module.rpartition(".")[2] in page + others or host == "dance_grpo"
    for fix in importlib.import_module(f"densegrpo_fast.compat.{host}").FIXES:
        assert f"`{fix}`" in page or f'"{fix}"' in page
    assert f"[`{host}`]({host}/README.md)" in (PAGES.page_of(host).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("host", HOSTS)
def test_a_page_quotes_what_was_measured(host: str) -> None:
    page = PAGES.page_of(host).read_text(encoding="utf-8")
    document = PAGES.result_of(host)
    assert not document["noisy"]
    assert PAGES.with_table(page, host, document) == page
    assert len([line for line in PAGES.table(host, document).splitlines() if "x |" in line]) == 3


def test_a_page_without_its_marks() -> None:
    with pytest.raises(ValueError, match="the page of mix_grpo needs the lines"):
        PAGES.with_table("# MixGRPO\n", "mix_grpo", PAGES.result_of("mix_grpo"))


def test_evaluations_of_turning_point() -> None:
    """Ten steps, a window of nine: states 1..8 are completed, with shared noise also state 0."""
    page = PAGES.page_of("turning_point").read_text(encoding="utf-8")
    # The host completes state j by its 10 - j remaining steps; here the first of them is the rollout's.
    completed = [len(path) for path in plans.exact(10).paths[:9]]
    assert completed == [9 - state for state in range(9)]
    host, here = sum(10 - state for state in range(1, 9)), sum(completed[1:])
    assert f"| completions of 8 states | {host} | {here} | {here} |" in page
    assert f"| noise-free image | 10 | 10 | {completed[0]} |" in page
    assert f"| sum | {20 + host} | {20 + here} | {10 + here + completed[0]} |" in page
