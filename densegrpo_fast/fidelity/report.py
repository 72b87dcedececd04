"""What the fidelity command shows and writes: tables and a JSON document."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from densegrpo_fast.fidelity.measure import cost_of, flops_ratio
from densegrpo_fast.fidelity.search import Candidate, Thresholds
from densegrpo_fast.fidelity.target import FidelityTarget
from densegrpo_fast.fidelity.variants import Variant, reference
from densegrpo_fast.training.agreement import Agreement

_COLUMNS = {
    "guided": "nfe_guided",
    "unguided": "nfe_unguided",
    "cost": "cost_ratio",
    "iteration": "iteration_flops_ratio",
    "rewards": "spearman_rewards_mean",
    "gains": "spearman_gains_mean",
    "worst": "spearman_gains_worst_step",
    "sign": "sign_agreement",
    "pooled": "pooled_gains",
    "advantages": "spearman_advantages",
    "adv. sign": "sign_agreement_advantages",
}
ENOUGH = 0.8
"""Share of units that must remain for a figure to stand for the groups."""
LEGEND = """\
guided, unguided   evaluations of the lookahead per sample, a trajectory or its branches; a guided one is two forwards
cost               forwards of the lookahead / those of the exact plan
iteration          operations of the training iteration / those of the sparse one, from the model's configuration
rewards, gains     mean in-group Spearman correlation with the exact plan, full guidance, full decoder, over the states
                   0..T-2 that have a completion of their own, or that branches lead to: their rewards rank branches
                   of one state as their gains do
worst              the same of the gains, in the step where it is lowest
sign, pooled       gains of the same sign, of branches rewards on the same side of their mean; Pearson correlation of
                   the gains over everything
advantages         Spearman correlation over a group's samples and steps, and sign, of the normalised advantages"""


def plan_record(variant: Variant, agreement: Agreement, target: FidelityTarget, group_size: int) -> dict[str, Any]:
    """What is known of one variant, as plain JSON data: cost per sample of a group, and agreement with the reference.

    `nfe_guided` and `nfe_unguided` count evaluations, a guided one being two forwards; `forwards` counts those.
    """
    cost = cost_of(variant, target, group_size)
    exact = cost_of(reference(target.coefficients.num_steps), target, group_size).lookahead.forwards
    return {
        "plan": variant.plan.name,
        "guidance": variant.guidance,
        "decoder": variant.decoder,
        "copy": variant.copy,
        "vae": variant.vae,
        "cache": variant.cache,
        "nfe_guided": cost.lookahead.guided,
        "nfe_unguided": cost.lookahead.unguided,
        "forwards": cost.lookahead.forwards,
        "decodes": cost.full_decodes + cost.preview_decodes,
        "rewards": cost.rewards,
        "cost_ratio": cost.lookahead.forwards / exact if exact else math.nan,
        "iteration_flops_ratio": flops_ratio(variant, target, group_size),
        **asdict(agreement),
    }


def search_record(
    candidates: Sequence[Candidate],
    chosen: Candidate | None,
    thresholds: Thresholds,
    *,
    max_nodes: int,
    longest_path: int,
) -> dict[str, Any]:
    """The search as plain JSON data: thresholds, the plan chosen with its in-sample agreement, and all candidates.

    Args:
        max_nodes: evaluations of the longest path that was searched.
        longest_path: of the longest one that there is.
    """
    keys = ("spearman_rewards_mean", "spearman_gains_mean", "spearman_gains_worst_step")
    return {
        "thresholds": asdict(thresholds),
        "max_nodes": max_nodes,
        "longest_path": longest_path,
        "chosen": None if chosen is None else chosen.variant.name,
        # as the command line takes it: nodes{3,6} is nodes:3,6
        "chosen_plan": None if chosen is None else chosen.variant.plan.name.replace("{", ":").removesuffix("}"),
        "in_sample": None if chosen is None else asdict(chosen.agreement),
        "candidates": {
            candidate.variant.name: {"forwards": candidate.forwards, "iteration_flops_ratio": candidate.iteration}
            | {key: getattr(candidate.agreement, key) for key in keys}
            for candidate in candidates
        },
    }


