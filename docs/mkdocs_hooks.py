"""What the site has besides the pages of docs/: README, the notebook and the changes; and links out of docs/."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(!?)\[([^\]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are written elsewhere, and the figures among the records."""
    pages = {
        "index.md": (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "]("),
        "quickstart.md": _notebook(ROOT / "docs" / "quickstart.ipynb"),
        "changelog.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").replace("](docs/", "]("),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    for figure in (ROOT / "benches" / "results").glob("*.png"):
        files.append(File.generated(config, f"benches/results/{figure.name}", abs_src_path=str(figure)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """A link to a file of the repository that the site does not have becomes the file's name."""
    folder = Path(page.file.src_uri).parent
    at_root = page.file.src_uri in ("index.md", "changelog.md")

    def inside(match: re.Match[str]) -> str:
        image, text, target, anchor = match.groups()
        found = os.path.normpath(folder / target)
        if (known := files.get_file_from_path(found)) is not None and known.inclusion.is_included():
            return match[0]
        outside = found if at_root else os.path.normpath(Path("docs") / folder / target)
        if not (ROOT / outside).exists():
            return match[0]
        if image and files.get_file_from_path(outside) is not None:
            return f"![{text}]({os.path.relpath(outside, folder)}{anchor or ''})"
        return text if text.strip("`") == outside else f"{text} (`{outside}`)"

    return _LINK.sub(inside, markdown)


def _notebook(path: Path) -> str:
    """A notebook's cells as a page."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
    return "\n\n".join(parts) + "\n"
