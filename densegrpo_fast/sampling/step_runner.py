"""What completions do at a step index of their plan: jump there from their last evaluation, and evaluate again."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from densegrpo_fast.flow import ops
from densegrpo_fast.models.base import Cache, Conditioning, FlowModel


@dataclass(frozen=True)
class StepInput:
    """Rows that are evaluated at one step index.

    Attributes:
        latents: [m, ...] float32 at each row's last evaluation, or at the step index itself without a velocity.
        next_sigma: [m] float32, the noise level of the step index.
        conditioning: prompts of the m rows.
        velocity: [m, ...] float32 at `latents`, which the jump to the step index follows; None = no jump.
        sigma: [m] float32 at `latents`; None without a jump.
        samples: [m] int64, which sample of the rollout each row completes; None where no cache asks.
    """

    latents: Tensor
    next_sigma: Tensor
    conditioning: Conditioning
    velocity: Tensor | None = None
    sigma: Tensor | None = None
    samples: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def select(self, rows: slice) -> StepInput:
        """Some of the rows; tensors are shared, not copied."""
        names = ("latents", "next_sigma", "velocity", "sigma", "samples")
        parts = {name: value[rows] for name in names if (value := getattr(self, name)) is not None}
        return replace(self, **parts, conditioning=self.conditioning.select(rows))

    def padded(self, count: int) -> StepInput:
        """With the last row repeated until there are `count`."""
        more = count - len(self)
        if more == 0:
            return self
        names = ("latents", "next_sigma", "velocity", "sigma", "samples")
        found = {name: value for name in names if (value := getattr(self, name)) is not None}
        rows = {name: torch.cat([value, value[-1:].expand(more, *value.shape[1:])]) for name, value in found.items()}
        last = self.conditioning.rows[-1:].expand(more)
        conditioning = replace(self.conditioning, rows=torch.cat([self.conditioning.rows, last]))
        return replace(self, **rows, conditioning=conditioning)


class StepOutput(NamedTuple):
    """What an evaluation gives.

    Attributes:
        latents: [m, ...] float32 at the step index; None without a jump, as they were there already.
        velocity: [m, ...] float32 there, guided if that was asked for.
    """

    latents: Tensor | None
    velocity: Tensor


class StepRunner:
    """Evaluates operation by operation; `graphs.GraphedStepRunner` replays CUDA graphs instead."""

    def begin(self, model: FlowModel) -> None:
        """Called before the evaluations of a rollout's completions."""

    def __call__(
        self, model: FlowModel, rows: StepInput, step_index: int, scale: float, *, cache: Cache | None
    ) -> StepOutput:
        """Jump and evaluate. The result's tensors are the caller's to use until the next call.

        Args:
            model: the policy, or a copy of it.
            rows: what is evaluated.
            step_index: grid index where the rows meet.
            scale: guidance there; 1 = off.
            cache: features of the rollout to reuse, or None.
        """
        arrived = None
        if rows.velocity is not None and rows.sigma is not None:
            arrived = ops.euler_jump(rows.latents, rows.velocity, rows.sigma, rows.next_sigma)
        latents = rows.latents if arrived is None else arrived
        reusing: AbstractContextManager[None] = nullcontext()
        if cache is not None:
            assert rows.samples is not None
            reusing = cache.reuse(step_index, rows.samples)
        with reusing:
            velocity = model.velocity(latents, rows.next_sigma, rows.conditioning, scale).combined()
        return StepOutput(arrived, velocity)
