"""Suggestions for misspelt names."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message that points at the nearest known name.

    A dotted name is compared whole and by its last part, so that `lr` and `optimiser.lr` both find
    `optimizer.lr`.

    Args:
        name: what the user wrote.
        known: the names that exist, plain or dotted.

    Returns:
        `; did you mean "NAME"?`, or the empty string when nothing is near.
    """
    names = list(known)
    nearest = get_close_matches(name, names, n=1, cutoff=0.6)
    if not nearest:
        by_last_part = {candidate.rpartition(".")[2]: candidate for candidate in reversed(names)}
        last_part = get_close_matches(name.rpartition(".")[2], by_last_part, n=1, cutoff=0.75)
        nearest = [by_last_part[match] for match in last_part]
    return f'; did you mean "{nearest[0]}"?' if nearest else ""
