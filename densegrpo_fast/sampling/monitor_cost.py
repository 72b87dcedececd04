"""What a lookahead monitor's exact re-scoring asks of the model, for each sample that it looks at, exactly counted."""

from __future__ import annotations

from dataclasses import dataclass

from densegrpo_fast.sampling.cost import Evaluations, UnitFlops, branched_iteration, lookahead_evaluations
from densegrpo_fast.sampling.dedup import CompletionDedup
from densegrpo_fast.sampling.plan import Plan


@dataclass(frozen=True)
class MonitorCost:
    """One trajectory's share of an exact re-scoring, which is not part of every iteration.

    Attributes:
        exact: evaluations of the exact completions.
        cheap: those by which a head that learns sees again what the lookahead's own completions show it.
        full_decodes: images through the pipeline's autoencoder.
        rewards: images scored.
        head_rows: rows that the head learns from, forward and backward.
    """

    exact: Evaluations
    cheap: Evaluations
    full_decodes: int | float
    rewards: int | float
    head_rows: int | float

    @property
    def evaluations(self) -> Evaluations:
        """All evaluations."""
        return self.exact + self.cheap

    @property
    def forwards(self) -> int | float:
        """Network forwards (NFE)."""
        return self.evaluations.forwards

    def flops(self, unit: UnitFlops, lookahead_forward: float | None = None) -> float:
        """Floating-point operations, as in `IterationCost.flops`; a backward through the head costs two forwards."""
        total = self.exact.forwards * unit.forward + self.full_decodes * unit.full_decode + self.rewards * unit.reward
        total += self.cheap.forwards * (unit.forward if lookahead_forward is None else lookahead_forward)
        return total + (3 * self.head_rows * unit.head if self.head_rows else 0.0)


def monitor_check(
    exact: Plan,
    *,
    guided: bool,
    noisy: tuple[bool, ...] | None = None,
    shared: int = 1,
) -> MonitorCost:
    """Cost of re-scoring trajectories exactly, with full guidance and the full decoder; no head learns from it.

    Args:
        exact: the plan through every step.
        guided, noisy: as in `lookahead_evaluations`.
        shared: as there; images are decoded and scored for each trajectory.

    Raises:
        ValueError: `noisy` is for another number of steps.
    """
    evaluations = lookahead_evaluations(exact, guided=guided, noisy=noisy, shared=shared)
    images = len(CompletionDedup((True,) * exact.num_steps if noisy is None else noisy).states)
    return MonitorCost(evaluations, Evaluations(), images, images, 0)


def branched_monitor_check(
    exact: Plan, *, branches: int, guided: bool, noisy: tuple[bool, ...] | None = None
) -> MonitorCost:
    """Cost of the same for the samples that share a trunk: what each branch leads to, completed exactly.

    Args:
        exact: the plan through every step.
        branches: samples that share a trunk.
        guided, noisy: as in `branched_iteration`.

    Raises:
        ValueError: as `branched_iteration`.
    """
    cost = branched_iteration(exact, branches=branches, trained_steps=0, guided=guided, kl=False, noisy=noisy)
    return MonitorCost(cost.lookahead, Evaluations(), cost.full_decodes, cost.rewards, 0)
