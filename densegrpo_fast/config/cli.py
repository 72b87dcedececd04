"""The command line: a preset or a file, and any option of it overridden by its dotted key.

    --config embedded_sparse --sampler.group_size 12 optimizer.lr=1e-4

Every mistake is reported by the key it is about, with a suggestion, before anything heavy is imported.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from pydantic import ValidationError

from densegrpo_fast.calibration.store import Calibration, read_calibration
from densegrpo_fast.common.aliases import OPTIONS, REMOVED, current_option, is_removed
from densegrpo_fast.common.errors import CheckpointError, UsageError, UserError
from densegrpo_fast.common.exit_codes import ExitCode
from densegrpo_fast.common.suggest import did_you_mean
from densegrpo_fast.config.help import describe_errors, help_text, takes_text
from densegrpo_fast.config.schema import Config, options, sections
from densegrpo_fast.config.yaml_files import (
    BASE_PRESET,
    DEFAULT_PRESET,
    check_stored,
    dump_yaml,
    follow_rewards,
    parse_yaml,
    preset_names,
    preset_summary,
    read_settings,
)

logger = logging.getLogger(__name__)

_PRINTING_FLAGS = ("--help", "-h", "--print-config", "--list-presets")
_FLAGS = ("--config", "--resume", "--dry-run", *_PRINTING_FLAGS)
_DOTTED = re.compile(r"--\w+\.\w+")


@dataclass(frozen=True)
class CliFlags:
    """What the command line asks for besides the configuration.

    Attributes:
        resume: continue the run in the output directory.
        dry_run: one small iteration to check that everything works.
    """

    resume: bool = False
    dry_run: bool = False


@dataclass
class _Arguments:
    """The command line, split but not yet interpreted."""

    source: str | None = None
    resume: bool = False
    resume_directory: str | None = None
    dry_run: bool = False
    printing: str | None = None
    overrides: dict[str, str] = field(default_factory=dict)


def parse_arguments(argv: Sequence[str], default: str = DEFAULT_PRESET) -> tuple[Config, CliFlags]:
    """Read the configuration that a command line asks for.

    Args:
        argv: the arguments, without the program's name.
        default: preset to start from without --config.

    Returns:
        The validated configuration and the other flags.

    Raises:
        UsageError: naming every wrong key; CheckpointError: the run to resume has no configuration.
        SystemExit: with status 0, after --help, --list-presets or --print-config printed to stdout.
    """
    arguments = _split(argv)
    if arguments.printing == "--list-presets":
        _print_and_exit("".join(f"{name:28}{preset_summary(name)}\n" for name in preset_names()))
    source = _source(arguments, default)
    settings = read_settings(source)
    if arguments.resume_directory is not None:
        arguments.overrides.setdefault("run.output_dir", arguments.resume_directory)
    if arguments.resume:
        # one that is stored in a file has had its effect
        arguments.overrides.setdefault("run.overwrite", "false")
    for key, text in arguments.overrides.items():
        _override(settings, key, text)
    follow_rewards(settings, arguments.overrides, source)
    config = _validated(settings, arguments.overrides)
    if arguments.resume and config.run.overwrite:
        raise UsageError("--resume and --run.overwrite contradict each other: choose one")
    if arguments.printing == "--print-config":
        _print_and_exit(dump_yaml(config))
    if arguments.printing:
        _print_and_exit(help_text(config))
    return config, CliFlags(resume=arguments.resume, dry_run=arguments.dry_run)


def configuration(arguments: Sequence[str]) -> Config:
    """The configuration of a command that does not train; without --config it starts from the base preset.

    Args:
        arguments: those that the command's own parser left over.

    Raises:
        UsageError: naming every wrong key, or a flag that only training has.
    """
    config, flags = parse_arguments(arguments, default=BASE_PRESET)
    if flags.resume or flags.dry_run:
        raise UsageError("--resume and --dry-run are options of training")
    return config


def load_config(source: str | PurePath = DEFAULT_PRESET, overrides: Mapping[str, Any] | None = None) -> Config:
    """The configuration of a preset or a file, with some options changed.

        load_config("embedded_dense", {"sampler.num_steps": 4, "run.iterations": 20})

    Args:
        source: name of a preset, or path of a file that ends in .yaml or .yml.
        overrides: values by the dotted key of their option.

    Raises:
        UsageError: there is no such preset, file or option, or a value does not fit; the message names the key.
    """
    if overrides is not None and not isinstance(overrides, Mapping):
        raise UsageError(f'overrides: expected a mapping such as {{"run.iterations": 20}}, got {overrides!r}')
    if not isinstance(source, str | PurePath):
        raise UsageError(f"load_config: expected the name of a preset or the path of a file, got {source!r}")
    settings, given = read_settings(os.fspath(source)), dict[str, str]()
    for key, value in (overrides or {}).items():
        if not isinstance(key, str):
            raise UsageError(f'overrides: expected dotted keys such as "run.iterations", got {key!r}')
        current = current_option(key, "overrides")
        if given.setdefault(current, key) != key:
            raise UsageError(f"overrides: {given[current]} and {key} are two names of one option; give one of them")
        if is_removed(current, value, "overrides"):
            continue
        if current in sections():
            raise UsageError(f'overrides: "{key}" is a section; give its options by dotted keys, such as "{key}.NAME"')
        if current not in options():
            raise UsageError(f'unknown option "{key}"{did_you_mean(key, options())}')
        if isinstance(value, tuple):
            value = list(value)
        _set(settings, current, str(value) if isinstance(value, PurePath) else value)
    follow_rewards(settings, overrides or {}, os.fspath(source))
    return _validated(settings, overrides or {})


def split_overrides(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tell the arguments of a command apart from the options of the configuration among them.

    Args:
        argv: the arguments, without the program's name; what follows `--` is the command's.

    Returns:
        The command's own arguments, and the others for `parse_arguments`, each written `section.key=VALUE`.

    Raises:
        UsageError: if a dotted option is unknown or lacks its value.
    """
    own: list[str] = []
    overrides: list[str] = []
    rest = list(argv)
    while rest and rest[0] != "--":
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if _DOTTED.fullmatch(name) or (equals and "." in name and name in (*options(), *OPTIONS, *REMOVED)):
            overrides.append(f"{name.removeprefix('--')}={_take_override(name, value if equals else None, rest)}")
        else:
            own.append(word)
    return own + rest, overrides


