"""The lookahead: from every state of a rollout, the image that the deterministic flow would reach.

All states that a plan brings to the same sigma are evaluated together, so a plan with K step indices costs K batched
forwards in a row, whatever the number of states; the first velocity of every state is the rollout's own.
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
from densegrpo_fast.models.base import Cache, Decoder, FlowModel
from densegrpo_fast.sampling.dedup import CompletionDedup
from densegrpo_fast.sampling.oom_backoff import OomBackoff
from densegrpo_fast.sampling.plan import Plan
from densegrpo_fast.sampling.rollout import Rollout
from densegrpo_fast.sampling.step_runner import StepInput, StepOutput, StepRunner

Guidance = Literal["full", "cond_only", "reuse"]


@dataclass(frozen=True)
class CompletionState:
    """How far a state's completion has come.

    Attributes:
        index: step index of its last evaluation.
        latents, velocity: [m, ...] float32, what that saw and gave.
        before: the evaluation before it, where a second-order step needs one.
    """

    index: int
    latents: Tensor
    velocity: Tensor
    before: Visited | None = None

    def slope(self, step_index: int, remainder: Remainder | None) -> Tensor:
        """Velocity of the jump to a step index."""
        if remainder is None:
            return self.velocity
        return remainder.slope(Visited(self.index, self.latents, self.velocity), step_index, self.before)

    def remembered(self, remainder: Remainder | None) -> Visited | None:
        """What the next state of the completion keeps of this one."""
        if remainder is None or self.index < remainder.start:
            return None
        return Visited(self.index, self.latents, self.velocity)


@dataclass(frozen=True)
class Completions:
    """The different completions of a rollout.

    Attributes:
        clean: [m, ...] float32 latents.
        samples: m numbers, the sample that each belongs to, the first where several share it.
        index: [n] int64 into `clean`, for every way, different state and sample, as `Rollout.group_rewards` has them.
    """

    clean: Tensor
    samples: list[int]
    index: Tensor

    @classmethod
    def ends(cls, rollout: Rollout) -> Completions:
        """The ends of trajectories alone, one for each sample: what a sparse reward needs."""
        clean = rollout.latents[-1]
        return cls(clean, list(range(len(clean))), torch.arange(len(clean)))

    @classmethod
    def joined(cls, ways: Sequence[Completions]) -> Completions:
        """Completions of one rollout in several ways, one after another."""
        offsets, count = [], 0
        for way in ways:
            offsets.append(way.index + count)
            count += len(way.clean)
        samples = [sample for way in ways for sample in way.samples]
        return cls(torch.cat([way.clean for way in ways]), samples, torch.cat(offsets))


class Lookahead:
    """Completes rollouts by a plan.

    Args:
        model: the policy, or a copy of it.
        plan: for the rollouts' number of steps.
        guidance: after a state's first velocity, which is the rollout's: "full" = the rollout's guidance again;
            "cond_only" = none, half the cost and an approximation; "reuse" = what guidance added to the sample's own
            velocity at the same step index during the rollout, at the same half cost.
        chunk: most rows per forward, and per decode unless `decode_chunk` says otherwise; an `OomBackoff` goes on with
            fewer if a GPU's memory runs out.
        decode_chunk: most rows per decode; None = `chunk`.
        cache: what the rollout recorded, for the completions' own forwards to reuse; None = they compute it all.
        step_runner: how a jump and its forward are run; None = operation by operation.
        replan: makes the plan for rollouts of another number of steps; None = there are none.

    Raises:
        ValueError: `chunk` or `decode_chunk` is below 1.
    """

    def __init__(
        self,
        model: FlowModel,
        plan: Plan,
        *,
        guidance: Guidance = "full",
        chunk: int | OomBackoff = 64,
        decode_chunk: int | OomBackoff | None = None,
        cache: Cache | None = None,
        step_runner: StepRunner | None = None,
        replan: Callable[[int], Plan] | None = None,
    ):
        decode_chunk = chunk if decode_chunk is None else decode_chunk
        self.rows = chunk if isinstance(chunk, OomBackoff) else OomBackoff(chunk, "lookahead.chunk")
        self.decode_rows = (
            decode_chunk
            if isinstance(decode_chunk, OomBackoff)
            else OomBackoff(decode_chunk, "lookahead.chunk, of decodes")
        )
        if min(self.rows.rows, self.decode_rows.rows) < 1:
            raise ValueError(
                f"lookahead chunk must be at least 1 row, got {min(self.rows.rows, self.decode_rows.rows)}"
            )
        self.model, self.plan, self.guidance = model, plan, guidance
        self.cache, self.replan = cache, replan
        self.step_runner = StepRunner() if step_runner is None else step_runner

    @torch.no_grad()
    def complete(self, rollout: Rollout) -> Tensor:
        """Clean latents [J, B, ...] float32 of the J states `rollout.completed`.

        The completion of the last state is the trajectory's own end. A state that a noise-free step joins to the next
        shares its completion (they lie on one ODE path), so the gain of such a step is exactly 0; and samples that are
        still one sample share theirs (`dedup`).

        Raises:
            ValueError: the plan is for another number of steps, or guidance is to be reused and was not kept.
        """
        dedup = self.dedup(rollout)
        ends = {state: dedup.spread(state, clean) for state, clean in self._ends(rollout).items()}
        return torch.stack([ends[state] for state in dedup.representatives])

    @torch.no_grad()
    def completions(self, rollout: Rollout) -> Completions:
        """The different ones among `complete`.

        Raises:
            ValueError: as `complete`.
        """
        dedup, ends = self.dedup(rollout), self._ends(rollout)
        clean = torch.cat([ends[state] for state in dedup.states])
        batch = rollout.batch * rollout.branches
        index = dedup.broadcast(torch.arange(len(clean)), batch).flatten()
        return Completions(clean, dedup.samples(batch), index)

    @torch.no_grad()
    def evaluate(self, rollout: Rollout, first: int = 0) -> dict[int, CompletionState]:
        """Bring every state that needs a completion of its own to its last evaluation, in the order of the states.

        Args:
            rollout: its B samples are completed; of those that share a completion only the first is in the result.
            first: which sample of the rollout that a cache has recorded the first one is.
        """
        plan, states = self.plan_for(rollout.coefficients.num_steps), self.start(rollout)
        for step_index in plan.nodes():
            here = {state: at for state, at in states.items() if step_index in plan.paths[state]}
            if here:
                states |= self.advance(here, step_index, rollout, first)
        return states

    def start(self, rollout: Rollout) -> dict[int, CompletionState]:
        """Every state that needs a completion of its own, by itself, with the velocity there."""
        rollout, dedup = rollout.evaluated(self), self.dedup(rollout)
        self.step_runner.begin(self.model)
        states = {}
        for index in dedup.states:
            if index < rollout.coefficients.num_steps:
                at = rollout.state(index)
                assert at.velocity is not None
                states[index] = CompletionState(index, dedup.rows(index, at.latents), dedup.rows(index, at.velocity))
        return states

    def advance(
        self, states: Mapping[int, CompletionState], step_index: int, rollout: Rollout, first: int = 0
    ) -> dict[int, CompletionState]:
        """Take completions to a later step index, and evaluate the model there: all rows of a state, then the next's.

        Args:
            states: how far they have come, by their states.
            step_index: where they meet.
            rollout, first: as in `evaluate`, after `start`.
        """
        sizes, remainder = [len(at.latents) for at in states.values()], rollout.coefficients.remainder
        sigmas, dedup = rollout.coefficients.sigmas, self.dedup(rollout)
        sigma = torch.cat([sigmas[at.index].expand(len(at.latents)) for at in states.values()])
        conditioning, samples = rollout.sample_conditioning.repeat(len(states)), None
        if len(conditioning) != len(sigma):
            own = rollout.sample_conditioning.rows
            conditioning = replace(conditioning, rows=torch.cat([dedup.rows(state, own) for state in states]))
        if self.cache is not None:
            batch = rollout.batch * rollout.branches
            numbers = torch.arange(first, first + batch, device=sigma.device)
            samples = torch.cat([dedup.rows(state, numbers) for state in states])
        rows = StepInput(
            latents=torch.cat([at.latents for at in states.values()]),
            velocity=torch.cat([at.slope(step_index, remainder) for at in states.values()]),
            sigma=sigma,
            next_sigma=sigmas[step_index].expand_as(sigma),
            conditioning=conditioning,
            samples=samples,
        )
        output = self._run(rows, step_index, self.guidance_scale(rollout.guidance_scale), self.cache)
        if self.guidance == "reuse" and rollout.guidance_terms is not None:
            # no completion is shared then
            output.velocity.unflatten(0, (len(states), -1)).add_(rollout.guidance_terms[step_index])
        assert output.latents is not None
        split = zip(output.latents.split(sizes), output.velocity.split(sizes), strict=True)
        return {
            state: CompletionState(step_index, latents, velocity, at.remembered(remainder))
            for (state, at), (latents, velocity) in zip(states.items(), split, strict=True)
        }

    def evaluate_state(self, rollout: Rollout, index: int) -> StepOutput:
        """Evaluate the B samples at one of the states that completions start from, at the rollout's guidance."""
        latents = rollout.state(index).latents
        sigma = rollout.coefficients.sigmas[index].expand(len(latents))
        rows = StepInput(latents, sigma, rollout.sample_conditioning)
        return self._run(rows, index, rollout.guidance_scale, None)

    @staticmethod
    def jump(states: Sequence[CompletionState], step_index: int, coefficients: StepCoefficients) -> Tensor:
        """Latents [m, ...] float32 of completions, one after another, at a step index where nothing is evaluated."""
        sigmas = coefficients.sigmas
        sigma = torch.cat([sigmas[at.index].expand(len(at.latents)) for at in states])
        latents = torch.cat([at.latents for at in states])
        velocity = torch.cat([at.slope(step_index, coefficients.remainder) for at in states])
        return ops.euler_jump(latents, velocity, sigma, sigmas[step_index].expand_as(sigma))

    @torch.no_grad()
    def images(self, rollout: Rollout, clean: Tensor, decoder: Decoder, model: FlowModel | None = None) -> Tensor:
        """Decoded completions [J, B, 3, H, W] in [0, 1]; states that share a completion are decoded once.

        Args:
            rollout: what was completed.
            clean: [J, B, ...] as `complete` returns it.
            decoder: of the model.
            model: whose decoder; None = the lookahead's own.
        """
        dedup = rollout.dedup(own=True)
        parts = list(self.decoded(dedup.different(clean), decoder, model))
        decoded = torch.cat(parts).unflatten(0, (-1, clean.shape[1]))
        return torch.stack([decoded[position] for position in dedup.positions])

    @torch.no_grad()
    def decoded(self, clean: Tensor, decoder: Decoder, model: FlowModel | None = None) -> Iterator[Tensor]:
        """Images of clean latents [m, ...], part after part: [at most `decode_chunk`, 3, H, W] in [0, 1] each."""
        source = self.model if model is None else model
        yield from self.decode_rows.each(slice(0, len(clean)), lambda rows: source.decode(clean[rows], decoder))

    def dedup(self, rollout: Rollout) -> CompletionDedup:
        """Which completions are one and the same.

        Samples of one initial noise are, as long as nothing has told them apart, unless the completion uses something
        of each one's own rollout: reused guidance, or a cache's features.
        """
        reused = self.guidance == "reuse" and rollout.guidance_terms is not None
        return rollout.dedup(own=reused or self.cache is not None)

    def plan_for(self, num_steps: int) -> Plan:
        """The plan of rollouts with so many steps.

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

    def guidance_scale(self, rollout_scale: float) -> float:
        """Guidance of the lookahead's own evaluations, given the rollout's."""
        return rollout_scale if self.guidance == "full" or self.model.forwards(rollout_scale) == 1 else 1.0

    def evaluations(self, noisy: tuple[bool, ...]) -> int:
        """Model evaluations of one trajectory, states that share a completion counted once."""
        paths = self.plan_for(len(noisy)).paths
        return sum(len(paths[state]) for state in CompletionDedup(noisy).states[:-1])

    def _ends(self, rollout: Rollout) -> dict[int, Tensor]:
        """Clean latents of each different state's rows; those of the image are there already."""
        steps, dedup = rollout.coefficients.num_steps, self.dedup(rollout)
        guided = self.model.forwards(rollout.guidance_scale) > 1
        if self.guidance == "reuse" and guided and rollout.guidance_terms is None:
            raise ValueError('lookahead guidance "reuse" needs a rollout with keep_guidance=True')
        self.plan_for(steps)
        rollout = rollout.evaluated(self)
        states = self.evaluate(rollout)
        ends = {}
        if states:
            done = self.jump(list(states.values()), steps, rollout.coefficients)
            ends = dict(zip(states, done.split([len(at.latents) for at in states.values()]), strict=True))
        if steps in dedup.states:
            ends[steps] = dedup.rows(steps, rollout.state(steps).latents)
        return ends

    def _run(self, rows: StepInput, step_index: int, scale: float, cache: Cache | None) -> StepOutput:
        """Take rows to a step index and evaluate the model there, at most `chunk` rows at a time."""
        latents, velocity = rows.latents, torch.empty_like(rows.latents)
        if rows.velocity is not None:
            latents = torch.empty_like(latents)

        def run(part: slice) -> tuple[slice, StepOutput]:
            return part, self.step_runner(self.model, rows.select(part), step_index, scale, cache=cache)

        for part, output in self.rows.each(slice(0, len(rows)), run):
            velocity[part] = output.velocity
            if output.latents is not None:
                latents[part] = output.latents
        return StepOutput(latents, velocity)
