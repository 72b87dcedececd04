"""The lookahead: from every state of a trajectory, the image that the deterministic flow would reach.

All states that a plan brings to the same sigma are evaluated together, so a plan with K nodes costs K batched forwards
in a row, whatever the number of states; the first velocity of every state is the rollout's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from densegrpo_fast.flow import ops
from densegrpo_fast.flow.dynamics import StepCoefficients
from densegrpo_fast.flow.remainder import Remainder, Visited
from densegrpo_fast.models.base import Cache, Decoder, FlowModel, Head
from densegrpo_fast.sampling.dedup import CompletionDedup
from densegrpo_fast.sampling.plan import Plan
from densegrpo_fast.sampling.step_runner import StepInput, StepOutput, StepRunner
from densegrpo_fast.sampling.trajectory import Trajectory

Guidance = Literal["full", "cond_only", "reuse"]


@dataclass(frozen=True)
class CompletionState:
    """Where a state's completion stands: the grid index of its last evaluation, what that saw and gave, and the
    evaluation before it where a second-order step wants it."""

    index: int
    latents: Tensor
    velocity: Tensor
    hidden: Tensor | None
    before: Visited | None = None

    def slope(self, step_index: int, remainder: Remainder | None) -> Tensor:
        """Velocity of the jump to a grid index."""
        if remainder is None:
            return self.velocity
        return remainder.slope(Visited(self.index, self.latents, self.velocity), step_index, self.before)

    def remembered(self, remainder: Remainder | None) -> Visited | None:
        """What the next standing keeps of this one."""
        if remainder is None or self.index < remainder.start:
            return None
        return Visited(self.index, self.latents, self.velocity)


class Lookahead:
    """Completes trajectories by a plan.

    Args:
        model: the policy, or a copy of it.
        plan: for the trajectories' number of steps.
        guidance: after a state's first velocity, which is the rollout's: "full" = the trajectory's guidance again;
            "cond_only" = none, half the cost and an approximation; "reuse" = what guidance added to the sample's own
            velocity at the same grid index during the rollout, at the same half cost.
        chunk: most rows per forward, and per decode unless `decode_chunk` says otherwise: a memory budget.
        decode_chunk: most rows per decode; None = `chunk`.
        head: corrects the last jump of the completions that leave steps out; None = Euler's jump as it is.
        cache: what the rollout recorded, for the completions' own forwards to take over; None = they compute it all.
        visits: how a jump and its forward are run; None = operation by operation.
        replan: makes the plan for trajectories of another number of steps; None = there are none.

    Raises:
        ValueError: `chunk` or `decode_chunk` is below 1.
    """

    def __init__(
        self,
        model: FlowModel,
        plan: Plan,
        *,
        guidance: Guidance = "full",
        chunk: int = 64,
        decode_chunk: int | None = None,
        head: Head | None = None,
        cache: Cache | None = None,
        visits: StepRunner | None = None,
        replan: Callable[[int], Plan] | None = None,
    ):
        self.chunk, self.decode_chunk = chunk, chunk if decode_chunk is None else decode_chunk
        if min(self.chunk, self.decode_chunk) < 1:
            raise ValueError(f"lookahead chunk must be at least 1 row, got {min(self.chunk, self.decode_chunk)}")
        self.model, self.plan, self.guidance = model, plan, guidance
        self.head, self.cache, self.replan = head, cache, replan
        self.visits = StepRunner() if visits is None else visits

    @torch.no_grad()
    def complete(self, trajectory: Trajectory) -> Tensor:
        """Clean latents [T+1, B, ...] float32; index = steps done, the last is the trajectory's own end.

        A state that a noise-free step joins to the next shares its completion (they lie on one ODE path), so the gain
        of such a step is exactly 0; and rows that are still one sample share theirs (`sharing`).

        Raises:
            ValueError: the plan is for another number of steps, or guidance is to be reused and was not kept.
        """
        steps = trajectory.num_steps
        if self.guidance == "reuse" and trajectory.guidance_scale != 1.0 and trajectory.guidance_terms is None:
            raise ValueError('lookahead guidance "reuse" needs a rollout with keep_guidance=True')
        self.plan_for(steps)
        ends, sharing = {steps: trajectory.latents[steps]}, self.sharing(trajectory)
        if self.head is not None and trajectory.hidden is None and sharing.states != [steps]:
            raise ValueError("a completion head needs a rollout, or branches reached, with keep_hidden=True")
        standing = self.evaluate(trajectory)
        if standing:
            done = self.jump(list(standing.values()), steps, trajectory.coefficients)
            for j, end in zip(standing, done.split([len(state.latents) for state in standing.values()]), strict=True):
                ends[j] = sharing.spread(j, self._correct(j, standing[j], end))
        return torch.stack([ends[owner] for owner in sharing.representatives])

    @torch.no_grad()
    def evaluate(self, trajectory: Trajectory, first: int = 0) -> dict[int, CompletionState]:
        """Bring every state that needs a completion of its own to its last evaluation, in the order of the states.

        Args:
            trajectory: the rows [B] to complete; of a state's rows that share a completion only the first is in the
                result.
            first: which sample of the rollout that a cache has recorded the first row is.
        """
        plan, standing = self.plan_for(trajectory.num_steps), self.start(trajectory)
        for step_index in plan.nodes():
            here = {state: at for state, at in standing.items() if step_index in plan.paths[state]}
            if here:
                standing |= self.advance(here, step_index, trajectory, first)
        return standing

    def start(self, trajectory: Trajectory) -> dict[int, CompletionState]:
        """Every state that needs a completion of its own, by itself, with the rollout's velocity there."""
        sharing = self.sharing(trajectory)
        self.visits.begin(self.model)
        return {
            j: CompletionState(
                j,
                sharing.rows(j, trajectory.latents[j]),
                sharing.rows(j, trajectory.velocities[j]),
                None if trajectory.hidden is None else sharing.rows(j, trajectory.hidden[j]),
            )
            for j in sharing.states[:-1]
        }

    def advance(
        self, standing: Mapping[int, CompletionState], step_index: int, trajectory: Trajectory, first: int = 0
    ) -> dict[int, CompletionState]:
        """Take completions to a later grid index, and evaluate the model there.

        Args:
            standing: where they stand, by their states.
            node: where they meet.
            trajectory, first: as in `evaluate`, after `start`.
        """
        sizes, remainder = [len(at.latents) for at in standing.values()], trajectory.coefficients.remainder
        arrived, velocity, tokens = self._visit(standing, step_index, trajectory, first)
        if self.guidance == "reuse" and trajectory.guidance_terms is not None:
            # no completion is shared then
            velocity.unflatten(0, (len(standing), -1)).add_(trajectory.guidance_terms[step_index])
        parts = [None] * len(standing) if tokens is None else tokens.split(sizes)
        rows = zip(arrived.split(sizes), velocity.split(sizes), parts, strict=True)
        return {
            state: CompletionState(step_index, x, v, hidden, at.remembered(remainder))
            for (state, at), (x, v, hidden) in zip(standing.items(), rows, strict=True)
        }

    def arrive(self, rows: StepInput, step_index: int, scale: float, cache: Cache | None = None) -> StepOutput:
        """Take rows to a node, and evaluate the model there, at most `chunk` rows at a time.

        Args:
            rows: who travels.
            node: grid index where they meet.
            scale: guidance there; 1 = off.
            cache: features of the rollout to take over, or None.
        """
        arrived, velocity, hidden = torch.empty_like(rows.latents), torch.empty_like(rows.velocity), None
        for start in range(0, len(rows), self.chunk):
            part = slice(start, min(start + self.chunk, len(rows)))
            here = self.visits(self.model, rows.select(part), step_index, scale, tap=self.head is not None, cache=cache)
            arrived[part], velocity[part] = here.latents, here.velocity
            if here.hidden is not None:
                if hidden is None:
                    hidden = here.hidden.new_empty(len(rows), *here.hidden.shape[1:])
                hidden[part] = here.hidden
        return StepOutput(arrived, velocity, hidden)

    @staticmethod
    def jump(states: Sequence[CompletionState], step_index: int, coefficients: StepCoefficients) -> Tensor:
        """Latents [m, ...] float32 of completions, one after another, at a grid index where nothing is evaluated."""
        sigmas = coefficients.sigmas
        sigma = torch.cat([sigmas[at.index].expand(len(at.latents)) for at in states])
        latents = torch.cat([at.latents for at in states])
        velocity = torch.cat([at.slope(step_index, coefficients.remainder) for at in states])
        return ops.euler_jump(latents, velocity, sigma, sigmas[step_index].expand_as(sigma))

    @torch.no_grad()
    def images(self, clean: Tensor, noisy: tuple[bool, ...], decoder: Decoder) -> Tensor:
        """Decoded completions [T+1, B, 3, H, W] in [0, 1]; states that share a completion are decoded once."""
        decoded = self.different_images(clean, noisy, decoder)
        return torch.stack([decoded[position] for position in CompletionDedup(noisy).positions])

    @torch.no_grad()
    def different_images(self, clean: Tensor, noisy: tuple[bool, ...], decoder: Decoder) -> Tensor:
        """The images of states with a completion of their own, [K+1, B, 3, H, W] for K noisy steps; last the end's."""
        decoded = torch.cat(list(self.decoded(CompletionDedup(noisy).different(clean), decoder)))
        return decoded.unflatten(0, (-1, clean.shape[1]))

    @torch.no_grad()
    def decoded(self, clean: Tensor, decoder: Decoder) -> Iterator[Tensor]:
        """Images of clean latents [m, ...], part after part: [at most `decode_chunk`, 3, H, W] in [0, 1] each."""
        for part in clean.split(self.decode_chunk):
            yield self.model.decode(part, decoder)

    def sharing(self, trajectory: Trajectory) -> CompletionDedup:
        """Which completions are one and the same.

        Samples of one initial noise are, as long as nothing has told them apart, unless the completion takes something
        over from each one's own rollout: reused guidance, or a cache's features other than their prompt's.
        """
        own = self.guidance == "reuse" and trajectory.guidance_terms is not None
        own = own or (self.cache is not None and self.cache.alike % trajectory.shared != 0)
        return CompletionDedup(trajectory.coefficients.noisy) if own else trajectory.sharing

    def plan_for(self, num_steps: int) -> Plan:
        """The plan of trajectories with so many steps.

        Raises:
            ValueError: there is none.
        """
        if num_steps == self.plan.num_steps:
            return self.plan
        if self.replan is None:
            raise ValueError(f"the lookahead plan is for {self.plan.num_steps} steps, the trajectory has {num_steps}")
        return self.replan(num_steps)

    def by(self, plan: Plan) -> Lookahead:
        """The same lookahead by another plan."""
        other = copy(self)
        other.plan = plan
        return other

    @staticmethod
    def representatives(noisy: tuple[bool, ...]) -> list[int]:
        """For each state 0..T the state whose completion it shares, as `CompletionDedup.representatives`."""
        return CompletionDedup(noisy).representatives

    def guidance_scale(self, rollout_scale: float) -> float:
        """Guidance of the lookahead's own evaluations, given the rollout's."""
        return rollout_scale if self.guidance == "full" else 1.0

    def evaluations(self, noisy: tuple[bool, ...]) -> int:
        """Model evaluations of one trajectory, states that share a completion counted once."""
        paths = self.plan_for(len(noisy)).paths
        return sum(len(paths[j]) for j in CompletionDedup(noisy).states[:-1])

    def _correct(self, state: int, standing: CompletionState, estimate: Tensor) -> Tensor:
        if self.head is None or standing.hidden is None or not self.head.applies(state):
            return estimate
        index = torch.full((len(estimate),), state, device=estimate.device)
        parts = zip(*(x.split(self.chunk) for x in (standing.hidden, standing.latents, estimate, index)), strict=True)
        return estimate + torch.cat([self.head(*part) for part in parts])

    def _visit(
        self, standing: Mapping[int, CompletionState], step_index: int, trajectory: Trajectory, first: int
    ) -> StepOutput:
        """Take states that meet at a node there: all rows of a state, then those of the next."""
        sigmas, remainder = trajectory.coefficients.sigmas, trajectory.coefficients.remainder
        sigma = torch.cat([sigmas[at.index].expand(len(at.latents)) for at in standing.values()])
        conditioning, samples = trajectory.conditioning.repeat(len(standing)), None
        sharing = self.sharing(trajectory)
        if len(conditioning) != len(sigma):
            conditioning = replace(
                conditioning, rows=torch.cat([sharing.rows(j, trajectory.conditioning.rows) for j in standing])
            )
        if self.cache is not None:
            own = torch.arange(first, first + trajectory.batch, device=trajectory.latents.device)
            samples = torch.cat([sharing.rows(j, own) for j in standing])
        rows = StepInput(
            latents=torch.cat([at.latents for at in standing.values()]),
            velocity=torch.cat([at.slope(step_index, remainder) for at in standing.values()]),
            sigma=sigma,
            next_sigma=sigmas[step_index].expand_as(sigma),
            conditioning=conditioning,
            samples=samples,
        )
        return self.arrive(rows, step_index, self.guidance_scale(trajectory.guidance_scale), self.cache)