def validate(settings: dict[str, Any]) -> Config:
    """Build the configuration from nested settings; a calibration's noise levels take their place in it.

    Raises:
        UsageError: with one line per problem that names its key, or if a calibration cannot be read or
            does not fit (see `_fitting_calibration`).
    """
    try:
        config = Config.model_validate(settings)
        made = _fitting_calibration(config)
        if made is None:
            return config
        sampler = config.sampler.model_dump() | {"noise_level": list(made.noise_level)}
    except ValidationError as error:
        raise _invalid("invalid configuration:", error) from None
    try:
        return Config.model_validate(config.model_dump() | {"sampler": sampler})
    except ValidationError as error:
        raise _invalid(f"sampler.calibration: the levels of {made.path} do not fit:", error) from None


def _validated(settings: dict[str, Any], given: Collection[str]) -> Config:
    """`validate`; what is wrong with a credit method that somebody chose ends with the presets that are made for it."""
    try:
        return validate(settings)
    except UsageError as error:
        if "credit.method" not in given:
            raise
        method, model = _at(settings, "credit", "method"), _at(settings, "model", "path")
        presets = {name: read_settings(name) for name in preset_names()}
        made = [name for name, own in presets.items() if own["credit"]["method"] == method]
        near = [name for name in made if presets[name]["model"]["path"] == model] or made
        if not near:
            raise
        near = sorted(near, key=lambda name: (str(method) not in name, len(name)))[:3]
        raise UsageError(f"{error}; presets with credit.method {method}: {', '.join(near)}") from None


def _at(settings: dict[str, Any], section: str, name: str) -> Any:
    options = settings.get(section)
    return options.get(name) if isinstance(options, dict) else None


