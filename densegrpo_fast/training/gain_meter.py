"""Reward gains of every step at given noise levels, and what they owe to the step's own noise.

Completions are exact, with full guidance and the full decoder, whatever training uses. Those of a cheap plan change
from state to state without any noise, and the sign of that error is no matter of the noise level.

All noise comes from the calibration stream, so that no training iteration repeats it: element counters as everywhere,
the sample's number, the draw as iteration, and as step the denoising step or, for the initial latents, T.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.config import Config
from densegrpo_fast.credit.consistency import StepConsistency, step_consistency
from densegrpo_fast.credit.dense import reward_gains
from densegrpo_fast.flow import ops
from densegrpo_fast.flow.dynamics import A, B, C, Family, StepCoefficients, coefficients
from densegrpo_fast.flow.noise import Stream, branch_stream, gaussian
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.rewards.base import Scorer
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.oom_backoff import OomBackoff
from densegrpo_fast.sampling.rollout import Trajectory, rollout, sample_ode
from densegrpo_fast.training.distributed import World
from densegrpo_fast.training.lookahead import lookahead_chunks
from densegrpo_fast.training.prompts import PromptSet
from densegrpo_fast.training.rewarding import check_missing

HELD_OUT_DRAW = 2**31
"""Draw of the samples that a calibration is judged on; the rounds count from 0."""
_BRANCH_DRAW = 2**32 - 1
"""Iteration of the branches' noise, whose streams branched rollouts share, in iterations that count from 0."""


@dataclass(frozen=True)
class _Batch:
    trajectory: Trajectory
    sampler: StepCoefficients
    prompts: list[str]
    metadata: list[dict[str, Any]]
    index: Tensor


def _within(window: range, levels: Sequence[float]) -> list[float]:
    """Noise levels with noise in the window's steps alone."""
    return [level if step in window else 0.0 for step, level in enumerate(levels)]


