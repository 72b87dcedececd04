"""What is wrong with a configuration, one line per key, in words a user can act on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from densegrpo_fast.common.suggest import did_you_mean
from densegrpo_fast.config.schema import options, sections

_EXPECTED = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section of options",
    "model_attributes_type": "a section of options",
    "finite_number": "a finite number",
    "greater_than": "a number > {gt}",
    "greater_than_equal": "a number >= {ge}",
    "less_than": "a number < {lt}",
    "less_than_equal": "a number <= {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "literal_error": "{expected}",
    "too_short": "at least {min_length} of them",
    "too_long": "at most {max_length} of them",
    "string_too_short": "at least {min_length} character",
    "string_too_long": "at most {max_length} characters",
    "string_pattern_mismatch": "text that matches {pattern}",
}


@dataclass(frozen=True)
class _Mismatch:
    """One branch of an option's type and how the value misses it."""

    depth: int
    expected: str
    received: str


def describe_errors(error: ValidationError) -> list[str]:
    """One line per problem, each naming the key it is about.

    An option with alternative types fails once per alternative: those that got furthest into the value are
    reported, joined by "or".
    """
    lines: list[str] = []
    mismatches: dict[str, dict[str, list[_Mismatch]]] = {}
    for item in error.errors(include_url=False):
        kind, location = item["type"], item["loc"]
        option = ".".join(str(part) for part in location[:2])
        if kind == "extra_forbidden":
            lines.append(f'unknown key "{option}"{did_you_mean(option, [*options(), *sections()])}')
        elif kind == "missing":
            lines.append(f"{option}: is required")
        elif kind == "value_error":
            # A check across options names the keys itself.
            prefix = f"{option}: " if option in options() else ""
            lines.append(f"{prefix}{item['ctx']['error']}")
        else:
            mismatch = _Mismatch(len(location), _expected(item), _received(item))
            mismatches.setdefault(option, {}).setdefault(option + _entry(option, location), []).append(mismatch)
    for entries in mismatches.values():
        deepest = max(found.depth for alternatives in entries.values() for found in alternatives)
        for entry, alternatives in entries.items():
            matched = [found for found in alternatives if found.depth == deepest]
            if matched:
                expected = " or ".join(dict.fromkeys(found.expected for found in matched))
                lines.append(f"{entry}: expected {expected}, got {matched[0].received}")
    return lines


def _entry(option: str, location: tuple[int | str, ...]) -> str:
    """The part of an option that is wrong: an index of a list or a name of a mapping."""
    parts = location[2:]
    if option == "reward.terms":
        return "".join(f".{part}" for part in parts)
    if option == "reward.options":
        # beyond the reward and its option come pydantic's names for kinds of JSON data
        return "".join(f".{part}" for part in parts[:2])
    # Between the option and an index, pydantic names the alternative of the type; the user never wrote that.
    return "".join(f"[{part}]" for part in parts if isinstance(part, int))


def _expected(item: Any) -> str:
    template = _EXPECTED.get(item["type"])
    text = template.format(**item.get("ctx", {})) if template else f"something else ({item['msg']})"
    return text.replace("'", '"')


def _received(item: Any) -> str:
    value = item["input"]
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    text = text if len(text) <= 100 else f"{text[:100]}..."
    if item["type"] == "literal_error" and isinstance(value, str):
        choices = [choice.strip(" '") for choice in item["ctx"]["expected"].replace(" or ", ", ").split(",")]
        text += did_you_mean(value, choices)
    return text
