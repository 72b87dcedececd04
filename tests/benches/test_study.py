"""The paired study: pairing, interpolation at equal time, what it writes, and going on after a stop."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from benches.common import summarise
from benches.common.claim import claimed
from benches.common.record import commit, interleaved, pairwise_ratio, portable, spread, write_json
from benches.learning import (
    study,
    study_plot,
)
from benches.learning.comparison import at, compare, operations_of, pairs, seconds_of
from benches.learning.study_document import StudyDocument, noisy, same_start
from benches.learning.study_plot import save_plot
from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode
from densegrpo_fast.config import Config
from densegrpo_fast.config.yaml_files import dump_yaml
from densegrpo_fast.run_files.statistics import paired_interval

ROOT = Path(__file__).resolve().parents[2]

DENSE, SPARSE = "embedded_dense", "embedded_sparse"


def run(
    variant: str,
    seed: int,
    values: list[float],
    seconds: float,
    after: list[list[float | None]] | None = None,
    operations: float | None = None,
):
    """A run evaluated every 2 iterations, each iteration `seconds` long and of `operations` TFLOP."""
    points = [
        {
            "iteration": 2 * i,
            "seconds": {"rollout": 0.5 * seconds * i, "update": 1.5 * seconds * i},
            "nfe": {"rollout": 10.0 * i},
            "operations": None if operations is None else 2 * i * operations,
            "held_out": {"reward": value},
        }
        for i, value in enumerate(values)
    ]
    last = [[values[-1]], [values[-1]]] if after is None else after
    return {"variant": variant, "seed": seed, "points": points, "before": {}, "after": {"reward": last}}


def test_runs_are_paired_by_seed():
    runs = [run("b", 3, [0, 1], 1), run("a", 1, [0, 1], 1), run("a", 3, [0, 1], 1), run("b", 2, [0, 1], 1)]
    assert [(one["variant"], other["variant"], one["seed"], other["seed"]) for one, other in pairs(runs, "a", "b")] == [
        ("a", "b", 3, 3)
    ]
    with pytest.raises(ValueError, match="a and c must share a seed, got none"):
        compare(runs, "a", "c")


def test_a_score_at_a_time_is_linear_between_evaluations():
    one = run("a", 0, [0.2, 0.4, 0.3], 5.0)
    # 2 iterations of 5 s: evaluated after 0, 10 and 20 s
    spent = seconds_of(one)
    assert at(one, "reward", spent, 0.0) == pytest.approx(0.2)
    assert at(one, "reward", spent, 2.5) == pytest.approx(0.25)
    assert at(one, "reward", spent, 15.0) == pytest.approx(0.35)
    assert at(one, "reward", spent, 20.0) == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"must lie in 0\.\.20\.0"):
        at(one, "reward", spent, 20.1)


def test_intervals_at_equal_iterations_and_equal_seconds():
    runs = [
        run("a", 0, [0.2, 0.4, 0.6], 2.0),
        run("b", 0, [0.2, 0.3, 0.5], 1.0),
        run("a", 1, [0.2, 0.5, 0.8], 2.0),
        run("b", 1, [0.2, 0.4, 0.5], 1.0),
    ]
    result = compare(runs, "a", "b")
    reward = result["scores"]["reward"]
    assert result["seeds"] == [0, 1]
    assert [entry["iteration"] for entry in reward["equal_iterations"]] == [0, 2, 4]
    # at the end 0.6 - 0.5 = 0.1 and 0.8 - 0.5 = 0.3: mean 0.2, std 0.2/sqrt(2), error 0.1, t(0.975, 1) = 12.706
    end = reward["equal_iterations"][-1]
    assert end["mean"] == pytest.approx(0.2)
    assert (end["low"], end["high"]) == (pytest.approx(0.2 - 1.2706, abs=1e-4), pytest.approx(0.2 + 1.2706, abs=1e-4))
    # b ends after 4 s, where a has done 2 iterations: 0.4 - 0.5 = -0.1 and 0.5 - 0.5 = 0
    assert reward["equal_seconds"]["stopped_at"] == [4.0, 4.0]
    assert reward["equal_seconds"]["mean"] == pytest.approx(-0.05)
    assert reward["equal_seconds"]["high"] == pytest.approx(-0.05 + 0.05 * 12.7062, abs=1e-4)


def test_intervals_at_equal_compute():
    # evaluated after 0, 2 and 4 iterations: a after 0, 6 and 12 TFLOP; b, whose seconds are shorter, after 0, 2 and 4
    runs = [
        run("a", 0, [0.2, 0.5, 0.6], 1.0, operations=3.0),
        run("b", 0, [0.2, 0.3, 0.5], 2.0, operations=1.0),
        run("a", 1, [0.2, 0.8, 0.8], 1.0, operations=3.0),
        run("b", 1, [0.2, 0.4, 0.5], 2.0, operations=1.0),
    ]
    found = compare(runs, "a", "b")["scores"]["reward"]["equal_compute"]
    # a stopped at 4 TFLOP is two thirds of the way to its second evaluation: 0.4 and 0.6, less b's 0.5: mean 0, std
    # 0.2/sqrt(2), error 0.1
    assert found["stopped_at"] == [4.0, 4.0]
    assert found["mean"] == pytest.approx(0.0)
    assert found["high"] == pytest.approx(1.2706, abs=1e-4)
    # the other way round it is the same stop, and without the count of one run there is none
    assert compare(runs, "b", "a")["scores"]["reward"]["equal_compute"]["stopped_at"] == [4.0, 4.0]
    for point in runs[3]["points"]:
        del point["operations"]
    assert operations_of(runs[3]) is None
    assert compare(runs, "a", "b")["scores"]["reward"]["equal_compute"] is None


def test_the_interval_over_prompts_averages_seeds_first_and_skips_missing_prompts():
    runs = [
        run("a", 0, [0, 0.5], 1.0, [[0.4, 0.6], [0.8, None], [None, None]]),
        run("b", 0, [0, 0.5], 1.0, [[0.4, 0.4], [0.4, 0.4], [0.9, 0.9]]),
        run("a", 1, [0, 0.5], 1.0, [[0.5, 0.5], [0.8, 0.8], [None, None]]),
        run("b", 1, [0, 0.5], 1.0, [[0.4, 0.4], [0.4, 0.4], [0.9, 0.9]]),
    ]
    pooled = compare(runs, "a", "b")["scores"]["reward"]["equal_iterations_over_prompts"]
    # prompt 0: 0.5 - 0.4; prompt 1: 0.8 - 0.4; prompt 2 has no score of a. Mean 0.25, error 0.15
    assert pooled["mean"] == pytest.approx(0.25)
    assert pooled["low"] == pytest.approx(0.25 - 0.15 * 12.7062, abs=1e-4)


def test_one_seed_gives_a_difference_without_an_interval():
    result = compare([run("a", 0, [0, 0.5], 1.0), run("b", 0, [0, 0.25], 1.0)], "a", "b")
    end = result["scores"]["reward"]["equal_iterations"][-1]
    assert end["mean"] == 0.25 and end["low"] != end["low"]


class FakeTrain:
    """Writes the files of a run whose reward rises; dense rises faster and takes twice as long."""

    def __init__(self, start: float = 0.5, stop_at: int | None = None):
        self.start, self.stop_at, self.calls = start, stop_at, list[tuple[str, int, bool]]()

    def __call__(self, config: Config, resume: bool = False) -> int:
        self.calls.append((config.preset, config.seed, resume))
        directory = config.output_dir
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(dump_yaml(config))
        if self.stop_at == len(self.calls):
            return ExitCode.INTERRUPTED
        dense = config.credit.method == "dense"
        rate = (0.02 if dense else 0.01) + 0.001 * config.seed
        self._scores(directory / "evaluation-before.json", self.start)
        self._scores(directory / "evaluation-after.json", self.start + rate * config.run.iterations)
        with open(directory / "metrics.jsonl", "w") as log:
            for done in range(1, config.run.iterations + 1):
                seconds = 2.0 if dense else 1.0
                record = {"iteration": done, "time/rollout": 0.25, "time/update": seconds - 0.25, "nfe/rollout": 384}
                if done % config.evaluation.every == 0 and done < config.run.iterations:
                    value = self.start + rate * done
                    record |= {"eval/reward": value, "eval/scenes": value, "eval/scenes_strict": value / 2}
                log.write(json.dumps(record) + "\n")
        return ExitCode.OK

    @staticmethod
    def _scores(path: Path, value: float) -> None:
        rows = [[value - 0.1], [value + 0.1], [float("nan")]]
        scores = {"reward": rows, "scenes": rows, "scenes_strict": [[v / 2 for v in row] for row in rows]}
        path.write_text(json.dumps({"prompts": ["a", "b", "c"], "scores": scores}))


def plan(seeds: tuple[int, ...] = (0, 1), **changes) -> study.Plan:
    return study.Plan((DENSE, SPARSE), seeds, 2, ("run.iterations=6", "model.path=/some/where/weights"), **changes)


@pytest.mark.ci
def test_a_study_writes_points_comparisons_and_a_plot(tmp_path, capsys):
    output = tmp_path / "results" / "study.json"
    train = FakeTrain()
    assert study.conduct(plan(), output, tmp_path / "work", train) == ExitCode.OK
    assert train.calls == [(DENSE, 0, False), (SPARSE, 0, False), (SPARSE, 1, False), (DENSE, 1, False)]
    text = output.read_text()
    assert "NaN" not in text and "/some" not in text and str(tmp_path) not in text and str(ROOT) not in text
    document = json.loads(text)
    assert document["settings"][SPARSE]["credit"]["method"] == "sparse"
    assert document["settings"][DENSE]["model"]["path"] == "weights"
    assert {"command", "commit", "hardware", "versions", "load_average", "noisy"} <= document.keys()
    first = document["runs"][0]
    assert [point["iteration"] for point in first["points"]] == [0, 2, 4, 6]
    assert first["points"][2]["seconds"] == {"rollout": 1.0, "update": 7.0} and first["points"][2]["nfe"] == {
        "rollout": 1536
    }
    assert [point["held_out"]["reward"] for point in first["points"]] == pytest.approx([0.5, 0.54, 0.58, 0.62])
    assert first["after"]["scenes"][2] == [None]
    reward = document["comparisons"][0]["scores"]["reward"]
    # at equal iterations 6 * 0.02 - 6 * 0.01; in sparse's 6 s dense does 3 iterations: 3 * (0.02 + s) - 6 * (0.01 + s),
    # where s is 0 and 0.001
    assert reward["equal_iterations"][-1]["mean"] == pytest.approx(0.06)
    assert reward["equal_seconds"]["mean"] == pytest.approx(-0.0015)
    assert document["noisy"] is False
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert f"{DENSE} minus {SPARSE}, 2 seeds" in capsys.readouterr().out


@pytest.mark.ci
def test_finished_runs_are_kept_and_an_unfinished_one_goes_on(tmp_path):
    output, work = tmp_path / "study.json", tmp_path / "work"
    assert study.conduct(plan(), output, work, FakeTrain(stop_at=3)) == ExitCode.INTERRUPTED
    assert [(run["variant"], run["seed"]) for run in json.loads(output.read_text())["runs"]] == [
        (DENSE, 0),
        (SPARSE, 0),
    ]
    train = FakeTrain()
    assert study.conduct(plan(), output, work, train) == ExitCode.OK
    assert train.calls == [(SPARSE, 1, True), (DENSE, 1, False)]
    more = FakeTrain()
    assert study.conduct(plan(seeds=(0, 1, 2)), output, work, more) == ExitCode.OK
    assert more.calls == [(DENSE, 2, False), (SPARSE, 2, False)]
    assert json.loads(output.read_text())["comparisons"][0]["seeds"] == [0, 1, 2]
    finished, nothing = output.read_bytes(), FakeTrain()
    assert study.conduct(plan(), output, work, nothing) == ExitCode.OK
    assert nothing.calls == [] and output.read_bytes() == finished


@pytest.mark.ci
def test_finished_runs_in_the_work_directory_are_read_and_not_repeated(tmp_path):
    work, first, second = tmp_path / "work", tmp_path / "first.json", tmp_path / "second.json"
    assert study.conduct(plan(seeds=(0,)), first, work, FakeTrain()) == ExitCode.OK
    nothing = FakeTrain()
    assert study.conduct(plan(seeds=(0,)), second, work, nothing) == ExitCode.OK
    assert nothing.calls == []
    points = [[run["points"] for run in json.loads(path.read_text())["runs"]] for path in (first, second)]
    assert points[0] == points[1]
    # one of other settings is neither taken for this one nor written over
    other = study.Plan((DENSE,), (0,), 2, ("run.iterations=6", "optimizer.lr=0.1", "model.path=/some/where/weights"))
    with pytest.raises(UserError, match="holds a run with another optimizer.lr"):
        study.conduct(other, tmp_path / "third.json", work, nothing)
    # and one that wants more iterations goes on
    longer = study.Plan((DENSE,), (0,), 2, ("run.iterations=8", "model.path=/some/where/weights"))
    assert study.conduct(longer, tmp_path / "third.json", work, nothing) == ExitCode.OK
    assert nothing.calls == [(DENSE, 0, True)]


@pytest.mark.ci
def test_runs_that_cannot_stand_together_are_refused(tmp_path):
    output, work = tmp_path / "study.json", tmp_path / "work"
    study.conduct(plan(seeds=(0,)), output, work, FakeTrain())
    kept = output.read_text()
    other = study.Plan((DENSE, SPARSE), (0, 1), 2, ("run.iterations=8", "model.path=/some/where/weights"))
    with pytest.raises(UserError, match=f"another {DENSE}.run.iterations, {SPARSE}.run.iterations; give another"):
        study.conduct(other, output, work, FakeTrain())
    with pytest.raises(UserError, match=f"{SPARSE}, seed 1, did not start like {DENSE}, seed 0"):
        study.conduct(plan(), output, work, FakeTrain(start=0.4))
    assert output.read_text() == kept
    document = json.loads(kept)
    document["hardware"]["threads"] += 1
    write_json(output, document)
    with pytest.raises(UserError, match="another hardware.threads; give another"):
        study.conduct(plan(), output, work, FakeTrain())
    output.write_text('{"runs": 3}')
    with pytest.raises(UserError, match="is no readable study"):
        study.conduct(plan(), output, work, FakeTrain())


@pytest.fixture
def no_plot(monkeypatch):
    monkeypatch.setattr(study_plot, "save_plot", lambda *_, **__: None)


def test_every_variant_is_compared_with_the_one_asked_for(tmp_path, capsys, no_plot):
    output, variants = tmp_path / "study.json", ("embedded_value", DENSE, SPARSE)
    three = study.Plan(variants, (0, 1), 2, ("run.iterations=6", "model.path=/some/where/weights"))
    study.conduct(three, output, tmp_path / "work", FakeTrain())
    found = json.loads(output.read_text())["comparisons"]
    assert [(one["first"], one["second"]) for one in found] == [(variants[0], DENSE), (variants[0], SPARSE)]
    nothing = FakeTrain()
    # a file's name does as well; no run is left, so only what is computed from them changes
    against = study.Plan(
        *(getattr(three, name) for name in ("variants", "seeds", "evaluate_every", "overrides")), f"{SPARSE}.yaml"
    )
    study.conduct(against, output, tmp_path / "work", nothing)
    found = json.loads(output.read_text())["comparisons"]
    assert nothing.calls == []
    assert [(one["first"], one["second"]) for one in found] == [(variants[0], SPARSE), (DENSE, SPARSE)]
    assert f"{DENSE} minus {SPARSE}, 2 seeds" in capsys.readouterr().out
    with pytest.raises(UserError, match="--against: expected one of embedded_value, .*, got dense"):
        study.conduct(plan(against="dense"), output, tmp_path / "work", nothing)


@pytest.mark.parametrize(
    ("scores", "same"),
    [
        ([[0.50005, None]], True),
        ([[0.5002, None]], False),
        ([[0.5, 0.0]], False),
        ([[None, None]], False),
        ([[0.5]], False),
    ],
)
def test_runs_start_alike_up_to_the_rounding_of_another_machine(scores, same):
    assert same_start({"reward": [[0.5, None]]}, {"reward": scores}) is same
    assert same_start({"reward": scores}, {"reward": [[0.5, None]]}) is same
    assert not same_start({"reward": scores}, {"other": scores})


def test_processes_share_the_runs(tmp_path, capsys, no_plot):
    output, work = tmp_path / "study.json", tmp_path / "work"
    first = FakeTrain()
    with claimed(work / f"{SPARSE}-0.claim") as claim:
        assert claim is not None
        assert study.conduct(plan(), output, work, first) == ExitCode.OK
    assert first.calls == [(DENSE, 0, False), (SPARSE, 1, False), (DENSE, 1, False)]
    assert f"{SPARSE}, seed 0: another process is at it" in capsys.readouterr().err
    # a process that had read the file before it held anything adds its run to what the file holds by then
    settings = plan().settings()
    stale = StudyDocument(output, settings)
    second = FakeTrain()
    assert study.conduct(plan(), output, work, second) == ExitCode.OK
    assert second.calls == [(SPARSE, 0, False)]
    held = json.loads(output.read_text())
    stale.add(held["runs"][0] | {"seed": 2})
    assert [run["seed"] for run in json.loads(output.read_text())["runs"]] == [0, 1, 1, 0, 2]
    # and what it did twice is not added
    stale.add(held["runs"][0])
    assert len(json.loads(output.read_text())["runs"]) == 5


def test_a_run_that_another_process_finishes_meanwhile_is_not_repeated(tmp_path, monkeypatch, no_plot):
    output, work, train = tmp_path / "study.json", tmp_path / "work", FakeTrain()
    asked: list[tuple[str, int]] = []

    def holds(self: StudyDocument, variant: str, seed: int) -> bool:
        asked.append((variant, seed))
        return len(asked) == 2

    monkeypatch.setattr(StudyDocument, "holds", holds)
    study.conduct(plan(seeds=(0,)), output, work, train)
    # dense was there when it was looked for again, under the claim; sparse was not
    assert asked == [(DENSE, 0), (DENSE, 0), (SPARSE, 0), (SPARSE, 0)]
    assert train.calls == [(SPARSE, 0, False)]


def test_cpu_seconds_add_up_over_stops_and_too_many_are_named(tmp_path, monkeypatch, capsys, no_plot):
    output, work = tmp_path / "study.json", tmp_path / "work"
    # dense 500 s; sparse 200 s until it is stopped, then 450 s
    clock = iter([0.0, 500.0, 500.0, 700.0, 1000.0, 1450.0])
    monkeypatch.setattr(study, "process_time", lambda: next(clock))
    assert study.conduct(plan(seeds=(0,)), output, work, FakeTrain(stop_at=2)) == ExitCode.INTERRUPTED
    assert study.conduct(plan(seeds=(0,)), output, work, FakeTrain()) == ExitCode.OK
    document = json.loads(output.read_text())
    assert [run["cpu_seconds"] for run in document["runs"]] == [500.0, 650.0]
    assert document["over_budget"] == [f"{SPARSE}-0"]
    assert document["unknown_cpu_seconds"] == []
    told = capsys.readouterr().out
    assert f"more than 600 CPU seconds: {SPARSE}-0" in told and "not known" not in told


def test_the_cpu_seconds_of_a_directory_that_was_there_are_not_known(tmp_path, capsys, no_plot):
    output, work = tmp_path / "study.json", tmp_path / "work"
    FakeTrain()(plan().config(DENSE, 0, work / f"{DENSE}-0"))
    study.conduct(study.Plan((DENSE,), (0,), 2, plan().overrides), output, work, FakeTrain())
    document = json.loads(output.read_text())
    assert document["runs"][0]["cpu_seconds"] is None and document["over_budget"] == []
    assert document["unknown_cpu_seconds"] == [f"{DENSE}-0"]
    assert f"CPU seconds not known: {DENSE}-0" in capsys.readouterr().out


def test_runs_of_one_seed_differ_in_the_variant_alone(tmp_path):
    dense, sparse = (plan().config(variant, 7, tmp_path) for variant in (DENSE, SPARSE))
    assert (dense.seed, dense.evaluation.every, dense.output_dir) == (7, 2, tmp_path)
    assert dense.model_copy(update={"preset": SPARSE, "credit": sparse.credit}) == sparse
    with pytest.raises(UserError, match="run.output_dir is given twice"):
        study.Plan((DENSE,), (0,), 2, ("run.output_dir=x",)).config(DENSE, 0, tmp_path)


def test_uneven_timings_are_marked_as_noisy(tmp_path):
    steady, uneven = run("a", 0, [0.0] * 5, 1.0), run("b", 0, [0.0] * 5, 1.0)
    assert not noisy([steady, uneven])
    for point, seconds in zip(uneven["points"], (0.0, 2.0, 5.0, 7.0, 11.0), strict=True):
        point["seconds"] = {"rollout": seconds}
    assert noisy([steady, uneven])


def test_a_noisy_study_is_not_compared_at_equal_seconds(tmp_path, capsys, monkeypatch):
    output, drawn = tmp_path / "study.json", []
    monkeypatch.setattr(study_plot, "save_plot", lambda *_, timed: drawn.append(timed))
    study.conduct(plan(), output, tmp_path / "work", FakeTrain())
    assert "equal seconds " in capsys.readouterr().out
    document = json.loads(output.read_text())
    # one of four seconds per iteration beside those of two: quartiles 2.5 and 3.5 around 3
    for point in document["runs"][3]["points"]:
        point["seconds"] = {"rollout": 2 * sum(point["seconds"].values())}
    write_json(output, document)
    study.conduct(plan(), output, tmp_path / "work", FakeTrain())
    document, told = json.loads(output.read_text()), capsys.readouterr().out
    assert document["noisy"] and drawn[0] and not drawn[-1]
    for found in document["comparisons"][0]["scores"].values():
        assert found["equal_seconds"] is None
        # the same study at equal iterations stays valid
        assert found["equal_iterations"][-1]["mean"] > 0
    assert "timings are noisy, so nothing is compared at equal seconds" in told and "equal seconds " not in told


@pytest.mark.ci
def test_every_variant_of_a_plot_has_a_look_of_its_own(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda figure, *given, **to: (drawn.append(figure), save(figure, *given, **to))
    )
    names = [f"variant_{number}" for number in range(14)]
    save_plot(tmp_path / "a.png", [run(name, 0, [0.0, 0.1], 1.0) for name in names], names, ["reward"])
    assert len(drawn[0].axes) == 2
    for panel in drawn[0].axes:
        assert len({(line.get_linestyle(), line.get_color()) for line in panel.lines}) == len(names)
    save_plot(tmp_path / "a.png", [run("a", 0, [0.0, 0.1], 1.0, operations=2.0)], ["a"], ["reward"])
    save_plot(tmp_path / "a.png", [run("a", 0, [0.0, 0.1], 1.0)], ["a"], ["reward"], timed=False)
    assert [len(figure.axes) for figure in drawn[1:]] == [3, 1]


def test_records_hold_no_directories_of_this_machine():
    value = {"path": "/home/someone/model", "hub": "owner/name", "/a/b.py:reward": [1.0, ("~", "runs/x")], "n": None}
    assert portable(value) == {"path": "model", "hub": "owner/name", "b.py:reward": [1.0, ["~", "runs/x"]], "n": None}


def test_records_are_json_without_nan(tmp_path):
    write_json(tmp_path / "new" / "a.json", {"x": [float("nan"), 1.5], "y": {"z": float("inf")}})
    assert json.loads((tmp_path / "new" / "a.json").read_text()) == {"x": [None, 1.5], "y": {"z": None}}


def test_the_commit_is_a_hash_or_unknown():
    assert commit() == "unknown" or len(commit().removesuffix("+changes")) == 40


def test_variants_are_timed_in_turns():
    calls: list[str] = []
    seconds = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert [len(own) for own in seconds.values()] == [2, 2]
    # ratios 2, 3 and 1 in the three rounds
    assert pairwise_ratio([2.0, 6.0, 5.0], [1.0, 2.0, 5.0]) == 2.0
    # quartiles 2 and 4 around a median of 3
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(2 / 3)
    assert spread([1.0]) == 0.0


def test_a_summary_keeps_means_and_intervals_and_no_scores_of_pictures(tmp_path: Path) -> None:
    raw, kept = tmp_path / "raw.json", tmp_path / "kept.json"
    scores = {"reward": [[0.25, 0.75], [0.5, 1.0], [0.0, None]]}, {"reward": [[0.5, 0.75], [1.0, 1.0], [0.0, 0.5]]}
    run = {"variant": "dense", "seed": 1, "before": scores[0], "after": scores[1]}
    raw.write_text(json.dumps({"settings": {}, "runs": [run]}))
    assert summarise.main([str(raw), str(kept)]) == 0
    document = json.loads(kept.read_text())
    found = document["runs"][0]
    assert found["before"]["reward"] == pytest.approx((0.5 + 0.75 + 0.0) / 3)
    expected = paired_interval(scores[0]["reward"], scores[1]["reward"])
    assert found["change"]["reward"] == pytest.approx(expected._asdict())
    assert document["raw_sha256"] == hashlib.sha256(raw.read_bytes()).hexdigest()


def test_the_results_in_the_repository_are_summaries() -> None:
    results = Path(summarise.__file__).parents[1] / "results"
    assert sum(path.stat().st_size for path in results.iterdir()) < 2_000_000
