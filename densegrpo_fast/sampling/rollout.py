"""Rollouts: the policy's stochastic trajectories, and the protocol through which an iteration uses any rollout."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
from torch import Tensor

from densegrpo_fast.flow import ops
from densegrpo_fast.flow.dynamics import StepCoefficients
from densegrpo_fast.flow.noise import Stream, gaussian
from densegrpo_fast.flow.step_op import INPUT_DTYPES
from densegrpo_fast.models.base import Conditioning, FlowModel, GuidanceGradient, Recorder
from densegrpo_fast.sampling.dedup import CompletionDedup

if TYPE_CHECKING:
    from typing import Self

    from densegrpo_fast.sampling.lookahead import Lookahead


class RolloutState(NamedTuple):
    """What is known of the B samples at one state.

    Attributes:
        latents: [B, ...] float32.
        velocity: [B, ...] float32, guided; None where nothing has evaluated it yet.
    """

    latents: Tensor
    velocity: Tensor | None = None


class GroupedRewards(NamedTuple):
    """Rewards of a rollout's completions, by prompt; NaN = missing.

    Attributes:
        states: [P, G, T+1] float32 of every state's completion, NaN where it is not completed; None for branches.
        branches: [P, N, C, K, L] of C branches at K steps of N trajectories, completed in L ways; None without.
    """

    states: Tensor | None
    branches: Tensor | None


class Rollout(Protocol):
    """Samples of an iteration: states that are trained, and states whose completions are rewarded.

    `Trajectory` takes one step from each state, `branches.BranchedRollout` several. S states of each step are trained,
    with K = `branches` steps from each, which makes B = S*K samples.
    """

    @property
    def coefficients(self) -> StepCoefficients:
        """Of the sampler's T steps; its `noisy` says which steps are stochastic."""

    @property
    def latents(self) -> Tensor:
        """[n+1, S, ...] float32, states after 0..n steps."""

    @property
    def velocities(self) -> Tensor:
        """[n, S, ...] float32, the guided velocity at each of the first n states."""

    @property
    def log_probs(self) -> Tensor:
        """[T, B] float32 of each sample's steps, mean over the latent's elements; 0 for a noise-free step."""

    @property
    def conditioning(self) -> Conditioning:
        """Prompts of the S rows of states."""

    @property
    def guidance_scale(self) -> float:
        """Of all velocities; 1 = off."""

    @property
    def guidance_terms(self) -> Tensor | None:
        """[T, B, ...] what guidance added to each velocity, for a lookahead that reuses it; None if not kept."""

    @property
    def batch(self) -> int:
        """S."""

    @property
    def branches(self) -> int:
        """K, steps taken from each state."""

    @property
    def sample_conditioning(self) -> Conditioning:
        """Prompts of the B samples."""

    @property
    def completed(self) -> tuple[int, ...]:
        """The states that completions start from, in the order in which `Lookahead.complete` returns them."""

    def select(self, rows: slice) -> Self:
        """Some of the S rows with all their samples; tensors are shared, not copied."""

    def sample_rows(self, rows: slice) -> slice:
        """The samples that belong to some of the S rows."""

    def next_latents(self, step: int, rows: slice) -> Tensor:
        """[m*K, ...] float32, where a step leads from the states of m rows."""

    def state(self, index: int) -> RolloutState:
        """The B samples at one of the `completed` states."""

    def dedup(self, *, own: bool = False) -> CompletionDedup:
        """Which of the completions are one and the same.

        Args:
            own: whether each completion uses something of its own sample, so that samples of one noise differ.
        """

    def evaluated(self, lookahead: Lookahead) -> Self:
        """The rollout with the velocity of every state that completions start from, by a lookahead's model."""

    def group_rewards(self, values: Tensor, group_size: int) -> GroupedRewards:
        """Rewards of completions by prompt.

        Args:
            values: [L * K, B] float32, for L ways to complete K different states of B samples, whole groups: all of a
                batch, of which the rollout itself may hold a part.
            group_size: G.
        """


