"""What an iteration costs in floating-point operations: the meter's counts times those of one row through each part."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from functools import cached_property

from densegrpo_fast.config import Config
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.feature_cache import FeatureCache
from densegrpo_fast.models.flops import (
    ModelFlops,
    architecture_of,
    cached_forward,
    clip_h_image,
    count,
)
from densegrpo_fast.sampling.cost import sparse_iteration
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.training.meter import ALWAYS, EXTRA, Counts, Meter, underlying

logger = logging.getLogger(__name__)

GFLOP = 1e9
_counted: dict[str, Prices] = {}


@dataclass(frozen=True)
class Prices:
    """Floating-point operations of one row.

    Attributes:
        unit: through each part of the model.
        lookahead: through one network forward of the lookahead.
    """

    unit: ModelFlops
    lookahead: float

    def flops(self, counts: Counts) -> float:
        """Floating-point operations of what was counted."""
        unit = self.unit
        total = counts.policy * unit.forward + counts.backward * unit.backward
        total += counts.lookahead * self.lookahead
        total += counts.reference * unit.reference_forward + counts.scored * unit.reward
        for rows, price in (
            (counts.full_decodes, unit.full_decode),
            (counts.preview_decodes, unit.preview_decode),
        ):
            # a part that the model does not have costs NaN
            if rows:
                total += rows * price
        return total


class CostReport:
    """The meter's counts as the metrics have them (docs/metrics.md), with operations where they can be counted.

    Args:
        config: the run's.
        model: the policy.
        lookahead: the run's, if it has one.
        meter: what has counted.
    """

    def __init__(self, config: Config, model: FlowModel, lookahead: Lookahead | None, meter: Meter):
        self.config, self.model, self.lookahead, self.meter = config, underlying(model), lookahead, meter

    def metrics(self, num_steps: int, trained_steps: int, samples: int) -> dict[str, float]:
        """`nfe/*`, `nfe_guided/*`, `nfe_unguided/*`, `decodes/*`, `pictures_scored` and `flops/*`.

        Args:
            num_steps, trained_steps, samples: of the iteration; what it would cost with one reward per image is for
                comparison, so that is a formula (`sampling/cost.py`).
        """
        counts = self.meter.counts
        metrics: dict[str, float] = {}
        for phase in (*ALWAYS, *(phase for phase in EXTRA if phase in counts)):
            own = counts.get(phase, Counts())
            metrics[f"nfe/{phase}"] = own.forwards
            metrics[f"nfe_guided/{phase}"] = own.guided
            metrics[f"nfe_unguided/{phase}"] = own.unguided
        total = sum(counts.values(), Counts())
        metrics["decodes/full"], metrics["decodes/preview"] = total.full_decodes, total.preview_decodes
        metrics["pictures_scored"] = total.scored
        if self.prices is None:
            return metrics
        extra = {p: self.prices.flops(counts[p]) / GFLOP for p in EXTRA if p in counts}
        own = self.meter.total(*(phase for phase in counts if phase not in EXTRA))
        metrics["flops/iteration"] = sum(extra.values()) + self.prices.flops(own) / GFLOP
        metrics |= {f"flops/{phase}": flops for phase, flops in extra.items()}
        guided = self.model.forwards(self.config.sampler.guidance_scale) > 1
        objective = self.config.objective
        sparse = sparse_iteration(
            num_steps,
            trained_steps=trained_steps,
            guided=guided,
            kl=objective.kl_coef > 0,
            guidance_gradient=objective.guidance_gradient,
        )
        metrics["flops/over_sparse"] = metrics["flops/iteration"] * GFLOP / (samples * sparse.flops(self.prices.unit))
        return metrics

    @cached_property
    def prices(self) -> Prices | None:
        """Operations of one row through each part; None, with a warning, where they cannot be counted."""
        if isinstance(self.model, DiffusersModel):
            try:
                return _prices(self.config, self.model, self.lookahead)
            except (TypeError, ValueError, RuntimeError) as error:
                reason = str(error)
        else:
            reason = "it is no pipeline of diffusers"
        logger.warning(
            "the metrics have no flops/*: the operations of this %s cannot be counted (%s)",
            type(self.model).__name__,
            reason,
        )
        return None


def _prices(config: Config, model: DiffusersModel, lookahead: Lookahead | None) -> Prices:
    """Counted once in a process for each kind of model, adapter and lookahead."""
    architecture, rank, targets = architecture_of(model), config.adapter_rank, tuple(config.lora.targets)
    parts = (model.network, model.pipeline.vae, model.preview_decoder)
    configs = [None if part is None else dict(part.config) for part in parts]
    copied, cache = False, None
    if lookahead is not None:
        copied, cache = underlying(lookahead.model) is not model, lookahead.cache
    cached = isinstance(cache, FeatureCache)
    pickscore = "pickscore" in config.reward.terms
    again = config.model.gradient_checkpointing
    key = repr((architecture.title, configs, rank, targets, copied, cached, pickscore, again))
    if key not in _counted:
        unit = count(architecture, lora_rank=rank, lora_targets=targets, reward=clip_h_image() if pickscore else 0)
        if again:
            unit = replace(unit, backward=unit.backward + unit.forward)
        forward = unit.reference_forward if copied else unit.forward
        if cached:
            forward = cached_forward(architecture, lora_rank=0 if copied else rank, lora_targets=targets)
        _counted[key] = Prices(unit, forward)
    return _counted[key]
