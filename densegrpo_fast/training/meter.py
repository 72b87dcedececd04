"""What an iteration's phases ask of the models, counted while they run: seconds, evaluations, decodes, operations.

`MeteredModel` stands in for a model and counts what goes through it under the phase that is open; `costs.py` knows what
each row costs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.models.base import Conditioning, Decoder, FlowModel, GuidanceGradient, Velocity
from densegrpo_fast.rewards.base import Scorer, Scores
from densegrpo_fast.training.distributed import World

logger = logging.getLogger(__name__)

PHASES = ("calibration", "rollout", "lookahead", "reward", "monitor", "update")
ALWAYS = ("rollout", "lookahead", "update")
"""Phases that every record has evaluations of, if only 0."""
EXTRA = ("calibration", "monitor")
"""Phases that not every iteration has; their operations stand in the record by themselves, too."""


@dataclass
class Counts:
    """Rows that went through each part of the models.

    Attributes:
        guided: velocities with classifier-free guidance, two forwards each.
        unguided: velocities of one forward.
        policy, reference, lookahead: forwards of the policy, of the model without its adapter, of the lookahead's own.
        backward: forwards with a gradient.
        full_decodes, preview_decodes: pictures through either decoder.
        scored: pictures that the reward scored.
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

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(getattr(self, part.name) + getattr(other, part.name) for part in fields(Counts)))

    @property
    def forwards(self) -> int:
        """Network forwards (NFE)."""
        return 2 * self.guided + self.unguided


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

    def add_up(self, world: World) -> None:
        """Let the counts be those of all processes together."""
        if world.size == 1:
            return
        names, own = [part.name for part in fields(Counts)], [self.counts.get(phase, Counts()) for phase in PHASES]
        table = torch.tensor([[getattr(counts, name) for name in names] for counts in own], dtype=torch.int64)
        rows = world.sum(table).tolist()
        self.counts = {phase: Counts(*row) for phase, row in zip(PHASES, rows, strict=True) if any(row)}

    def total(self, *phases: str) -> Counts:
        """The sum of some phases."""
        return sum((self.counts.get(phase, Counts()) for phase in phases), Counts())


class PhaseTimer:
    """Seconds spent in each named phase.

        with timer("rollout"):
            ...

    A phase inside another counts for itself alone, so the seconds of all phases add up to time that passed
    once.

    Args:
        synchronize: called at the beginning and the end of a phase, such as `torch.cuda.synchronize`: a GPU
            works on after the call that started it has returned.
        clock: seconds that only grow.
        cpu_clock: the same of the CPU: by default what all threads of this process have spent.
    """

    def __init__(
        self,
        synchronize: Callable[[], object] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
        cpu_clock: Callable[[], float] = time.process_time,
    ) -> None:
        self._synchronize = synchronize
        self._clock, self._cpu_clock = clock, cpu_clock
        self._seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = self._cpu_since = self._cpu_seconds = 0.0

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count the time inside for `phase`."""
        self._charge()
        self._open.append(phase)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds by phase since the last `reset`, in the order the phases first ended."""
        return dict(self._seconds)

    def cpu_seconds(self) -> float:
        """CPU seconds since the last `reset`, of all phases together."""
        return self._cpu_seconds

    def reset(self) -> None:
        """Start again from zero."""
        self._seconds.clear()
        self._cpu_seconds = 0.0

    def _charge(self) -> None:
        self._synchronize()
        now, cpu_now = self._clock(), self._cpu_clock()
        if self._open:
            phase = self._open[-1]
            self._seconds[phase] = self._seconds.get(phase, 0.0) + now - self._since
            self._cpu_seconds += cpu_now - self._cpu_since
        self._since, self._cpu_since = now, cpu_now


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
    def sharded(self) -> bool:  # type: ignore[override]
        return self.model.sharded

    def blocks(self) -> list[torch.nn.Module]:
        return self.model.blocks()

    @property
    def input_dtype(self) -> torch.dtype:
        return self.model.input_dtype

    def encode(self, prompts: list[str]) -> Conditioning:
        return self.model.encode(prompts)

    def velocity(
        self,
        latents: Tensor,
        sigma: Tensor,
        conditioning: Conditioning,
        guidance_scale: float = 1.0,
        guidance_gradient: GuidanceGradient = "full",
    ) -> Velocity:
        velocity = self.model.velocity(latents, sigma, conditioning, guidance_scale, guidance_gradient)
        self.count(len(latents), guidance_scale)
        if self._counting:
            for half in (velocity.cond, velocity.uncond):
                self.meter.now.backward += len(latents) if half is not None and half.requires_grad else 0
        return velocity

    def count(self, rows: int, guidance_scale: float) -> None:
        if not self._counting:
            return
        counts, forwards = self.meter.now, rows
        if self.forwards(guidance_scale) > 1:
            counts.guided += rows
            forwards = 2 * rows
        else:
            counts.unguided += rows
        if self.lookahead:
            counts.lookahead += forwards
        elif self.mode == "reference":
            counts.reference += forwards
        else:
            counts.policy += forwards

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

    def start(self, noise: Tensor, sigmas: Tensor) -> Tensor:
        return self.model.start(noise, sigmas)

    def refresh(self) -> None:
        self.model.refresh()

    def forwards(self, guidance_scale: float) -> int:
        return self.model.forwards(guidance_scale)


def underlying(model: Any) -> Any:
    """What a metered model stands for; anything else is itself."""
    return model.model if isinstance(model, MeteredModel) else model


@dataclass(frozen=True)
class MeteredReward:
    """A reward that counts the pictures it scores.

    Under `reward.overlap` it runs on a thread of its own, within the phase that waits for it.
    """

    reward: Scorer
    meter: Meter

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        # of a video some frames
        frames = min(getattr(self.reward, "frames", 1), images.shape[2]) if images.ndim == 5 else 1
        self.meter.now.scored += len(images) * frames
        return self.reward(images, prompts, metadata)
