"""Pages say what is true: the hosts' what is replaced and fixed, and all of them what was measured."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from densegrpo_fast.compat.hosts import HOSTS
from densegrpo_fast.config.cli import load_config
from densegrpo_fast.flow import backends
from densegrpo_fast.sampling import plan as plans

ROOT = Path(__file__).resolve().parent.parent


def load_pages() -> ModuleType:
    spec = importlib.util.spec_from_file_location("_pages", ROOT / "benches" / "_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PAGES = load_pages()
TABLES, METHODS = (importlib.import_module(name) for name in ("_page_tables", "_method_tables"))
STEPS = {op: PAGES.step_result_of(op) for op in PAGES.STEPS}


@pytest.mark.parametrize("host", HOSTS)
def test_a_page_shows_the_line_to_add_and_what_happens(host: str) -> None:
    page = PAGES.page_of(host).read_text(encoding="utf-8")
    flag = "" if host == "flow_grpo" else f" --host {host}"
    assert f"-m densegrpo_fast.launch{flag} " in page
    assert f"import densegrpo_fast.compat.{host} as fast\n\nfast.install()" in page
    headings = re.findall(r"^## (.+)$", page, re.MULTILINE)
    assert {"What is replaced", "What changes numerically", "Measured effect"} <= set(headings)
    assert "Verified against formulas and published values" in " ".join(page.split())
    others = PAGES.page_of("flow_grpo").read_text(encoding="utf-8") if host == "turning_point" else ""
    for target in HOSTS[host].replaced:
        assert f"`{target.name.rpartition('.')[2]}`" in page + others
        assert target.module.rpartition(".")[2] in page + others or host == "dance_grpo"
    for fix in importlib.import_module(f"densegrpo_fast.compat.{host}").FIXES:
        assert f"`{fix}`" in page or f'"{fix}"' in page
    assert f"[`{host}`]({host}.md)" in PAGES.page_of("index").read_text(encoding="utf-8")


@pytest.mark.parametrize("host", HOSTS)
def test_a_page_quotes_what_was_measured(host: str) -> None:
    page = PAGES.page_of(host).read_text(encoding="utf-8")
    document = PAGES.result_of(host)
    assert not document["noisy"]
    assert PAGES.with_table(page, host, document) == page
    assert len([line for line in PAGES.table(host, document).splitlines() if "x |" in line]) == 3


def test_a_page_without_its_marks() -> None:
    with pytest.raises(ValueError, match="the page of mix_grpo needs the lines"):
        PAGES.with_table("# MixGRPO\n", "mix_grpo", PAGES.result_of("mix_grpo"))
    with pytest.raises(ValueError, match="the page of csrc needs the lines"):
        PAGES.with_step_table("# csrc\n", STEPS)


def test_evaluations_of_turning_point() -> None:
    """Ten steps, a window of nine: states 1..8 are completed, with shared noise also state 0."""
    page = PAGES.page_of("turning_point").read_text(encoding="utf-8")
    # The host completes state j by its 10 - j remaining steps; here the first of them is the rollout's.
    completed = [len(path) for path in plans.exact(10).paths[:9]]
    assert completed == [9 - state for state in range(9)]
    host, here = sum(10 - state for state in range(1, 9)), sum(completed[1:])
    assert f"| completions of 8 states | {host} | {here} | {here} |" in page
    assert f"| noise-free image | 10 | 10 | {completed[0]} |" in page
    assert f"| sum | {20 + host} | {20 + here} | {10 + here + completed[0]} |" in page


def test_the_steps_page_quotes_what_was_recorded() -> None:
    page = PAGES.STEP_PAGE.read_text(encoding="utf-8")
    assert PAGES.with_step_table(page, STEPS) == page
    own = STEPS["sde_step"]["variants"]["csrc"]
    assert f"{own['times_faster_than_eager']:.1f}x | {own['times_faster_than_eager_compiled']:.1f}x" in page
    changed = {**STEPS, "sde_step": STEPS["sde_log_prob"]}
    assert PAGES.with_step_table(page, changed) != page


def test_every_op_with_a_compiled_form_is_there() -> None:
    forms = {"guided_sde_step", "sde_step_outputs", "guided_sde_log_prob"}
    assert set(PAGES.STEPS) == {op for op, names in backends.OPS.items() if "cpu" in names} - forms


@pytest.mark.parametrize("op", PAGES.STEPS)
def test_what_was_recorded_says_how(op: str) -> None:
    document = STEPS[op]
    assert document["settings"]["shape"] == ([16] if op == "grpo_loss" else [16, 16, 64, 64])
    assert (document["settings"]["dtype"], document["settings"]["threads"]) == ("float32", 2)
    assert document["command"].split(" --rounds ")[0] == f"python benches/bench_{op}.py"
    assert document["noisy"] == any(variant["spread"] > 0.2 for variant in document["variants"].values())
    assert {"csrc", "reference", "eager", "eager_compiled", "copy"} == set(document["variants"])
    own, eager = document["variants"]["csrc"], document["variants"]["eager"]
    medians = eager["median_seconds"] / own["median_seconds"]
    assert math.isclose(own["times_faster_than_eager"], medians, rel_tol=0.3), "another run's ratio"


@pytest.mark.parametrize(
    ("op", "over", "least"),
    [
        ("sde_step", "eager", 3.0),
        ("sde_step", "eager_compiled", 1.5),
        ("sde_log_prob", "eager", 3.0),
        ("grpo_loss", "eager", 1.0),
    ],
)
def test_what_was_recorded_meets_the_bars(op: str, over: str, least: float) -> None:
    assert STEPS[op]["variants"]["csrc"][f"times_faster_than_{over}"] >= least


def test_methods_are_compared_from_one_start() -> None:
    """Every variant that has a run has a name, and all but rounding of the first scores is the same."""
    for runs in (METHODS.late_runs(), [run for study in METHODS.EARLY_STUDIES for run in METHODS._runs(study)]):
        assert len(runs) > 10
        for run in runs:
            assert run["variant"] in METHODS.METHODS or run["variant"].removeprefix("embedded_") in METHODS.METHODS
            for mine, first in zip(run["before"]["reward"], runs[0]["before"]["reward"], strict=True):
                assert mine == pytest.approx(first, abs=1e-4)
    assert METHODS.METHODS.keys() >= {path.stem for path in (ROOT / "benches/variants/methods").glob("*.yaml")}


def test_the_projects_page_quotes_the_study() -> None:
    page, document = PAGES.STUDY_PAGE.read_text(encoding="utf-8"), PAGES.study_result()
    assert PAGES.with_study_table(page, document) == page
    with pytest.raises(ValueError, match="the page of project needs the lines"):
        PAGES.with_study_table("# densegrpo-fast\n", document)
    variants = {name: {run["seed"] for run in document["runs"] if run["variant"] == name} for name in PAGES.REWARDED}
    assert all(seeds == {1, 2, 3, 4, 5} for seeds in variants.values())
    # steps, weights, prompts and group are one and the same, and noise that is not calibrated; credit, lookahead, rows
    # per forward and sparse's rate are not
    settings = {name: document["settings"][name] for name in PAGES.REWARDED}
    first = settings["embedded_branched"]
    for section in ("window", "objective", "data", "reward", "evaluation", "lora", "ema"):
        assert all(one[section] == first[section] for one in settings.values()), section
    rates = {name: one["optimizer"]["lr"] for name, one in settings.items()}
    assert rates.pop("sparse") == 5e-4 and set(rates.values()) == {1e-3}
    for key in ("dynamics", "group_size", "num_steps", "guidance_scale"):
        assert all(one["sampler"][key] == first["sampler"][key] for one in settings.values()), key
    calibrated = {name for name, one in settings.items() if one["sampler"]["calibration"]}
    assert calibrated == {"branched_calibrated", "dense_calibrated"}


@pytest.mark.parametrize("variant", ["embedded_branched", "branched_calibrated", "dense"])
def test_a_reward_per_step_beats_one_per_picture(variant: str) -> None:
    """The aim: held-out prompts, five paired seeds, an interval above 0 at equal iterations and operations."""
    runs = PAGES.study_result()["runs"]
    found = PAGES.compare(runs, variant, "sparse")["scores"]["reward"]
    assert found["equal_iterations"][-1]["low"] > 0
    assert found["equal_compute"]["low"] > 0


def test_the_projects_page_quotes_a_judge_that_nothing_was_trained_on() -> None:
    document = json.loads((ROOT / "benches/results/judge_branched.json").read_text(encoding="utf-8"))
    page = " ".join(PAGES.STUDY_PAGE.read_text(encoding="utf-8").split())
    found = {each["first"]: each["measures"] for each in document["comparisons"] if each["second"] == "sparse"}
    for variant, words in (("embedded_branched", "branches"), ("turning_point", "TP-GRPO"), ("dense", "plain gains")):
        quoted = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**found[variant]["judge/graded"])
        assert f"{words} minus sparse {quoted}" in page
    assert found["embedded_branched"]["judge/graded"]["low"] > 0
    branched, sparse = (document["variants"][name] for name in ("embedded_branched", "sparse"))
    numbers = [f"{side['kl/flow_grpo']['mean']:.3f}".removeprefix("0") for side in (branched, sparse)]
    assert f"a KL of {numbers[0]} per trajectory for sparse's {numbers[1]}" in page


def test_the_projects_page_quotes_the_opposite_noise() -> None:
    document = json.loads((ROOT / "benches/results/response.json").read_text(encoding="utf-8"))
    found = document["before"]["consistency"]["mirror"]
    quoted = ", ".join(f"{value:+.2f}".replace("0.", ".", 1) for value in found[:5])
    assert f"correlations are {quoted} in steps 0 to 4" in " ".join(
        PAGES.STUDY_PAGE.read_text(encoding="utf-8").split()
    )
    # the steps that the preset trains are those that follow the noise best, but for the last
    assert min(found[:3]) > max(found[3:5])


@pytest.mark.parametrize(("dynamics", "steps"), [("flow_sde", [3, 4, 5]), ("precise", [4]), ("cps", [])])
def test_the_projects_page_says_which_dynamics_are_out_of_balance(dynamics: str, steps: list[int]) -> None:
    """Beyond two standard deviations of fair signs, as the command marks it."""
    document = json.loads((ROOT / f"benches/results/balance_{dynamics}.json").read_text(encoding="utf-8"))
    assert document["dynamics"] == dynamics
    signs = zip(document["before"]["positive"], document["before"]["negative"], strict=True)
    assert [step for step, (up, down) in enumerate(signs) if abs(up - down) > 2 * (up + down) ** 0.5] == steps


def test_a_table_goes_between_its_own_marks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where nothing stands there yet, and however often it is written."""
    for name in ("one", "two"):
        monkeypatch.setitem(TABLES.TABLES, name, lambda name=name: f"| {name} |")
    end = "<!-- end of table -->"
    page = f"<!-- table: one -->\n{end}\n\nbetween\n\n<!-- table: two -->\n\n| old |\n\n{end}\n"
    written = f"<!-- table: one -->\n\n| one |\n\n{end}\n\nbetween\n\n<!-- table: two -->\n\n| two |\n\n{end}\n"
    assert TABLES.with_tables(page) == written and TABLES.with_tables(written) == written
    assert TABLES.names_of(page) == ["one", "two"]


