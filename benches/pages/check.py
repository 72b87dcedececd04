"""Holds the pages to what was recorded, and the records to what is claimed of them: `python -m benches.pages.check`.

It lists what is wrong and exits with 1, or with 0 if nothing is. Run it after a measurement was recorded or a page was
written: tables are brought up to date by `python -m benches.pages.write`, sentences by hand. A sentence is looked for
on all pages, wherever its lines break.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benches.pages import measured
from benches.pages import methods as method_tables
from benches.pages.tables import TABLES, correlations, names_of, read
from benches.pages.write import ROOT, pages, updated
from densegrpo_fast.common.aliases import complete_settings
from densegrpo_fast.compat.hosts import HOSTS
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.credit import registry as credit
from densegrpo_fast.flow import backends
from densegrpo_fast.flow.dynamics import FAMILIES
from densegrpo_fast.objective.registry import POLICIES, STEP_WEIGHTS
from densegrpo_fast.sampling import plan as plans

Pages = Mapping[Path, str]

_LINK = re.compile(r"\]\((?!\w+:)([^)#\s]+)(?:#[^)]*)?\)")
_MODULE = re.compile(r"-m ((?:densegrpo_fast|benches)(?:\.\w+)*)")
_SCRIPT = re.compile(r"(?:python|bash) ((?:benches|csrc|tests|\.ci)/[\w./]+)")


def tables(found: Pages) -> Iterator[str]:
    """Every table is on a page, and what it was recorded as."""
    named: set[str] = set()
    for path, page in found.items():
        own = names_of(page)
        named |= set(own)
        unknown = [name for name in own if name not in TABLES]
        if page.count("<!-- table: ") != len(own):
            yield f"{_short(path)}: a table has no end, or no name"
        elif unknown:
            yield f"{_short(path)}: there is no table {', '.join(unknown)}"
        elif own and updated(path, page) != page:
            yield f"{_short(path)}: a table is not what was recorded; run python -m benches.pages.write"
    for name in TABLES.keys() - named:
        yield f"the table {name} is on no page"


def references(found: Pages) -> Iterator[str]:
    """Links lead to files, and commands are there."""
    for path, page in found.items():
        for target in _LINK.findall(page):
            if not (path.parent / target).exists():
                yield f"{_short(path)}: links to {target}, which is not there"
        for name in sorted({*_MODULE.findall(page)}):
            if importlib.util.find_spec(name) is None:
                yield f"{_short(path)}: python -m {name}: there is no such module"
        for script in sorted({*_SCRIPT.findall(page)}):
            if not (ROOT / script).exists():
                yield f"{_short(path)}: {script} is not there"


def hosts(found: Pages) -> Iterator[str]:
    """The page with a host's measurements says how it is used and what can be fixed."""
    for host in measured.KINDS:
        page = "".join(text for text in found.values() if f"dropin_{host}" in names_of(text))
        flag = "" if host == "flow_grpo" else f" --host {host}"
        wanted = [f"-m densegrpo_fast.launch{flag} ", f"import densegrpo_fast.compat.{host} as fast\n\nfast.install()"]
        wanted += [f"`{fix}`" for fix in HOSTS[host].fixes]
        # the pipelines of Flow-GRPO are told of on its own page
        others = "" if host == "flow_grpo" else "".join(t for t in found.values() if "dropin_flow_grpo" in names_of(t))
        for name in {replaced.name.rpartition(".")[2] for replaced in HOSTS[host].replaced}:
            if f"`{name}`" not in page + others:
                yield f"the page of {host} does not say that {name} is replaced"
        for text in wanted:
            if text not in page and text.replace("`", '"') not in page:
                yield f"the page of {host} lacks {text!r}"
        if measured.dropin_result(host)["noisy"]:
            yield f"what was recorded for {host} is noisy"


def methods(found: Pages) -> Iterator[str]:
    """The page of methods has every method that the configuration can name."""
    page = found[ROOT / "docs/methods.md"]
    named = {*credit.names(), *POLICIES.names(), *STEP_WEIGHTS.names(), *FAMILIES} - {"none", "ode"}
    for name in sorted(named):
        if f"`{name}`" not in page:
            yield f"docs/methods.md does not have the method {name}"


def sentences(found: Pages) -> Iterator[str]:
    """What the pages say in words is what was recorded."""
    everything = _plain(" ".join(found.values()))
    for what, text in _quoted():
        if _plain(text) not in everything:
            yield f"no page says of {what}: {text}"


def _plain(text: str) -> str:
    """A text in one line, its numbers without the zero before the point, with or without which pages have them."""
    return re.sub(r"\b0\.", ".", " ".join(text.split()))


