"""The text of `--help`: every option with its type, range, value and meaning."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from densegrpo_fast.common.exit_codes import ExitCode
from densegrpo_fast.config.schema import Config, options, sections
from densegrpo_fast.config.yaml_files import DEFAULT_PRESET, inline_yaml, preset_names

_USAGE = """\
usage: densegrpo-train [--config PRESET_OR_FILE] [--SECTION.KEY VALUE | SECTION.KEY=VALUE ...] [flags]

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
