"""What the command line says about the options: the text of `--help`, and what is wrong with a configuration."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from densegrpo_fast.common.exit_codes import ExitCode
from densegrpo_fast.common.suggest import did_you_mean
from densegrpo_fast.config.schema import Config, options, sections
from densegrpo_fast.config.yaml_files import DEFAULT_PRESET, inline_yaml, preset_names

_USAGE = """\
usage: densegrpo train [--config PRESET_OR_FILE] [--SECTION.KEY VALUE | SECTION.KEY=VALUE ...] [flags]

  --config NAME      preset ({presets}),
                     or a .yaml file with any of the keys; what it leaves out comes from the preset that
                     its `extends` key names (default: {default})
  --resume[=DIR]     continue the run in run.output_dir, or the run in DIR with the settings stored there
  --dry-run          check everything with one small iteration
  --print-config     print the resolved configuration as YAML and exit
  --list-presets     list the presets and exit
  -h, --help         print this and exit

exit status: {exit_codes}

Options, with their value in "{preset}":
"""

_BOUNDS = {"gt": "> {}", "ge": ">= {}", "lt": "< {}", "le": "<= {}", "multiple_of": "multiple of {}"}

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


def help_text(config: Config) -> str:
    """The help page, whose values are those of `config`."""
    exit_codes = ", ".join(f"{code.value} {code.name.lower().replace('_', ' ')}" for code in ExitCode)
    lines = [
        _USAGE.format(
            presets=", ".join(preset_names()),
            default=DEFAULT_PRESET,
            exit_codes=exit_codes,
            preset=config.preset,
        )
    ]
    values = config.model_dump(mode="json")
    section = ""
    for key, option in options().items():
        name, _, last = key.rpartition(".")
        if name != section:
            section = name
            lines.append(f"\n{name}: {sections()[name].__doc__}")
        value = values[name][last] if name else values[last]
        lines.append(f"  {key} = {inline_yaml(value)}")
        lines.append(f"      {option.description} [{_type_text(option)}]")
    return "\n".join(lines) + "\n"


def takes_text(option: FieldInfo) -> bool:
    """Whether an option's value is text as it stands, so that it needs no YAML quotes on the command line."""
    kinds = [kind for kind in map(_bare, _alternatives(option.annotation)) if kind is not type(None)]
    return all(kind is str or get_origin(kind) is Literal for kind in kinds)


def _alternatives(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if hasattr(annotation, "__metadata__") else annotation


def _type_text(option: FieldInfo) -> str:
    names = [_name(kind) for kind in _alternatives(option.annotation)]
    return ", ".join([" or ".join(names), *_bounds(option.metadata)])


def _name(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return "|".join(str(choice) for choice in get_args(annotation))
    if hasattr(annotation, "__metadata__"):
        bounds = [bound for item in annotation.__metadata__ for bound in _bounds(getattr(item, "metadata", [item]))]
        return " ".join([_name(_bare(annotation)), *bounds])
    if get_origin(annotation) is list:
        return f"list of {_name(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping of name to number" if get_args(annotation)[1] is float else "mapping of name to options"
    return {str: "text", int: "integer", float: "number", bool: "true|false", type(None): "null"}[annotation]


def _bounds(metadata: list[Any]) -> list[str]:
    return [
        text.format(getattr(item, bound))
        for item in metadata
        for bound, text in _BOUNDS.items()
        if getattr(item, bound, None) is not None
    ]


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