@dataclass(frozen=True)
class Trajectory:
    """T steps of B samples from noise to image: a `Rollout` that takes one step from each state.

    Attributes:
        latents: [T+1, B, ...] float32; index = steps done, so `latents[0]` is noise and `latents[T]` the end.
        velocities: [T, B, ...] float32, the guided velocity at each state.
        log_probs: [T, B] float32 of each step, mean over the latent's elements; 0 for a noise-free step.
        coefficients: the steps' coefficients and sigmas.
        conditioning: the prompts of the B rows.
        guidance_scale: of `velocities`.
        guidance_terms: [T, B, ...] float32, `velocities` minus the conditional ones; None if they were not kept.
        shared: rows, in consecutive blocks, that have prompt and initial noise in common; 1 = each row its own.
        completed_states: the states to complete, increasing, each with a completion of its own; None = all T+1.

    Raises:
        ValueError: shapes that do not belong together, such as samples before steps.
    """

    latents: Tensor
    velocities: Tensor
    log_probs: Tensor
    coefficients: StepCoefficients
    conditioning: Conditioning
    guidance_scale: float
    guidance_terms: Tensor | None = None
    shared: int = 1
    completed_states: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        steps, batch = len(self.velocities), self.latents.shape[1]
        like = (steps, *self.latents.shape[1:])
        expected = {"latents": (steps + 1, *like[1:]), "velocities": like, "log_probs": like[:2]}
        if self.guidance_terms is not None:
            expected["guidance_terms"] = like
        for name, shape in expected.items():
            if (found := getattr(self, name)).shape != shape:
                raise ValueError(
                    f"Trajectory: {name} must have shape {list(shape)}, steps before samples (latents [T+1, B, ...], "
                    f"velocities [T, B, ...], log_probs [T, B]), got {list(found.shape)}"
                )
        if len(self.conditioning) != batch:
            raise ValueError(
                f"Trajectory: conditioning must have {batch} rows like latents, got {len(self.conditioning)}"
            )
        if steps > self.coefficients.num_steps:
            raise ValueError(f"Trajectory: {steps} steps were taken, coefficients has {self.coefficients.num_steps}")

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.velocities)

    @property
    def batch(self) -> int:
        return self.latents.shape[1]

    @property
    def branches(self) -> int:
        return 1

    @property
    def sample_conditioning(self) -> Conditioning:
        return self.conditioning

    @property
    def completed(self) -> tuple[int, ...]:
        """Those asked for, the last of all T+1 being the image itself."""
        return tuple(range(self.num_steps + 1)) if self.completed_states is None else self.completed_states

    def select(self, rows: slice) -> Trajectory:
        """The trajectories of some rows; tensors are shared, not copied."""
        latents = self.latents[:, rows]
        batch = latents.shape[1]
        return replace(
            self,
            latents=latents,
            velocities=self.velocities[:, rows],
            log_probs=self.log_probs[:, rows],
            conditioning=self.conditioning.select(rows),
            guidance_terms=None if self.guidance_terms is None else self.guidance_terms[:, rows],
            # only of whole blocks is it known
            shared=self.shared if not (rows.start or 0) % self.shared and not batch % self.shared else 1,
        )

    def sample_rows(self, rows: slice) -> slice:
        return rows

    def next_latents(self, step: int, rows: slice) -> Tensor:
        return self.latents[step + 1, rows]

    def state(self, index: int) -> RolloutState:
        if index == self.num_steps:
            return RolloutState(self.latents[index])
        return RolloutState(self.latents[index], self.velocities[index])

    def dedup(self, *, own: bool = False) -> CompletionDedup:
        """States that noise-free steps join share a completion, and so do samples of one noise before any other."""
        return CompletionDedup(self.coefficients.noisy, 1 if own else self.shared, self.completed_states)

    def evaluated(self, lookahead: Lookahead) -> Trajectory:
        """The trajectory itself: the rollout has evaluated all of its states."""
        return self

    def group_rewards(self, values: Tensor, group_size: int) -> GroupedRewards:
        by_prompt = values.unflatten(1, (-1, group_size)).permute(1, 2, 0)
        return GroupedRewards(self.dedup().every_state(by_prompt), None)


def initial_noise(
    model: FlowModel, sample_index: Tensor, *, seed: int, iteration: int, stream: Stream = Stream.INITIAL
) -> Tensor:
    """Standard normal [B, ...] float32, each a function of (seed, sample index, iteration, stream) alone."""
    return gaussian(
        model.latent_shape,
        seed=seed,
        sample_index=sample_index,
        step=0,
        stream=stream,
        iteration=iteration,
        device=model.device,
    )