def test_every_table_is_on_a_page() -> None:
    pages = [path.read_text(encoding="utf-8") for path in PAGES.TABLE_PAGES]
    assert sorted(name for page in pages for name in TABLES.names_of(page)) == sorted(TABLES.TABLES)


@pytest.mark.parametrize("path", PAGES.TABLE_PAGES, ids=lambda path: path.parent.name)
def test_tables_are_what_was_recorded(path: Path) -> None:
    page = path.read_text(encoding="utf-8")
    assert page.count("<!-- table: ") == len(TABLES.names_of(page)) > 0
    assert TABLES.with_tables(page) == page


@pytest.mark.parametrize(("name", "left"), [("calibration_late", 0), ("calibration_branched", 1)])
def test_a_calibration_removes_the_imbalance(name: str, left: int) -> None:
    """Steps beyond two standard deviations of fair signs, by samples that the search has not seen."""
    document = json.loads((ROOT / f"benches/results/{name}.json").read_text(encoding="utf-8"))

    def out_of_balance(state: dict[str, Any]) -> set[int]:
        signs = {step: (state["positive"][step], state["negative"][step]) for step in document["steps"]}
        return {step for step, (up, down) in signs.items() if abs(up - down) > 2 * (up + down) ** 0.5}

    before, after = out_of_balance(document["before"]), out_of_balance(document["after"])
    assert document["settled"] and len(before) == 2 and len(after) == left
    # and that one is no worse than the tolerance of the search
    for step in after:
        up, down = document["after"]["positive"][step], document["after"]["negative"][step]
        assert abs(up - down) <= 0.15 * (up + down)