def _fitting_calibration(config: Config) -> Calibration | None:
    """The file of `sampler.calibration`, if it fits the configuration's sampler as far as that can be told without the
    model; None without one.

    What else it was made for and the run does not have is a warning, for balance may survive it: the file's
    `Config.calibration_settings`, and noise in further steps, after which a step starts from other states.

    Raises:
        UsageError: it cannot be read, or was made for other dynamics, another number of steps, or without noise
            in a step that may have it here.
    """
    if config.sampler.calibration is None:
        return None
    made, steps = read_calibration(Path(config.sampler.calibration)), config.calibrated_steps()
    made.check_sampler(config.sampler.num_steps, config.sampler.dynamics, steps)
    others = [
        f"{key} {made.settings[key]} (here {own})"
        for key, own in config.calibration_settings().items()
        if made.settings.get(key, own) != own
    ]
    if list(made.steps) != steps:
        others.append(f"noise in the steps {list(made.steps)} (here {steps})")
    if others:
        logger.warning(
            "sampler.calibration: %s was made with %s; gains need not be balanced here", made.path, ", ".join(others)
        )
    return made


def _invalid(beginning: str, error: ValidationError) -> UserError:
    problems = describe_errors(error)
    separator = "\n  " if len(problems) > 1 else " "
    return UsageError(separator.join([beginning, *problems]))


def _print_and_exit(text: str) -> None:
    print(text, end="")
    raise SystemExit(int(ExitCode.OK))


def _source(arguments: _Arguments, default: str) -> str:
    if arguments.source is not None or arguments.resume_directory is None:
        return arguments.source or default
    stored = Path(arguments.resume_directory) / "config.yaml"
    if not stored.is_file():
        raise CheckpointError(f"--resume: {stored} does not exist, so there is no run to continue")
    check_stored(stored)
    return str(stored)


def _split(argv: Sequence[str]) -> _Arguments:
    arguments, rest, seen = _Arguments(), list(argv), set()
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        given = value if equals else None
        if name in _FLAGS:
            key = name
            _take_flag(arguments, name, given, rest)
        else:
            key = current_option(name.removeprefix("--"), "command line")
            arguments.overrides[key] = _take_override(name, given, rest)
        if key in seen:
            raise UsageError(f"option {key} is given twice")
        seen.add(key)
    return arguments


def _take_flag(arguments: _Arguments, name: str, given: str | None, rest: list[str]) -> None:
    if name == "--config":
        arguments.source = given if given is not None else _next_value(name, rest)
    elif name == "--resume":
        arguments.resume = True
        if given is None and rest and not rest[0].startswith("-") and "=" not in rest[0]:
            given = rest.pop(0)
        arguments.resume_directory = given
    elif given is not None:
        raise UsageError(f"{name} takes no value, got {given!r}")
    elif name == "--dry-run":
        arguments.dry_run = True
    else:
        arguments.printing = arguments.printing or name


def _take_override(name: str, given: str | None, rest: list[str]) -> str:
    known, key = options(), name.removeprefix("--")
    current = OPTIONS.get(key, key)
    if key == name and (given is None or name.startswith("-")):
        raise UsageError(
            f'unexpected argument "{name}": an option is written --section.key VALUE or section.key=VALUE',
        )
    if current not in known and current not in REMOVED:
        flag = did_you_mean(name, _FLAGS) if key != name and "." not in key else ""
        raise UsageError(f'unknown option "{key}"{did_you_mean(key, known) or flag}')
    if given is not None:
        return given
    if current in known and known[current].annotation is bool and (not rest or rest[0] not in ("true", "false")):
        return "true"
    return _next_value(name, rest)


def _next_value(name: str, rest: list[str]) -> str:
    if not rest or rest[0].startswith("--"):
        raise UsageError(f"{name} needs a value")
    return rest.pop(0)


def _override(settings: dict[str, Any], key: str, text: str) -> None:
    if key in REMOVED and is_removed(key, parse_yaml(text, f"option {key}"), "command line"):
        return
    verbatim = takes_text(options()[key]) and text != "null"
    _set(settings, key, text if verbatim else parse_yaml(text, f"option {key}"))


def _set(settings: dict[str, Any], key: str, value: Any) -> None:
    """Set an option by its dotted key; a section that is no mapping stays, to be refused by name."""
    section, _, name = key.rpartition(".")
    target = settings.setdefault(section, {}) if section else settings
    if isinstance(target, dict):
        target[name] = value
