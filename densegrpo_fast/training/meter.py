"""What the phases of an iteration ask of the model, counted while they run: evaluations, decodes, pictures, operations.

`MeteredModel` stands in for a model and counts what goes through it under the phase that is open. Operations are the
counts times those of one row through each part, which `models/flops.py` counts once, on the meta device.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.config import Config
from densegrpo_fast.models.base import Conditioning, Decoder, FlowModel, Head, Velocity
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
from densegrpo_fast.rewards.base import Scorer, Scores
from densegrpo_fast.sampling.cost import sparse_iteration
from densegrpo_fast.sampling.lookahead import Lookahead

logger = logging.getLogger(__name__)

GFLOP = 1e9
ALWAYS = ("rollout", "lookahead", "update")
"""Phases that every record has evaluations of, if only 0."""
EXTRA = ("calibration", "monitor")
"""Phases that not every iteration has; their operations stand in the record by themselves, too."""
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


@dataclass
class Counts:
    """Rows that went through each part of the models.

    Attributes:
        guided: velocities with classifier-free guidance, two forwards each.
        unguided: velocities of one forward.
        policy, reference, lookahead: forwards of the policy, of the model without its adapter, of the lookahead's own.
        backward: evaluated rows with a gradient.
        full_decodes, preview_decodes: pictures through either decoder.
        scored: pictures that the reward scored.
        corrected, learned: rows through the completion head, and rows that it learned from.
    """

    guided: int = 0
    unguided: int = 0
    policy: int = 0
    reference: int = 0
    lookahead: int = 0
    backward: int = 0
    full_decodes: int = 0
    preview_decodes: int = 0
    scored: int = 0
    corrected: int = 0
    learned: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(Counts)))

    @property
    def forwards(self) -> int:
        """Network forwards (NFE)."""
        return 2 * self.guided + self.unguided

    def flops(self, prices: Prices) -> float:
        """Floating-point operations; a backward through the head costs two forwards."""
        unit = prices.unit
        total = self.policy * unit.forward + self.backward * unit.backward
        total += self.lookahead * prices.lookahead
        total += self.reference * unit.reference_forward + self.scored * unit.reward
        for rows, price in (
            (self.full_decodes, unit.full_decode),
            (self.preview_decodes, unit.preview_decode),
            (self.corrected + 3 * self.learned, unit.head),
        ):
            # a part that the model does not have costs NaN
            if rows:
                total += rows * price
        return total


@dataclass
class Meter:
    """Counts by phase since the last `reset`.

    Attributes:
        counts: by the name of the phase.
    """

    counts: dict[str, Counts] = field(default_factory=dict)
    _open: list[str] = field(default_factory=lambda: ["outside"])

    def reset(self) -> None:
        """Start again from nothing."""
        self.counts = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what happens inside for `phase`; an inner phase counts for itself alone."""
        self._open.append(phase)
        try:
            yield
        finally:
            self._open.pop()

    @property
    def now(self) -> Counts:
        """The counts of the open phase."""
        return self.counts.setdefault(self._open[-1], Counts())

    def total(self, *phases: str) -> Counts:
        """The sum of some phases."""
        return sum((self.counts.get(phase, Counts()) for phase in phases), Counts())


