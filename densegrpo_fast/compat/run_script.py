"""A script or module as `__main__` with a host patched: in this process, and in those that it starts.

The script is executed here rather than by `runpy`, which rewrites `sys.argv[0]`, takes `__main__` away before exit
handlers run, and has no place for the hook that replaces a function where the script defines it.

A process that `multiprocessing` spawns executes the script again, under the name `__mp_main__`. Its parent names
`spawned_main.py` in the script's place, which calls `resume`. A Python command that the script runs finds
`python_path/sitecustomize.py`, which calls `join` when the host is imported.
"""

from __future__ import annotations

import ast
import builtins
import json
import multiprocessing
import multiprocessing.spawn
import os
import sys
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densegrpo_fast.compat.patch import Patch

_HOOK = "__densegrpo_fast_on_definition__"
_LAUNCHED = "DENSEGRPO_FAST_LAUNCHED"
"""Environment variable for processes that the script starts: a `Launched` as JSON, and the patched `modules`."""


@dataclass(frozen=True)
class Launched:
    """What runs, and how its host is patched.

    Attributes:
        path: absolute path of the script, or of the module's file.
        module: full name of the module; None: a script.
        host: module of `densegrpo_fast.compat`.
        options: arguments of the host's `install`.
    """

    path: str
    module: str | None
    host: str
    options: dict[str, Any]


def source_of(module: str) -> tuple[str, str]:
    """The full name, with `.__main__` for a package, and the absolute path of what `python -m module` would run.

    Raises:
        ImportError: there is no such module, it has no source file, or a package that holds it cannot be imported.
    """
    spec = find_spec(module)
    if spec is not None and spec.submodule_search_locations is not None:
        module = f"{module}.__main__"
        spec = find_spec(module)
    if spec is None or not isinstance(spec.loader, SourceFileLoader) or spec.origin is None:
        raise ImportError(f"no module named {module} with a source file", name=module)
    return module, os.path.abspath(spec.origin)


def run(launched: Launched, patch: Patch) -> None:
    """Execute a script or module as `__main__`; a function that the patch knows by name is replaced at its definition.

    Args:
        launched: what to execute.
        patch: in force.
    """
    module = ModuleType("__main__")
    vars(module).update(__builtins__=builtins, __cached__=None, **_names(launched))
    sys.modules["__main__"] = module
    _tell_errors(launched.path)
    _pass_on(launched, patch)
    _execute(launched, patch, vars(module))


def resume(namespace: dict[str, Any]) -> None:
    """Patch the host in a process that a launched script has spawned, then execute the script there.

    Args:
        namespace: of the process's main module, which becomes that of the script.

    Raises:
        CompatError: the host cannot be patched.
    """
    launched, patch = _installed(None)
    names = _names(launched)
    sys.argv[0] = names["__file__"]
    namespace.update(names)
    _pass_on(launched, patch)
    _execute(launched, patch, namespace)


def join() -> None:
    """Patch the host in a command that a launched script has started; the first rank says what is replaced.

    Raises:
        CompatError: the host cannot be patched.
    """
    _tell_errors(None)
    _installed(say if is_first_rank() and multiprocessing.parent_process() is None else None)


def is_first_rank() -> bool:
    """Whether this process speaks for all of a run."""
    return os.environ.get("RANK", "0") == "0"


def say(line: str) -> None:
    """Print a line on stderr, marked as this package's."""
    print(f"densegrpo_fast: {line}", file=sys.stderr, flush=True)


def _installed(say: Any) -> tuple[Launched, Patch]:
    given = json.loads(os.environ[_LAUNCHED])
    given.pop("modules")
    launched = Launched(**given)
    host = import_module(f"densegrpo_fast.compat.{launched.host}")
    return launched, host.install(**launched.options, say=say or (lambda line: None))


def _names(launched: Launched) -> dict[str, Any]:
    """What Python sets in the main module."""
    loader = SourceFileLoader(launched.module or "__main__", launched.path)
    names = {"__file__": launched.path, "__loader__": loader}
    if launched.module is None:
        return names
    spec = ModuleSpec(launched.module, loader, origin=launched.path)
    spec.has_location = True
    return {**names, "__spec__": spec, "__package__": spec.parent}


def _tell_errors(script: str | None) -> None:
    """Of a refused host show the message alone; of other errors the traceback from the script on."""
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        from densegrpo_fast.compat.patch import CompatError

        if isinstance(error, CompatError):
            say(f"error: {error}")
            return
        while script is not None and trace is not None and trace.tb_frame.f_code.co_filename != script:
            trace = trace.tb_next
        usual(kind, error.with_traceback(trace), trace)

    sys.excepthook = hook


def _pass_on(launched: Launched, patch: Patch) -> None:
    """Let processes that are spawned from here begin with `spawned_main.py`, and commands with `sitecustomize.py`."""
    os.environ[_LAUNCHED] = json.dumps({**asdict(launched), "modules": sorted(patch.modules)})
    folder = str(Path(__file__).with_name("python_path"))
    places = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if folder not in places:
        os.environ["PYTHONPATH"] = os.pathsep.join([folder, *filter(None, places)])
    before = multiprocessing.spawn.get_preparation_data

    def prepared(name: str) -> dict[str, Any]:
        data = before(name)
        of_script = data.get("init_main_from_path") == launched.path
        if of_script or launched.module is not None and data.pop("init_main_from_name", None) == launched.module:
            data["init_main_from_path"] = str(Path(__file__).with_name("spawned_main.py"))
        return data

    multiprocessing.spawn.get_preparation_data = prepared


def _execute(launched: Launched, patch: Patch, namespace: dict[str, Any]) -> None:
    source: bytes | ast.Module = Path(launched.path).read_bytes()
    if patch.script_names:
        namespace[_HOOK] = patch.on_definition
        source = ast.parse(source, launched.path)
        for node in source.body:
            if isinstance(node, ast.FunctionDef) and node.name in patch.script_names:
                # the hook decorates the script's own function; lines stay as they are
                node.decorator_list.insert(0, ast.copy_location(ast.Name(_HOOK, ast.Load()), node))
    exec(compile(source, launched.path, "exec", dont_inherit=True), namespace)
