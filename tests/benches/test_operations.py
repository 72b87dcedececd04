"""Operations of recorded runs: the closed forms against recorded forwards, and sums by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benches.common.operations import TERA, IterationOperations, config_of, operations
from benches.learning.study_document import StudyDocument
from densegrpo_fast.config.cli import parse_arguments

ROOT = Path(__file__).resolve().parents[2]

STUDIES = ("study_branched", "study", "methods")


def recorded(study: str) -> dict[str, Any]:
    return json.loads((ROOT / "benches" / "results" / f"{study}.json").read_text(encoding="utf-8"))


def settings_of(preset: str, *overrides: str) -> dict[str, Any]:
    settings = parse_arguments(["--config", preset, *overrides])[0].model_dump(mode="json", exclude={"seed"})
    del settings["run"]["output_dir"]
    return settings


def run_of(iterations: int, **nfe: float) -> dict[str, Any]:
    points: list[dict[str, Any]] = [{"iteration": 0, "nfe": {}}]
    return {"variant": "a", "seed": 0, "points": [*points, {"iteration": iterations, "nfe": nfe}]}


@pytest.mark.ci
@pytest.mark.parametrize("study", STUDIES)
def test_the_closed_forms_count_the_forwards_that_were_recorded(study):
    document = recorded(study)
    for run in document["runs"]:
        counted = IterationOperations(config_of(document["settings"][run["variant"]], run["seed"]))
        last = run["points"][-1]
        nfe = sum(value for phase, value in last["nfe"].items() if phase != "guard")
        assert sum(map(counted.forwards, range(last["iteration"]))) == nfe, run["variant"]


def test_the_operations_of_a_sparse_run_by_hand():
    # T = 6 without guidance, 3 trained steps, 48 samples: per sample 6 + 3 forwards, 3 backwards and 1 decode
    settings = settings_of(
        "embedded_branched", "sampler.branches=null", "sampler.micro_batch=48", "credit.method=sparse"
    )
    unit = IterationOperations(config_of(settings, 0)).unit
    once = 48 * (9 * unit.forward + 3 * unit.backward + unit.full_decode) / TERA
    assert operations(settings, run_of(5)) == pytest.approx([0.0, 5 * once])
    # a backward to the adapter alone is cheaper than the two forwards of a whole one
    assert 1.0 < unit.backward / unit.forward < 1.25


@pytest.mark.parametrize("monitor", ["monitor", "guard"])
def test_calibrations_and_the_monitor_come_on_top_with_their_decodes(monitor):
    overrides = ("sampler.branches=null", "sampler.micro_batch=48", "credit.method=dense")
    settings = settings_of("embedded_branched", *overrides)
    unit = IterationOperations(config_of(settings, 0)).unit
    plain = operations(settings, run_of(5))
    more = operations(settings, run_of(5, calibration=1200.0, **{monitor: 60.0}))
    assert plain is not None and more is not None
    # noise in steps 2, 3 and 4 of 6: a calibration sample takes 6 forwards of the rollout and 3 + 2 + 1 of its exact
    # completions, and 4 decodes: 1200 / 12 = 100 samples. The monitor has only the completions: 60 / 6 = 10.
    extra = 1200 * unit.forward + 400 * unit.full_decode + 60 * unit.forward + 40 * unit.full_decode
    assert more[1] - plain[1] == pytest.approx(extra / TERA)


def test_granularities_share_first_velocities():
    # G2RPO with step sizes 1 and 2 decodes every branch twice; the rollout and the replay are done once
    settings = settings_of("embedded_g2rpo")
    counted = IterationOperations(config_of(settings, 0))
    noisy = counted._noisy(0)
    both = counted.cost(noisy, (2, 3))
    single = settings_of("embedded_g2rpo", "credit.granularities=[1]")
    one = IterationOperations(config_of(single, 0)).cost(noisy, (2, 3))
    assert settings["credit"]["granularities"] == [1, 2]
    assert both.preview_decodes + both.full_decodes == 2 * (one.preview_decodes + one.full_decodes)
    assert (both.rollout, both.policy) == (one.rollout, one.policy)


def test_a_model_or_an_option_that_is_not_known_has_no_count():
    assert operations(settings_of("embedded_sparse", "model.path=somewhere/else"), run_of(3)) is None
    gone = settings_of("embedded_sparse")
    gone["sampler"]["an_option_of_old"] = 1
    assert operations(gone, run_of(3)) is None


@pytest.mark.ci
def test_a_document_without_operations_gets_them(tmp_path, monkeypatch):
    monkeypatch.setattr("benches.learning.study_document.hardware", dict)
    document = recorded("study_branched")
    for run in document["runs"]:
        for point in run["points"]:
            point.pop("operations", None)
        # the record has means alone
        run["before"], run["after"] = (
            {name: [[mean], [mean]] for name, mean in run[when].items()} for when in ("before", "after")
        )
    (tmp_path / "study.json").write_text(json.dumps(document))
    settings = {name: document["settings"][name] for name in ("embedded_branched", "sparse", "dense")}
    filled = StudyDocument(tmp_path / "study.json", settings, against="sparse").refresh()
    assert json.loads((tmp_path / "study.json").read_text())["comparisons"][0]["second"] == "sparse"
    ends = {run["variant"]: run["points"][-1]["operations"] for run in filled["runs"]}
    assert ends["embedded_branched"] < ends["sparse"] < ends["dense"]
    reward = filled["comparisons"][0]["scores"]["reward"]
    assert reward["equal_compute"]["stopped_at"] == pytest.approx(5 * [ends["embedded_branched"]])
