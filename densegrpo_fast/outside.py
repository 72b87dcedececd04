"""Code of one's own, named in an option: `package.module:name` or `path/to/file.py:name`."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

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
