"""What the pages of a run are made with: jinja2 templates, and the values that several of them show alike."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).parent / "templates"


def render(template: str, **values: Any) -> str:
    """A template of `templates/` with its values.

    Text is escaped in pages whose name ends in .html.j2. A name that the template uses and nobody gave is an error.

    Raises:
        jinja2.UndefinedError: a value is missing.
    """
    return _environment().get_template(template).render(values)


def lookup(settings: Any, key: str) -> Any:
    """The setting under a dotted key of nested mappings; None where there is none."""
    for part in key.split("."):
        settings = settings.get(part) if isinstance(settings, dict) else None
    return settings


def number(value: float, form: str = ".4g") -> str:
    """A number as text, a dash for NaN."""
    return format(value, form) if math.isfinite(value) else "–"


def figure(value: float, *, sign: bool = False) -> str:
    """A number with as many digits as such numbers have everywhere on a page: three decimals around 1.

    Args:
        sign: of a difference, which has a plus, too, and is 0 where it is too small for three decimals.
    """
    if not math.isfinite(value):
        return "–"
    size = abs(value)
    if size < 5e-4 and (sign or not size):
        return "0.000" if sign else "0"
    if size < 5e-4 or size >= 1e6:
        return format(value, "+.1e" if sign else ".1e")
    decimals = 3 if size < 10 else 2 if size < 100 else 1 if size < 1000 else 0
    return format(value, f"{'+' if sign else ''},.{decimals}f")


def _cell(text: str) -> str:
    """Text that a cell of a Markdown table can hold."""
    return text.replace("|", "\\|").replace("\n", " ")


def _literal(value: object) -> str:
    """A Python string or number that ends no block of Markdown code."""
    return (f"{value:g}" if isinstance(value, float) else repr(value)).replace("```", "` ` `")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        "number": number,
        "figure": figure,
        "isfinite": math.isfinite,
        "cell": _cell,
        "literal": _literal,
    }
    environment.globals |= {"lookup": lookup}
    return environment
