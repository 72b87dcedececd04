"""The noise-free end of a trajectory: DPM-Solver++ of second order as a velocity for Euler's jump, and a coarser grid.

On the path x = (1 - sigma) * data + sigma * noise the solver's first-order step is Euler's, and its second-order one
("midpoint") adds a multiple c of how the prediction m = x - sigma * v of the data has changed since the last step:

    next = x + (sigma' - sigma) * v + c * (m_0 - m_1),    c = -data_weights[1] of `dpm_solver.solver_step`

so that it is Euler's jump along the velocity v + c / (sigma' - sigma) * (m_0 - m_1). MixGRPO-Flash (arXiv 2507.21802)
ends its trajectories so, over fewer steps than the sampler's grid has left. Its code takes m_1 of the first step from
the last noisy one; here the remainder has a memory of its own, because a prediction from before the noise differs from
one after it by that noise. So the remainder's first step is Euler's, as is the one onto sigma 0.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from densegrpo_fast.flow.dpm_solver import solver_step
from densegrpo_fast.flow.dynamics import A, B, StepCoefficients


@dataclass(frozen=True, eq=False)
class Visited:
    """A state at which the model was evaluated.

    Attributes:
        index: of the grid.
        latents: [B, ...] float32.
        velocity: [B, ...] float32 there.
    """

    index: int
    latents: Tensor
    velocity: Tensor


@dataclass(frozen=True)
class Remainder:
    """Second-order steps from a grid index on.

    Attributes:
        sigmas: the grid, T+1 numbers on the host.
        start: index of the first state that no noise follows.
    """

    sigmas: tuple[float, ...]
    start: int

    def slope(self, here: Visited, there: int, before: Visited | None) -> Tensor:
        """Velocity by which Euler's jump from `here` to index `there` is the solver's step.

        Args:
            here: the state.
            there: a later index.
            before: the evaluation before this one; None, or one before `start`, makes the step first-order.

        Returns:
            [B, ...]; the velocity itself where the step is first-order.
        """
        sigma = self.sigmas[here.index]
        if before is None or before.index < self.start or self.sigmas[there] == 0:
            return here.velocity
        past = self.sigmas[before.index]
        change = here.latents - sigma * here.velocity - (before.latents - past * before.velocity)
        return torch.add(here.velocity, change, alpha=_bend(past, sigma, self.sigmas[there]))

    def along(self, latents: Tensor, velocities: Tensor, step: int) -> Tensor:
        """`slope` of one step of a trajectory [T+1, B, ...] with velocities [T, B, ...]."""
        before = Visited(step - 1, latents[step - 1], velocities[step - 1]) if step else None
        return self.slope(Visited(step, latents[step], velocities[step]), step + 1, before)


@lru_cache(maxsize=4096)
def _bend(past: float, sigma: float, next_sigma: float) -> float:
    return -solver_step((past, sigma, next_sigma), 1).data_weights[1] / (next_sigma - sigma)


def with_remainder(
    coefficients: StepCoefficients, start: int, *, steps: int | None = None, second_order: bool = False
) -> StepCoefficients:
    """The same sampler with another way from state `start`, which no noise may follow, to the end.

    Args:
        coefficients: tables of T steps; the rows before `start` stay as they are, to the bit.
        start: grid index, in 0..T.
        steps: how many of the T - start are left, at equal distances along the grid, between whose points sigma is
            linear; None = all.
        second_order: whether they are DPM-Solver++'s.

    Raises:
        ValueError: a step from `start` on injects noise, or `steps` is out of range.
    """
    left = coefficients.num_steps - start
    count = left if steps is None else steps
    if left < 0 or any(coefficients.noisy[start:]):
        raise ValueError(f"with_remainder: no step from {start} on may inject noise, got {coefficients.noisy}")
    if not min(left, 1) <= count <= left:
        raise ValueError(f"with_remainder: steps must lie in {min(left, 1)}..{left}, got {count}")
    if count < left:
        grid = torch.cat([coefficients.sigmas[:start], _coarser(coefficients.sigmas[start:], count)])
        euler = torch.zeros_like(coefficients.table[:count])
        euler[:, A] = 1.0
        euler[:, B] = grid[start:].diff()
        coefficients = replace(
            coefficients,
            table=torch.cat([coefficients.table[:start], euler]),
            sigmas=grid,
            noise_level=(*coefficients.noise_level[:start], *[0.0] * count),
            noisy=(*coefficients.noisy[:start], *[False] * count),
        )
    if not second_order:
        return coefficients
    return replace(coefficients, remainder=Remainder(tuple(coefficients.sigmas.tolist()), start))


def _coarser(grid: Tensor, steps: int) -> Tensor:
    """A grid of so many steps with the same ends."""
    places = torch.arange(steps + 1, dtype=torch.float64) * (len(grid) - 1) / steps
    below = places.long().clamp(max=len(grid) - 2)
    exact = grid.cpu().double()
    return torch.lerp(exact[below], exact[below + 1], places - below).to(grid)
