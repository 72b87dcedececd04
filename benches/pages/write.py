"""Writes measurements into the pages that quote them: `python -m benches.pages.write`.

A page, any Markdown file of the checkout, names the tables it wants between two marks, `<!-- table: NAME -->` and
`<!-- end of table -->`; what stands there is written anew. The tables are in `tables.py`. `check.py` says
whether pages and records agree.
"""

from __future__ import annotations

import os
from pathlib import Path

from benches.pages.tables import RESULTS, names_of, with_tables

ROOT = Path(__file__).resolve().parents[2]
_NOT_OURS = ("runs", "build", "dist", "node_modules")


def pages() -> dict[Path, str]:
    """Every Markdown file of the checkout, by its path, and its text."""
    found = {}
    for path in sorted(ROOT.rglob("*.md")):
        folders = path.relative_to(ROOT).parts[:-1]
        if not any(folder.startswith(".") or folder in _NOT_OURS for folder in folders):
            found[path] = path.read_text(encoding="utf-8")
    return found


def updated(path: Path, page: str) -> str:
    """A page with its tables as they were recorded.

    Raises:
        KeyError: it names a table that there is not.
    """
    return with_tables(page, Path(os.path.relpath(RESULTS, path.parent)).as_posix())


def main() -> None:
    """Bring all pages up to date."""
    for path, page in pages().items():
        if names_of(page):
            path.write_text(updated(path, page), encoding="utf-8")


if __name__ == "__main__":
    main()
