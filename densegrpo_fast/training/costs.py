"""What each iteration of a run asks of the model, for its record: evaluations, decodes, pictures and operations.

The numbers are the closed forms of `sampling/cost.py`, of the iteration as it was drawn. Operations are counted once,
on the meta device (`models/flops.py`), when the first record is written.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from densegrpo_fast.config import Config
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.completion_head import CompletionHead
from densegrpo_fast.models.feature_cache import FeatureCache
from densegrpo_fast.models.flops import (
    ModelFlops,
    architecture_of,
    cached_forward,
    clip_h_image,
    completion_head,
    count,
)
from densegrpo_fast.models.sd3 import SD3
from densegrpo_fast.sampling.cost import Evaluations, IterationCost
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.monitor_cost import MonitorCost

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


class CostLog:
    """Adds up what an iteration asks of the model, work that not every iteration has included.

    Operations are left out, with a warning, where the model's cannot be counted.

    Args:
        config: the run's.
        model: the policy.
        lookahead: the run's, if it has one.
    """

    def __init__(self, config: Config, model: FlowModel, lookahead: Lookahead | None):
        self.config, self.model, self.lookahead = config, model, lookahead
        self.reset()

    def reset(self) -> None:
        """Start again from nothing."""
        self._phases: dict[str, Evaluations] = {}
        self._parts: list[tuple[str, IterationCost | MonitorCost, int]] = []
        self._sparse: tuple[IterationCost, int] | None = None

    def iteration(self, cost: IterationCost, sparse: IterationCost, samples: int) -> None:
        """Add the rollout, lookahead, rewards and update of so many samples.

        Args:
            cost: of one sample.
            sparse: of one with the same settings and one reward per image, to compare with.
            samples: how many.
        """
        self._add("iteration", cost, cost.phases, samples)
        self._sparse = sparse, samples

    def calibration(self, cost: IterationCost, samples: int) -> None:
        """Add the exact completions by which so many samples found noise levels."""
        self._add("calibration", cost, {"calibration": cost.rollout + cost.lookahead}, samples)

    def monitor(self, cost: MonitorCost, samples: int) -> None:
        """Add an exact re-scoring of so many samples."""
        self._add("monitor", cost, {"monitor": cost.evaluations}, samples)

    def metrics(self) -> dict[str, float]:
        """All of it as docs/metrics.md has it: `nfe/*`, `nfe_guided/*`, `nfe_unguided/*`, `decodes/*`,
        `pictures_scored` and, where operations can be counted, `flops/*`."""
        found: dict[str, float] = {}
        for phase, evaluations in self._phases.items():
            found[f"nfe/{phase}"] = _whole(evaluations.forwards)
            found[f"nfe_guided/{phase}"] = _whole(evaluations.guided)
            found[f"nfe_unguided/{phase}"] = _whole(evaluations.unguided)
        costs = [(cost, samples) for _, cost, samples in self._parts]
        found["decodes/full"] = _whole(sum(cost.full_decodes * samples for cost, samples in costs))
        found["decodes/preview"] = _whole(
            sum(cost.preview_decodes * samples for cost, samples in costs if isinstance(cost, IterationCost))
        )
        found["pictures_scored"] = _whole(sum(cost.rewards * samples for cost, samples in costs))
        return found | self._operations()

    def _add(
        self, part: str, cost: IterationCost | MonitorCost, phases: Mapping[str, Evaluations], samples: int
    ) -> None:
        self._parts.append((part, cost, samples))
        for phase, each in phases.items():
            own = Evaluations(each.guided * samples, each.unguided * samples)
            self._phases[phase] = self._phases.get(phase, Evaluations()) + own

    def _operations(self) -> dict[str, float]:
        prices = self.prices
        if prices is None:
            return {}
        found: dict[str, float] = {"flops/iteration": 0.0}
        for part, cost, samples in self._parts:
            # a calibration's lookahead evaluates the policy itself
            cheap = None if part == "calibration" else prices.lookahead
            flops = samples * cost.flops(prices.unit, cheap) / GFLOP
            found["flops/iteration"] += flops
            if part != "iteration":
                found[f"flops/{part}"] = found.get(f"flops/{part}", 0.0) + flops
        if self._sparse is not None:
            sparse, samples = self._sparse
            found["flops/over_sparse"] = found["flops/iteration"] * GFLOP / (samples * sparse.flops(prices.unit))
        return found

    @cached_property
    def prices(self) -> Prices | None:
        """Operations of one row through each part; None where they cannot be counted."""
        if isinstance(self.model, SD3):
            try:
                return _prices(self.config, self.model, self.lookahead)
            except (TypeError, ValueError, RuntimeError) as error:
                reason = str(error)
        else:
            reason = "it is not of the SD3 family"
        logger.warning(
            "the metrics have no flops/*: the operations of this %s cannot be counted (%s)",
            type(self.model).__name__,
            reason,
        )
        return None


def _prices(config: Config, model: SD3, lookahead: Lookahead | None) -> Prices:
    """Counted once in a process for each kind of model, adapter and lookahead."""
    architecture, lora, targets = architecture_of(model), config.lora, tuple(config.lora.targets)
    parts = (model.transformer, model.pipeline.vae, model.preview_decoder)
    configs = [None if part is None else dict(part.config) for part in parts]
    copied, head, cache = False, None, None
    if lookahead is not None:
        copied, head, cache = lookahead.model is not model, lookahead.head, lookahead.cache
    shape = head.config if isinstance(head, CompletionHead) else None
    spec = cache.spec if isinstance(cache, FeatureCache) else None
    pickscore = "pickscore" in config.reward.terms
    again = config.model.gradient_checkpointing
    key = repr((architecture.title, configs, lora.rank, targets, copied, spec, shape, pickscore, again))
    if key not in _counted:
        unit = count(architecture, lora_rank=lora.rank, lora_targets=targets, reward=clip_h_image() if pickscore else 0)
        if shape is not None:
            unit = replace(unit, head=completion_head(shape))
        if again:
            unit = replace(unit, backward=unit.backward + unit.forward)
        forward = unit.reference_forward if copied else unit.forward
        if spec is not None:
            forward = cached_forward(architecture, spec, lora_rank=0 if copied else lora.rank, lora_targets=targets)
        _counted[key] = Prices(unit, forward)
    return _counted[key]


def _whole(number: float) -> float:
    """The number, as an integer where it is one but for the rounding of samples' shares."""
    return round(number) if abs(number - round(number)) < 1e-6 * max(1.0, abs(number)) else number
