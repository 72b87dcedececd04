"""Find, compare, replace and put back functions of another codebase, imported already or later.

Each original is first compared with its replacement: by its parameters, then by what it returns for a few numbers. A
copy that differs is refused before anything is replaced.

A function that was bound by `from host.module import function` lives on under the importer's name, so replacing the
host's attribute alone would leave old bindings in use. `Patch.install` therefore looks through every imported module,
`__main__` included, and replaces each module-level name that is the original. Modules of the host that are not
imported yet are patched the moment they have run, before their importer sees them.

Bindings that are not module-level names are out of reach: default arguments, closures, attributes of objects.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

from densegrpo_fast.compat.hosts import HOSTS
from densegrpo_fast.compat.rng import make_noise

_logger = logging.getLogger(__name__)


Build = Callable[..., tuple[Any, str]]
"""Takes an original, returns its replacement and a few words on it; raises `CompatError` where it is not the known one.

It may return the original itself, to leave it as it is.
"""


class CompatError(RuntimeError):
    """A host that cannot be patched safely; the message says what was found and what to do."""


@dataclass(frozen=True)
class Target:
    """One name to replace.

    Attributes:
        module: full name of the host's module that defines it; `__main__` for a function of the user's script.
        name: the name there, or `Class.name` for an attribute of a class.
        build: makes the replacement.
        required: whether a module without the name is an error.
    """

    module: str
    name: str
    build: Build
    required: bool = True


@dataclass(frozen=True)
class _Replaced:
    target: Target
    original: Any
    replacement: Any
    note: str
    owner: type | None


class Patch:
    """Replacements in one host; also a context manager that undoes them at its end.

    Attributes:
        package: top-level package of the host.
        messages: what is replaced now or left as it is, one line per target, in order; empty again after `uninstall`.
    """

    def __init__(self, package: str, targets: Sequence[Target], say: Callable[[str], None] | None = None) -> None:
        """Describe a patch; `install` applies it.

        Args:
            package: top-level package of the host.
            targets: what to replace.
            say: receives each line of `messages` as it is made; default: this module's logger, at level INFO.
        """
        self.package = package
        self.messages: list[str] = []
        self._targets: dict[str, list[Target]] = {}
        for target in targets:
            self._targets.setdefault(target.module, []).append(target)
        self._say = say or _logger.info
        self._replaced: list[_Replaced] = []
        self._finder = _AfterImport(set(self._targets), self._replace)

    @property
    def installed(self) -> bool:
        """Whether the patch is in force."""
        return self._finder in sys.meta_path

    def install(self) -> Patch:
        """Replace what is imported now and wait for the rest. Nothing happens if it is in force already.

        Raises:
            CompatError: the host is not installed, another project has its name, or one of its originals is unknown;
                then nothing was replaced.
        """
        if self.installed:
            return self
        _check_package(self.package, self._targets)
        present = [sys.modules[name] for name in self._targets if isinstance(sys.modules.get(name), ModuleType)]
        self._replace(*present)
        sys.meta_path.insert(0, self._finder)
        return self

    def uninstall(self) -> None:
        """Put every original back, also where a later import has bound a replacement."""
        if self.installed:
            sys.meta_path.remove(self._finder)
        while self._replaced:
            entry = self._replaced.pop()
            if entry.owner is None:
                _rebind(entry.replacement, entry.original)
            else:
                setattr(entry.owner, entry.target.name.rpartition(".")[2], entry.original)
        self.messages.clear()

    @property
    def replaces(self) -> bool:
        """Whether a function is replaced now; `messages` also has those that are left as they are."""
        return bool(self._replaced)

    @property
    def modules(self) -> frozenset[str]:
        """Full names of the modules that define what is to be replaced, without `__main__`."""
        return frozenset(self._targets) - {"__main__"}

    @property
    def script_names(self) -> frozenset[str]:
        """Names to replace where a script defines them itself; `on_definition` has to be told of each."""
        return frozenset(target.name for target in self._targets.get("__main__", ()))

    def on_definition(self, function: Any) -> Any:
        """Replacement of a function that the running script has just defined; usable as a decorator.

        Raises:
            CompatError: the function is not what the replacement stands for.
        """
        for target in self._targets["__main__"]:
            if target.name == function.__name__:
                replacement, note = target.build(function)
                self._apply(_Replaced(target, function, replacement, note, None))
                return replacement
        return function

    def __enter__(self) -> Patch:
        return self.install()

    def __exit__(self, *exception: object) -> None:
        self.uninstall()

    def _replace(self, *modules: ModuleType) -> None:
        """Replace what some modules define; everything is compared before anything is replaced."""
        entries = []
        pairs = [(module, target) for module in modules for target in self._targets[module.__name__]]
        for module, target in pairs:
            path, _, name = target.name.rpartition(".")
            owner = vars(module).get(path) if path else module
            if owner is None or name not in vars(owner):
                if not target.required:
                    continue
                raise CompatError(
                    f"{target.module} has no {target.name}: this is no version of {self.package} that is known here; "
                    "nothing was replaced"
                )
            original = vars(owner)[name]
            replacement, note = target.build(original)
            entries.append(_Replaced(target, original, replacement, note, owner if isinstance(owner, type) else None))
        for entry in entries:
            self._apply(entry)

    def _apply(self, entry: _Replaced) -> None:
        if entry.replacement is entry.original:
            self._note(f"{entry.target.module}.{entry.target.name} is {entry.note}")
            return
        self._replaced.append(entry)
        if entry.owner is None:
            places = _rebind(entry.original, entry.replacement)
        else:
            setattr(entry.owner, entry.target.name.rpartition(".")[2], entry.replacement)
            places = []
        names = sorted(place for place in places if place != f"{entry.target.module}.{entry.target.name}")
        also = f"; also bound as {', '.join(names)}" if names else ""
        self._note(f"replaced {entry.target.module}.{entry.target.name} ({entry.note}){also}")

    def _note(self, message: str) -> None:
        self.messages.append(message)
        self._say(message)


def _check_package(package: str, modules: Collection[str]) -> None:
    """Find a package, without importing it, and any of some modules in it, or any place for `__main__`."""
    imported = sys.modules.get(package)
    spec = find_spec(package) if imported is None else None
    if imported is None and spec is None:
        raise CompatError(
            f"the package {package} cannot be imported here; install it into this environment, or add the folder that "
            "holds it to PYTHONPATH"
        )
    if "__main__" in modules or any(module in sys.modules for module in modules):
        return
    where = getattr(imported, "__path__", None) if spec is None else spec.submodule_search_locations
    places = [Path(place) for place in where or ()]
    stems = [place.joinpath(*module.split(".")[1:]) for place in places for module in modules]
    # what does not lie in folders, such as an archive, cannot be looked into
    folders = all(place.is_dir() for place in places)
    if folders and not any(stem.is_dir() or any(stem.parent.glob(f"{stem.name}.*")) for stem in stems):
        raise CompatError(
            f"the package {package} ({', '.join(map(str, places)) or 'a single file'}) has none of the modules "
            f"{', '.join(modules)}: it is another project, or a version that is not known here; nothing was replaced"
        )


def _rebind(old: Any, new: Any) -> list[str]:
    """Replace `old` in every imported module's namespace; return the full names that were changed."""
    changed = []
    for module_name, module in list(sys.modules.items()):
        # The dictionary itself, because asking a lazy module for an attribute may import half a library.
        namespace = getattr(module, "__dict__", None)
        if not isinstance(namespace, dict):
            continue
        for name in [name for name, value in list(namespace.items()) if value is old]:
            namespace[name] = new
            changed.append(f"{module_name}.{name}")
    return changed


