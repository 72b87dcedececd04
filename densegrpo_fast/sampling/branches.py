"""Branches: one noise-free trajectory, and at single steps several samples that leave its state with their own noise.

The sampling of TempFlow-GRPO (arXiv 2508.04324) and Granular-GRPO (arXiv 2510.01982). Branches of one state differ by
the noise of one step alone, so their rewards compare nothing else; what follows that step is noise-free again, and is
a lookahead's to complete. The velocity of a state is evaluated once for all its branches, in sampling and in training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from densegrpo_fast.flow import ops
from densegrpo_fast.flow.dynamics import StepCoefficients
from densegrpo_fast.flow.noise import branch_stream
from densegrpo_fast.models.base import Conditioning, FlowModel
from densegrpo_fast.sampling.dedup import CompletionDedup
from densegrpo_fast.sampling.rollout import GroupedRewards, RolloutState, Trajectory, rollout

if TYPE_CHECKING:
    from densegrpo_fast.sampling.lookahead import Lookahead


@dataclass(frozen=True)
class BranchedRollout:
    """S noise-free trajectories with K branches at each of M steps: a `Rollout`.

    Branch k of trajectory s is sample b = s*K + k of B = S*K.

    Attributes:
        ode_trajectory: of S rows, as far as the last state that branches.
        branch_latents: [M, B, ...] float32, where the branches of each of the M steps lead.
        log_probs: [T, B] float32 of the branches' steps; 0 at steps without branches.
        coefficients: of the sampler, with noise in the M branching steps.
        sample_conditioning: prompts of the B branches.
        branches: K.
        branch_velocities: [M', B, ...] float32, the guided velocity where the branches of each step lead, as far as
            that is not the image; None until `evaluated`.
    """

    ode_trajectory: Trajectory
    branch_latents: Tensor
    log_probs: Tensor
    coefficients: StepCoefficients
    sample_conditioning: Conditioning
    branches: int
    branch_velocities: Tensor | None = None

    @property
    def batch(self) -> int:
        return self.ode_trajectory.batch

    @property
    def latents(self) -> Tensor:
        return self.ode_trajectory.latents

    @property
    def velocities(self) -> Tensor:
        return self.ode_trajectory.velocities

    @property
    def conditioning(self) -> Conditioning:
        return self.ode_trajectory.conditioning

    @property
    def guidance_scale(self) -> float:
        return self.ode_trajectory.guidance_scale

    @property
    def guidance_terms(self) -> None:
        """None: what guidance adds differs from branch to branch."""
        return None

    @property
    def steps(self) -> tuple[int, ...]:
        """The M branching steps, increasing."""
        return tuple(step for step, noisy in enumerate(self.coefficients.noisy) if noisy)

    @property
    def completed(self) -> tuple[int, ...]:
        """The states that branches lead to."""
        return tuple(step + 1 for step in self.steps)

    def select(self, rows: slice) -> BranchedRollout:
        """Some trajectories with their branches; tensors are shared, not copied."""
        samples, velocities = self.sample_rows(rows), self.branch_velocities
        return replace(
            self,
            ode_trajectory=self.ode_trajectory.select(rows),
            branch_latents=self.branch_latents[:, samples],
            log_probs=self.log_probs[:, samples],
            sample_conditioning=self.sample_conditioning.select(samples),
            branch_velocities=None if velocities is None else velocities[:, samples],
        )

    def sample_rows(self, rows: slice) -> slice:
        return slice(rows.start * self.branches, rows.stop * self.branches)

    def next_latents(self, step: int, rows: slice) -> Tensor:
        return self.branch_latents[self.steps.index(step), self.sample_rows(rows)]

    def state(self, index: int) -> RolloutState:
        place = self.completed.index(index)
        latents = self.branch_latents[place]
        if self.branch_velocities is None or index == self.coefficients.num_steps:
            return RolloutState(latents)
        return RolloutState(latents, self.branch_velocities[place])

    def dedup(self, *, own: bool = False) -> CompletionDedup:
        """Every branch has a completion of its own."""
        return CompletionDedup((True,) * self.coefficients.num_steps, completed=self.completed)

    @torch.no_grad()
    def evaluated(self, lookahead: Lookahead) -> BranchedRollout:
        """The rollout with the velocity of every state that a branch leads to, at the trajectories' guidance.

        A rollout that has them already stays as it is, so that several ways to complete it share them.

        Args:
            lookahead: evaluates them by its own model, as nothing but completions starts there.
        """
        if self.branch_velocities is not None:
            return self
        inner = [state for state in self.completed if state < self.coefficients.num_steps]
        velocities = self.branch_latents.new_empty(len(inner), *self.branch_latents.shape[1:])
        lookahead.step_runner.begin(lookahead.model)
        for place, state in enumerate(inner):
            velocities[place] = lookahead.evaluate_state(self, state).velocity
        return replace(self, branch_velocities=velocities)

    def group_rewards(self, values: Tensor, group_size: int) -> GroupedRewards:
        by_way = values.view(-1, len(self.steps), values.shape[1] // group_size, group_size)
        grouped = by_way.permute(2, 3, 1, 0)  # [P, G, K, L]
        branches = grouped.unflatten(1, (group_size // self.branches, self.branches))
        return GroupedRewards(None, branches)


@torch.no_grad()
def branch_rollout(
    model: FlowModel,
    noise: Tensor,
    conditioning: Conditioning,
    coefficients: StepCoefficients,
    *,
    branches: int,
    sample_index: Tensor,
    seed: int,
    iteration: int,
    guidance_scale: float = 1.0,
    micro_batch: int | None = None,
) -> BranchedRollout:
    """Follow the ODE from noise, and branch at every step in which `coefficients` inject noise.

    Args:
        noise: initial latents [S, ...] float32 of the trajectories.
        conditioning: prompts of the B = S*K branches; those of one trajectory share one.
        coefficients: tables for T steps, on the model's device.
        branches: K, at least 2.
        sample_index: [S] int64, the global index that seeds each trajectory's noise; its branches have streams of
            their own (`flow.noise.branch_stream`).
        seed, iteration: the other parts of the noise counters.
        guidance_scale: 1 is off.
        micro_batch: trajectories per forward, which training must repeat (see `rollout`). None = all of them.

    Raises:
        ValueError: no step injects noise, K is below 2, or the numbers of rows do not fit together.
    """
    steps = [step for step, noisy in enumerate(coefficients.noisy) if noisy]
    rows, num_steps = len(conditioning), coefficients.num_steps
    if not steps:
        raise ValueError("branch_rollout: no step injects noise, so no state can branch")
    if branches < 2 or rows != len(noise) * branches:
        raise ValueError(
            f"branch_rollout: {len(noise)} trajectories with {branches} branches each do not make {rows} rows"
        )
    ode_trajectory = rollout(
        model,
        noise,
        conditioning.select(slice(0, rows, branches)),
        coefficients.only(()),
        sample_index=sample_index,
        seed=seed,
        iteration=iteration,
        guidance_scale=guidance_scale,
        micro_batch=micro_batch,
        steps=steps[-1] + 1,
    )
    branch_latents = noise.new_empty(len(steps), rows, *noise.shape[1:])
    log_probs = noise.new_zeros(num_steps, rows)
    for place, step in enumerate(steps):
        for branch in range(branches):
            samples = slice(branch, None, branches)
            branch_latents[place, samples], log_probs[step, samples] = ops.sde_step(
                ode_trajectory.latents[step],
                ode_trajectory.velocities[step],
                coefficients.table,
                step,
                seed=seed,
                sample_index=sample_index,
                iteration=iteration,
                stream=branch_stream(branch),
            )
    return BranchedRollout(ode_trajectory, branch_latents, log_probs, coefficients, conditioning, branches)
