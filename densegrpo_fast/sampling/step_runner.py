"""What completions do at a node of their plan: jump there from where they stand, and evaluate the model again."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

from densegrpo_fast.flow import ops
from densegrpo_fast.models.base import Cache, Conditioning, FlowModel


@dataclass(frozen=True)
class StepInput:
    """Rows on their way to a node.

    Attributes:
        latents: [m, ...] float32 at each row's last evaluation.
        velocity: [m, ...] float32 there.
        sigma: [m] float32 there.
        next_sigma: [m] float32 of the node.
        conditioning: prompts of the m rows.
        samples: [m] int64, which sample of the trajectory's batch each row completes; None where no cache asks.
    """

    latents: Tensor
    velocity: Tensor
    sigma: Tensor
    next_sigma: Tensor
    conditioning: Conditioning
    samples: Tensor | None

    def __len__(self) -> int:
        return len(self.latents)

    def select(self, rows: slice) -> StepInput:
        """Some of the rows; tensors are shared, not copied."""
        parts = {name: getattr(self, name)[rows] for name in ("latents", "velocity", "sigma", "next_sigma")}
        samples = None if self.samples is None else self.samples[rows]
        return replace(self, **parts, conditioning=self.conditioning.select(rows), samples=samples)


class StepOutput(NamedTuple):
    """Where a visit leads.

    Attributes:
        latents: [m, ...] float32 at the node.
        velocity: [m, ...] float32 there, guided if the visit was.
        hidden: [m, N, D] the network's last hidden tokens, of the conditional forward; None if they were not asked for.
    """

    latents: Tensor
    velocity: Tensor
    hidden: Tensor | None


class StepRunner:
    """Visits computed operation by operation; `graphs.GraphedStepRunner` replays them as CUDA graphs."""

    def begin(self, model: FlowModel) -> None:
        """Called before the visits of a batch of trajectories."""

    def __call__(
        self, model: FlowModel, rows: StepInput, step_index: int, scale: float, *, tap: bool, cache: Cache | None
    ) -> StepOutput:
        """Jump and evaluate. The result's tensors are the caller's to use until the next visit.

        Args:
            model: the policy, or a copy of it.
            rows: who travels.
            node: grid index where they meet.
            scale: guidance there; 1 = off.
            tap: whether the hidden tokens are wanted.
            cache: features of the rollout to take over, or None.
        """
        arrived = ops.euler_jump(rows.latents, rows.velocity, rows.sigma, rows.next_sigma)
        reusing: AbstractContextManager[None] = nullcontext()
        if cache is not None:
            assert rows.samples is not None
            reusing = cache.reuse(step_index, rows.samples)
        with model.tap() if tap else nullcontext([]) as tokens, reusing:
            velocity = model.velocity(arrived, rows.next_sigma, rows.conditioning, scale).combined()
        return StepOutput(arrived, velocity, tokens[0] if tap else None)
