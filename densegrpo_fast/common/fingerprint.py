"""A stable identity for settings: equal settings have equal fingerprints, on any machine and Python."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any


def canonical_json(data: Any) -> bytes:
    """The one JSON text of `data`: sorted keys, no spaces, ASCII.

    Raises:
        ValueError: if `data` holds NaN or an infinity.
        TypeError: if `data` holds something JSON cannot express.
    """
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False).encode("ascii")


def fingerprint(settings: Mapping[str, Any]) -> str:
    """SHA-256 of the canonical JSON of `settings`, as 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(settings)).hexdigest()


def flatten(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one with dotted keys: `{"a": {"b": 8}}` gives `{"a.b": 8}`."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differences(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One line per key whose value differs, sorted by key.

    A line reads `sampler.num_steps: 10 in the checkpoint, 8 now`.

    Args:
        stored: the settings a checkpoint was written with.
        current: the settings it is compared with.
    """
    was, now = flatten(stored), flatten(current)
    absent = object()

    def show(value: Any) -> str:
        return "absent" if value is absent else json.dumps(value)

    return [
        f"{key}: {show(was.get(key, absent))} in the checkpoint, {show(now.get(key, absent))} now"
        for key in sorted(was.keys() | now.keys())
        if was.get(key, absent) != now.get(key, absent)
    ]