def test_the_fast_iteration_of_the_bench_is_at_the_bars_of_fidelity() -> None:
    """One and the same plan: what `bench_iteration` times as dense_fast, that of the preset embedded_paper_fast, judged
    on 64 held-out groups of 16."""
    timed = json.loads((ROOT / "benches/results/iteration_cpu.json").read_text(encoding="utf-8"))
    config = timed["settings"]["variants"]["dense_fast"]
    ahead = config["lookahead"]
    preset = load_config(["--config", "embedded_paper_fast"])[0].model_dump(mode="json")
    assert config["model"]["vae_dtype"] == preset["model"]["vae_dtype"]
    for section in ("lookahead", "sampler", "window", "data", "credit", "objective"):
        assert config[section].items() <= preset[section].items(), section
    judged = json.loads((ROOT / "benches/results/fidelity_fast.json").read_text(encoding="utf-8"))
    decoder = f"{ahead['decoder']}({config['model']['vae_dtype']})"
    name = f"{ahead['plan']}+copy({ahead['copy_dtype']})/{ahead['guidance']}/{decoder}"
    found = judged["plans"][name]
    assert judged["settings"]["groups_measured"] == 64 and judged["settings"]["group_size"] == 16
    for key in ("num_steps", "dynamics", "noise_level", "guidance_scale"):
        assert judged["settings"]["sampler"][key] == config["sampler"][key], key
    rewards, gains, worst = TABLES.correlations(found, judged)
    assert rewards >= 0.95 and gains >= 0.90 and worst >= 0.75 and found["remaining_gains"] >= 0.8
    page = " ".join(PAGES.STUDY_PAGE.read_text(encoding="utf-8").split())
    assert round(rewards, 2) == round(gains, 2)
    quoted = [f"{value:.2f}".removeprefix("0") for value in (gains, worst)]
    assert f"({quoted[0]}, worst step {quoted[1]}, 64 held-out groups of 16;" in page
    assert f"By operations the first line is {found['iteration_flops_ratio']:.2f} with KL" in page


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ("branches, all steps but the last, float32 copy, full decoder / sparse", "dense_fast/sparse"),
        ("the same / stock sparse", "dense_fast/stock_sparse"),
        ("the same along trajectories / sparse", "dense_trajectories/sparse"),
        ("dense exact / sparse", "dense_exact/sparse"),
        ("stock dense / stock sparse", "stock_dense/stock_sparse"),
        ("dense exact / stock dense", "dense_exact/stock_dense"),
    ],
)
def test_the_projects_page_quotes_seconds(words: str, key: str) -> None:
    document = json.loads((ROOT / "benches/results/iteration_cpu.json").read_text(encoding="utf-8"))
    quoted = f"| {words} | {document['ratios'][key]:.2f} | {document['no_kl']['ratios'][key]:.2f} |"
    assert quoted in PAGES.STUDY_PAGE.read_text(encoding="utf-8")


