"""What a training iteration costs with each lookahead, for models known by their configuration alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import combinations
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch

from densegrpo_fast.common.errors import SetupError
from densegrpo_fast.common.pretrained import is_hub_id
from densegrpo_fast.common.progress import PhaseProgress
from densegrpo_fast.fidelity.price import iteration_cost, price
from densegrpo_fast.fidelity.report import table
from densegrpo_fast.fidelity.variants import Variant, expanded
from densegrpo_fast.flow.schedule import sd3_sigmas
from densegrpo_fast.models.base import Decoder
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.flops import (
    ARCHITECTURES,
    Architecture,
    ModelFlops,
    architecture_of,
    cached_forward,
    clip_h_image,
    count,
    embedded,
    known,
)
from densegrpo_fast.models.published import MODELS
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.cost import (
    Evaluations,
    IterationCost,
    branched_iteration,
    dense_iteration,
    mean_cost,
    sparse_iteration,
)
from densegrpo_fast.sampling.lookahead import Guidance
from densegrpo_fast.sampling.plan import Plan
from densegrpo_fast.training.models import load_model
from densegrpo_fast.training.schedule import Schedule

if TYPE_CHECKING:
    from densegrpo_fast.config import Config

STEPS = 10
TRAINED = 9
BRANCHES = 8
WINDOW = 3
_RANKS = {"embedded": 16}
_RANK = 32
_SD35_MEDIUM = "stabilityai/stable-diffusion-3.5-medium"


def cost_records(
    make_plans: Sequence[Callable[[int], Plan]],
    guidances: Sequence[Guidance],
    decoders: Sequence[Decoder],
    *,
    copies: Sequence[str] = (),
    caches: Sequence[str] = (),
) -> dict[str, Any]:
    """Costs of T = 10 steps of which 9 are trained, one update per sample, per sample; plain JSON data.

    Each plan is counted for trajectories, for samples of which 8 are branches of one ODE trajectory at every trained
    step, for trajectories with noise in the window of steps 0..2 alone, which are then all that is trained, and for
    trajectories of which 3 trained steps are drawn, each alike, whose states alone are completed: the mean over all
    draws.

    Guidance is on where it takes a second forward (FLUX.1-dev's does not). The published plan, exact with full guidance
    and the full decoder, comes first. Caches are for SD3's transformers, and not for branches; what does not fit a
    model is named in its record's `left_out`.

    Args:
        make_plans: from T to a plan.
        guidances, decoders: to combine with every plan.
        copies: dtypes of copies, with the adapter merged, to count every plan with too.
        caches: features that are reused, to count every plan with too.

    Raises:
        ValueError: a plan does not fit 10 steps.
    """
    chosen = [make(STEPS) for make in make_plans]
    plain = [Variant(plan, guidance, decoder) for plan in chosen for guidance in guidances for decoder in decoders]
    records = {}
    with PhaseProgress("counting", len(ARCHITECTURES), "models") as progress:
        for name, architecture in ARCHITECTURES.items():
            built, rank = architecture(), _RANKS.get(name, _RANK)
            # the embedded model's own reward is image analysis: no arithmetic to speak of
            unit = count(built, lora_rank=rank, reward=0.0 if name == "embedded" else clip_h_image())
            extras = _Extras.of(built, unit, rank, copies=copies, caches=caches)
            variants = expanded(plain, copies=extras.copies, caches=extras.caches)
            published = Variant(plans.exact(STEPS), "full", "full")
            records[name] = _model_record(built, extras, list(dict.fromkeys([published, *variants])))
            progress()
    return records


def cost_text(records: dict[str, Any]) -> str:
    """The records as text, one table per model."""
    blocks = []
    for record in records.values():
        unit = record["flops"]
        parts = ("forward", "backward", "full_decode", "preview_decode", "reward")
        named = ", ".join(f"{part.replace('_', ' ')} {_amount(unit[part])}" for part in parts if unit[part] >= 0)
        guidance = "guided" if record["guided"] else "no second forward for guidance"
        header = ["plan/guidance/decoder", "guided", "unguided", "each", "decodes", "rewards", "extra", "KL", "no KL"]
        lines = [
            [
                name,
                *(f"{row[key]:.4g}" for key in ("nfe_guided", "nfe_unguided")),
                f"{row['lookahead_forward'] / unit['forward']:.2f}",
                *(f"{row[key]:.4g}" for key in ("decodes", "rewards")),
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
            + "".join(f"\nleft out: {name}: {reason}" for name, reason in record["left_out"].items())
        )
    blocks.append(
        "each: operations of one forward of the lookahead over those of the policy's.\n"
        "extra: operations that the dense iteration adds to the sparse one, or saves; KL, no KL: dense / sparse.\n"
        f"{BRANCHES} branches: so many samples share an ODE trajectory, which they leave at every trained step.\n"
        f"window: noise in these steps alone, which are trained; against a sparse iteration with the same window.\n"
        f"drawn: {WINDOW} of the {TRAINED} steps are trained, each alike (objective.step_sampling uniform), on average "
        f"over the draws; against a sparse iteration that trains {WINDOW}, too. --config prices importance.\n"
        "Both sides are this package's: first velocities reused, a backward pass through both halves of guidance."
    )
    return "\n\n".join(blocks)


def own_record(config: Config) -> dict[str, Any]:
    """What an iteration of a configuration costs, per sample; plain JSON data.

    Raises:
        SetupError: the model's sizes are not known without its weights, or these cannot be loaded; UsageError: an
            option does not fit the model.
    """
    built, sigmas = _architecture(config)
    rank, targets = config.adapter_rank, tuple(config.lora.targets)
    scored = clip_h_image() if "pickscore" in config.reward.terms else 0.0
    unit = count(built, lora_rank=rank, lora_targets=targets, reward=scored)
    if config.model.gradient_checkpointing:
        unit = replace(unit, backward=unit.backward + unit.forward)
    merged = config.lookahead.copy_dtype is not None
    ahead = unit.reference_forward if merged else unit.forward
    if config.lookahead.cache is not None:
        ahead = cached_forward(built, lora_rank=0 if merged else rank, lora_targets=targets)
    grid: Any = SimpleNamespace(device=torch.device("cpu"), sigmas=lambda steps: sigmas(steps))
    guided = built.guided and config.sampler.guidance_scale != 1.0
    cost = iteration_cost(config, Schedule(config, grid), guided=guided)
    nothing = Evaluations()
    parts = {
        "rollout": replace(cost, lookahead=nothing, policy=nothing, reference=nothing),
        "lookahead": replace(cost, rollout=nothing, policy=nothing, reference=nothing),
        "update": replace(cost, rollout=nothing, lookahead=nothing),
    }
    pictures = replace(cost, rollout=nothing, lookahead=nothing, policy=nothing, reference=nothing).flops(unit)
    return {
        "configuration": config.preset,
        "title": built.title,
        "operations": {name: part.flops(unit, ahead) - pictures for name, part in parts.items()}
        | {"pictures": pictures, "iteration": cost.flops(unit, ahead)},
        "nfe": {phase: evaluations.forwards for phase, evaluations in cost.phases.items()},
        "decodes": cost.full_decodes + cost.preview_decodes,
        "rewards": cost.rewards,
        "trained_steps": config.objective.trained_steps,
        "step_sampling": config.objective.step_sampling,
        "update": config.optimizer.update,
        "kl": config.objective.kl_coef > 0,
        **asdict(price(cost, config, unit, ahead, guided=guided)),
    }


def own_text(record: dict[str, Any]) -> str:
    """The record of a configuration as text."""
    operations, trained = record["operations"], record["trained_steps"]
    if isinstance(trained, int):
        trained = f"{trained}, drawn by {record['step_sampling']}"
    return "\n".join(
        [
            f"{record['configuration']}: {record['title']}",
            f"trained steps: {trained}; update {record['update']}; {'with' if record['kl'] else 'without'} KL",
            *(f"  {name:10} {_amount(flops)} per sample" for name, flops in operations.items()),
            f"  {sum(record['nfe'].values()):.4g} forwards, {record['decodes']:.4g} decodes, "
            f"{record['rewards']:.4g} rewards",
            f"over one reward per picture, all steps trained, forwards repeated: {record['over_replayed_sparse']:.2f}",
            f"  likewise without a repeated forward: {record['over_streamed_sparse']:.2f}",
            f"  with as many trained steps, forwards repeated: {record['over_sparse_of_as_many_steps']:.2f}",
        ]
    )


def _architecture(config: Config) -> tuple[Architecture, Callable[[int], torch.Tensor]]:
    """Of a configuration's model, and the sigmas of so many steps: without weights where it is known by name."""
    options = config.model
    if options.path == "embedded" and not options.height:
        return embedded(), partial(sd3_sigmas, shift=3.0)
    named = {model.hub: name for name, model in MODELS.items()}
    if options.path in named:
        if options.height != options.width:
            raise SetupError(
                f"--cost: {options.path} is known for square pictures, got {options.height}x{options.width}"
            )
        medium = options.path == _SD35_MEDIUM
        built = known(
            named[options.path],
            options.height or (1024 if medium else 0),
            77 + options.max_sequence_length if medium else 0,
            options.frames,
        )
        # of a schedule without its configuration: the levels do not change what is counted, if steps are not drawn by
        # them
        return built, partial(sd3_sigmas, shift=3.0)
    if is_hub_id(options.path):
        raise SetupError(
            f"--cost: of the hub's models {', '.join(named)} are known without their weights, for {options.path} give "
            "a pipeline directory as model.path"
        )
    model = load_model(options, torch.device("cpu"))
    if not isinstance(model, DiffusersModel):
        raise SetupError(f"--cost: the parts of a pipeline are counted, {options.path} is none")
    return architecture_of(model), model.sigmas


@dataclass(frozen=True)
class _Extras:
    """What a model's lookahead may do besides.

    Attributes:
        unit: operations of each part.
        forwards: operations of one lookahead forward, by (dtype of the copy, cache), either or None.
        copies, caches: those that fit.
        left_out: what does not, and why.
    """

    unit: ModelFlops
    forwards: dict[tuple[str | None, str | None], float]
    copies: tuple[str, ...]
    caches: tuple[str, ...]
    left_out: dict[str, str]

    @classmethod
    def of(
        cls,
        built: Architecture,
        unit: ModelFlops,
        rank: int,
        *,
        copies: Sequence[str],
        caches: Sequence[str],
    ) -> _Extras:
        """Count what of the wishes fits the model."""
        from diffusers import SD3Transformer2DModel

        forwards: dict[tuple[str | None, str | None], float] = {(None, None): unit.forward}
        forwards |= {(dtype, None): unit.reference_forward for dtype in copies}
        with torch.device("meta"):
            network = built.network()
        if not isinstance(network, SD3Transformer2DModel):
            reason = f"for SD3's transformer alone, this is {type(network).__name__}"
            return cls(unit, forwards, tuple(copies), (), {f"cache({spec})": reason for spec in caches})
        for spec in caches:
            # a copy has the adapter merged
            operations = cached_forward(built, lora_rank=0 if copies else rank)
            forwards |= {(dtype, spec): operations for dtype in copies or (None,)}
        return cls(unit, forwards, tuple(copies), tuple(caches), {})


def _model_record(architecture: Architecture, extras: _Extras, variants: Sequence[Variant]) -> dict[str, Any]:
    guided, unit = architecture.guided, extras.unit
    sparse = {
        (trained, kl): sparse_iteration(STEPS, trained_steps=trained, guided=guided, kl=kl).flops(unit)
        for trained in (TRAINED, WINDOW)
        for kl in (True, False)
    }
    rows = {}
    for variant in variants:
        if variant.guidance != "full" and not (guided and variant.plan.evaluations):
            continue
        forward = extras.forwards[variant.copy, variant.cache]
        ways = {
            variant.name: (None, False, False),
            f"{variant.name}, {BRANCHES} branches": (BRANCHES, False, False),
            f"{variant.name}, window 0..{WINDOW - 1}": (None, True, False),
            f"{variant.name}, {WINDOW} steps drawn": (None, False, True),
        }
        for title, (branches, window, drawn) in ways.items():
            if branches is not None and variant.cache is not None:
                continue
            trained = WINDOW if window or drawn else TRAINED
            cost, without = (_cost(variant, branches, trained, drawn, guided=guided, kl=kl) for kl in (True, False))
            operations = cost.flops(unit, forward)
            rows[title] = {
                "branches": branches,
                "window": list(range(WINDOW)) if window else None,
                "drawn": WINDOW if drawn else None,
                "copy": variant.copy,
                "cache": variant.cache,
                "nfe_guided": cost.lookahead.guided,
                "nfe_unguided": cost.lookahead.unguided,
                "lookahead_forward": forward,
                "decodes": cost.full_decodes + cost.preview_decodes,
                "rewards": cost.rewards,
                "extra_flops": operations - sparse[trained, True],
                "ratio_kl": operations / sparse[trained, True],
                "ratio_no_kl": without.flops(unit, forward) / sparse[trained, False],
            }
    return {
        "title": architecture.title,
        "guided": guided,
        "flops": asdict(unit),
        "sparse_kl": sparse[TRAINED, True],
        "sparse_no_kl": sparse[TRAINED, False],
        "sparse_window_kl": sparse[WINDOW, True],
        "sparse_window_no_kl": sparse[WINDOW, False],
        "left_out": extras.left_out,
        "plans": rows,
    }


def _cost(
    variant: Variant, branches: int | None, trained: int, drawn: bool, *, guided: bool, kl: bool
) -> IterationCost:
    options: dict[str, Any] = {"trained_steps": trained, "guided": guided, "kl": kl}
    options |= {"guidance": variant.guidance, "decoder": variant.decoder}
    noisy = tuple(step < trained for step in range(STEPS))
    if branches is not None:
        return branched_iteration(variant.plan, branches=branches, noisy=noisy, **options)
    if drawn:
        ends = [{*steps, *(step + 1 for step in steps), STEPS} for steps in combinations(range(TRAINED), trained)]
        return mean_cost([dense_iteration(variant.plan, completed=tuple(sorted(each)), **options) for each in ends])
    # of trajectories without a window the last step, which is not trained, has noise too
    return dense_iteration(variant.plan, noisy=noisy if trained == WINDOW else None, **options)


def _amount(flops: float) -> str:
    return f"{flops / 1e12:.3f} TFLOP" if abs(flops) >= 1e11 else f"{flops / 1e9:.3f} GFLOP"
