"""Which lookaheads a fidelity run measures, and on what, by its options and its configuration.

Unless plans are named, the lookahead that the configuration trains with is among them, with its copy and cache.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.credit import registry
from densegrpo_fast.fidelity.options import plans_of
from densegrpo_fast.fidelity.target import FidelityTarget, analytic_target, pipeline_target
from densegrpo_fast.models.base import Decoder
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.lookahead import Guidance
from densegrpo_fast.sampling.plan import Plan

if TYPE_CHECKING:
    from densegrpo_fast.config import Config

Value = TypeVar("Value")


@dataclass(frozen=True)
class Variant:
    """One way to compute lookahead rewards.

    Attributes:
        plan: where completions evaluate the model.
        guidance: of completions after their first velocity.
        decoder: of all images.
        copy: dtype of the target's copy that is evaluated instead of the policy, or None.
        cache: spec of the features that its forwards take over from the rollout, or None.
        vae: precision of the full decoder, or None for the target's own.
    """

    plan: Plan
    guidance: Guidance
    decoder: Decoder
    copy: str | None = None
    cache: str | None = None
    vae: str | None = None

    @property
    def name(self) -> str:
        """Such as "nodes{3,6}+copy(bfloat16)+cache(text:own)/cond_only/preview" or "exact/full/full(bfloat16)"."""
        decoder = self.decoder if self.vae is None else f"{self.decoder}({self.vae})"
        extras = "".join(f"+{name}({value})" for name in ("copy", "cache") if (value := getattr(self, name)))
        return f"{self.plan.name}{extras}/{self.guidance}/{decoder}"


def reference(num_steps: int) -> Variant:
    """What every variant is compared with: every remaining step, full guidance, full decoder."""
    return Variant(plans.exact(num_steps), "full", "full")


def expanded(
    variants: Sequence[Variant],
    *,
    copies: Iterable[str],
    caches: Iterable[str],
    vaes: Iterable[str] = (),
) -> list[Variant]:
    """The variants, and beside each what else its completions may do.

    Args:
        variants: without any of that.
        copies: dtypes of copies to evaluate too, where anything is evaluated.
        caches: specs of features to take over too, by the copies or, without any, by the model itself.
        vaes: precisions in which the full decoder decodes too, whatever the completions do.
    """
    wanted = [*variants]
    evaluating, dtypes = [variant for variant in wanted if variant.plan.evaluations], list(copies)
    wanted += [replace(variant, copy=dtype) for dtype in dtypes for variant in evaluating]
    readers: list[str | None] = [*dtypes] or [None]
    wanted += [replace(v, copy=dtype, cache=spec) for dtype in readers for spec in caches for v in evaluating]
    in_full = [variant for variant in wanted if variant.decoder == "full"]
    return wanted + [replace(variant, vae=dtype) for dtype in vaes for variant in in_full]


class Choice(NamedTuple):
    """What to measure.

    Attributes:
        target: on what.
        variants: the lookaheads, each once.
        configured: those of them that the configuration trains with; empty where plans are named, or without a
            lookahead.
        ways: of which plan a search is to find the best, each with the exact one in its place.
    """

    target: FidelityTarget
    variants: list[Variant]
    configured: list[Variant]
    ways: list[Variant]


def choose(options: argparse.Namespace, config: Config | None) -> Choice:
    """What the options ask for.

    Args:
        options: parsed.
        config: of the pipeline; None = the analytic flow.

    Raises:
        UserError: an option does not fit the others, the configuration or its model.
    """
    makers = plans_of(options)
    if config is None:
        target, configured = analytic_target(options.groups), []
        guidances, decoders = options.guidance or ["full"], options.decoder or ["full"]
    else:
        for make in makers:
            _made(make, config.sampler.num_steps)
        _check(config, options)
        configured = [] if options.plans else configured_variants(config)
        target = _pipeline(options, config, configured)
        guidances = options.guidance or [config.lookahead.guidance]
        decoders = options.decoder or [config.lookahead.decoder]
    _check_decoders(target, options, [*decoders, *(variant.decoder for variant in configured)])
    if not target.guided:
        # without guidance there is nothing to drop after the first velocity
        guidances = ["full"]
    steps = target.coefficients.num_steps
    chosen = [*(variant.plan for variant in configured), *(_made(make, steps) for make in makers)]
    exact = plans.exact(steps)

    def beside(variants: list[Variant]) -> list[Variant]:
        return expanded(
            variants,
            copies=_once(options.copy_dtype),
            caches=_once(options.cache),
            vaes=_once(options.vae_dtype),
        )

    asked = beside([variant for plan in chosen for variant in _crossed(plan, guidances, decoders)])
    variants = [*configured, *asked]
    if any(variant.decoder == "preview" for variant in variants):
        variants = [Variant(exact, "full", "preview"), *variants]
    ways = beside(_crossed(exact, guidances, decoders))
    ways += [Variant(exact, v.guidance, v.decoder, copy=v.copy, cache=v.cache) for v in configured]
    return Choice(target, _once(variants), configured, _once(ways))


def configured_variants(config: Config) -> list[Variant]:
    """The lookahead that a configuration trains with: none if it has no use for one, several with granularities."""
    if not (config.uses_lookahead or config.uses_branches):
        return []
    from densegrpo_fast.training.lookahead import build_plan

    options, steps = config.lookahead, config.sampler.num_steps
    chosen = [build_plan(config, steps)]
    if "granularities" in registry.find(config.credit.method).options:
        chosen = [plans.strided(steps, stride) for stride in config.credit.granularities]
    guidance: Guidance = "full" if config.sampler.guidance_scale == 1.0 else options.guidance
    extras: dict[str, Any] = {"copy": options.copy_dtype, "cache": options.cache}
    return [Variant(plan, guidance, options.decoder, **extras) for plan in chosen]


def _crossed(plan: Plan, guidances: list[Guidance], decoders: list[Decoder]) -> list[Variant]:
    # without an evaluation every guidance is the same
    return [
        Variant(plan, guidance, decoder)
        for guidance in (guidances if plan.evaluations else guidances[:1])
        for decoder in decoders
    ]


def _pipeline(options: argparse.Namespace, config: Config, configured: list[Variant]) -> FidelityTarget:
    """The configuration's target, with what the options and its own lookahead ask for."""
    dtypes, specs = _once(options.copy_dtype), _once(options.cache)
    return pipeline_target(
        config,
        options.adapter,
        options.groups,
        copy_dtypes=_once([*dtypes, *(variant.copy for variant in configured if variant.copy)]),
        vae_dtypes=_once(options.vae_dtype),
        caches=_once(
            [
                *((dtype, spec) for dtype in dtypes or (None,) for spec in specs),
                *((variant.copy, variant.cache) for variant in configured if variant.cache),
            ]
        ),
    )


