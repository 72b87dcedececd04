"""The lookahead: from every state of a trajectory, the image that the deterministic flow would reach.

All states that a plan brings to the same sigma are evaluated together, so a plan with K nodes costs K batched forwards
in a row, whatever the number of states; the first velocity of every state is the rollout's own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from densegrpo_fast.flow import ops
from densegrpo_fast.models.base import Conditioning, Decoder, FlowModel
from densegrpo_fast.sampling.plan import Plan
from densegrpo_fast.sampling.trajectory import Trajectory

Guidance = Literal["full", "cond_only", "reuse"]


class Lookahead:
    """Completes trajectories by a plan.

    Args:
        model: the policy.
        plan: for the trajectories' number of steps.
        guidance: after a state's first velocity, which is the rollout's: "full" = the trajectory's guidance again;
            "cond_only" = none, half the cost and an approximation; "reuse" = what guidance added to the sample's own
            velocity at the same grid index during the rollout, at the same half cost.
        chunk: rows per forward and per decode, a memory budget.

    Raises:
        ValueError: `chunk` is below 1.
    """

    def __init__(self, model: FlowModel, plan: Plan, *, guidance: Guidance = "full", chunk: int = 64):
        if chunk < 1:
            raise ValueError(f"lookahead chunk must be at least 1 row, got {chunk}")
        self.model, self.plan, self.guidance, self.chunk = model, plan, guidance, chunk

    @torch.no_grad()
    def complete(self, trajectory: Trajectory) -> Tensor:
        """Clean latents [T+1, B, ...] float32; index = steps done, the last is the trajectory's own end.

        A state that a noise-free step joins to the next shares its completion (they lie on one ODE path), so the gain
        of such a step is exactly 0.

        Raises:
            ValueError: the plan is for another number of steps, or guidance is to be reused and was not kept.
        """
        steps, batch = trajectory.num_steps, trajectory.batch
        if self.guidance == "reuse" and trajectory.guidance_scale != 1.0 and trajectory.guidance_terms is None:
            raise ValueError('lookahead guidance "reuse" needs a rollout with keep_guidance=True')
        if self.plan.num_steps != steps:
            raise ValueError(f"the lookahead plan is for {self.plan.num_steps} steps, the trajectory has {steps}")
        owners = self.owners(trajectory.coefficients.noisy)
        states = sorted(set(owners) - {steps})
        # pending[j] = (latents, velocity, grid index): where state j's completion stands
        pending = {j: (trajectory.latents[j], trajectory.velocities[j], j) for j in states}
        for node in self.plan.nodes():
            here = [j for j in states if node in self.plan.paths[j]]
            if not here:
                continue
            arrived = self._jump([pending[j] for j in here], node, trajectory)
            velocity = self._evaluate(arrived, node, trajectory, trajectory.conditioning.repeat(len(here)))
            if self.guidance == "reuse" and trajectory.guidance_terms is not None:
                velocity.unflatten(0, (len(here), batch)).add_(trajectory.guidance_terms[node])
            for j, x, v in zip(here, arrived.split(batch), velocity.split(batch), strict=True):
                pending[j] = (x, v, node)
        ends = {steps: trajectory.latents[steps]}
        if states:
            done = self._jump([pending[j] for j in states], steps, trajectory)
            ends |= zip(states, done.split(batch), strict=True)
        return torch.stack([ends[owner] for owner in owners])

    @torch.no_grad()
    def images(self, clean: Tensor, noisy: tuple[bool, ...], decoder: Decoder) -> Tensor:
        """Decoded completions [T+1, B, 3, H, W] in [0, 1]; states that share a completion are decoded once."""
        owners = self.owners(noisy)
        unique = sorted(set(owners))
        rows = clean[unique].flatten(0, 1)
        decoded = torch.cat([self.model.decode(part, decoder) for part in rows.split(self.chunk)])
        decoded = decoded.unflatten(0, (len(unique), clean.shape[1]))
        return decoded[[unique.index(owner) for owner in owners]]

    @staticmethod
    def owners(noisy: tuple[bool, ...]) -> list[int]:
        """For each state 0..T the state whose completion it shares: the first one not followed by a noise-free step."""
        owners = list(range(len(noisy) + 1))
        for step in reversed(range(len(noisy))):
            if not noisy[step]:
                owners[step] = owners[step + 1]
        return owners

    def guidance_scale(self, rollout_scale: float) -> float:
        """Guidance of the lookahead's own evaluations, given the rollout's."""
        return rollout_scale if self.guidance == "full" else 1.0

    def evaluations(self, noisy: tuple[bool, ...]) -> int:
        """Model evaluations per trajectory, shared states counted once."""
        return sum(len(self.plan.paths[j]) for j in set(self.owners(noisy)) - {len(noisy)})

    def _jump(self, states: list[tuple[Tensor, Tensor, int]], node: int, trajectory: Trajectory) -> Tensor:
        sigmas, batch = trajectory.coefficients.sigmas, trajectory.batch
        sigma = torch.cat([sigmas[index].expand(batch) for _, _, index in states])
        latents = torch.cat([latents for latents, _, _ in states])
        velocity = torch.cat([velocity for _, velocity, _ in states])
        return ops.euler_jump(latents, velocity, sigma, sigmas[node].expand_as(sigma))

    def _evaluate(self, latents: Tensor, node: int, trajectory: Trajectory, conditioning: Conditioning) -> Tensor:
        sigma = trajectory.coefficients.sigmas[node]
        scale = self.guidance_scale(trajectory.guidance_scale)
        velocity = torch.empty_like(latents)
        for start in range(0, len(latents), self.chunk):
            rows = slice(start, min(start + self.chunk, len(latents)))
            part = latents[rows]
            velocity[rows] = self.model.velocity(
                part, sigma.expand(len(part)), conditioning.select(rows), scale
            ).combined()
        return velocity
