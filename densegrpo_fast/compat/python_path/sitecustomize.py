"""Imported by Python at its start in commands that a launched script runs, whose PYTHONPATH begins with this folder.

The host is patched when the first of its modules to be patched is imported, so that other commands pay nothing. Nothing
of this package is imported before, because the search path is not whole yet.
"""

from __future__ import annotations

import json
import os
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from pathlib import Path


class _AtFirstImport:
    """Finder that patches the host, then leaves the search to the others."""

    def __init__(self, modules: list[str]) -> None:
        self._modules = frozenset(modules)

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if fullname not in self._modules or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        try:
            run_script = import_module("densegrpo_fast.compat.run_script")
        except ImportError as error:
            raise ImportError(
                f"densegrpo_fast, whose launcher started this run, cannot be imported by {sys.executable}: {error}; "
                "install it there, or add the folder that holds it to PYTHONPATH"
            ) from error
        run_script.join()
        return find_spec(fullname)


if "DENSEGRPO_FAST_LAUNCHED" in os.environ:
    sys.meta_path.insert(0, _AtFirstImport(json.loads(os.environ["DENSEGRPO_FAST_LAUNCHED"])["modules"]))

# the environment's own module of this name, which this one hides
_here = str(Path(__file__).parent)
_hidden = PathFinder.find_spec("sitecustomize", [place for place in sys.path if os.path.abspath(place) != _here])
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(sys.modules["sitecustomize"])
