"""Configuration as YAML: reading strictly, presets that extend one another, writing what reads back the same.

The dialect is the core of YAML 1.2: `true` and `false` are the only booleans, `1e-4` is a number, and a key
given twice or an alias is an error. So a file cannot mean something other than what it seems to say.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml

from densegrpo_fast.common.aliases import ADDED_SECTIONS, complete_settings, current_settings
from densegrpo_fast.common.errors import CheckpointError, UsageError
from densegrpo_fast.common.files import read_verified
from densegrpo_fast.common.suggest import did_you_mean
from densegrpo_fast.config.schema import Config, sections

DEFAULT_PRESET = "embedded_branched"
"""What is trained without --config."""
BASE_PRESET = "embedded_dense"
"""What a file that extends nothing goes by, and what the other commands describe the model and sampler with."""
_PRESET_DIRECTORY = Path(__file__).parent.parent / "configs"

_FLOAT = re.compile(r"[-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_CORE_SCHEMA = [
    ("tag:yaml.org,2002:null", re.compile(r"(?:null|Null|NULL|~|)\Z"), "nN~\0"),
    ("tag:yaml.org,2002:bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"), "tTfF"),
    ("tag:yaml.org,2002:int", re.compile(r"[-+]?[0-9]+\Z"), "-+0123456789"),
    ("tag:yaml.org,2002:float", re.compile(rf"(?:{_FLOAT.pattern})\Z"), "-+.0123456789"),
]


class _StrictLoader(yaml.SafeLoader):
    """PyYAML's safe loader, narrowed to the core schema and to mappings without repeated keys."""

    yaml_implicit_resolvers: dict[str, Any] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.constructor.ConstructorError(
                None, None, "aliases are not supported", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                problem = f"expected a name as key, got {key!r}"
            elif key in mapping:
                problem = f'key "{key}" is given twice'
            else:
                mapping[key] = self.construct_object(value_node, deep=True)
                continue
            raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        return mapping

    def construct_decimal_int(self, node: Any) -> int:
        return int(self.construct_scalar(node))


_StrictLoader.add_constructor("tag:yaml.org,2002:int", _StrictLoader.construct_decimal_int)


class _StrictDumper(yaml.SafeDumper):
    """PyYAML's safe dumper; text is quoted where either dialect would read something else."""

    yaml_implicit_resolvers = {first: list(pairs) for first, pairs in yaml.SafeDumper.yaml_implicit_resolvers.items()}


for _tag, _pattern, _first_characters in _CORE_SCHEMA:
    _first = ["" if character == "\0" else character for character in _first_characters]
    _StrictLoader.add_implicit_resolver(_tag, _pattern, _first)
    _StrictDumper.add_implicit_resolver(_tag, _pattern, _first)


def parse_yaml(text: str, source: str) -> Any:
    """The value that a YAML document holds.

    Args:
        text: the document; empty means None.
        source: what to call it in an error, such as a file name or an option.

    Raises:
        UsageError: naming the source, the line and the problem.
    """
    try:
        loader = _StrictLoader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}, line {mark.line + 1}" if mark and "\n" in text else source
        raise UsageError(f"{where}: {error.problem or error.context}") from None
    # an explicit tag such as !!timestamp fails in ways of its own
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UsageError(f"{source}: not readable as YAML: {error}") from None


def preset_names() -> list[str]:
    """Names of the presets that come with the package, sorted."""
    return sorted(path.stem for path in _PRESET_DIRECTORY.glob("*.yaml"))


def preset_summary(name: str) -> str:
    """What a preset is for: the comment on its first line."""
    return _preset_path(name).read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")


def _preset_path(name: str) -> Path:
    known = preset_names()
    if name not in known:
        raise UsageError(
            f'unknown preset "{name}"{did_you_mean(name, known)} (known: {", ".join(known)}; '
            "a file must end in .yaml or .yml)",
        )
    return _PRESET_DIRECTORY / f"{name}.yaml"


