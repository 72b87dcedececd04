"""Writes measurements into the pages that quote them: `python benches/_pages.py`.

A page, any Markdown file of the checkout, names the tables it wants between two marks, `<!-- table: NAME -->` and
`<!-- end of table -->`; what stands there is written anew. The tables are in `_page_tables.py`. `check_pages.py` says
whether pages and records agree.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

# what is quoted is what the checkout around this file makes of it
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from _page_tables import RESULTS, names_of, with_tables

ROOT = Path(__file__).resolve().parent.parent
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
