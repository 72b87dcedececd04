"""What an option names: a thing of the package, or code of one's own as `some.module:name` or `path/file.py:name`."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

Entry = TypeVar("Entry")

_SPEC = re.compile(r"[^:\s][^:]*:[A-Za-z_]\w*")


def is_outside(name: str) -> bool:
    """Whether a name has one of the two forms, so that it stands for code outside of the package."""
    return _SPEC.fullmatch(name) is not None


def load(spec: str) -> Any:
    """What the name stands for. The module or file is run, by nothing but this explicit form.

    Raises:
        ValueError: there is no such module or file, it fails when it is run, or it holds no such name.
    """
    source, _, name = spec.rpartition(":")
    try:
        module = _file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:
        raise ValueError(f"{spec}: cannot load {source}: {type(error).__name__}: {error}") from error
    if not hasattr(module, name):
        raise ValueError(f"{spec}: {source} holds no {name!r}")
    return getattr(module, name)


def problem(spec: str) -> str | None:
    """What is sure to go wrong when `load` is asked for a file, found without running it; None = nothing found."""
    source, _, name = spec.rpartition(":")
    if not source.endswith(".py"):
        return None
    try:
        tree = ast.parse(Path(source).read_bytes(), source)
    except (OSError, SyntaxError, ValueError) as error:
        return f"{spec}: cannot load {source}: {type(error).__name__}: {error}"
    # any name that is bound anywhere, or may be: more than the file's own names, so that nothing good is refused
    names = {getattr(node, "name", None) or getattr(node, "id", None) for node in ast.walk(tree)}
    imported = {
        alias for node in ast.walk(tree) for alias in getattr(node, "names", ()) if isinstance(alias, ast.alias)
    }
    names |= {alias.asname or alias.name for alias in imported}
    if name in names or "*" in names or {"globals", "__getattr__", "exec"} & names:
        return None
    return f"{spec}: {source} holds no {name!r}"


def _file(path: Path) -> ModuleType:
    path = path.resolve()
    name = f"densegrpo_fast_outside_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    location = importlib.util.spec_from_file_location(name, path)
    assert location is not None and location.loader is not None  # a .py file always has both
    module = importlib.util.module_from_spec(location)
    sys.modules[name] = module  # where dataclasses and pickle look a class's module up
    try:
        location.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def resolve(function: str | Callable[..., Any]) -> Callable[..., Any]:
    """A function that is given as it is, or by where it is in this package as `module:name`: imported when needed."""
    if callable(function):
        return function
    module, _, name = function.rpartition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return found


def select_options(whose: str, wanted: Sequence[str], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of some options that a thing takes.

    Args:
        whose: what takes them, for the message.

    Raises:
        ValueError: one is not there.
    """
    if missing := [option for option in wanted if option not in options]:
        raise ValueError(f"{whose} needs the options {', '.join(missing)}")
    return {option: options[option] for option in wanted}


class Registry(Generic[Entry]):
    """Entries of one kind by their names.

    Args:
        kind: their class.
        what: what messages call one, such as "method".
        known: the package's, in order.
    """

    def __init__(self, kind: type[Entry], what: str, known: Mapping[str, Entry]):
        self.kind, self.what = kind, what
        self._known, self._loaded = dict(known), dict[str, Entry]()

    def names(self) -> list[str]:
        """The package's entries and the registered ones, in the order of their registration."""
        return list(self._known)

    def register(self, name: str, entry: Entry) -> None:
        """Give an entry a name.

        Raises:
            ValueError: the name is taken, or has a colon.
        """
        if ":" in name or name in self._known:
            raise ValueError(
                f"register: name must be new and without a colon, got {name!r}; taken: {', '.join(self._known)}"
            )
        self._known[name] = entry

    def find(self, name: str) -> Entry:
        """The entry of a name; `module:name` and `file.py:name` load code from outside the package, once.

        Raises:
            ValueError: there is none.
        """
        if name in self._known:
            return self._known[name]
        if not is_outside(name):
            known = ", ".join(self._known)
            raise ValueError(f"unknown {self.what} {name!r} (known: {known}; your own: file.py:NAME)")
        if name not in self._loaded:
            entry, kind = load(name), self.kind
            if not isinstance(entry, kind):
                raise ValueError(f"{name}: expected a {kind.__name__} ({kind.__module__}), got {entry!r}")
            self._loaded[name] = entry
        return self._loaded[name]