def summary(
    settings: Mapping[str, Any],
    records: Mapping[str, dict[str, Any]],
    searched: Mapping[str, Any] | None,
    persistence: Sequence[float] | None,
) -> str:
    """What the command prints.

    Args:
        settings: what was measured.
        records: as from `plan_record`, by the name of the variant.
        searched: as from `search_record`; None without a search.
        persistence: correlation of the exact rewards of neighbouring states; None for branches.
    """
    sampler, branched = settings["sampler"], settings.get("branched")
    steps = [step for step, noisy in enumerate(settings["noisy"]) if noisy]
    blocks = [
        f"{settings['target']}: {settings['groups_measured']} groups of {settings['group_size']}"
        f"{' branches of one ODE trajectory' if branched else ''}, "
        f"{sampler['num_steps']} steps, {sampler['dynamics']} at noise level {sampler['noise_level']}, "
        f"guidance {sampler['guidance_scale']:g}",
        plan_table(records),
        step_table(records, steps if branched else [*range(sampler["num_steps"] - 1)]),
        LEGEND,
    ]
    if settings["lookahead"]:
        blocks.append(f"The configuration trains with {' and '.join(settings['lookahead'])}.")
    remaining = min((record["remaining_gains"] for record in records.values()), default=1.0)
    advice = "" if remaining >= ENOUGH else f"; below {ENOUGH:.0%}, judge by a more finely graded reward"
    lines = [f"{remaining:.0%} of the groups' steps remain, in the others all exact gains are equal{advice}."]
    if persistence is not None:
        numbers = " ".join(f"{value:.2f}" for value in persistence)
        lines.append(
            f"exact rewards of neighbouring states correlate by {numbers}; below .5 a gain is noisier than a reward."
        )
    lines += [] if searched is None else _search_lines(searched, records)
    return "\n\n".join([*blocks, "\n".join(lines)])


def _search_lines(searched: Mapping[str, Any], records: Mapping[str, dict[str, Any]]) -> list[str]:
    wanted = ", ".join(f"{name} {value:g}" for name, value in searched["thresholds"].items())
    if searched["chosen"] is None:
        longer = searched["max_nodes"] < searched["longest_path"]
        advice = "raise --max-nodes" if longer else "there are no longer paths to search"
        return [f"search: none of {len(searched['candidates'])} candidates reaches {wanted}; {advice}."]
    held_out = records[searched["chosen"]]
    extras = {"copy": "copy-dtype", "vae": "vae-dtype", "cache": "cache"}
    again = "".join(f" --{option} {held_out[key]}" for key, option in extras.items() if held_out[key])
    return [
        f"search: {searched['chosen']} is the cheapest of {len(searched['candidates'])} candidates above {wanted}; "
        f"again by --plans {searched['chosen_plan']}{again}",
        *(
            f"  {label:10} rewards {found['spearman_rewards_mean']:.3f}, gains {found['spearman_gains_mean']:.3f}, "
            f"worst step {found['spearman_gains_worst_step']:.3f}"
            for label, found in (("in sample", searched["in_sample"]), ("held out", held_out))
        ),
    ]


def plan_table(records: Mapping[str, dict[str, Any]]) -> str:
    """The records as a table, one line per variant."""
    header = ["plan/guidance/decoder", *_COLUMNS]
    lines = [[name, *(_cell(record[key]) for key in _COLUMNS.values())] for name, record in records.items()]
    return table(header, lines)


def step_table(records: Mapping[str, dict[str, Any]], steps: Sequence[int]) -> str:
    """Correlation of the gains at each of these steps, one line per variant."""
    lines = [[name, *map(_cell, record["spearman_gains"])] for name, record in records.items()]
    return table(["gains at step", *map(str, steps)], lines)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns of text, the first one left-aligned and the others right-aligned."""
    rows = [header, *lines]
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    )


def _cell(value: float | None) -> str:
    if value is None or math.isnan(value):
        return "-"
    return str(value) if isinstance(value, int) else f"{value:.3f}"
