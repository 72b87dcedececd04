"""The lookahead: from every state of a trajectory, the image that the deterministic flow would reach.

All states that a plan brings to the same sigma are evaluated together, so a plan with K nodes costs K batched forwards
in a row, whatever the number of states; the first velocity of every state is the rollout's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from densegrpo_fast.flow import ops
from densegrpo_fast.models.base import Cache, Decoder, FlowModel, Head
from densegrpo_fast.sampling.plan import Plan
from densegrpo_fast.sampling.trajectory import Trajectory
from densegrpo_fast.sampling.visit import Arrival, Travellers, Visits

Guidance = Literal["full", "cond_only", "reuse"]


@dataclass(frozen=True)
class _Standing:
    """Where a state's completion stands: the grid index of its last evaluation, and what that saw and gave."""

    index: int
    latents: Tensor
    velocity: Tensor
    hidden: Tensor | None


class Lookahead:
    """Completes trajectories by a plan.

    Args:
        model: the policy, or a copy of it.
        plan: for the trajectories' number of steps.
        guidance: after a state's first velocity, which is the rollout's: "full" = the trajectory's guidance again;
            "cond_only" = none, half the cost and an approximation; "reuse" = what guidance added to the sample's own
            velocity at the same grid index during the rollout, at the same half cost.
        chunk: rows per forward and per decode, a memory budget.
        head: corrects the last jump of the completions that leave steps out; None = Euler's jump as it is.
        cache: what the rollout recorded, for the completions' own forwards to take over; None = they compute it all.
        visits: how a jump and its forward are run; None = operation by operation.

    Raises:
        ValueError: `chunk` is below 1.
    """

    def __init__(
        self,
        model: FlowModel,
        plan: Plan,
        *,
        guidance: Guidance = "full",
        chunk: int = 64,
        head: Head | None = None,
        cache: Cache | None = None,
        visits: Visits | None = None,
    ):
        if chunk < 1:
            raise ValueError(f"lookahead chunk must be at least 1 row, got {chunk}")
        self.model, self.plan, self.guidance, self.chunk = model, plan, guidance, chunk
        self.head, self.cache = head, cache
        self.visits = Visits() if visits is None else visits

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
        if self.head is not None and trajectory.hidden is None:
            raise ValueError("a completion head needs a rollout with keep_hidden=True")
        owners = self.owners(trajectory.coefficients.noisy)
        ends = {steps: trajectory.latents[steps]}
        standing = self.evaluate(trajectory)
        if standing:
            sigmas = trajectory.coefficients.sigmas
            done = self._jump(list(standing.values()), steps, sigmas).split(batch)
            ends |= {j: self._correct(j, standing[j], end) for j, end in zip(standing, done, strict=True)}
        return torch.stack([ends[owner] for owner in owners])

    @torch.no_grad()
    def evaluate(self, trajectory: Trajectory) -> dict[int, _Standing]:
        """Bring every state that needs a completion of its own to its last evaluation, in the order of the states."""
        batch = trajectory.batch
        states = sorted(set(self.owners(trajectory.coefficients.noisy)) - {trajectory.num_steps})
        hidden = [None] * trajectory.num_steps if trajectory.hidden is None else trajectory.hidden
        standing = {j: _Standing(j, trajectory.latents[j], trajectory.velocities[j], hidden[j]) for j in states}
        self.visits.begin(self.model)
        for node in self.plan.nodes():
            here = [j for j in states if node in self.plan.paths[j]]
            if not here:
                continue
            arrived, velocity, tokens = self._visit([standing[j] for j in here], node, trajectory)
            if self.guidance == "reuse" and trajectory.guidance_terms is not None:
                velocity.unflatten(0, (len(here), batch)).add_(trajectory.guidance_terms[node])
            parts = [None] * len(here) if tokens is None else tokens.split(batch)
            for j, x, v, h in zip(here, arrived.split(batch), velocity.split(batch), parts, strict=True):
                standing[j] = _Standing(node, x, v, h)
        return standing

    @torch.no_grad()
    def images(self, clean: Tensor, noisy: tuple[bool, ...], decoder: Decoder) -> Tensor:
        """Decoded completions [T+1, B, 3, H, W] in [0, 1]; states that share a completion are decoded once."""
        decoded = self.different_images(clean, noisy, decoder)
        return torch.stack([decoded[position] for position in self.positions(noisy)])

    @torch.no_grad()
    def different_images(self, clean: Tensor, noisy: tuple[bool, ...], decoder: Decoder) -> Tensor:
        """The images of states with a completion of their own, [K+1, B, 3, H, W] for K noisy steps; last the end's."""
        rows = torch.cat([clean[owner] for owner in sorted(set(self.owners(noisy)))])
        decoded = torch.cat([self.model.decode(part, decoder) for part in rows.split(self.chunk)])
        return decoded.unflatten(0, (-1, clean.shape[1]))

    @staticmethod
    def owners(noisy: tuple[bool, ...]) -> list[int]:
        """For each state 0..T the state whose completion it shares: the first one not followed by a noise-free step."""
        owners = list(range(len(noisy) + 1))
        for step in reversed(range(len(noisy))):
            if not noisy[step]:
                owners[step] = owners[step + 1]
        return owners

    @classmethod
    def positions(cls, noisy: tuple[bool, ...]) -> list[int]:
        """For each state 0..T the position of its completion among the different ones."""
        owners = cls.owners(noisy)
        different = sorted(set(owners))
        return [different.index(owner) for owner in owners]

    def guidance_scale(self, rollout_scale: float) -> float:
        """Guidance of the lookahead's own evaluations, given the rollout's."""
        return rollout_scale if self.guidance == "full" else 1.0

    def evaluations(self, noisy: tuple[bool, ...]) -> int:
        """Model evaluations per trajectory, shared states counted once."""
        return sum(len(self.plan.paths[j]) for j in set(self.owners(noisy)) - {len(noisy)})

    def _jump(self, states: list[_Standing], node: int, sigmas: Tensor) -> Tensor:
        batch = len(states[0].latents)
        sigma = torch.cat([sigmas[state.index].expand(batch) for state in states])
        latents = torch.cat([state.latents for state in states])
        velocity = torch.cat([state.velocity for state in states])
        return ops.euler_jump(latents, velocity, sigma, sigmas[node].expand_as(sigma))

    def _correct(self, state: int, standing: _Standing, estimate: Tensor) -> Tensor:
        if self.head is None or standing.hidden is None or not self.head.applies(state):
            return estimate
        index = torch.full((len(estimate),), state, device=estimate.device)
        parts = zip(*(x.split(self.chunk) for x in (standing.hidden, standing.latents, estimate, index)), strict=True)
        return estimate + torch.cat([self.head(*part) for part in parts])

    def _visit(self, states: list[_Standing], node: int, trajectory: Trajectory) -> Arrival:
        """Take states that meet at a node there, in chunks of rows; row i*B + b is sample b of the i-th state."""
        batch, count, sigmas = trajectory.batch, len(states), trajectory.coefficients.sigmas
        rows = Travellers(
            latents=torch.cat([state.latents for state in states]),
            velocity=torch.cat([state.velocity for state in states]),
            sigma=torch.cat([sigmas[state.index].expand(batch) for state in states]),
            next_sigma=sigmas[node].expand(count * batch),
            conditioning=trajectory.conditioning.repeat(count),
            samples=torch.arange(batch, device=trajectory.latents.device).repeat(count),
        )
        scale = self.guidance_scale(trajectory.guidance_scale)
        arrived, velocity, hidden = torch.empty_like(rows.latents), torch.empty_like(rows.velocity), None
        for start in range(0, len(rows), self.chunk):
            part = slice(start, min(start + self.chunk, len(rows)))
            here = self.visits(self.model, rows.select(part), node, scale, tap=self.head is not None, cache=self.cache)
            arrived[part], velocity[part] = here.latents, here.velocity
            if here.hidden is not None:
                if hidden is None:
                    hidden = here.hidden.new_empty(len(rows), *here.hidden.shape[1:])
                hidden[part] = here.hidden
        return Arrival(arrived, velocity, hidden)
