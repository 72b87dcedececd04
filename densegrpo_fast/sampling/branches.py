"""Trees: noise-free trunks, and at single steps several branches that leave one state with noise of their own.

The sampling of TempFlow-GRPO (arXiv 2508.04324) and Granular-GRPO (arXiv 2510.01982). Branches of one state differ by
the noise of one step alone, so their rewards compare nothing else; what follows that step is noise-free again, and is
a lookahead's to complete. The velocity of a state is evaluated once for all its branches, in sampling and in training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from densegrpo_fast.flow import ops
from densegrpo_fast.flow.dynamics import StepCoefficients
from densegrpo_fast.flow.noise import branch_stream
from densegrpo_fast.models.base import Conditioning, FlowModel
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import rollout
from densegrpo_fast.sampling.step_runner import StepInput
from densegrpo_fast.sampling.trajectory import Trajectory


@dataclass(frozen=True)
class BranchedRollout:
    """S trunks with K branches at each of M steps.

    Branch k of trunk s is row b = s*K + k of B = S*K.

    Attributes:
        trunk: noise-free trajectories of S rows, as far as the last state that branches.
        twigs: B rows of which only what follows a branching step t is filled: `latents[t+1]`, where its branches lead;
            `velocities[t+1]` and `hidden[t+1]`, the guided velocity and the hidden tokens there (of t < T-1), once
            `reach` has filled them; `log_probs[t]`, of the branches' steps. Its `coefficients.noisy` marks the states
            that branches lead to, as if their next step were noisy: a lookahead then completes these and no others.
        coefficients: of the sampler, with noise in the M branching steps.
        branches: K.
        reached: whether `reach` has filled what completions start with.
    """

    ode_trajectory: Trajectory
    twigs: Trajectory
    coefficients: StepCoefficients
    branches: int
    reached: bool = False

    @property
    def batch(self) -> int:
        """S."""
        return self.ode_trajectory.batch

    @property
    def latents(self) -> Tensor:
        """[n+1, S, ...] float32 of the trunks, which take n steps."""
        return self.ode_trajectory.latents

    @property
    def velocities(self) -> Tensor:
        """[n, S, ...] float32, the guided velocity at each state of the trunks."""
        return self.ode_trajectory.velocities

    @property
    def conditioning(self) -> Conditioning:
        """The prompts of the S trunks."""
        return self.ode_trajectory.conditioning

    @property
    def guidance_scale(self) -> float:
        """Of all velocities."""
        return self.ode_trajectory.guidance_scale

    @property
    def log_probs(self) -> Tensor:
        """[T, B] float32 of the branches' steps; 0 at steps without branches."""
        return self.twigs.log_probs

    @property
    def steps(self) -> list[int]:
        """The M steps at which the trunks branch, increasing."""
        return [step for step, noisy in enumerate(self.coefficients.noisy) if noisy]

    @property
    def inner(self) -> list[int]:
        """The states that branches lead to and that are not the image yet."""
        return [step + 1 for step in self.steps if step + 1 < self.coefficients.num_steps]

    def select(self, rows: slice) -> BranchedRollout:
        """Some trunks with their branches; tensors are shared, not copied."""
        return replace(self, ode_trajectory=self.ode_trajectory.select(rows), twigs=self.twigs.select(self.taken(rows)))

    def taken(self, rows: slice) -> slice:
        """The branches' rows of some trunks."""
        return slice(rows.start * self.branches, rows.stop * self.branches)

    def arrivals(self, step: int, rows: slice) -> Tensor:
        """[m*K, ...] float32, where the branches of m trunks' states lead in a step."""
        return self.twigs.latents[step + 1, self.taken(rows)]

    @torch.no_grad()
    def reach(self, lookahead: Lookahead) -> BranchedRollout:
        """The tree with the velocity of every state that a branch leads to, at the trunks' guidance.

        Args:
            lookahead: evaluates them as it does its nodes, by its model: nothing but completions goes on from there.
                With a completion head the hidden tokens there are kept too.
        """
        twigs, sigmas = self.twigs, self.coefficients.sigmas
        velocities, hidden = twigs.latents.new_zeros(twigs.velocities.shape), None
        lookahead.visits.begin(lookahead.model)
        for state in self.inner:
            here, sigma = twigs.latents[state], sigmas[state].expand(twigs.batch)
            # they are there already: whatever the velocity, the jump has no length
            rows = StepInput(here, here, sigma, sigma, twigs.conditioning, samples=None)
            _, velocities[state], tokens = lookahead.arrive(rows, state, self.guidance_scale)
            if tokens is not None:
                hidden = tokens.new_zeros(len(velocities), *tokens.shape) if hidden is None else hidden
                hidden[state] = tokens
        return replace(self, twigs=replace(twigs, velocities=velocities, hidden=hidden), reached=True)

    def reached_by(self, lookahead: Lookahead) -> BranchedRollout:
        """The tree as a lookahead's completions start from it: as it is if `reached`, else `reach`."""
        return self if self.reached else self.reach(lookahead)

    def completions(self, lookahead: Lookahead) -> Tensor:
        """Clean latents [M, B, ...] float32 of every step's branches.

        A tree that is not `reached` is, by the lookahead: several completions of one tree share that.

        Raises:
            ValueError: as `Lookahead.complete`.
        """
        clean = lookahead.complete(self.reached_by(lookahead).twigs)
        return torch.stack([clean[step + 1] for step in self.steps])


Sampled = Trajectory | BranchedRollout
"""What an iteration trains on."""


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
    """Follow the flow from noise without noise, and branch at every step in which `coefficients` inject some.

    Args:
        noise: initial latents [S, ...] float32 of the trunks.
        conditioning: prompts of the B = S*K branches; those of one trunk share one.
        coefficients: tables for T steps, on the model's device.
        branches: K, at least 2.
        sample_index: [S] int64, the global index that seeds each trunk's noise; its branches have streams of their own
            (`flow.noise.branch_stream`).
        seed, iteration: the other parts of the noise counters.
        guidance_scale: 1 is off.
        micro_batch: trunks per forward, which training must repeat (see `rollout`). None = all of them.

    Raises:
        ValueError: no step injects noise, K is below 2, or the numbers of rows do not fit together.
    """
    steps = [step for step, noisy in enumerate(coefficients.noisy) if noisy]
    rows, num_steps = len(conditioning), coefficients.num_steps
    if not steps:
        raise ValueError("grow: no step injects noise, so no state can branch")
    if branches < 2 or rows != len(noise) * branches:
        raise ValueError(f"grow: {len(noise)} trunks with {branches} branches each do not make {rows} rows")
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
    latents = noise.new_zeros(num_steps + 1, rows, *noise.shape[1:])
    log_probs = noise.new_zeros(num_steps, rows)
    # takes no memory: `reach` makes those that are needed
    velocities = noise.new_zeros(()).expand(num_steps, *latents.shape[1:])
    for step in steps:
        for branch in range(branches):
            mine = slice(branch, None, branches)
            latents[step + 1, mine], log_probs[step, mine] = ops.sde_step(
                ode_trajectory.latents[step],
                ode_trajectory.velocities[step],
                coefficients.table,
                step,
                seed=seed,
                sample_index=sample_index,
                iteration=iteration,
                stream=branch_stream(branch),
            )
    led_to = replace(coefficients, noisy=(False, *coefficients.noisy[:-1]))
    twigs = Trajectory(latents, velocities, log_probs, led_to, conditioning, guidance_scale)
    return BranchedRollout(ode_trajectory, twigs, coefficients, branches)
