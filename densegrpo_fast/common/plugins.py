"""What an option names: a thing of the package, or code of one's own as `some.module:name` or `path/file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import re
import signal
import sys
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from densegrpo_fast.common.errors import PluginError, UserError

logger = logging.getLogger(__name__)

Entry = TypeVar("Entry")

_SPEC = re.compile(r"[^:\s][^:]*:[A-Za-z_]\w*")


def is_outside(name: str) -> bool:
    """Whether a name has one of the two forms, so that it stands for code outside of the package."""
    return _SPEC.fullmatch(name) is not None


def load(spec: str) -> Any:
    """What the name stands for. The module or file is run, by nothing but this explicit form.

    Raises:
        ValueError: there is no such module or file, it fails when it is run, or it holds no such name.
        PluginError: it exits when it is run.
    """
    source, _, name = spec.rpartition(":")
    try:
        with fenced(f"{spec}: {source}", through=(Exception,)):
            module = _file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except Exception as error:
        if isinstance(error, UserError):
            raise
        raise ValueError(f"{spec}: cannot load {source}: {_described(error)}") from error
    if not hasattr(module, name):
        raise ValueError(f"{spec}: {source} holds no {name!r}")
    return getattr(module, name)


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


def is_package_code(thing: Any) -> bool:
    """Whether a function, an object or a partial of one is defined in this package."""
    while hasattr(thing, "func"):
        thing = thing.func
    module = str(getattr(thing, "__module__", None) or type(thing).__module__)
    return module.split(".")[0] == __name__.split(".")[0]


def fence(function: Any, what: str, through: tuple[type[BaseException], ...] = ()) -> AbstractContextManager[None]:
    """`fenced` for code of one's own; code of the package raises what it raises."""
    return nullcontext() if is_package_code(function) else fenced(what, through=through)


@contextmanager
def fenced(
    what: str, error: Callable[[str], UserError] = PluginError, through: tuple[type[BaseException], ...] = ()
) -> Iterator[None]:
    """Run code of one's own so that whatever it does ends here.

    What it raises, `sys.exit` too, becomes an error under its name; a changed working directory is changed back; a
    process that it forked ends instead of going on with ours. What ends the interpreter (`os._exit`) is not held.

    Args:
        what: names the code; begins the message.
        error: makes the error.
        through: raised on as they are; a Ctrl-C is as well.

    Raises:
        UserError: what `error` makes.
    """
    process, directory = os.getpid(), _working_directory()
    try:
        yield
    except through:
        raise
    except BaseException as raised:
        if os.getpid() == process and _is_interrupt(raised):
            raise
        if os.getpid() == process:
            raise error(f"{what} raised {_described(raised)}") from raised
    finally:
        if os.getpid() != process:
            os._exit(1)
        if directory is not None and _working_directory() != directory:
            logger.warning("%s changed the working directory; it is %s again", what, directory)
            os.chdir(directory)


def _working_directory() -> str | None:
    try:
        return os.getcwd()
    except OSError:  # somebody has deleted it
        return None


def _is_interrupt(error: BaseException) -> bool:
    """Whether this is a Ctrl-C of the user's, as far as can be told: code can raise KeyboardInterrupt itself."""
    return (
        isinstance(error, KeyboardInterrupt)
        and threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    )


def _described(error: BaseException) -> str:
    """Class and message of an error whose own text may fail."""
    try:
        text = str(error)
    except BaseException:
        text = "(its message cannot be read)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


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
