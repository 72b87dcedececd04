"""Checks the options that a configuration gives to a reward against what the reward's factory takes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, get_type_hints


class OptionError(ValueError):
    """A reward does not have such an option, needs one that is not given, or takes no such value."""


def check_options(name: str, factory: Callable[..., Any], options: Mapping[str, Any], skip: int = 0) -> None:
    """Check options by the factory's signature and type hints.

    Args:
        name: the reward, for messages.
        factory: class of a reward, function that makes one, or a reward itself.
        options: keyword arguments.
        skip: leading parameters that are no options: the three of `reward(images, prompts, metadata, ...)`.

    Raises:
        OptionError: an option is unknown, absent or of the wrong type.
    """
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return  # built in C: it checks its own
    named = dict(list(parameters.items())[skip:])
    open_ended = any(entry.kind is entry.VAR_KEYWORD for entry in named.values())
    known = {
        key: entry for key, entry in named.items() if entry.kind in (entry.KEYWORD_ONLY, entry.POSITIONAL_OR_KEYWORD)
    }
    for key in options:
        if key not in known and not open_ended:
            close = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            raise OptionError(f"the reward {name!r} has no option {key!r}{hint} ({takes})")
    for key, entry in known.items():
        if entry.default is entry.empty and key not in options:
            raise OptionError(f"the reward {name!r} needs the option {key!r}")
    for key, hint_type in _types(factory).items():
        if key in options and key in known:
            _check_type(name, key, hint_type, options[key])


def _types(factory: Callable[..., Any]) -> dict[str, Any]:
    try:
        hints = get_type_hints(vars(factory).get("__init__", factory) if isinstance(factory, type) else factory)
    except (NameError, TypeError, AttributeError):
        return {}  # somebody's own annotations, which need not be types
    return {key: kind for key, kind in hints.items() if key != "return"}


def _check_type(name: str, key: str, kind: Any, value: Any) -> None:
    from pydantic import ConfigDict, PydanticUserError, TypeAdapter, ValidationError

    try:
        adapter = TypeAdapter(kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True, allow_inf_nan=False))
        adapter.validate_python(value)
    except ValidationError:
        expected = getattr(kind, "__name__", str(kind)) if isinstance(kind, type) else str(kind)
        raise OptionError(f"the reward {name!r} takes {expected} as {key!r}, got {value!r}") from None
    except PydanticUserError:
        return  # no such check for this type