def _check(config: Config, options: argparse.Namespace) -> None:
    """Refuse a configuration of which one set of trajectories, or branches, shows only a part.

    Raises:
        UsageError: always with the way out.
    """
    if config.window.remainder_share < 1:
        raise UsageError("window.remainder_share: plans are compared on all of the grid; set it to 1")
    windows, trained = config.schedule().reached(), config.objective.trained_steps
    if len(windows) > 1:
        raise UsageError(
            f"window.schedule: expected fixed, as plans are compared in one window, got {config.window.schedule} with "
            f"the windows {', '.join(f'{window[0]}..{window[-1]}' for window in windows)}; choose by "
            "--window.schedule fixed --window.first STEP",
        )
    if config.sampler.branches is None:
        return
    if isinstance(trained, int) and trained < len(config.windows()[0]):
        raise UsageError(
            f"objective.trained_steps: expected all_but_last or a list of steps, as plans are compared in the same "
            f"steps, got {trained} drawn for each iteration",
        )
    if options.cache:
        problem = f"is for trajectories, and {config.preset} has sampler.branches; leave it out"
        raise UsageError(f"--cache {problem}")
    if "reuse" in (options.guidance or ()):
        raise UsageError("--guidance: expected full or cond_only with sampler.branches, got reuse")


def _check_decoders(target: FidelityTarget, options: argparse.Namespace, decoders: list[Decoder]) -> None:
    if not {*decoders} <= {*target.decoders}:
        key = "--decoder" if "preview" in (options.decoder or ()) else "lookahead.decoder"
        raise UsageError(f"{key}: this model has no preview decoder, expected full")


def _made(make: Callable[[int], Plan], num_steps: int) -> Plan:
    try:
        return make(num_steps)
    except ValueError as error:
        raise UsageError(f"--plans: {error}") from None


def _once(values: Iterable[Value] | None) -> list[Value]:
    return list(dict.fromkeys(values or ()))
