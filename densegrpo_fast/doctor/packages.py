"""Findings about what is installed: versions, and whether the package's own data is whole."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from densegrpo_fast.doctor.findings import Finding

OPTIONAL = ("triton",)
"""Packages that are used where they are installed; the tests' requirements say which versions."""

_DISTRIBUTION = "densegrpo-fast"
_DATA = "package data"


class Requirement(NamedTuple):
    """A package that the distribution asks for.

    Attributes:
        name: of its distribution.
        wanted: supported versions, as in `satisfies`; empty = any.
        remedy: the command that installs it; empty where nothing needs it.
    """

    name: str
    wanted: str
    remedy: str


def package_findings() -> Iterator[Finding]:
    """Versions of Python and of every package that is used, against those that the distribution's metadata states."""
    python = platform.python_version()
    if satisfies(python, ">=3.11"):
        yield Finding("packages", "python", "ok", python)
    else:
        yield Finding("packages", "python", "warn", python, "training needs Python 3.11, because diffusers 0.42 does")
    try:
        stated = importlib.metadata.requires(_DISTRIBUTION) or []
    except importlib.metadata.PackageNotFoundError:
        advice = "without its metadata the supported versions are not known: pip install it, with -e from a checkout"
        yield Finding("packages", _DISTRIBUTION, "warn", "not installed", advice)
        return
    for requirement in requirements(stated):
        yield version_finding(requirement, installed_version(requirement.name))


def requirements(stated: Sequence[str]) -> list[Requirement]:
    """What training needs, and `OPTIONAL`, of the requirements that a distribution's metadata states.

    Args:
        stated: lines such as `peft>=0.18; extra == "train"`, as `importlib.metadata.requires` gives them.
    """
    core, training, optional = [], [], []
    for line in stated:
        requirement, _, marker = line.partition(";")
        match = re.fullmatch(r"([\w.-]+)\s*([^\[]*)", requirement.strip())
        if match is None:
            continue  # this distribution itself, by one of its extras
        name, wanted = match[1], ",".join(sorted(match[2].replace(" ", "").split(","), reverse=True))
        if "extra" not in marker:
            core.append(Requirement(name, wanted, f"pip install '{name}{wanted}'"))
        elif re.search(r"""extra == ['"]train['"]""", marker):
            training.append(Requirement(name, wanted, f'pip install "{_DISTRIBUTION}[train]"'))
        elif name in OPTIONAL:
            optional.append(Requirement(name, wanted, ""))
    return core + training + optional


def version_finding(requirement: Requirement, found: str | None) -> Finding:
    """The judgement of one package.

    Args:
        found: installed version, or None.
    """
    where, (name, wanted, remedy) = "packages", requirement
    if found is None and not remedy:
        return Finding(where, name, "ok", "not installed; other implementations serve")
    if found is None:
        return Finding(where, name, "problem", "not installed", remedy)
    if satisfies(found, wanted):
        return Finding(where, name, "ok", found)
    return Finding(where, name, "warn", f"{found}, supported is {wanted}", f"pip install '{name}{wanted}'")


def installed_version(name: str) -> str | None:
    """Version of a distribution, or None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def satisfies(version: str, wanted: str) -> bool:
    """Whether a version meets `>=A`, `<B` or both, joined by a comma; only the numbers before any suffix count.

    Raises:
        ValueError: `wanted` holds another kind of condition.
    """
    own = _release(version)
    for condition in filter(None, wanted.split(",")):
        match = re.fullmatch(r"(>=|<)([\d.]+)", condition)
        if match is None:
            raise ValueError(f"expected conditions such as >=1.2 or <2, got {condition!r}")
        bound = _release(match[2])
        if (own >= bound) != (match[1] == ">="):
            return False
    return True


def _release(version: str) -> tuple[int, ...]:
    numbers = re.match(r"\d+(?:\.\d+)*", version)
    parts = [int(part) for part in numbers[0].split(".")] if numbers else []
    while parts and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def data_findings(
    load_preset: Callable[[str], object], presets: list[str], models: Mapping[str, Path]
) -> Iterator[Finding]:
    """Whether the presets are valid and the files of the embedded models are whole.

    Args:
        load_preset: reads one, raising if it is wrong.
        presets: their names.
        models: the directories of the embedded pipelines, by name.
    """
    remedy = "install the package again"
    broken = []
    for name in presets:
        try:
            load_preset(name)
        except Exception as error:  # whatever it is, the preset cannot be used
            broken.append(f"{name}: {error}")
    if broken or not presets:
        yield Finding(_DATA, "presets", "problem", "; ".join(broken) or "none found", remedy)
    else:
        yield Finding(_DATA, "presets", "ok", ", ".join(presets))
    for name, weights in models.items():
        title = name.replace("_", " ") + " model"
        if wrong := weight_faults(weights):
            advice = "git lfs pull" if any("LFS" in fault for fault in wrong) else remedy
            yield Finding(_DATA, title, "problem", "; ".join(wrong), advice)
        else:
            size = sum(path.stat().st_size for path in weights.rglob("*") if path.is_file())
            yield Finding(_DATA, title, "ok", f"{size / 1e6:.1f} MB, all files readable")


def weight_faults(directory: Path) -> list[str]:
    """What is wrong with a pipeline directory: missing parts, and weight files that are not whole."""
    try:
        index = json.loads((directory / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"model_index.json: {error}"]
    # a component is [library, class]; [null, null] is one that is left out
    components = [name for name, value in index.items() if isinstance(value, list) and value[0]]
    faults = [f"{name} is missing" for name in components if not (directory / name).is_dir()]
    for path in sorted(directory.rglob("*.safetensors")):
        fault = safetensors_fault(path)
        if fault:
            faults.append(f"{path.relative_to(directory)} {fault}")
    for name in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        if name in components and (directory / name).is_dir() and not any((directory / name).glob("*.safetensors")):
            faults.append(f"{name} has no weights")
    return faults


def safetensors_fault(path: Path) -> str:
    """What is wrong with a safetensors file, by its header and its length; empty when it is whole."""
    try:
        with open(path, "rb") as file:
            start = file.read(8)
            if start == b"version ":
                return "is a git LFS pointer"
            length, size = int.from_bytes(start, "little"), path.stat().st_size
            if len(start) < 8 or not 2 <= length <= size - 8:
                return "is no safetensors file"
            header = json.loads(file.read(length))
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError):
        return "has a damaged header"
    expected = 8 + length + max(ends, default=0)
    return "" if size == expected else f"has {size} bytes, expected {expected}"
