"""What a training iteration costs with each lookahead, for models known by their configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from densegrpo_fast.fidelity.report import table
from densegrpo_fast.models.base import Decoder
from densegrpo_fast.models.flops import ARCHITECTURES, Architecture, ModelFlops, clip_h_image, count
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.cost import IterationCost, branched_iteration, dense_iteration, sparse_iteration
from densegrpo_fast.sampling.lookahead import Guidance
from densegrpo_fast.sampling.plan import Plan

STEPS = 10
TRAINED = 9
BRANCHES = 8
_EMBEDDED_RANK = 16


def cost_records(
    make_plans: Sequence[Callable[[int], Plan]], guidances: Sequence[Guidance], decoders: Sequence[Decoder]
) -> dict[str, Any]:
    """Costs of T = 10 steps of which 9 are trained, one update per sample, per sample; plain JSON data.

    Each plan is counted for trajectories, and for samples of which 8 are branches of one trunk at every trained step.

    Guidance is on where it takes a second forward (FLUX.1-dev's does not). The published plan, exact with full guidance
    and the full decoder, comes first.

    Args:
        make_plans: from T to a plan.
        guidances, decoders: to combine with every plan.

    Raises:
        ValueError: a plan does not fit 10 steps.
    """
    chosen = [make(STEPS) for make in make_plans]
    variants: list[tuple[Plan, Guidance, Decoder]] = [(plans.exact(STEPS), "full", "full")]
    variants += [(plan, guidance, decoder) for plan in chosen for guidance in guidances for decoder in decoders]
    found = {}
    for name, architecture in ARCHITECTURES.items():
        built = architecture()
        embedded = name == "embedded"
        # the embedded model's own reward is image analysis: no arithmetic to speak of
        unit = count(built, lora_rank=_EMBEDDED_RANK if embedded else 32, reward=0.0 if embedded else clip_h_image())
        found[name] = _model_record(built, unit, list(dict.fromkeys(variants)))
    return found


def cost_text(records: dict[str, Any]) -> str:
    """The records as text, one table per model."""
    blocks = []
    for record in records.values():
        unit = record["flops"]
        parts = ("forward", "backward", "full_decode", "preview_decode", "reward")
        named = ", ".join(f"{part.replace('_', ' ')} {_amount(unit[part])}" for part in parts)
        guidance = "guided" if record["guided"] else "no second forward for guidance"
        header = ["plan/guidance/decoder", "guided", "unguided", "decodes", "rewards", "extra", "KL", "no KL"]
        lines = [
            [
                name,
                *(str(row[key]) for key in ("nfe_guided", "nfe_unguided", "decodes", "rewards")),
                _amount(row["extra_flops"]),
                f"{row['ratio_kl']:.3f}",
                f"{row['ratio_no_kl']:.3f}",
            ]
            for name, row in record["plans"].items()
        ]
        blocks.append(
            f"{record['title']}; {STEPS} steps, {TRAINED} trained, {guidance}\n"
            f"per row: {named}\n"
            f"sparse iteration per trajectory: {_amount(record['sparse_kl'])} with KL, "
            f"{_amount(record['sparse_no_kl'])} without\n{table(header, lines)}"
        )
    blocks.append(
        "extra: operations that the dense iteration adds to the sparse one, or saves; KL, no KL: dense / sparse.\n"
        f"{BRANCHES} branches: so many samples share a trunk, which they leave at every trained step.\n"
        "Both sides are this package's: first velocities reused, unconditional halves without a backward pass."
    )
    return "\n\n".join(blocks)


def _model_record(
    architecture: Architecture, unit: ModelFlops, variants: Sequence[tuple[Plan, Guidance, Decoder]]
) -> dict[str, Any]:
    guided = architecture.guided
    sparse = {
        kl: sparse_iteration(STEPS, trained_steps=TRAINED, guided=guided, kl=kl).flops(unit) for kl in (True, False)
    }
    rows = {}
    for plan, guidance, decoder in variants:
        if guidance != "full" and not (guided and plan.evaluations):
            continue
        name = f"{plan.name}/{guidance}/{decoder}"
        for branches, title in ((None, name), (BRANCHES, f"{name}, {BRANCHES} branches")):
            costs = {kl: _cost(plan, guidance, decoder, branches, guided=guided, kl=kl) for kl in (True, False)}
            cost = costs[True]
            rows[title] = {
                "branches": branches,
                "nfe_guided": cost.lookahead.guided,
                "nfe_unguided": cost.lookahead.unguided,
                "decodes": cost.full_decodes + cost.preview_decodes,
                "rewards": cost.rewards,
                "extra_flops": cost.flops(unit) - sparse[True],
                "ratio_kl": cost.flops(unit) / sparse[True],
                "ratio_no_kl": costs[False].flops(unit) / sparse[False],
            }
    return {
        "title": architecture.title,
        "guided": guided,
        "flops": asdict(unit),
        "sparse_kl": sparse[True],
        "sparse_no_kl": sparse[False],
        "plans": rows,
    }


def _cost(
    plan: Plan, guidance: Guidance, decoder: Decoder, branches: int | None, *, guided: bool, kl: bool
) -> IterationCost:
    options: dict[str, Any] = {"trained_steps": TRAINED, "guided": guided, "kl": kl}
    options |= {"guidance": guidance, "decoder": decoder}
    if branches is None:
        return dense_iteration(plan, **options)
    return branched_iteration(
        plan, branches=branches, noisy=(True,) * TRAINED + (False,) * (STEPS - TRAINED), **options
    )


def _amount(flops: float) -> str:
    return f"{flops / 1e12:.3f} TFLOP" if abs(flops) >= 1e11 else f"{flops / 1e9:.3f} GFLOP"
