"""Who may import whom. The rules are the table below; the code is read, not run."""

from __future__ import annotations

import ast
import sys
from graphlib import TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "densegrpo_fast"
COMMANDS = (
    "train",
    "completion",
    "preview",
    "calibrate",
    "fidelity",
    "sample",
    "evaluate",
    "doctor",
    "launch",
    "watch",
    "compare",
)

# Part of the package -> the other parts that it may import, at module level or inside functions.
ALLOWED: dict[str, set[str]] = {
    "common": set(),
    "kernels": set(),
    "flow": {"kernels"},
    "sampling": {"flow", "models.base", "common.errors"},
    "credit": {"flow", "common"},
    "objective": {"flow", "common"},
    "rewards": {"common"},
    "embedded": {"rewards.ocr", "rewards.scenes", "common"},
    "models": {"flow.schedule", "flow.analytic", "embedded", "common"},
    "calibration": {"credit", "common"},
    "config": {
        "calibration.rules",
        "calibration.store",
        "credit.registry",
        "objective.registry",
        "rewards.registry",
        "sampling.windows",
        "sampling.plan",
        "common",
    },
    "run_files": {
        "rewards.registry",
        "models.lora",
        "models.whole_network",
        "models.adapter_formats",
        "models.base",
        "embedded",
        "config",
        "flow",
        "common",
    },
    "compat": {"flow", "sampling", "credit", "models", "calibration.store"},
}
ALLOWED["training"] = set(ALLOWED) - {"compat"}
ALLOWED["fidelity"] = ALLOWED["doctor"] = {*ALLOWED["training"], "training"}
# Parts that need nothing but torch and the standard library to be imported (kernels: and Triton).
TORCH_ONLY = ("flow", "kernels", "sampling", "credit", "objective", "compat")


class Import(NamedTuple):
    importer: str
    target: str
    at_module_level: bool


def source_files() -> dict[str, Path]:
    """Module name -> file; kernels/ under the name it is imported by."""
    files = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    for path in sorted((ROOT / "kernels").glob("*.py")):
        files[f"{PACKAGE}.kernels.{path.stem}"] = path
    return files


FILES = source_files()


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def imports_of(module: str, path: Path) -> list[Import]:
    """Every import statement that can run, relative names resolved, modules told from attributes."""
    found = []

    def visit(node: ast.AST, at_module_level: bool) -> None:
        if is_type_checking(node):
            return
        if isinstance(node, ast.Import):
            found.extend(Import(module, alias.name, at_module_level) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if path.stem == "__init__" else module.rpartition(".")[0]
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                child = f"{base}.{alias.name}"
                found.append(Import(module, child if child in FILES else base, at_module_level))
        inside = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        for child_node in ast.iter_child_nodes(node):
            visit(child_node, at_module_level and not inside)

    visit(ast.parse(path.read_text(encoding="utf-8")), True)
    return found


IMPORTS = [found for module, path in FILES.items() for found in imports_of(module, path)]


def part_of(module: str) -> str:
    """First name below the package: densegrpo_fast.flow.ops -> flow."""
    return module.removeprefix(f"{PACKAGE}.").split(".")[0]


def internal(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")


def test_every_part_has_a_rule() -> None:
    folders = {path.name for path in (ROOT / PACKAGE).iterdir() if (path / "__init__.py").is_file()}
    assert folders <= set(ALLOWED), "a new part of the package needs a line in ALLOWED"


@pytest.mark.parametrize("part", sorted(ALLOWED))
def test_a_part_imports_only_what_it_may(part: str) -> None:
    allowed = tuple(f"{PACKAGE}.{name}" for name in (part, *ALLOWED[part]))
    offences = [
        found
        for found in IMPORTS
        if part_of(found.importer) == part
        and internal(found.target)
        # the package itself holds the version alone
        and found.target != PACKAGE
        and not any(found.target == name or found.target.startswith(f"{name}.") for name in allowed)
    ]
    assert not offences


def test_no_two_parts_import_each_other() -> None:
    """Not even through a third one; single files that lie below their folder (a contract, a registry) count alone."""
    below = {name for names in ALLOWED.values() for name in names if "." in name}

    def unit(module: str) -> str:
        name = module.removeprefix(f"{PACKAGE}.")
        return next((file for file in below if name == file or name.startswith(f"{file}.")), part_of(module))

    graph: dict[str, set[str]] = {}
    for found in IMPORTS:
        if internal(found.target) and PACKAGE not in (found.target, found.importer):
            one, other = unit(found.importer), unit(found.target)
            if one != other:
                graph.setdefault(one, set()).add(other)
    # a file that lies below its folder may still use its neighbours' contracts, not the folder above it
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize("part", TORCH_ONLY)
def test_a_torch_only_part_needs_nothing_else(part: str) -> None:
    known = {*sys.stdlib_module_names, "torch", *(["triton"] if part == "kernels" else [])}
    offences = [
        found
        for found in IMPORTS
        if part_of(found.importer) == part
        and found.at_module_level
        and not internal(found.target)
        and found.target.split(".")[0] not in known
    ]
    assert not offences


def test_commands_are_imported_by_nobody() -> None:
    names = {f"{PACKAGE}.{command}{suffix}" for command in COMMANDS for suffix in ("", ".__main__")}
    assert not [found for found in IMPORTS if found.target in names and found.importer != found.target]


def test_configuration_never_reaches_torch() -> None:
    """Follow module-level imports from config and the top of commands: help and errors must be instant."""
    quick = ("train", "sample", "evaluate", "fidelity.__main__", "preview", "watch", "compare")
    commands = tuple(f"{PACKAGE}.{name}" for name in quick)
    pending = [name for name in FILES if part_of(name).startswith("config") or name in commands]
    seen = {*pending, PACKAGE}
    external = set()
    while pending:
        importer = pending.pop()
        for found in IMPORTS:
            if found.importer != importer or not found.at_module_level:
                continue
            if not internal(found.target):
                external.add(found.target.split(".")[0])
            elif found.target not in seen:
                seen.add(found.target)
                pending.append(found.target)
    assert external <= {*sys.stdlib_module_names, "pydantic", "yaml"}


def test_there_are_no_circles() -> None:
    graph = {module: set[str]() for module in FILES}
    for found in IMPORTS:
        if found.at_module_level and found.target in FILES and found.target != found.importer:
            graph[found.importer].add(found.target)
    # Raises CycleError, naming the modules, if the imports do not form an order.
    order = list(TopologicalSorter(graph).static_order())
    assert set(order) == set(FILES)


def test_kernels_have_one_name() -> None:
    assert not [found for found in IMPORTS if found.target.split(".")[0] == "kernels"]


def test_the_reader_sees_what_it_should(tmp_path: Path) -> None:
    path = tmp_path / "example.py"
    path.write_text(
        "from typing import TYPE_CHECKING\n"
        "import torch\n"
        "from . import ops\n"
        "from ..models.base import FlowModel\n"
        "if TYPE_CHECKING:\n    import diffusers\n"
        "def late():\n    import triton\n"
    )
    found = [(item.target, item.at_module_level) for item in imports_of(f"{PACKAGE}.flow.example", path)]
    assert found == [
        ("typing", True),
        ("torch", True),
        (f"{PACKAGE}.flow.ops", True),
        (f"{PACKAGE}.models.base", True),
        ("triton", False),
    ]
