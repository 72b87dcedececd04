"""Rewards by their names: those of the package, registered ones, and one's own; and a check of their options.

This file needs no torch, so that the configuration can read it; a reward's own file is imported when it is created.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_type_hints

from densegrpo_fast.common.errors import RewardError
from densegrpo_fast.common.plugins import fenced, load, resolve

if TYPE_CHECKING:
    from densegrpo_fast.rewards.base import Reward

Factory = TypeVar("Factory", bound=Callable[..., Any])


@dataclass(frozen=True)
class _BuiltIn:
    """Where a reward of this package lives.

    Attributes:
        module, factory: its file and its class.
        options: that its name stands for.
        bounds: between which its scores lie; None = none are known.
        reads: what reads a prompt, as `module:name`, and raises ValueError at one that it cannot; None = it takes any.
    """

    module: str
    factory: str
    options: dict[str, Any] = field(default_factory=dict)
    bounds: tuple[float, float] | None = None
    reads: str | None = None


_SCENES: dict[str, Any] = {"bounds": (0.0, 1.0), "reads": f"{__package__}.scene_request:parse"}


BUILT_IN = {
    "scenes": _BuiltIn(".scenes", "ScenesReward", **_SCENES),
    "scenes_strict": _BuiltIn(".scenes", "ScenesReward", {"strict": True}, **_SCENES),
    "scenes_smooth": _BuiltIn(".scenes_smooth", "ScenesSmooth", **_SCENES),
    "jpeg_compressibility": _BuiltIn(".jpeg", "JpegCompressibility"),
    "jpeg_incompressibility": _BuiltIn(".jpeg", "JpegIncompressibility"),
    "pickscore": _BuiltIn(".pickscore", "PickScore"),
    "clipscore": _BuiltIn(".clipscore", "ClipScore"),
    "aesthetic": _BuiltIn(".aesthetic", "Aesthetic"),
    "ocr": _BuiltIn(".ocr", "Ocr", bounds=(0.0, 1.0)),
    "remote": _BuiltIn(".remote", "RemoteReward"),
    "vlm_judge": _BuiltIn(".vlm_judge", "VlmJudge"),
}
"""The package's rewards by name. A configuration writes any other as `module:function` or `path.py:function`."""

USE = "use"
"""Key among a reward's options: the reward that stands behind a name of one's own."""

_HOW = frozenset(
    ("url", "timeout", "retries", "retry_delay", "breaker_after", "cooldown", "max_reply", "concurrency", "token_env")
    + ("batch", "device", "chunk", "threads")
)
"""Options of the package's rewards that say where and how to compute a score, and leave its meaning alone."""

_REGISTERED: dict[str, Callable[..., Reward]] = {}


class OptionError(ValueError):
    """A reward does not have such an option, needs one that is not given, or takes no such value."""


def names() -> list[str]:
    """Names that `create` knows, sorted."""
    return sorted({*BUILT_IN, *_REGISTERED})


def register(name: str) -> Callable[[Factory], Factory]:
    """Decorator: give a reward factory (a class, or a function returning a reward) a name that `create`
    knows.

    Raises:
        ValueError: the name is taken, or contains a colon.
    """
    if ":" in name or name in names():
        raise ValueError(f"register: name must be new and without a colon, got {name!r}; taken: {', '.join(names())}")

    def remember(factory: Factory) -> Factory:
        _REGISTERED[name] = factory
        return factory

    return remember


def resolve_alias(name: str, options: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The reward that a name stands for and its options: the name itself, or what its option `use` says."""
    own = dict(options.get(name, {}))
    return own.pop(USE, name), own


def bounds(terms: Mapping[str, float], options: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Between which scores lie, of the rewards that are known to have bounds, and of their weighted sum as "reward".

    Args:
        terms: reward name -> weight, 0 for those that are only observed.
        options: as in `reward.options`.
    """
    kinds = {name: resolve_alias(name, options)[0] for name in terms}
    known = {name: own for name, kind in kinds.items() if kind in BUILT_IN and (own := BUILT_IN[kind].bounds)}
    if all(name in known for name, weight in terms.items() if weight):
        ends = [sorted(weight * end for end in known[name]) for name, weight in terms.items() if weight]
        known["reward"] = (sum(low for low, _ in ends), sum(high for _, high in ends))
    return known


def check_sources(names: Iterable[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Look for the files and modules of one's own rewards without running them.

    Raises:
        ValueError: one is not there.
    """
    for name in names:
        kind, _ = resolve_alias(name, options)
        source = kind.rpartition(":")[0]
        if source.endswith(".py") and not Path(source).is_file():
            raise ValueError(f"{kind}: there is no file {source}")


def check_prompts(names: Iterable[str], options: Mapping[str, Mapping[str, Any]], prompts: Iterable[str]) -> None:
    """Let the rewards that cannot read every prompt read these.

    Raises:
        ValueError: one of them cannot read one of the prompts; it names both.
    """
    every = list(prompts)
    for name in names:
        kind, _ = resolve_alias(name, options)
        if kind in BUILT_IN and (reads := BUILT_IN[kind].reads) is not None:
            for prompt in every:
                try:
                    resolve(reads)(prompt)
                except ValueError as error:
                    raise ValueError(f"reward {name!r}: {error}") from None


def score_affecting(options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options without those that only say where and how the package's rewards are computed."""
    affecting = {}
    for name, own in options.items():
        ours = resolve_alias(name, options)[0] in BUILT_IN
        affecting[name] = {key: value for key, value in own.items() if not (ours and key in _HOW)}
    return affecting


def create(name: str, **options: Any) -> Reward:
    """Make a reward from its name, importing only the file it lives in.

    Args:
        name: a registered name; or one's own reward as `package.module:function` or
            `path/to/file.py:function`. That code is then run: only this explicit form loads code from outside
            the package.
        **options: keywords of the reward's factory; for one's own function they are bound to it.

    Raises:
        ValueError: the name is unknown, or what it names cannot be loaded; `OptionError` if it has no such option,
            needs another, or takes no such value.
        OSError, ImportError: what a reward of the package needs is not here.
        RewardError: one's own reward failed while it was made.
    """
    if ":" in name:
        target = load(name)
        if not callable(target):
            raise ValueError(f"reward {name!r}: expected a function or class, got {type(target).__name__}")
        _check_options(name, target, options, skip=0 if isinstance(target, type) else 3)
        if isinstance(target, type):
            with _made(name):
                return target(**options)
        return partial(target, **options) if options else target
    if name in _REGISTERED:
        _check_options(name, _REGISTERED[name], options)
        with _made(name):
            return _REGISTERED[name](**options)
    if name not in BUILT_IN:
        close = difflib.get_close_matches(name, names(), n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(
            f"unknown reward {name!r}; {hint}known: {', '.join(names())}; your own: module:function or file.py:function"
        )
    entry = BUILT_IN[name]
    factory = getattr(importlib.import_module(entry.module, __package__), entry.factory)
    merged = {**entry.options, **options}
    _check_options(name, factory, merged)
    return factory(**merged)


def _made(name: str) -> AbstractContextManager[None]:
    """Whatever one's own reward raises while it is made is its error; a lack of memory is told by the caller."""
    import torch  # not where names alone are asked for

    return fenced(f"making the reward {name!r}", partial(RewardError, name=name), (torch.OutOfMemoryError,))


def _check_options(name: str, factory: Callable[..., Any], options: Mapping[str, Any], skip: int = 0) -> None:
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