class TrajectorySampler:
    """Takes the steps of B trajectories one by one, by the SDE of Flow-GRPO (arXiv 2505.05470, Eq 9) or another family.

        for step in range(sampler.steps):
            sampler.evaluate(step)
            sampler.advance(step)

    Args:
        noise: standard normal [B, ...] float32, of which `FlowModel.start` makes the initial latents.
        conditioning: prompts of the B rows.
        coefficients: tables for T steps, on the model's device; their family is that of the steps.
        sample_index: [B] int64, the global index that seeds each row's noise.
        seed, iteration: the other parts of the noise counters.
        guidance_scale: 1 is off.
        micro_batch: rows per forward. The replay in training must use the same split: a forward's rounding may depend
            on its batch shape, and the importance ratio of an unchanged policy shall be 1. None means all rows.
        keep_guidance: keep the guidance terms for a lookahead that reuses them.
        cache: where the forwards leave features for the lookahead; their numbers stay the same to the bit.
        stream: purpose of the steps' noise.
        steps: how many steps are taken, the first ones of T; None = all.

    Raises:
        ValueError: B is not a multiple of `micro_batch`.
    """

    def __init__(
        self,
        model: FlowModel,
        noise: Tensor,
        conditioning: Conditioning,
        coefficients: StepCoefficients,
        *,
        sample_index: Tensor,
        seed: int,
        iteration: int,
        guidance_scale: float = 1.0,
        micro_batch: int | None = None,
        keep_guidance: bool = False,
        cache: Recorder | None = None,
        stream: int = Stream.STEP,
        steps: int | None = None,
    ):
        self.steps, batch = coefficients.num_steps if steps is None else steps, len(noise)
        size = micro_batch or batch
        if batch % size:
            raise ValueError(f"micro_batch must divide the number of samples: {batch} samples, micro_batch {size}")
        self.model, self.cache = model, cache
        self.counters: dict[str, Any] = {"seed": seed, "sample_index": sample_index, "iteration": iteration}
        self.counters["stream"] = stream
        self.parts = [slice(start, start + size) for start in range(0, batch, size)]
        latents = noise.new_empty(self.steps + 1, *noise.shape)
        velocities = noise.new_empty(self.steps, *noise.shape)
        terms = torch.empty_like(velocities) if keep_guidance and model.forwards(guidance_scale) > 1 else None
        latents[0] = self._entering = model.start(noise, coefficients.sigmas)
        self.trajectory = Trajectory(
            latents,
            velocities,
            noise.new_empty(self.steps, batch),
            coefficients,
            conditioning,
            guidance_scale,
            terms,
        )
        if cache is not None:
            cache.clear()

    def evaluate(self, step: int, guidance_gradient: GuidanceGradient | None = None) -> list[Tensor]:
        """Evaluate the model at the state before a step, micro-batch by micro-batch.

        Args:
            guidance_gradient: the halves of guidance that keep their graph; None = none has one.

        Returns:
            The guided velocity of each micro-batch [m, ...] float32, with its graph if that was asked for.
        """
        done, found = self.trajectory, []
        with torch.set_grad_enabled(guidance_gradient is not None):
            for rows in self.parts:
                sigma = done.coefficients.sigmas[step].expand(rows.stop - rows.start)
                with nullcontext() if self.cache is None else self.cache.record(step, rows):
                    velocity = self.model.velocity(
                        self._entering[rows],
                        sigma,
                        done.conditioning.select(rows),
                        done.guidance_scale,
                        guidance_gradient or "full",
                    )
                found.append(velocity.combined())
                done.velocities[step, rows] = found[-1].detach()
                if done.guidance_terms is not None:
                    done.guidance_terms[step, rows] = velocity.guidance_term.detach()
        return found

    @torch.no_grad()
    def advance(self, step: int) -> None:
        """Take a step from the state that `evaluate` has evaluated."""
        done, ahead = self.trajectory, self.trajectory.coefficients.remainder
        slope = done.velocities[step] if ahead is None else ahead.along(done.latents, done.velocities, step)
        output = ops.sde_step_outputs(
            done.latents[step],
            slope,
            done.coefficients.table,
            step,
            input_dtype=self.model.input_dtype if self.model.input_dtype in INPUT_DTYPES else None,
            **self.counters,
        )
        done.latents[step + 1], done.log_probs[step] = output.next_latents, output.log_prob
        self._entering = output.next_latents if output.model_input is None else output.model_input


@torch.no_grad()
def rollout(
    model: FlowModel, noise: Tensor, conditioning: Conditioning, coefficients: StepCoefficients, **options: Any
) -> Trajectory:
    """All steps of a `TrajectorySampler`, which takes the same arguments."""
    sampler = TrajectorySampler(model, noise, conditioning, coefficients, **options)
    for step in range(sampler.steps):
        sampler.evaluate(step)
        sampler.advance(step)
    return sampler.trajectory


@torch.no_grad()
def sample_ode(
    model: FlowModel,
    noise: Tensor,
    conditioning: Conditioning,
    sigmas: Tensor,
    *,
    guidance_scale: float = 1.0,
    micro_batch: int | None = None,
) -> Tensor:
    """Euler's method to clean latents [B, ...] float32; `noise` are latents at the first of `sigmas` [T+1]."""
    sigmas = sigmas.to(noise.device)
    parts = []
    for rows in torch.arange(len(noise), device=noise.device).split(micro_batch or len(noise)):
        latents, condition = noise[rows], conditioning.select(rows)
        for step in range(len(sigmas) - 1):
            sigma, next_sigma = sigmas[step].expand(len(rows)), sigmas[step + 1].expand(len(rows))
            velocity = model.velocity(latents, sigma, condition, guidance_scale).combined()
            latents = ops.euler_jump(latents, velocity, sigma, next_sigma)
        parts.append(latents)
    return torch.cat(parts)