def read_settings(source: str) -> dict[str, Any]:
    """All settings of a preset or of a file, with what it extends filled in, not yet validated.

    A file may give any part of the keys. The others come from the preset named by its `extends` key, or from
    `BASE_PRESET`. A file that extends nothing and has every section, such as a run's own config.yaml, was written
    whole: an option that came later has its old meaning there (`common/aliases.py`).

    Args:
        source: name of a preset, or path of a file that ends in .yaml or .yml.

    Raises:
        UsageError: if there is no such preset or file, or it cannot be read.
    """
    if not source.lower().endswith((".yaml", ".yml")):
        return _read_preset(source, ())
    path = Path(source)
    settings = _read_mapping(path)
    extended = _pop_extends(settings, path)
    if extended is None and settings.keys() >= sections().keys() - ADDED_SECTIONS:
        settings = complete_settings(settings)
    follow_rewards(settings, {f"{section}.{key}" for section, keys in settings.items() for key in _keys(keys)})
    base = _read_preset(extended or BASE_PRESET, ())
    settings.setdefault("preset", re.sub(r"[^A-Za-z0-9_-]+", "-", path.stem).strip("-") or "config")
    return _merged(base, settings)


def follow_rewards(settings: dict[str, Any], given: Collection[str], source: str | None = None) -> None:
    """Observe no reward of a preset beside other rewards or held-out prompts than the preset's, unless it is asked for.

    Args:
        settings: changed in place.
        given: dotted keys of what somebody has set on top of a source.
        source: a preset or file that was read; one that names `reward.observed` itself keeps it. None = no source.
    """
    if "reward.observed" in given or not {"reward.terms", "data.eval_prompts"} & {*given}:
        return
    if source is not None and source.lower().endswith((".yaml", ".yml")):
        if "observed" in _keys(_read_mapping(Path(source)).get("reward")):
            return
    reward = settings.setdefault("reward", {})
    if isinstance(reward, dict):
        reward["observed"] = []


def _keys(section: Any) -> list[str]:
    return [str(key) for key in section] if isinstance(section, dict) else []


def check_stored(path: Path) -> None:
    """Refuse the configuration of a run that is not whole, as a full disk leaves it: what it lacks would be a preset's.

    Raises:
        CheckpointError: it is cut off, cannot be read, or is not what the run wrote.
    """
    try:
        settings = complete_settings(_read_mapping(path))
    except UsageError as error:
        raise CheckpointError(f"--resume: {error}") from None
    groups = sections()
    lacking = [name for name in groups if not isinstance(settings.get(name), dict)]
    if not lacking:
        # the last one is the first to be cut
        last = list(groups)[-1]
        lacking = [f"{last}.{key}" for key in groups[last].model_fields if key not in settings[last]]
    if lacking:
        raise CheckpointError(
            f"--resume: {path} is not the whole configuration of a run, it lacks {', '.join(lacking)}; give the run's "
            "own with --config FILE"
        )


def _read_preset(name: str, extended_by: tuple[str, ...]) -> dict[str, Any]:
    if name in extended_by:
        chain = " -> ".join([*extended_by, name])
        raise UsageError(f"presets extend one another in a circle: {chain}")
    path = _preset_path(name)
    settings = _read_mapping(path)
    base = _pop_extends(settings, path)
    settings["preset"] = name
    return _merged(_read_preset(base, (*extended_by, name)), settings) if base else settings


def _pop_extends(settings: dict[str, Any], path: Path) -> str | None:
    base = settings.pop("extends", None)
    if base is not None and not isinstance(base, str):
        raise UsageError(f"{path}: extends: expected the name of a preset, got {base!r}")
    return base


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        text = read_verified(path).decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{path}: cannot read this configuration: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{path}: not UTF-8 text (byte {error.start})") from None
    settings = parse_yaml(text, str(path))
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UsageError(f"{path}: expected options as `key: value`, got {settings!r}")
    return current_settings(settings, str(path))


def _merged(base: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """`base` with `settings` laid over it, option by option; an empty section changes nothing."""
    merged = dict(base)
    for key, value in settings.items():
        if isinstance(base.get(key), dict) and value is None:
            continue
        both_sections = isinstance(base.get(key), dict) and isinstance(value, dict)
        merged[key] = {**base[key], **value} if both_sections else value
    return merged


def dump_yaml(config: Config) -> str:
    """The configuration as YAML, one line per option, that reads back as an equal configuration."""
    lines: list[str] = []
    for name, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            lines += [f"{name}:", *(f"  {key}: {inline_yaml(option)}" for key, option in value.items())]
        else:
            lines.append(f"{name}: {inline_yaml(value)}")
    return "\n".join(lines) + "\n"


def inline_yaml(value: Any) -> str:
    """One option's value as YAML on one line, text quoted where it needs to be."""
    text = yaml.dump(value, Dumper=_StrictDumper, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("...\n").rstrip("\n")
