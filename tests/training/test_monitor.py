"""The lookahead monitor in whole runs: silent when there is nothing to say, loud when the lookahead drifts."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from densegrpo_fast.run_files.metrics import read_metrics

Train = Callable[..., int]
GROUPS = {"sampler.group_size": 6, "sampler.micro_batch": 6, "run.iterations": 3, "evaluation.every": 0}
KEYS = {
    "monitor/spearman_rewards",
    "monitor/spearman_gains",
    "monitor/spearman_gains_worst_step",
    "monitor/sign_agreement",
}
MEASURED = ("time/", "memory/", "cpu_seconds")
OTHERS = (
    "alarms",
    "nfe/monitor",
    "nfe_guided/monitor",
    "nfe_unguided/monitor",
    "decodes/",
    "pictures_scored",
    "flops/",
)


@pytest.mark.ci
def test_the_exact_lookahead_agrees_with_itself(train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"lookahead.plan": "exact", "lookahead.decoder": "full", "lookahead.monitor_every": 2}
    with caplog.at_level(logging.WARNING):
        assert train(tmp_path / "run", **GROUPS, **options) == 0
    first, second, third = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert KEYS <= first.keys() and not KEYS & second.keys() and KEYS <= third.keys()
    assert all(record[key] == pytest.approx(1.0) for record in (first, third) for key in KEYS)
    assert first["time/monitor"] > 0 and second["time/monitor"] == 0
    assert "lookahead_drift" not in caplog.text and "alarms" not in first


@pytest.mark.ci
def test_a_lookahead_below_the_alarm_is_named(train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    options = {"lookahead.plan": "one_step", "lookahead.monitor_every": 1, "lookahead.monitor_alarm": 1.0}
    with caplog.at_level(logging.WARNING):
        assert train(tmp_path / "run", **GROUPS, **options) == 0
    records = read_metrics(tmp_path / "run" / "metrics.jsonl")
    drifted = ["lookahead_drift" in record.get("alarms", []) for record in records]
    assert any(drifted) and drifted == [record["monitor/spearman_gains"] < 1 for record in records]
    # the lookahead of these runs is cheap in its plan and its decoder
    assert "choose a plan with more nodes; or lookahead.decoder full" in caplog.text
    assert caplog.text.count("alarm lookahead_drift") == 1
    report = (tmp_path / "run" / "report.html").read_text()
    assert "<b>lookahead_drift</b>" in report and "Agreement with the exact lookahead" in report


@pytest.mark.ci
@pytest.mark.parametrize("branches", [6, 3])
def test_branches_are_monitored_among_those_of_their_state(
    train: Train, tmp_path: Path, caplog: pytest.LogCaptureFixture, branches: int
) -> None:
    options = {
        "credit.method": "branch",
        "sampler.branches": branches,
        "sampler.micro_batch": 1,
        "sampler.num_steps": 5,
    }
    options |= {"lookahead.decoder": "full", "lookahead.monitor_every": 1, "lookahead.monitor_alarm": 0.99}
    with caplog.at_level(logging.WARNING):
        assert train(tmp_path / "exact", **GROUPS | options, **{"lookahead.plan": "exact"}) == 0
    for record in read_metrics(tmp_path / "exact" / "metrics.jsonl"):
        assert [record[key] for key in sorted(KEYS)] == pytest.approx([1.0] * 4)
        # one prompt is completed again as all of them were, and the lookahead itself is counted for each prompt
        assert record["nfe/monitor"] > 0 and record["nfe/lookahead"] % record["nfe/monitor"] == 0
    assert "lookahead_drift" not in caplog.text
    with caplog.at_level(logging.WARNING):
        assert train(tmp_path / "cheap", **GROUPS | options, **{"lookahead.plan": "one_step"}) == 0
    assert any(record["monitor/spearman_gains"] < 0.99 for record in read_metrics(tmp_path / "cheap" / "metrics.jsonl"))
    assert "alarm lookahead_drift" in caplog.text and "choose a plan with more nodes; python" in caplog.text


@pytest.mark.ci
@pytest.mark.parametrize("options", [{"lookahead.monitor_every": 0}, {"credit.method": "sparse"}])
def test_nothing_is_monitored_without_a_lookahead(train: Train, tmp_path: Path, options: dict[str, object]) -> None:
    assert train(tmp_path / "run", **{**GROUPS, "run.iterations": 1}, **options) == 0
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert not KEYS & record.keys()


@pytest.mark.ci
def test_watching_does_not_touch(train: Train, tmp_path: Path) -> None:
    for every in (0, 1):
        assert train(tmp_path / str(every), **GROUPS, **{"lookahead.monitor_every": every}) == 0
    watched, alone = (read_metrics(tmp_path / str(every) / "metrics.jsonl") for every in (1, 0))
    for one, other in zip(watched, alone, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(("monitor/", *OTHERS, *MEASURED))} == {
            k: v for k, v in other.items() if not k.startswith((*OTHERS, *MEASURED))
        }
