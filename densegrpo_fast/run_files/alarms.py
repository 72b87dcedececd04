"""Conditions under which a run learns nothing or the wrong thing, looked for in its metrics.

An alarm is on while its condition has held in the last few iterations in a row; where only some iterations are looked
at, it stays as it is in between. It is written into every record in which it is on (`alarms`), shown in the report, and
logged as a warning once in a run. Nothing but the records decides, so a resumed run goes on as if it had never stopped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from densegrpo_fast.config import Config

logger = logging.getLogger(__name__)

Record = Mapping[str, Any]

CLIP_FRACTION = 0.5
"""Share of ratios outside the clip range from which most of a batch teaches nothing."""
DRIFT = 10.0
"""Typical log-ratio, in clip ranges, from which the policy that is trained is no longer the one that sampled."""


@dataclass(frozen=True)
class Alarm:
    """One condition.

    Attributes:
        name: as it is recorded.
        holds: whether it holds in a record; a record without the numbers for it says no, or None if that leaves
            everything as it was.
        patience: records in a row that say yes, after which the alarm is on.
        meaning: what the condition is, in words.
        advice: what to do about it.
    """

    name: str
    holds: Callable[[Record], bool | None]
    patience: int
    meaning: str
    advice: str


def alarms_for(config: Config) -> tuple[Alarm, ...]:
    """The alarms of a run; thresholds that depend on its settings are taken from them."""
    clip_range, allowed = config.objective.clip_range, config.reward.max_missing
    agreement = config.lookahead.monitor_alarm
    alarms = (
        Alarm(
            "zero_spread",
            lambda record: _number(record, "frac_reward_zero_std") >= 1,
            3,
            "no group has a spread of rewards, so every advantage is 0",
            "take a finer reward, a higher sampler.noise_level, a larger sampler.group_size or easier prompts",
        ),
        Alarm(
            "clip_fraction",
            lambda record: _number(record, "clip_fraction") > CLIP_FRACTION,
            3,
            f"more than {CLIP_FRACTION:.0%} of the ratios are outside the clip range",
            "lower optimizer.lr or optimizer.updates_per_iteration, or raise objective.clip_range "
            "(it shrinks with the root of the number of latent values)",
        ),
        Alarm(
            "first_ratio",
            lambda record: _number(record, "first_ratio_deviation") > clip_range,
            1,
            "a ratio of the first update differs from 1 by more than the clip range, before anything was trained",
            "rollout and training compute different numbers: give both one precision and one batch shape",
        ),
        Alarm(
            "ratio_drift",
            # approx_kl is the mean of r - 1 - log r, half the mean square of a small log r
            lambda record: math.sqrt(max(2 * _number(record, "approx_kl"), 0.0)) > DRIFT * clip_range,
            3,
            f"typical log-ratios are beyond {DRIFT:g} clip ranges",
            "lower optimizer.lr or optimizer.updates_per_iteration",
        ),
        Alarm(
            "reward_missing",
            lambda record: _number(record, "reward_missing") > allowed / 2,
            1,
            "more than half as many scores are missing as reward.max_missing allows before the run stops",
            "find out why the reward cannot judge these pictures",
        ),
        Alarm(
            "skipped_updates",
            lambda record: _number(record, "skipped_updates") > 0,
            1,
            "updates were skipped because a loss or gradient was not finite",
            "lower optimizer.lr or sampler.noise_level",
        ),
        Alarm(
            "lookahead_drift",
            lambda record: _below(_number(record, "monitor/spearman_gains"), agreement),
            1,
            f"a prompt's gains agree with exact ones at a rank correlation below {agreement:g}",
            f"{_closer(config)}; python -m densegrpo_fast.fidelity --adapter ADAPTER tells how good each is",
        ),
    )
    if config.objective.policy == "dppo":
        # it lets ratios drift: what it bounds is the divergence of a step, by dppo_threshold
        return tuple(alarm for alarm in alarms if alarm.name != "ratio_drift")
    return alarms


def iterations_by_alarm(records: Iterable[Record]) -> dict[str, list[int]]:
    """The iterations in which each alarm was on, in the order of their first ones."""
    found: dict[str, list[int]] = {}
    for index, record in enumerate(records):
        for name in record.get("alarms", ()):
            found.setdefault(name, []).append(record.get("iteration", index))
    return found


class Alarms:
    """Watches the records of a run.

    Args:
        alarms: what to look for.
        past: the records of the iterations that are already done, oldest first; they raise no warning again.
    """

    def __init__(self, alarms: Iterable[Alarm], past: Iterable[Record] = ()) -> None:
        self._alarms = tuple(alarms)
        self._in_a_row = {alarm.name: 0 for alarm in self._alarms}
        self._warned: set[str] = set()
        for record in past:
            self._warned.update(alarm.name for alarm in self._on(record))

    def check(self, record: Record) -> list[str]:
        """Names of the alarms that are on with this record, the next of the run; each is warned of once."""
        on = self._on(record)
        for alarm in on:
            if alarm.name not in self._warned:
                self._warned.add(alarm.name)
                logger.warning(
                    "iteration %s, alarm %s: %s; %s",
                    record.get("iteration", "?"),
                    alarm.name,
                    alarm.meaning,
                    alarm.advice,
                )
        return [alarm.name for alarm in on]

    def _on(self, record: Record) -> list[Alarm]:
        for alarm in self._alarms:
            holds = alarm.holds(record)
            if holds is not None:
                self._in_a_row[alarm.name] = self._in_a_row[alarm.name] + 1 if holds else 0
        return [alarm for alarm in self._alarms if self._in_a_row[alarm.name] >= alarm.patience]


def _closer(config: Config) -> str:
    """What would bring the lookahead closer to the exact one."""
    options, ways = config.lookahead, []
    if not options.plan.startswith("exact"):
        ways.append("a plan with more nodes")
    if options.guidance != "full":
        ways.append("lookahead.guidance full")
    if options.decoder != "full":
        ways.append("lookahead.decoder full, or a decoder fitted by python -m densegrpo_fast.preview")
    return f"choose {'; or '.join(ways)}" if ways else "leave out lookahead.copy_dtype and cache"


def _below(number: float, limit: float) -> bool | None:
    """Whether a number that not every record has is below a limit; None without one."""
    return None if math.isnan(number) else number < limit


def _number(record: Record, name: str) -> float:
    """The number under a name; NaN, which no comparison is true of, if there is none."""
    value = record.get(name)
    return float(value) if isinstance(value, (int, float)) else math.nan
