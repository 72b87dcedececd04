"""Optional loggers: what they are given, and that nothing they do stops a run."""

from __future__ import annotations

import importlib.util
import logging
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from densegrpo_fast.run_files.loggers import KINDS, Loggers, RunFacts
from densegrpo_fast.run_files.metrics import MetricsLog, read_metrics

RECORD = {
    "iteration": 3,
    "reward": 0.5,
    "nfe/rollout": 12,
    "kl": None,
    "grad_norm": math.nan,
    "alarms": ["zero_spread"],
    "flag": True,
}
NUMBERS = {"reward": 0.5, "nfe/rollout": 12.0}


class Fake:
    """A stand-in for trackio and wandb (and a run of them) that notes its calls, and fails where it is told to."""

    def __init__(self, fails: str = "") -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.fails = fails

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*arguments: Any, **options: Any) -> Fake:
            if name == self.fails:
                raise {"log": RuntimeError, "finish": SystemExit}.get(name, ConnectionError)("no network")
            self.calls.append((name, arguments, options))
            return self

        return call

    def of(self, name: str) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        return [(arguments, options) for called, arguments, options in self.calls if called == name]


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    def install(name: str, fails: str = "") -> Fake:
        made = Fake(fails)
        monkeypatch.setitem(sys.modules, name, made)
        return made

    return install


def facts(directory: Path, start: int = 0) -> RunFacts:
    directory.mkdir(exist_ok=True)
    return RunFacts(directory, {"seed": 7}, start)


def test_trackio_is_given_numbers_and_iterations(fake: Callable[..., Fake], tmp_path: Path) -> None:
    trackio = fake("trackio")
    with Loggers(["trackio"], facts(tmp_path / "mine")) as loggers:
        loggers.log(RECORD)
    assert trackio.of("init") == [
        (("densegrpo-fast",), {"name": "mine", "config": {"seed": 7}, "resume": "never"}),
    ]
    assert trackio.of("log") == [((NUMBERS,), {"step": 3})]
    assert len(trackio.of("finish")) == 1
    with Loggers(["trackio"], facts(tmp_path / "mine", start=3)):
        assert trackio.of("init")[1][1]["resume"] == "allow"


def test_wandb_goes_on_under_its_id(fake: Callable[..., Fake], tmp_path: Path) -> None:
    wandb = fake("wandb")
    for start in (0, 3, 0):
        with Loggers(["wandb"], facts(tmp_path / "mine", start)) as loggers:
            loggers.log(RECORD)
    first, resumed, again = (options for _, options in wandb.of("init"))
    assert first["id"] == resumed["id"] != again["id"]
    assert (first["name"], first["dir"], first["resume"]) == ("mine", str(tmp_path / "mine"), "allow")
    assert wandb.of("log")[0] == (({**NUMBERS, "iteration": 3},), {})
    assert wandb.of("define_metric")[0] == (("*",), {"step_metric": "iteration"})


def test_pictures_are_shown_by_those_that_show_pictures(fake: Callable[..., Fake], tmp_path: Path) -> None:
    trackio, wandb, path = fake("trackio"), fake("wandb"), tmp_path / "strip.png"
    Image.new("RGB", (4, 3), (9, 0, 0)).save(path)
    with Loggers(["trackio", "wandb"], facts(tmp_path / "mine")) as loggers:
        loggers.log_picture("strip", path, 3)
    assert trackio.of("log") == [(({"strip": trackio},), {"step": 3})]
    assert wandb.of("log") == [(({"strip": wandb, "iteration": 3},), {})]
    assert trackio.of("Image") == wandb.of("Image") == [((str(path),), {})]
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Loggers(["tensorboard"], facts(tmp_path / "mine")) as loggers:
        loggers.log_picture("strip", path, 3)
    events = event_accumulator.EventAccumulator(str(tmp_path / "mine" / "tensorboard")).Reload()
    (image,) = events.Images("strip")
    assert (image.step, image.width, image.height) == (3, 4, 3)