@dataclass(frozen=True)
class GainMeter:
    """Draws trajectories and scores the completions of their states.

    Attributes:
        model: the policy.
        reward: what gains are gains of.
        sigmas: the model's grid, [T+1].
        dynamics: family of the stochastic step.
        prompts: the samples take turns in them.
        guidance_scale: of the rollout and of the completions.
        rows: samples at a time, and rows per forward and decode; fewer from then on if the memory runs out.
        seed: of all noise.
        max_missing: share of the scores that may be missing.
        count: number of samples N.
        branched: whether each step is taken from a noise-free trajectory (`sampler.branches`), instead of from where
            the noise of the steps before it has led.
        world: the processes that share the samples; each gets the gains of all.
        windows: steps that a trajectory has noise in; samples are shared out among several windows, in order. The steps
            after one are Euler's, all of them, whatever training takes instead.
    """

    model: FlowModel
    reward: Scorer
    sigmas: Tensor
    dynamics: Family
    prompts: PromptSet
    guidance_scale: float
    rows: OomBackoff
    seed: int
    max_missing: float
    count: int
    windows: tuple[range, ...]
    branched: bool = False
    world: World = field(default_factory=World)

    @classmethod
    def of(
        cls,
        config: Config,
        model: FlowModel,
        reward: Scorer,
        prompts: PromptSet,
        count: int,
        world: World | None = None,
    ) -> GainMeter:
        """The meter for a configuration's sampler."""
        chunks = lookahead_chunks(config, model, "full")
        branched, windows = config.sampler.branches is not None, config.schedule().reached()
        return cls(
            model=model,
            reward=reward,
            sigmas=model.sigmas(config.sampler.num_steps),
            dynamics=config.sampler.dynamics,
            prompts=prompts,
            guidance_scale=config.sampler.guidance_scale,
            rows=OomBackoff(
                min(config.sampler.micro_batch, chunks.forward, chunks.decode), "sampler.micro_batch, of calibrations"
            ),
            seed=config.seed,
            max_missing=config.reward.max_missing,
            count=count,
            # a step that leaves a noise-free trajectory knows of no window
            windows=(range(config.sampler.num_steps),) if branched else tuple(windows),
            branched=branched,
            world=World() if world is None else world,
        )

    def gains(
        self, levels: Sequence[float], draw: int, progress: Callable[[int], object] = lambda samples: None
    ) -> Tensor:
        """Gains of N samples, each with a prompt of its own as far as there are enough.

        Of a trajectory, or of T branches of a noise-free one, at every step with noise: reward of the branch's image
        minus reward of the trajectory's.

        Args:
            levels: noise level of every step.
            draw: which samples; the same draw gives the same noise and prompts at any levels.
            progress: is told the size of every batch.

        Returns:
            [N, T] float64 on the CPU; NaN = missing, exactly 0 in steps that a sample has no noise in.

        Raises:
            RewardError: the reward failed, or more scores are missing than `max_missing`.
        """

        def work(levels: Sequence[float], samples: slice) -> Tensor:
            batch = self._batch(levels, draw, samples)
            before = self._state_rewards(batch)
            if not self.branched:
                return reward_gains(before.T[:, None])[:, 0]
            after = [
                self._completed(batch, self._branch(batch, step, Stream.CALIBRATION, draw)[0], step)
                if noisy
                else before[step]
                for step, noisy in enumerate(batch.sampler.noisy)
            ]
            return torch.stack(after, dim=1) - before[:-1].T

        return self._all(self.count, levels, work, progress)

    def consistency(
        self,
        levels: Sequence[float],
        draw: int,
        branches: int,
        progress: Callable[[int], object] = lambda samples: None,
    ) -> StepConsistency:
        """How much of each step's gain its own noise decides (see `credit.consistency`), by repeated branches.

        From every state of N // `branches` trajectories (at least 2) the step is taken `branches` times with fresh
        noise, and as often with the opposite of it.

        Raises:
            UserError: as `gains`.
        """
        table = coefficients(self.sigmas, levels, self.dynamics)

        def work(levels: Sequence[float], samples: slice) -> Tensor:
            batch = self._batch(levels, draw, samples)
            before = self._state_rewards(batch)
            steps = []
            for step, noisy in enumerate(batch.sampler.noisy):
                after = before[step].expand(2, branches, -1)
                if noisy:
                    pairs = [self._branch(batch, step, branch_stream(k), _BRANCH_DRAW) for k in range(branches)]
                    scores = [self._completed(batch, next_latents, step) for pair in pairs for next_latents in pair]
                    after = torch.stack(scores).unflatten(0, (branches, 2)).transpose(0, 1)
                # a state that the step leaves without noise only here says nothing of its noise
                steps.append(after - before[step] if noisy or not table.noisy[step] else after * torch.nan)
            return torch.stack(steps).permute(3, 1, 2, 0)

        gains = self._all(max(2, self.count // branches), levels, work, progress)
        return step_consistency(gains[:, 0], table.table[:, C], gains[:, 1])

    def _all(
        self,
        count: int,
        levels: Sequence[float],
        work: Callable[[Sequence[float], slice], Tensor],
        progress: Callable[[int], object],
    ) -> Tensor:
        """The joined results of `work` on samples 0..count-1, each with the levels that its window leaves, as many at a
        time as the memory allows."""
        parts = []
        for window, samples in self._shares(count):
            share, own = self.world.share(samples.stop - samples.start), []
            first, last = samples.start + int(share.rows[0]), samples.start + int(share.rows[-1])
            for part in self.rows.each(slice(first, last + 1), partial(work, _within(window, levels))):
                own.append(part)
                progress(len(part))
            parts.append(share.gather(torch.cat(own)))
        return torch.cat(parts)

    def _shares(self, count: int) -> Iterator[tuple[range, slice]]:
        """The windows with the samples that each has of `count`."""
        bounds = [number * count // len(self.windows) for number in range(len(self.windows) + 1)]
        for window, (start, stop) in zip(self.windows, pairwise(bounds), strict=True):
            if start < stop:
                yield window, slice(start, stop)

    def _batch(self, levels: Sequence[float], draw: int, samples: slice) -> _Batch:
        model, steps = self.model, len(self.sigmas) - 1
        # prompts go on from draw to draw; those that it is judged on come after those of draw 0
        first = self.count * {0: 0, HELD_OUT_DRAW: 1}.get(draw, draw + 1)
        index = torch.arange(samples.start, samples.stop, device=model.device)
        chosen = [(first + sample) % len(self.prompts) for sample in index.tolist()]
        prompts = [self.prompts.prompts[prompt] for prompt in chosen]
        words: dict[str, Any] = {"seed": self.seed, "sample_index": index, "iteration": draw}
        sampler = coefficients(self.sigmas, levels, self.dynamics).to(model.device)
        trajectory = rollout(
            model,
            gaussian(model.latent_shape, step=steps, stream=Stream.CALIBRATION, **words),
            model.encode(prompts),
            sampler.only(()) if self.branched else sampler,
            **words,
            guidance_scale=self.guidance_scale,
            stream=Stream.CALIBRATION,
        )
        return _Batch(trajectory, sampler, prompts, [self.prompts.metadata[prompt] for prompt in chosen], index)

    def _branch(self, batch: _Batch, step: int, stream: int, iteration: int) -> tuple[Tensor, Tensor]:
        """Where a step leads a batch, each [B, ...]: with the noise of a stream, and with the opposite."""
        latents, velocity = batch.trajectory.latents[step], batch.trajectory.velocities[step]
        table = batch.sampler.table
        next_latents, _ = ops.sde_step(
            latents, velocity, table, step, seed=self.seed, sample_index=batch.index, iteration=iteration, stream=stream
        )
        mean = table[step, A] * latents + table[step, B] * velocity
        return next_latents, 2 * mean - next_latents

    def _completed(self, batch: _Batch, next_latents: Tensor, step: int) -> Tensor:
        """Rewards [B] of the completions of where a step has led."""
        clean = sample_ode(
            self.model,
            next_latents,
            batch.trajectory.conditioning,
            self.sigmas[step + 1 :],
            guidance_scale=self.guidance_scale,
        )
        return self._scores(self.model.decode(clean)[None], batch)[0]

    def _state_rewards(self, batch: _Batch) -> Tensor:
        """Rewards [T+1, B] of the completions of a batch's states; of a noise-free trajectory all its image."""
        if self.branched:
            reached = self._scores(self.model.decode(batch.trajectory.latents[-1])[None], batch)
            return reached.expand(len(self.sigmas), -1)
        exact = Lookahead(self.model, plans.exact(len(self.sigmas) - 1), chunk=len(batch.index))
        clean = exact.complete(batch.trajectory)
        return self._scores(exact.images(batch.trajectory, clean, "full"), batch)

    def _scores(self, images: Tensor, batch: _Batch) -> Tensor:
        """Rewards [S, B] float64 on the CPU of images [S, B, 3, H, W]."""
        count = len(images)
        scores = self.reward(images.flatten(0, 1), batch.prompts * count, batch.metadata * count)
        check_missing(scores, self.max_missing)
        return scores.values.double().view(count, -1).cpu()