class _AfterImport(MetaPathFinder):
    """Calls back when one of some modules has been executed; finding it is left to the other finders."""

    def __init__(self, names: set[str], callback: Callable[[ModuleType], None]) -> None:
        self._names = names
        self._callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self._names:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None and finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    self._watch(spec.loader)
                return spec
        return None

    def _watch(self, loader: Loader) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                self._callback(module)

        # On the instance: a loader of another class would lose what inspect and linecache ask of it.
        loader.exec_module = exec_module  # type: ignore[method-assign]


_in_force: dict[str, tuple[Patch, object]] = {}
"""The patch of each of the table's hosts, and the options that it was made with."""


def install_host(
    host: str,
    replacements: Callable[..., Mapping[str, Build]],
    say: Callable[[str], None] | None,
    *,
    rng: str,
    seed: int | None,
    fixes: Collection[str],
    **options: Any,
) -> Patch:
    """Patch a host of the table; nothing happens if that was done with the same options.

    Args:
        host: name of the host.
        replacements: makes what replaces each name from the options; names that it leaves out stay.
        say: as in `Patch`.
        rng, seed: as in `rng.make_noise`.
        fixes: names of the host's fixes.
        options: further ones, for `replacements`.

    Raises:
        CompatError: the host is not installed, or an original is not what is known; then nothing was replaced.
        ValueError: an option is wrong.
    """
    known = HOSTS[host]
    if isinstance(fixes, str):
        raise ValueError(f"fixes must be a collection of names, got the string {fixes!r}")
    for fix in fixes:
        if fix not in known.fixes:
            raise ValueError(f"unknown fix {fix!r}; known are: {', '.join(known.fixes) or 'none'}")
    make_noise(rng, seed)
    options |= {"rng": rng, "seed": seed, "fixes": frozenset(fixes)}
    patch, wanted = _in_force.get(known.patch, (None, None))
    if patch is not None and patch.installed:
        if wanted == (host, options):
            return patch
        patch.uninstall()
    builds = replacements(**options)
    targets = [
        Target(
            entry.module,
            entry.name,
            partial(builds[entry.name], version=entry.version) if entry.version else builds[entry.name],
            entry.required,
        )
        for entry in known.replaced
        if entry.name in builds
    ]
    patch = Patch(known.package, targets, say).install()
    _in_force[known.patch] = patch, (host, options)
    return patch


def uninstall_host(host: str) -> None:
    """Put the host's own functions back; nothing happens if nothing is replaced."""
    if HOSTS[host].patch in _in_force:
        _in_force.pop(HOSTS[host].patch)[0].uninstall()