def _quoted() -> Iterator[tuple[str, str]]:
    """What is quoted, and how."""
    judge = read("judge_branched")
    measures = {each["first"]: each["measures"] for each in judge["comparisons"] if each["second"] == "sparse"}
    for variant, words in (("embedded_branched", "branches"), ("turning_point", "TP-GRPO"), ("dense", "gains")):
        graded = "{mean:+.3f} [{low:+.3f}, {high:+.3f}]".format(**measures[variant]["judge/graded"])
        yield "the judge", f"{words} minus sparse {graded}"
    kl = [judge["variants"][name]["kl/flow_grpo"]["mean"] for name in ("embedded_branched", "sparse")]
    yield "the judge", f"a KL of {kl[0]:.3f} per trajectory, {kl[1]:.3f} for sparse"

    mirror = read("response")["before"]["consistency"]["mirror"][:5]
    opposite = ", ".join(f"{value:+.2f}" for value in mirror)
    yield "the opposite noise", f"correlations are {opposite} in steps 0 to 4"

    fast = _fast_lookahead()
    _, gains, worst = correlations(fast, read("fidelity_fast"))
    yield "the fast lookahead", f"({gains:.2f}, worst step {worst:.2f}, 64 held-out groups of 16;"

    seconds = read("iteration_cpu")
    for words, key in (
        ("DenseGRPO, exact completions / sparse", "dense_exact/sparse"),
        ("DenseGRPO / sparse", "dense_trajectories/sparse"),
        ("DenseGRPO, 4 of nine steps drawn / sparse", "dense_drawn/sparse"),
        ("the same, streamed (`embedded_paper_drawn`) / sparse", "dense_streamed/sparse"),
        ("the same / sparse without a repeated forward", "dense_streamed/sparse_retained"),
        ("sparse without a repeated forward / sparse", "sparse_retained/sparse"),
        ("branches (`embedded_paper_fast`), a relative / sparse", "dense_fast/sparse"),
        ("stock dense / stock sparse", "stock_dense/stock_sparse"),
        ("DenseGRPO, exact completions / stock dense", "dense_exact/stock_dense"),
    ):
        yield "seconds", f"| {words} | {seconds['ratios'][key]:.2f} | {seconds['no_kl']['ratios'][key]:.2f} |"

    counted = read("price")["sd35_medium"]
    for words, key, form in (
        ("DenseGRPO: independent trajectories, exact completions", "dense_exact", "exact"),
        ("DenseGRPO, completions over all steps but the last", "dense_trajectories", "all but the last step"),
        ("drawn by their gradients", "dense_drawn", "all but the last step, 4 of nine"),
        ("(preset `embedded_paper_drawn`)", "dense_streamed", "all but the last step, 4 of nine, streamed"),
    ):
        ratio = counted[form]["operations"]["over_replayed_sparse"]
        yield "an iteration's price", f"{words} | {seconds['ratios'][f'{key}/sparse']:.2f} | {ratio:.2f} |"

    for name, words in (("learning_branched", "6 steps as in training"), ("learning_branched_10steps", "10 steps")):
        document = read(name)
        before, after = (subject["reward"]["mean"] for subject in document["subjects"].values())
        change = next(each for each in document["differences"] if each["reward"] == "reward")
        numbers = f"{before:.3f} | {after:.3f} | {change['mean']:+.3f} [{change['low']:+.3f}, {change['high']:+.3f}]"
        yield "the default run", f"| reward, {words} | {numbers} |"

    large = {key: plan["ratio_kl"] for key, plan in read("cost")["models"]["sd35_medium"]["plans"].items()}
    previews, few = (large[f"{plan}/full/preview, 8 branches"] for plan in ("exact_but_last", "nodes{4,7}"))
    yield "the costs", f"takes {previews:.2f} with 8 branches"
    yield "the costs", f"and {few:.2f} with nodes {{4,7}}"

    # of ten steps nine are noisy: states 1 to 8 are completed, with shared noise state 0 too. The host takes all of a
    # state's remaining steps; here the first of them is the rollout's.
    completed = [len(path) for path in plans.exact(10).paths[:9]]
    host, here = sum(10 - state for state in range(1, 9)), sum(completed[1:])
    yield "turning_point's evaluations", f"| completions of 8 states | {host} | {here} | {here} |"
    yield "turning_point's evaluations", f"| noise-free image | 10 | 10 | {completed[0]} |"
    yield "turning_point's evaluations", f"| sum | {20 + host} | {20 + here} | {10 + here + completed[0]} |"

    yield "sparse's learning rates", f"(seed 0, {_sparse_change('high'):+.3f} for {_sparse_change('low'):+.3f};"


