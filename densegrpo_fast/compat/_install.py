"""One patch per host: installed at most once, replaced when its options change, undone by name."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from densegrpo_fast.compat._patch import Patch, Target

TargetsOf = Callable[..., Sequence[Target]]


class Installer:
    """Installs and uninstalls the patch of one host."""

    def __init__(self, package: str, targets: TargetsOf) -> None:
        """Args: top-level package of the host; `targets(**options)` makes its targets."""
        self._package = package
        self._targets = targets
        self._active: tuple[Patch, dict[str, Any]] | None = None

    def install(self, say: Callable[[str], None] | None, **options: Any) -> Patch:
        """Patch the host; nothing happens if that was done with the same options.

        Raises:
            CompatError: the host is not installed, or an original is not what is known; then nothing was replaced.
        """
        if self._active is not None and self._active[0].installed:
            if self._active[1] == options:
                return self._active[0]
            self._active[0].uninstall()
        patch = Patch(self._package, self._targets(**options), say).install()
        self._active = patch, options
        return patch

    def uninstall(self) -> None:
        """Put the originals back; nothing happens if nothing is replaced."""
        if self._active is not None:
            self._active[0].uninstall()
            self._active = None


def checked_fixes(fixes: Collection[str], known: Mapping[str, str]) -> frozenset[str]:
    """The names of a host's fixes.

    Raises:
        ValueError: one is unknown; the message names those that exist.
    """
    if isinstance(fixes, str):
        raise ValueError(f"fixes must be a collection of names, got the string {fixes!r}")
    for fix in fixes:
        if fix not in known:
            raise ValueError(f"unknown fix {fix!r}; known are: {', '.join(known) or 'none'}")
    return frozenset(fixes)
