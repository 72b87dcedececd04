"""Which form of a host's function is installed: by its parameters, then by its results, which ours has to equal."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from densegrpo_fast.compat.hosts import SIGNATURES, signature_of
from densegrpo_fast.compat.patch import CompatError

Call = tuple[str, Callable[[Callable[..., Any]], Any]]
"""A few words on a call, and the call itself, which takes the function."""


def parameters_of(function: Callable[..., Any], name: str) -> tuple[str, ...]:
    """Names of a function's parameters.

    Raises:
        CompatError: it has no signature to read.
    """
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError) as error:
        raise CompatError(f"{name} of the host has no signature to read: {error}") from error


def known_version(function: Callable[..., Any], name: str) -> str:
    """Version of a host's function by its parameters.

    Raises:
        CompatError: no version has them.
    """
    found = parameters_of(function, name)
    known = {tuple(signature_of(name, version).parameters): version for version in SIGNATURES[name]}
    if found not in known:
        listed = " or ".join(f"({', '.join(names)})" for names in known)
        raise CompatError(
            f"{name} of the host takes ({', '.join(found)}), known is {listed}: no version that is known here; "
            "nothing was replaced"
        )
    return known[found]


def first_equal(
    host: Callable[..., Any],
    name: str,
    candidates: Mapping[str, Callable[..., Any]],
    calls: Sequence[Call],
    parameters: str = "known parameters but other results:",
) -> str:
    """Name of the first candidate that returns what the host's function returns.

    Args:
        host: the host's function.
        name: what to call it in messages.
        candidates: our forms of it, drawing the host's random numbers.
        calls: what to compare them on.
        parameters: of the message, what the host's function has.

    Raises:
        CompatError: the host's function fails, or none is equal; the message says in what the nearest candidate
            differs, that is, the one that differs in the fewest calls.
    """
    for form, ours in candidates.items():
        if next(_differences(host, ours, calls), None) is None:
            return form
    differences = {form: list(_differences(host, ours, calls)) for form, ours in candidates.items()}
    nearest = min(differences, key=lambda form: len(differences[form]))
    of_several = f" (nearest known form: {nearest.strip(', ')})" if len(candidates) > 1 else ""
    raise CompatError(
        f"{name} of the host has {parameters} {differences[nearest][0]}{of_several}. It was changed in this copy of "
        "the host, so nothing was replaced."
    )


def _differences(host: Callable[..., Any], ours: Callable[..., Any], calls: Sequence[Call]) -> Iterator[str]:
    """A few words on every call in which two functions differ."""
    for words, call in calls:
        try:
            theirs = results_of(call, host)
        except Exception as error:
            yield f"{words} it raised {error!r}"
            continue
        difference = _difference(theirs, results_of(call, ours))
        if difference:
            yield f"{words} {difference}"


def _difference(theirs: Any, ours: Any) -> str:
    if len(theirs) != len(ours):
        return f"it returned {len(theirs)} values, not {len(ours)}"
    for place, (their, our) in enumerate(zip(theirs, ours, strict=True), start=1):
        if (their is None) != (our is None):
            return f"value {place} is {their if our is not None else 'not None'}"
        if our is None:
            continue
        their = torch.as_tensor(their)
        if their.shape != our.shape or their.dtype != our.dtype:
            return f"value {place} is {their.dtype} {list(their.shape)}, not {our.dtype} {list(our.shape)}"
        if not torch.allclose(their, our, rtol=1e-4, atol=1e-5, equal_nan=True):
            return f"value {place} differs by {float((their - our).abs().max()):.3g}"
    return ""


def results_of(call: Callable[[Callable[..., Any]], Any], function: Callable[..., Any]) -> Any:
    """What a call returns; torch's generator starts from one state and is left as it was."""
    state = torch.get_rng_state()
    try:
        with torch.no_grad(), torch.device("cpu"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            return call(function)
    finally:
        torch.set_rng_state(state)