def steps_as_recorded(_: Pages) -> Iterator[str]:
    """Records of the step ops say how they were made, and meet their bars."""
    forms = {"guided_sde_step", "sde_step_outputs", "guided_sde_log_prob"}
    if set(measured.STEPS) != {op for op, names in backends.OPS.items() if "cpu" in names} - forms:
        yield "an op with a compiled form has no record"
    bars = {
        "sde_step": {"eager": 3.0, "eager_compiled": 1.5},
        "sde_log_prob": {"eager": 3.0},
        "grpo_loss": {"eager": 1},
    }
    for op in measured.STEPS:
        document = measured.step_result(op)
        settings, variants = document["settings"], document["variants"]
        shape = [16] if op == "grpo_loss" else [16, 16, 64, 64]
        if (settings["shape"], settings["dtype"], settings["threads"]) != (shape, "float32", 2):
            yield f"{op} was recorded in another shape, dtype or number of threads"
        if not document["command"].split(" --rounds ")[0].removesuffix(".py").endswith(f"bench_{op}"):
            yield f"{op} was recorded by {document['command']}"
        if document["noisy"] != any(variant["spread"] > 0.2 for variant in variants.values()):
            yield f"{op}: whether it is noisy is not what its spreads say"
        own, eager = variants["csrc"], variants["eager"]
        medians = eager["median_seconds"] / own["median_seconds"]
        if not math.isclose(own["times_faster_than_eager"], medians, rel_tol=0.3):
            yield f"{op}: its ratio is another run's"
        for over, least in bars.get(op, {}).items():
            if own[f"times_faster_than_{over}"] < least:
                yield f"{op} is not {least} times as fast as {over}"


def studies(_: Pages) -> Iterator[str]:
    """What is compared differs in what it is compared by, starts alike, and shows what is claimed."""
    early = [run for study in method_tables.EARLY_STUDIES for run in method_tables._runs(study)]
    known = method_tables.METHODS
    for runs in (method_tables.late_runs(), early):
        for run in runs:
            if run["variant"] not in known and run["variant"].removeprefix("embedded_") not in known:
                yield f"{run['variant']} has no name in the tables of methods"
            if abs(run["before"]["reward"] - runs[0]["before"]["reward"]) > 1e-4:
                yield f"{run['variant']} did not start as {runs[0]['variant']}"
    for path in (ROOT / "benches/variants/methods").glob("*.yaml"):
        if path.stem not in known:
            yield f"{path.stem} has no name in the tables of methods"
    document = measured.study_result()
    settings = {name: document["settings"][name] for name in measured.REWARDED}
    first = settings["embedded_branched"]
    for name, own in settings.items():
        if {run["seed"] for run in document["runs"] if run["variant"] == name} != {1, 2, 3, 4, 5}:
            yield f"the study has other seeds of {name} than 1 to 5"
        different = [
            section
            for section in ("window", "objective", "data", "reward", "evaluation", "lora", "ema")
            if own[section] != first[section]
        ]
        different += [
            f"sampler.{key}"
            for key in ("dynamics", "group_size", "num_steps", "guidance_scale")
            if own["sampler"][key] != first["sampler"][key]
        ]
        if different:
            yield f"{name} differs from embedded_branched in {', '.join(different)}"
        if own["optimizer"]["lr"] != (5e-4 if name == "sparse" else 1e-3):
            yield f"{name} has another learning rate"
        if bool(own["sampler"]["calibration"]) != name.endswith("_calibrated"):
            yield f"{name}: calibrated, or not, against its name"
    for variant in ("embedded_branched", "branched_calibrated", "dense"):
        found = measured.against_sparse(document)[variant]
        if min(found["equal_iterations"][-1]["low"], found["equal_compute"]["low"]) <= 0:
            yield f"{variant} is not better than sparse at equal iterations and at equal operations"
    judged = read("judge_branched")["comparisons"]
    if not any(each["first"] == "embedded_branched" and each["measures"]["judge/graded"]["low"] > 0 for each in judged):
        yield "branches are not better than sparse by the judge"
    mirror = read("response")["before"]["consistency"]["mirror"]
    if min(mirror[:3]) <= max(mirror[3:5]):
        yield "the steps that the default preset trains are not those that follow the noise best"
    if _sparse_change("low") <= _sparse_change("high"):
        yield "sparse does not learn more at the lower rate"


def default_run(_: Pages) -> Iterator[str]:
    """The default run takes the minutes that are claimed, and learns."""
    for name in ("learning_branched", "learning_branched_10steps"):
        if next(each for each in read(name)["differences"] if each["reward"] == "reward")["low"] <= 0:
            yield f"{name}: the default run has learned nothing"
    lines = (ROOT / "benches/results/learning_branched.metrics.jsonl").read_text(encoding="utf-8").splitlines()
    seconds = sum(value for line in lines for key, value in json.loads(line).items() if key.startswith("time/"))
    if len(lines) != 100 or not 2.4 <= seconds / 60 <= 3:
        yield f"the default run has {len(lines)} iterations and took {seconds / 60:.2f} minutes, not 100 and about 2.7"


