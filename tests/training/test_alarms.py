"""The alarms on synthetic records: when each is on, when it warns, and that a resumed run goes on the same."""

from __future__ import annotations

import logging
import math
import re
from pathlib import Path
from typing import Any

import pytest

from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.run_files.alarms import Alarms, alarms_for

ROOT = Path(__file__).resolve().parents[2]
CONFIG = parse_arguments(["--objective.clip_range=1e-3", "--reward.max_missing=0.2"])[0]
HEALTHY = {
    "frac_reward_zero_std": 0.2,
    "clip_fraction": 0.3,
    "first_ratio_deviation": 1e-6,
    "approx_kl": 1e-8,
    "reward_missing": 0.0,
    "skipped_updates": 0.0,
}


def watched(*changes: dict[str, Any]) -> list[list[str]]:
    """The alarms of successive records."""
    alarms = Alarms(alarms_for(CONFIG))
    return [alarms.check({"iteration": n, **HEALTHY, **change}) for n, change in enumerate(changes, 1)]


def test_a_healthy_run_raises_none() -> None:
    assert watched(*[{}] * 10) == [[]] * 10


@pytest.mark.parametrize(
    ("name", "key", "below", "above"),
    [
        ("zero_spread", "frac_reward_zero_std", 0.99, 1.0),
        ("clip_fraction", "clip_fraction", 0.5, 0.51),
        # 10 clip ranges of 1e-3 as a typical log-ratio: approx_kl = 0.01^2 / 2
        ("ratio_drift", "approx_kl", 4.9e-5, 5.1e-5),
    ],
)
def test_three_in_a_row_are_needed(name: str, key: str, below: float, above: float) -> None:
    low, high = {key: below}, {key: above}
    assert watched(low, low, low, low) == [[]] * 4
    assert watched(high, high, low, high, high, high, high, low) == [[], [], [], [], [], [name], [name], []]


@pytest.mark.parametrize(
    ("name", "key", "below", "above"),
    [
        ("first_ratio", "first_ratio_deviation", 1e-3, 1.1e-3),
        # half of the 0.2 above which a run stops
        ("reward_missing", "reward_missing", 0.1, 0.11),
        ("skipped_updates", "skipped_updates", 0.0, 1.0),
    ],
)
def test_one_is_enough(name: str, key: str, below: float, above: float) -> None:
    assert watched({key: below}, {key: above}, {key: below}) == [[], [name], []]


def test_drift_stays_as_it_was_seen_last() -> None:
    """The guard looks at some iterations alone, and its number may be missing there."""
    low, high = ({"monitor/spearman_gains": CONFIG.lookahead.monitor_alarm + by} for by in (-0.01, 0.0))
    name = "lookahead_drift"
    unknown = {"monitor/spearman_gains": None}
    assert watched({}, low, {}, unknown, high, {}, low) == [[], [name], [name], [name], [], [], [name]]


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (["lookahead.plan=exact", "lookahead.decoder=full"], "leave out lookahead.copy_dtype and cache; "),
        (["lookahead.plan=one_step", "lookahead.decoder=full"], "choose a plan with more nodes; python"),
        (
            ["lookahead.plan=one_step", "lookahead.guidance=cond_only", "lookahead.decoder=preview"],
            "choose a plan with more nodes; or lookahead.guidance full; or lookahead.decoder full, or a decoder fitted",
        ),
    ],
)
def test_drift_names_what_comes_closer(options: list[str], advice: str) -> None:
    config = parse_arguments(options)[0]
    (drift,) = (alarm for alarm in alarms_for(config) if alarm.name == "lookahead_drift")
    assert drift.advice.startswith(advice)


def test_numbers_that_are_not_there_alarm_nobody() -> None:
    for nothing in (None, math.nan):
        assert watched(*[dict.fromkeys(HEALTHY, nothing)] * 4) == [[]] * 4
    assert Alarms(alarms_for(CONFIG)).check({}) == []


def test_each_warns_once_and_says_what_to_do(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        watched(*[{"frac_reward_zero_std": 1.0, "skipped_updates": 2.0}] * 5, {}, *[{"skipped_updates": 1.0}] * 2)
    first, second = (record.getMessage() for record in caplog.records)
    assert first.startswith("iteration 1, alarm skipped_updates: ") and "lower optimizer.lr" in first
    assert second.startswith("iteration 3, alarm zero_spread: ") and "sampler.group_size" in second


def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(caplog: pytest.LogCaptureFixture) -> None:
    records = [{"iteration": n, **HEALTHY, "clip_fraction": 0.9, "skipped_updates": 1.0} for n in range(1, 6)]
    whole = Alarms(alarms_for(CONFIG))
    expected = [whole.check(record) for record in records]
    for stop in range(6):
        caplog.clear()
        resumed = Alarms(alarms_for(CONFIG), past=records[:stop])
        assert not caplog.records, "what was warned of before is not warned of again"
        assert [resumed.check(record) for record in records[stop:]] == expected[stop:]
        names = [re.search(r"alarm (\w+)", record.getMessage())[1] for record in caplog.records]
        assert names == [name for name, when in (("skipped_updates", 1), ("clip_fraction", 3)) if when > stop]


def test_every_alarm_is_documented() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    for alarm in alarms_for(CONFIG):
        assert f"| `{alarm.name}` |" in text and f"| {alarm.patience} |" in text


def test_dppo_bounds_the_divergence_and_not_the_ratio() -> None:
    config, _ = parse_arguments(["--objective.policy", "dppo"])
    of_clip, of_dppo = ({alarm.name for alarm in alarms_for(each)} for each in (CONFIG, config))
    assert of_clip - of_dppo == {"ratio_drift"}
