"""Loading one of the package's compiled libraries (csrc/) through ctypes."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent

Signatures = Mapping[str, tuple[type | None, tuple[type, ...]]]
"""Functions of a library: name -> (result, arguments)."""


def load(
    stem: str, version_function: str, version: int, signatures: Signatures, remedy: str
) -> tuple[ctypes.CDLL | None, str]:
    """Load `densegrpo_fast/<stem>.<platform>.so` and declare its functions.

    Args:
        stem: of the file.
        version_function: name of the function that returns the library's interface number.
        version: the interface number that the caller is written for.
        signatures: of the functions that the caller uses.
        remedy: what to do when the file is not there.

    Returns:
        the library and "", or None and the reason why there is none.
    """
    candidates = sorted(PACKAGE.glob(f"{stem}.*.so"))
    if not candidates:
        return None, f"densegrpo_fast/{stem}.*.so was not built; {remedy}"
    try:
        library = ctypes.CDLL(str(candidates[-1]))
        found = getattr(library, version_function)()
    except (OSError, AttributeError) as error:
        return None, f"{candidates[-1].name} cannot be loaded: {error}"
    if found != version:
        return None, f"{candidates[-1].name} has interface {found}, expected {version}; run pip install again"
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library, ""
