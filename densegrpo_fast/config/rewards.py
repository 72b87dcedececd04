"""Which rewards a configuration may name, and what it may say about each. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from densegrpo_fast.common.plugins import is_outside
from densegrpo_fast.common.suggest import did_you_mean

REWARD_NAMES = (
    "scenes",
    "scenes_strict",
    "jpeg_compressibility",
    "jpeg_incompressibility",
    "pickscore",
    "clipscore",
    "aesthetic",
    "ocr",
    "remote",
    "vlm_judge",
)
"""Rewards that come with the package. Any other must be written `module:function` or `path.py:function`."""

USE = "use"
"""Key among a reward's options: the reward that stands behind a name of one's own."""

_HOW = frozenset(
    ("url", "timeout", "retries", "retry_delay", "breaker_after", "cooldown", "max_reply", "concurrency", "token_env")
    + ("batch", "device", "chunk", "threads")
)
"""Options of the package's rewards that say where and how to compute a score, and leave its meaning alone."""


def resolve_alias(name: str, options: Mapping[str, Mapping[str, Any]]) -> tuple[str, dict[str, Any]]:
    """The reward that a name stands for and its options: the name itself, or what its option `use` says."""
    own = dict(options.get(name, {}))
    return own.pop(USE, name), own


def check_names(terms: Iterable[str], observed: Iterable[str], options: Mapping[str, Mapping[str, Any]]) -> None:
    """Check that every named reward can exist.

    Raises:
        ValueError: naming the key under `reward` and the name that is wrong.
    """
    for key, names in (("terms", list(terms)), ("observed", list(observed))):
        for name in names:
            kind, _ = resolve_alias(name, options)
            if not isinstance(kind, str):
                raise ValueError(f"reward.options.{name}.{USE}: expected the name of a reward, got {kind!r}")
            if kind not in REWARD_NAMES and not is_outside(kind):
                where = f"reward.{key}" if kind == name else f"reward.options.{name}.{USE}"
                raise ValueError(
                    f'{where}: unknown reward "{kind}"{did_you_mean(kind, REWARD_NAMES)} '
                    f"(known: {', '.join(REWARD_NAMES)}; your own: module:function or path.py:function; another name "
                    f"for one of them: reward.options='{{{name}: {{{USE}: ...}}}}')"
                )
    named = [*terms, *observed]
    for name in options:
        if name not in named:
            raise ValueError(
                f'reward.options: there is no reward "{name}" in reward.terms or reward.observed'
                f"{did_you_mean(name, named)}"
            )


def score_affecting(options: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The options without those that only say where and how the package's rewards are computed."""
    return {
        name: {
            key: value
            for key, value in own.items()
            if key not in _HOW or resolve_alias(name, options)[0] not in REWARD_NAMES
        }
        for name, own in options.items()
    }
