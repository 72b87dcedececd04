"""Old names of options and metrics, old meanings of options that came later, and options that are gone.

They are still read; everything that is written has the new names, and every option.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from densegrpo_fast.common.errors import UsageError

logger = logging.getLogger(__name__)

OPTIONS = {
    "lookahead.guard_every": "lookahead.monitor_every",
    "lookahead.guard_alarm": "lookahead.monitor_alarm",
}
"""Old dotted key of an option -> its key now."""

ADDED = {
    "credit.closeness": 0.0,
    "lora.start": None,
    "model.frames": 1,
    "model.train": "lora",
    "objective.guidance_gradient": "conditional",
    "objective.step_sampling": "uniform",
    "optimizer.update": "replayed",
    "reward.frames": 1,
    "reward.timeout": None,
}
"""Dotted key of an option that older complete settings lack -> the value that they mean."""

ADDED_SECTIONS = {"distributed"}
"""Sections that older complete settings lack."""

_HEADS = (
    "completion heads were removed, since they raised the rank correlation of the gains by .01 only, from .929 to .939 "
    "at best"
)

REMOVED = {"lookahead.head": (None, _HEADS), "lookahead.head_refresh": (0, _HEADS)}
"""Dotted key of an option that is gone -> its value without effect, which may still be given, and why it is gone."""

CACHES = ("text:own",)
"""What `lookahead.cache` may be beside null."""

_PHASES = ("time", "nfe", "nfe_guided", "nfe_unguided", "flops")


def current_option(key: str, where: str) -> str:
    """The key of an option today, with a warning if `key` is an old one.

    Args:
        key: dotted.
        where: the file or command line it stands in, for the warning.
    """
    if key not in OPTIONS:
        return key
    logger.warning("%s: %s is now called %s; the old name will go in a later version", where, key, OPTIONS[key])
    return OPTIONS[key]


def is_removed(key: str, value: Any, where: str | None) -> bool:
    """Whether an option is gone, in which case its value has no effect.

    Args:
        key: dotted.
        where: as in `current_settings`.

    Raises:
        UsageError: it is gone, and its value would have an effect.
    """
    if key not in REMOVED:
        return False
    neutral, reason = REMOVED[key]
    if value != neutral:
        raise UsageError(f"{'' if where is None else f'{where}: '}{key} {value}: {reason}")
    return True


def cache_problem(form: str) -> str | None:
    """What is wrong with a value of `lookahead.cache`, and why if it was valid once; None = nothing."""
    if form in CACHES:
        return None
    if form.split(":")[0].split("+")[0] in ("text", "reuse", "skip"):
        return (
            f"{form} was removed: a prompt's shared text, reused and skipped blocks ranked the gains worse (rank "
            "correlation .58, .17 and .08) than each sample's own text, text:own (.81)"
        )
    return f"expected {' or '.join(CACHES)}, or null for no cache, got {form}"


def current_settings(settings: Mapping[str, Any], where: str | None = None) -> dict[str, Any]:
    """Nested settings with the keys of today.

    Args:
        where: as in `current_option`; None = no warning, for what a run has stored itself.

    Raises:
        UsageError: an option stands there by its old and its new name, or one that is gone has a value with an effect.
    """
    renamed = dict(settings)
    for old, new in OPTIONS.items():
        (section, old_name), (_, new_name) = old.split("."), new.split(".")
        options = renamed.get(section)
        if isinstance(options, Mapping) and old_name in options:
            if new_name in options:
                beginning = "" if where is None else f"{where}: "
                raise UsageError(f"{beginning}{old} and {new} are two names of one option; give one of them")
            if where is not None:
                current_option(old, where)
            renamed[section] = {(new_name if name == old_name else name): value for name, value in options.items()}
    for key in REMOVED:
        section, name = key.split(".")
        options = renamed.get(section)
        if isinstance(options, Mapping) and name in options and is_removed(key, options[name], where):
            renamed[section] = {other: value for other, value in options.items() if other != name}
    return renamed


def complete_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that a run has stored whole, with the keys of today and the old meaning of what older ones lack.

    Raises:
        UsageError: as `current_settings`.
    """
    complete = current_settings(settings)
    for key, meaning in ADDED.items():
        section, name = key.split(".")
        if isinstance(complete.get(section), Mapping):
            complete[section] = {name: meaning, **complete[section]}
    return complete


def comparable_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """`complete_settings` with one value for each option that has no effect, so that equal runs have equal settings.

    Raises:
        UsageError: as `current_settings`.
    """
    complete = complete_settings(settings)
    objective, sampler = complete.get("objective"), complete.get("sampler")
    if isinstance(objective, Mapping) and isinstance(sampler, Mapping):
        complete["objective"] = objective = dict(objective)
        if sampler.get("guidance_scale") == 1:
            objective["guidance_gradient"] = "conditional"
        if objective.get("negative_factor") == 1:
            objective["negative_threshold"] = None
    if isinstance(complete.get("reward"), Mapping):
        complete["reward"] = {**complete["reward"], "timeout": None}
    return complete


def current_metric(name: str) -> str:
    """The name of a metric today: `guard/...` became `monitor/...`, and the phase "guard" the phase "monitor"."""
    head, _, rest = name.partition("/")
    if head == "guard":
        return f"monitor/{rest}"
    return f"{head}/monitor" if rest == "guard" and head in _PHASES else name