def test_the_projects_page_quotes_the_default_run() -> None:
    page = PAGES.STUDY_PAGE.read_text(encoding="utf-8")
    for name, words in (("learning_branched", "6 steps as in training"), ("learning_branched_10steps", "10 steps")):
        document = json.loads((ROOT / f"benches/results/{name}.json").read_text(encoding="utf-8"))
        before, after = (subject["reward"]["mean"] for subject in document["subjects"].values())
        change = next(found for found in document["differences"] if found["reward"] == "reward")
        numbers = f"{before:.3f} | {after:.3f} | {change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
        assert f"| reward, {words} | {numbers.replace('0.', '.')} |" in page
        assert change["low"] > 0
    lines = (ROOT / "benches/results/learning_branched.metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = [value for line in lines for key, value in json.loads(line).items() if key.startswith("time/")]
    assert len(lines) == 100 and 3 <= sum(seconds) / 60 <= 3.75


def test_the_projects_page_quotes_the_costs() -> None:
    page = " ".join(PAGES.STUDY_PAGE.read_text(encoding="utf-8").split())
    models = json.loads((ROOT / "benches/results/cost.json").read_text(encoding="utf-8"))["models"]
    plans_of = {name: {key: found["ratio_kl"] for key, found in models[name]["plans"].items()} for name in models}
    large = plans_of["sd35_medium"]
    several = large["exact_but_last/full/preview, 8 branches"], large["nodes{4,7}/full/preview, 8 branches"]
    assert f"takes {several[0]:.2f} with 8 branches" in page
    assert f"and {several[1]:.2f}".replace("0.", ".") + " with nodes {4,7}" in page


def test_the_projects_page_quotes_the_rates_of_sparse() -> None:
    changes = {}
    for name in ("study_sparse_high_rate", "study_sparse_low_rate"):
        document = json.loads((ROOT / f"benches/results/{name}.json").read_text(encoding="utf-8"))
        (run,), (settings,) = document["runs"], document["settings"].values()
        points = [point["held_out"]["reward"] for point in run["points"]]
        assert run["seed"] == 0
        changes[settings["optimizer"]["lr"]] = points[-1] - points[0]
    quoted = [f"{changes[lr]:+.3f}".replace("0.", ".", 1) for lr in (1e-3, 5e-4)]
    assert f"(seed 0, {quoted[0]} for {quoted[1]};" in PAGES.STUDY_PAGE.read_text(encoding="utf-8")
    assert changes[5e-4] > changes[1e-3]
