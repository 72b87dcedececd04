"""The price of DenseGRPO in its forms, over one reward per picture, and what each form gives for it.

    python -m benches.iteration.price    writes results/price.json

Operations are counted by the closed forms of `densegrpo_fast/sampling/cost.py`: ten steps, nine trained unless steps
are drawn (then the mean over draws), one update per sample, with KL and without; guidance with its full gradient where
it takes a second forward (FLUX.1-dev's does not). Seconds are those that `bench_iteration.py` has recorded, variances
those of `gradient_variance.py`, fidelity that of the recorded comparison with exact completions.

Two forms of one reward per picture stand in the denominator: as Flow-GRPO runs it, each trained step's forward
repeated, and one that repeats none (every trained step's graph kept until the picture is scored).
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benches.common.operations import draws, schedule_of
from benches.common.record import RESULTS, provenance, write_json
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config.cli import load_config
from densegrpo_fast.flow.schedule import flux_sigmas
from densegrpo_fast.models.flops import ModelFlops, clip_h_image, count, embedded, flux, sd35_medium
from densegrpo_fast.sampling.cost import IterationCost, dense_iteration, mean_cost, sparse_iteration
from densegrpo_fast.sampling.plan import Plan, exact, exact_but_last

STEPS, TRAINED = 10, 9


@dataclass(frozen=True)
class Form:
    """One way to run DenseGRPO.

    Attributes:
        plan: of the completions.
        drawn: how many of the nine steps are trained in an iteration; None = all.
        streamed: whether no forward is repeated.
        seconds: variant of `bench_iteration.py` that has its seconds.
        fidelity: plan of the recorded comparison, where completions are not exact.
    """

    plan: Plan
    drawn: int | None = None
    streamed: bool = False
    seconds: str | None = None
    fidelity: str | None = None


ALL_BUT_LAST = "exact_but_last+copy(float32)/full/full(bfloat16)"
FORMS = {
    "exact": Form(exact(STEPS), seconds="dense_exact"),
    "exact, streamed": Form(exact(STEPS), streamed=True),
    "all but the last step": Form(exact_but_last(STEPS), seconds="dense_trajectories", fidelity=ALL_BUT_LAST),
    "all but the last step, streamed": Form(exact_but_last(STEPS), streamed=True, fidelity=ALL_BUT_LAST),
    "exact, 3 of nine": Form(exact(STEPS), 3),
    "exact, 4 of nine": Form(exact(STEPS), 4),
    "exact, 4 of nine, streamed": Form(exact(STEPS), 4, True),
    "all but the last step, 4 of nine": Form(exact_but_last(STEPS), 4, False, "dense_drawn", ALL_BUT_LAST),
    "all but the last step, 4 of nine, streamed": Form(exact_but_last(STEPS), 4, True, "dense_streamed", ALL_BUT_LAST),
    "exact, 5 of nine": Form(exact(STEPS), 5),
}


def costs(form: Form, config: Any, sigmas: Any, *, guided: bool, kl: bool) -> tuple[IterationCost, IterationCost]:
    """A sample's share of an iteration, and of a sparse one with as many trained steps."""
    schedule, own = schedule_of(config, sigmas), {"guided": guided, "kl": kl}
    dense, sparse = [], []
    for trained, _, share in draws(config, sigmas):
        completed = schedule.completed_states((True,) * STEPS, trained)
        cost = dense_iteration(form.plan, trained_steps=len(trained), completed=completed, **own)
        dense += [replace(cost, streamed=form.streamed)] * share
        sparse += [sparse_iteration(STEPS, trained_steps=len(trained), **own)] * share
    return mean_cost(dense), mean_cost(sparse)


def operations(form: Form, unit: ModelFlops, sigmas: Any, *, guided: bool) -> dict[str, dict[str, float]]:
    """Ratios of operations, with KL and without."""
    options = {"objective.kl_coef": 0.0}
    if form.drawn is not None:
        options |= {"objective.trained_steps": form.drawn, "objective.step_sampling": "importance"}
    config = load_config("embedded_paper", options)
    found = {}
    for name, kl in (("operations", True), ("operations_without_kl", False)):
        cost, few = costs(form, config, sigmas, guided=guided, kl=kl)
        sparse = sparse_iteration(STEPS, trained_steps=TRAINED, guided=guided, kl=kl)
        own = cost.flops(unit)
        found[name] = {
            "over_replayed_sparse": own / sparse.flops(unit),
            "over_streamed_sparse": own / replace(sparse, streamed=True).flops(unit),
            "over_sparse_of_as_many_steps": own / few.flops(unit),
        }
    return found


def seconds(form: Form, record: Mapping[str, Any]) -> dict[str, float] | None:
    """Ratios of recorded seconds with KL; None where the form was not timed."""
    if form.seconds is None or form.seconds not in record["seconds"]:
        return None
    ratios = record["ratios"]
    found = {"over_replayed_sparse": ratios[f"{form.seconds}/sparse"]}
    if "sparse_retained/sparse" in ratios:
        found["over_streamed_sparse"] = found["over_replayed_sparse"] / ratios["sparse_retained/sparse"]
    return found


def document() -> dict[str, Any]:
    """Everything, from the records that there are."""

    def recorded(stem: str) -> dict[str, Any] | None:
        path = RESULTS / f"{stem}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    timed, varied, ranked = (recorded(stem) for stem in ("iteration_cpu", "gradient_variance", "fidelity_trajectories"))
    found: dict[str, Any] = provenance()
    models = {
        "embedded": (embedded(), 16, 0.0, None),
        "sd35_medium": (sd35_medium(), 32, clip_h_image(), None),
        "flux1_dev": (flux(), 32, clip_h_image(), flux_sigmas(STEPS, 1024)),
    }
    for model, (architecture, rank, reward, sigmas) in models.items():
        unit = count(architecture, lora_rank=rank, reward=reward)
        found[model] = {"title": architecture.title}
        for name, form in FORMS.items():
            own: dict[str, Any] = operations(form, unit, sigmas, guided=architecture.guided)
            if model == "embedded":
                own["seconds"] = None if timed is None else seconds(form, timed)
                if ranked is not None and form.fidelity in ranked["plans"]:
                    record = ranked["plans"][form.fidelity]
                    keys = ("spearman_rewards_mean", "spearman_gains_mean", "spearman_gains_worst_step")
                    own["fidelity"] = {key: record[key] for key in keys}
                if varied is not None and form.drawn is not None:
                    own["variance"] = varied["forms"][f"{form.drawn} of nine, importance"]["none"]
            found[model][name] = own
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    del arguments
    with user_errors_exit():
        made = document()
        write_json(RESULTS / "price.json", made)
    for model in ("embedded", "sd35_medium", "flux1_dev"):
        print(made[model]["title"])
        for name in FORMS:
            own = made[model][name]
            with_kl, without = own["operations"], own["operations_without_kl"]
            timed = own.get("seconds") or {}
            print(
                f"  {name:44} {with_kl['over_replayed_sparse']:.2f} / {with_kl['over_streamed_sparse']:.2f} / "
                f"{with_kl['over_sparse_of_as_many_steps']:.2f}   no KL {without['over_replayed_sparse']:.2f} / "
                f"{without['over_streamed_sparse']:.2f}   seconds "
                + (f"{timed['over_replayed_sparse']:.2f}" if timed else "-")
            )
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
