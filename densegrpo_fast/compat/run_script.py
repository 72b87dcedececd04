"""A script as `__main__` with a host patched: in this process, and in those that the script spawns.

The script is executed here rather than by `runpy.run_path`, which rewrites `sys.argv[0]` and takes `__main__` away
before exit handlers run.

A process that `multiprocessing` spawns executes the script again, under the name `__mp_main__`. Its parent names
`spawned_main.py` in the script's place, which calls `resume`.
"""

from __future__ import annotations

import ast
import builtins
import json
import multiprocessing.spawn
import os
import sys
from importlib import import_module
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from densegrpo_fast.compat.patch import Patch

_HOOK = "__densegrpo_fast_on_definition__"
_LAUNCHED = "DENSEGRPO_FAST_LAUNCHED"
"""Environment variable for spawned processes: path of the script, host, arguments of its `install`, as JSON."""


def run(script: Path, patch: Patch, host: str, options: dict[str, Any]) -> None:
    """Execute a file as `__main__`; a function that the patch knows by name is replaced where the file defines it.

    Args:
        script: absolute path.
        patch: in force.
        host: module of `densegrpo_fast.compat` that it comes from.
        options: arguments of the host's `install`, for processes that the script spawns.
    """
    module = ModuleType("__main__")
    loader = SourceFileLoader("__main__", str(script))
    vars(module).update(__file__=str(script), __loader__=loader, __builtins__=builtins, __cached__=None)
    sys.modules["__main__"] = module
    usual = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        while trace is not None and trace.tb_frame.f_code.co_filename != str(script):
            trace = trace.tb_next
        usual(kind, error.with_traceback(trace), trace)

    sys.excepthook = hook
    _pass_on(script, host, options)
    _execute(script, patch, vars(module))


def resume(namespace: dict[str, Any]) -> None:
    """Patch the host in a process that a launched script has spawned, then execute the script there.

    Args:
        namespace: of the process's main module, which becomes that of the script.

    Raises:
        CompatError: the host cannot be patched.
    """
    path, host, options = json.loads(os.environ[_LAUNCHED])
    patch = import_module(f"densegrpo_fast.compat.{host}").install(**options, say=lambda line: None)
    namespace["__file__"] = sys.argv[0] = path
    _pass_on(Path(path), host, options)
    _execute(Path(path), patch, namespace)


def _pass_on(script: Path, host: str, options: dict[str, Any]) -> None:
    """Let processes that are spawned from here begin with `spawned_main.py` in place of the script."""
    os.environ[_LAUNCHED] = json.dumps([str(script), host, options])
    before = multiprocessing.spawn.get_preparation_data

    def prepared(name: str) -> dict[str, Any]:
        data = before(name)
        if data.get("init_main_from_path") == str(script):
            data["init_main_from_path"] = str(Path(__file__).with_name("spawned_main.py"))
        return data

    multiprocessing.spawn.get_preparation_data = prepared


def _execute(script: Path, patch: Patch, namespace: dict[str, Any]) -> None:
    source: bytes | ast.Module = script.read_bytes()
    if patch.script_names:
        namespace[_HOOK] = patch.on_definition
        source = ast.parse(source, str(script))
        for node in source.body:
            if isinstance(node, ast.FunctionDef) and node.name in patch.script_names:
                # the hook decorates the script's own function; lines stay as they are
                node.decorator_list.insert(0, ast.copy_location(ast.Name(_HOOK, ast.Load()), node))
    exec(compile(source, str(script), "exec", dont_inherit=True), namespace)
