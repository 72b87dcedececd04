"""The scripts that write and check the pages do so."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benches.pages import (
    check,
    tables,
)
from densegrpo_fast.config.yaml_files import preset_names

ROOT = Path(__file__).resolve().parents[2]

README = (ROOT / "README.md").read_text(encoding="utf-8")
END = "<!-- end of table -->"


def test_the_presets_that_users_are_told_of_exist() -> None:
    pages = [README, *(path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md"))]
    named = set(re.findall(r"(?:--config |`)((?:embedded|sd35)_\w+)", "\n".join(pages)))
    assert named and named <= set(preset_names())


def test_a_table_goes_between_its_own_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing stands there yet, however often it is written, and with links from where the page is."""
    for name in ("one", "two"):
        monkeypatch.setitem(tables.TABLES, name, lambda name=name: f"| [{name}](@results/{name}.json) |")
    page = f"<!-- table: one -->\n{END}\n\nbetween\n\n<!-- table: two -->\n\n| old |\n\n{END}\n"
    one, two = (f"<!-- table: {name} -->\n\n| [{name}](../x/{name}.json) |\n\n{END}\n" for name in ("one", "two"))
    written = f"{one}\nbetween\n\n{two}"
    assert tables.with_tables(page, "../x") == written
    assert tables.with_tables(written, "../x") == written
    assert tables.names_of(page) == ["one", "two"]
    with pytest.raises(KeyError):
        tables.with_tables(page.replace("table: one", "table: three"), "../x")


def test_the_check_lists_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(check, "TABLES", {"one": str, "two": str})
    page = f"<!-- table: three -->\n{END}\n[here](gone.md), python -m densegrpo_fast.gone, python benches/gone.py\n"
    monkeypatch.setattr(check, "pages", lambda: {ROOT / "a.md": page, ROOT / "b.md": "<!-- table: one -->\n"})
    monkeypatch.setattr(check, "CHECKS", (check.tables, check.references))
    assert check.main() == 1
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "a.md: benches/gone.py is not there",
        "a.md: links to gone.md, which is not there",
        "a.md: python -m densegrpo_fast.gone: there is no such module",
        "a.md: there is no table three",
        "b.md: a table has no end, or no name",
        "the table one is on no page",
        "the table two is on no page",
    ]
    monkeypatch.setattr(check, "CHECKS", (lambda pages: iter(()),))
    assert check.main() == 0