def balance(_: Pages) -> Iterator[str]:
    """Which steps' gains are out of balance, beyond two standard deviations of fair signs, before and after."""

    def out(state: Mapping[str, Any]) -> list[int]:
        signs = zip(state["positive"], state["negative"], strict=True)
        return [step for step, (up, down) in enumerate(signs) if abs(up - down) > 2 * (up + down) ** 0.5]

    for dynamics, steps in (("flow_sde", [3, 4, 5]), ("precise", [4]), ("cps", [])):
        document = read(f"balance_{dynamics}")
        if document["dynamics"] != dynamics or out(document["before"]) != steps:
            yield f"balance_{dynamics}: steps {out(document['before'])} of {document['dynamics']} are out of balance"
    for name, left in (("calibration_late", 0), ("calibration_branched", 1)):
        document = read(name)
        before, after = (set(out(document[when])) & set(document["steps"]) for when in ("before", "after"))
        signs = [(document["after"]["positive"][step], document["after"]["negative"][step]) for step in after]
        # and what is left is no worse than the tolerance of the search
        close = all(abs(up - down) <= 0.15 * (up + down) for up, down in signs)
        if not document["settled"] or len(before) != 2 or len(after) != left or not close:
            yield f"{name}: steps {sorted(before)} were out of balance, {sorted(after)} are"


def fast_iteration(_: Pages) -> Iterator[str]:
    """What is timed as dense_fast is the preset embedded_paper_fast, whose fidelity is at its bars."""
    timed = complete_settings(read("iteration_cpu")["settings"]["variants"]["dense_fast"])
    judged = read("fidelity_fast")
    preset = parse_arguments(["--config", "embedded_paper_fast"])[0].model_dump(mode="json")
    apart = {"monitor_every", "monitor_alarm"}
    for section in ("lookahead", "sampler", "window", "data", "credit", "objective"):
        own = {key: value for key, value in timed[section].items() if key not in apart}
        if not own.items() <= preset[section].items():
            yield f"what was timed as dense_fast is not embedded_paper_fast in {section}"
    if timed["model"]["vae_dtype"] != preset["model"]["vae_dtype"]:
        yield "what was timed as dense_fast decodes in another precision than embedded_paper_fast"
    if (judged["settings"]["groups_measured"], judged["settings"]["group_size"]) != (64, 16):
        yield "the fast lookahead was not judged on 64 groups of 16"
    for key in ("num_steps", "dynamics", "noise_level", "guidance_scale"):
        if judged["settings"]["sampler"][key] != timed["sampler"][key]:
            yield f"the fast lookahead was judged with another sampler.{key}"
    found = _fast_lookahead()
    rewards, gains, worst = correlations(found, judged)
    if rewards < 0.95 or gains < 0.90 or worst < 0.75 or found["remaining_gains"] < 0.8:
        yield "the fast lookahead is below a bar of its fidelity"


def drawn_iteration(_: Pages) -> Iterator[str]:
    """What is timed as dense_streamed is the preset embedded_paper_drawn."""
    timed = complete_settings(read("iteration_cpu")["settings"]["variants"]["dense_streamed"])
    preset = parse_arguments(["--config", "embedded_paper_drawn"])[0].model_dump(mode="json")
    for section, apart in (("lookahead", {"monitor_every"}), ("credit", set()), ("objective", set())):
        if any(preset[section][key] != value for key, value in timed[section].items() if key not in apart):
            yield f"what was timed as dense_streamed is not embedded_paper_drawn in {section}"
    if timed["optimizer"]["update"] != preset["optimizer"]["update"]:
        yield "what was timed as dense_streamed is not streamed"


def _fast_lookahead() -> dict[str, Any]:
    """The fidelity of what is timed as dense_fast."""
    config = read("iteration_cpu")["settings"]["variants"]["dense_fast"]
    ahead, vae = config["lookahead"], config["model"]["vae_dtype"]
    name = f"{ahead['plan']}+copy({ahead['copy_dtype']})/{ahead['guidance']}/{ahead['decoder']}({vae})"
    return read("fidelity_fast")["plans"][name]


def _sparse_change(rate: str) -> float:
    """Change of the held-out reward of a sparse run at the "high" or "low" learning rate."""
    points = [point["held_out"]["reward"] for point in read(f"study_sparse_{rate}_rate")["runs"][0]["points"]]
    return points[-1] - points[0]


def _short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


CHECKS: tuple[Callable[[Pages], Iterator[str]], ...] = (
    tables,
    references,
    hosts,
    methods,
    sentences,
    steps_as_recorded,
    studies,
    default_run,
    balance,
    fast_iteration,
    drawn_iteration,
)


def main() -> int:
    """Command line entry; returns the exit code."""
    found = pages()
    problems = [problem for check in CHECKS for problem in check(found)]
    print("\n".join(problems) or "pages and records agree")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