class MeteredModel(FlowModel):
    """A model that counts its velocities and decodes; in all else it is the one it stands for.

    Args:
        model: that one.
        meter: what counts.
        lookahead: whether this is the lookahead's model, whose forwards may be cheaper.
    """

    def __init__(self, model: FlowModel, meter: Meter, *, lookahead: bool = False):
        self.model, self.meter, self.lookahead = model, meter, lookahead
        self.latent_shape, self.device = model.latent_shape, model.device
        self._counting = True

    @property
    def mode(self) -> str:  # type: ignore[override]
        return self.model.mode

    @property
    def network(self) -> Any:  # type: ignore[override]
        return self.model.network

    @property
    def input_dtype(self) -> torch.dtype:
        return self.model.input_dtype

    def encode(self, prompts: list[str]) -> Conditioning:
        return self.model.encode(prompts)

    def velocity(
        self, latents: Tensor, sigma: Tensor, conditioning: Conditioning, guidance_scale: float = 1.0
    ) -> Velocity:
        velocity = self.model.velocity(latents, sigma, conditioning, guidance_scale)
        self.count(len(latents), guidance_scale)
        return velocity

    def count(self, rows: int, guidance_scale: float) -> None:
        if not self._counting:
            return
        counts, forwards = self.meter.now, self.model.forwards(guidance_scale) * rows
        if guidance_scale != 1.0:
            counts.guided += rows
        else:
            counts.unguided += rows
        if self.lookahead:
            counts.lookahead += forwards
        elif self.mode == "reference":
            counts.reference += forwards
        else:
            counts.policy += forwards
            # the conditional half of each evaluation; the other one has no gradient
            counts.backward += rows if torch.is_grad_enabled() else 0

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        before, self._counting = self._counting, False
        try:
            yield
        finally:
            self._counting = before

    def decode(self, latents: Tensor, decoder: Decoder = "full") -> Tensor:
        images = self.model.decode(latents, decoder)
        if decoder == "full":
            self.meter.now.full_decodes += len(latents)
        else:
            self.meter.now.preview_decodes += len(latents)
        return images

    def reference(self) -> AbstractContextManager[None]:
        return self.model.reference()

    def trainable_parameters(self) -> dict[str, torch.nn.Parameter]:
        return self.model.trainable_parameters()

    def sigmas(self, num_steps: int) -> Tensor:
        return self.model.sigmas(num_steps)

    def tap(self) -> AbstractContextManager[list[Tensor]]:
        return self.model.tap()

    def refresh(self) -> None:
        self.model.refresh()

    def forwards(self, guidance_scale: float) -> int:
        return self.model.forwards(guidance_scale)


@dataclass(frozen=True)
class MeteredHead:
    """A completion head that counts the rows it corrects."""

    head: Head
    meter: Meter

    def applies(self, state: int) -> bool:
        return self.head.applies(state)

    def __call__(self, hidden: Tensor, latents: Tensor, estimate: Tensor, state: Tensor) -> Tensor:
        self.meter.now.corrected += len(state)
        return self.head(hidden, latents, estimate, state)


def underlying(part: Any) -> Any:
    """What a metered model or head stands for; anything else is itself."""
    if isinstance(part, MeteredModel):
        return part.model
    return part.head if isinstance(part, MeteredHead) else part


@dataclass(frozen=True)
class MeteredReward:
    """A reward that counts the pictures it scores.

    Under `reward.overlap` it runs on a thread of its own, within the phase that waits for it.
    """

    reward: Scorer
    meter: Meter

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        self.meter.now.scored += len(images)
        return self.reward(images, prompts, metadata)


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
        extra = {p: counts[p].flops(self.prices) / GFLOP for p in EXTRA if p in counts}
        own = self.meter.total(*(phase for phase in counts if phase not in EXTRA))
        metrics["flops/iteration"] = sum(extra.values()) + own.flops(self.prices) / GFLOP
        metrics |= {f"flops/{phase}": flops for phase, flops in extra.items()}
        guided = self.model.forwards(self.config.sampler.guidance_scale) > 1
        kl = self.config.objective.kl_coef > 0
        sparse = sparse_iteration(num_steps, trained_steps=trained_steps, guided=guided, kl=kl)
        metrics["flops/over_sparse"] = metrics["flops/iteration"] * GFLOP / (samples * sparse.flops(self.prices.unit))
        return metrics

    @cached_property
    def prices(self) -> Prices | None:
        """Operations of one row through each part; None, with a warning, where they cannot be counted."""
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
        copied, head, cache = underlying(lookahead.model) is not model, underlying(lookahead.head), lookahead.cache
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
