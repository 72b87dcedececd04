"""The commands that the README shows can be run, and the scripts that write and check the pages do so."""

from __future__ import annotations

import argparse
import importlib
import re
import shlex
from pathlib import Path

import pytest

from benches.pages import (
    check,
    tables,
)
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.config.yaml_files import preset_names

ROOT = Path(__file__).resolve().parents[2]

README = (ROOT / "README.md").read_text(encoding="utf-8")
SHOWN = "\n".join(
    re.findall(r"^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    + re.findall(r"`(python -m \S+ --[^`]+)`", README)
)
COMMANDS = sorted(set(re.findall(r"python -m (densegrpo_fast\..+)", SHOWN)))
END = "<!-- end of table -->"


class Parsed(Exception):
    """A command line was understood."""


@pytest.fixture
def only_parsing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command ends where its parser, or a parser within it, is done."""
    depth = 0

    def stopping(name: str) -> None:
        original = getattr(argparse.ArgumentParser, name)

        def parse(*arguments: object, **options: object) -> object:
            nonlocal depth
            depth += 1
            try:
                found = original(*arguments, **options)
            finally:
                depth -= 1
            if not depth:
                raise Parsed
            return found

        monkeypatch.setattr(argparse.ArgumentParser, name, parse)

    for name in ("parse_args", "parse_known_args", "parse_intermixed_args"):
        stopping(name)


@pytest.mark.parametrize("line", COMMANDS)
def test_a_command_of_the_readme_is_understood(line: str, only_parsing: None) -> None:
    module, *arguments = shlex.split(line.partition(" && ")[0], comments=True)
    if module == "densegrpo_fast.train":
        parse_arguments(arguments)
    else:
        # that of a package is in its __main__
        command = importlib.import_module(module)
        command = command if hasattr(command, "main") else importlib.import_module(f"{module}.__main__")
        with pytest.raises(Parsed):
            command.main(arguments)


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