@pytest.mark.parametrize("name", ["trackio", "wandb"])
@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_failure_is_one_warning(
    fake: Callable[..., Fake], name: str, fails: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken, other = fake(name, fails), {"trackio": "wandb", "wandb": "trackio"}[name]
    whole = fake(other)
    with caplog.at_level(logging.WARNING), Loggers([name, other], facts(tmp_path / "run")) as loggers:
        for _ in range(3):
            loggers.log(RECORD)
    (warning,) = caplog.records
    assert warning.getMessage().startswith(f"run.loggers: {name} ") and "no network" in warning.getMessage()
    assert len(whole.of("log")) == 3 and len(whole.of("finish")) == 1, "the other one is not touched"
    # one that failed is left alone: neither logged to nor closed
    assert len(broken.of("log")) == (3 if fails == "finish" else 0) and not broken.of("finish")


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_missing_package_is_one_warning_that_says_what_to_install(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with Loggers([name], facts(tmp_path / "run")) as loggers:
        loggers.log(RECORD)
    (warning,) = caplog.records
    assert f"{name} cannot start" in warning.getMessage() and f"pip install {name}" in warning.getMessage()


def test_tensorboard_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The order of calls that a writer sees, with a stand-in for torch's."""
    seen: list[Any] = []
    writer = SimpleNamespace(
        add_scalar=lambda name, value, step: seen.append((name, value, step)),
        flush=lambda: seen.append("flush"),
        close=lambda: seen.append("close"),
    )
    stand_in = ModuleType("torch.utils.tensorboard")
    stand_in.SummaryWriter = lambda path, purge_step: (seen.append((Path(path).name, purge_step)), writer)[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)
    with Loggers(["tensorboard"], facts(tmp_path / "run", start=2)) as loggers:
        loggers.log(RECORD)
    assert seen == [("tensorboard", 3), ("reward", 0.5, 3), ("nfe/rollout", 12.0, 3), "flush", "close"]
    assert not caplog.records


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, iterations in ((0, (1, 2, 3)), (2, (3, 4))):
        with Loggers(["tensorboard"], facts(tmp_path / "run", start)) as loggers:
            for iteration in iterations:
                loggers.log({**RECORD, "iteration": iteration, "reward": iteration + start})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == sorted(NUMBERS)
    # the third iteration of the first process was not in its last checkpoint: the second's replaces it
    assert [(event.step, event.value) for event in events.Scalars("reward")] == [(1, 1.0), (2, 2.0), (3, 5.0), (4, 6.0)]


def test_the_metrics_file_has_everything_and_comes_first(fake: Callable[..., Fake], tmp_path: Path) -> None:
    trackio, path = fake("trackio"), tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        log.show({"iteration": 0, "eval/reward": 0.1})
        log.also(Loggers(["trackio"], facts(tmp_path / "run")))
        log.show({"iteration": 0, "eval/reward": 0.2})
        log.append(RECORD)
    assert read_metrics(path) == [{**RECORD, "grad_norm": None}]
    assert trackio.of("log") == [(({"eval/reward": 0.2},), {"step": 0}), ((NUMBERS,), {"step": 3})]
    assert len(trackio.of("finish")) == 1


@pytest.mark.ci
def test_a_whole_run_survives_its_loggers(
    train: Callable[..., int], fake: Callable[..., Fake], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake("wandb", "init")
    trackio = fake("trackio")
    assert train(tmp_path / "run", **{"run.iterations": 1, "run.loggers": "[wandb, trackio]"}) == 0
    assert "run.loggers: wandb cannot start (ConnectionError: no network)" in caplog.text
    numbers = [options["step"] for (values,), options in trackio.of("log") if "eval/reward" in values]
    pictures = [(name, options["step"]) for (values,), options in trackio.of("log") for name in values]
    assert numbers == [0, 1], "before and after"
    shown = [(name, step) for name, step in pictures if name in ("samples", "strip")]
    assert shown == [("samples", 0), ("strip", 1), ("samples", 1)]
    assert trackio.of("init")[0][1]["config"]["run"]["loggers"] == ["wandb", "trackio"]
