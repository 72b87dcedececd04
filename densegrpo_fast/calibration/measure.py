"""Reward gains of every step at given noise levels, and what they owe to the step's own noise.

Completions are exact, with full guidance and the full decoder, whatever training uses. Those of a cheap plan change
from state to state without any noise, and the sign of that error is no matter of the noise level.

All noise comes from the calibration stream, so that no training iteration repeats it: element counters as everywhere,
the sample's number, the draw as epoch, and as step the denoising step or, for the initial latents, T.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.config import Config
from densegrpo_fast.credit.consistency import StepConsistency, step_consistency
from densegrpo_fast.credit.dense import reward_gains
from densegrpo_fast.exit_codes import ExitCode, UserError
from densegrpo_fast.flow import ops
from densegrpo_fast.flow.dynamics import A, B, C, Family, coefficients
from densegrpo_fast.flow.noise import Stream, branch_stream, gaussian
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.runtime.chunks import lookahead_chunks
from densegrpo_fast.runtime.data import PromptSet
from densegrpo_fast.runtime.row_budget import RowBudget
from densegrpo_fast.runtime.scoring import score
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.cost import IterationCost, dense_iteration
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import rollout, sample_ode
from densegrpo_fast.sampling.trajectory import Trajectory

HELD_OUT_DRAW = 2**31
"""Draw of the samples that judge a calibration; the rounds count from 0."""
_BRANCH_DRAW = 2**32 - 1
"""Epoch of the branches' noise, whose streams tree rollouts share, in iterations that count from 0."""


@dataclass(frozen=True)
class _Batch:
    trajectory: Trajectory
    prompts: list[str]
    metadata: list[dict[str, Any]]
    index: Tensor


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
        max_missing: share of missing scores that is endured.
        count: number of samples N.
    """

    model: FlowModel
    reward: RewardMixture
    sigmas: Tensor
    dynamics: Family
    prompts: PromptSet
    guidance_scale: float
    rows: RowBudget
    seed: int
    max_missing: float
    count: int

    @classmethod
    def of(cls, config: Config, model: FlowModel, reward: RewardMixture, prompts: PromptSet, count: int) -> GainMeter:
        """The meter for a configuration's sampler."""
        chunks = lookahead_chunks(config, model, "full")
        return cls(
            model=model,
            reward=reward,
            sigmas=model.sigmas(config.sampler.num_steps),
            dynamics=config.sampler.dynamics,
            prompts=prompts,
            guidance_scale=config.sampler.guidance_scale,
            rows=RowBudget(
                min(config.sampler.micro_batch, chunks.forward, chunks.decode), "sampler.micro_batch, of calibrations"
            ),
            seed=config.seed,
            max_missing=config.reward.max_missing,
            count=count,
        )

    def cost(self, levels: Sequence[float]) -> IterationCost:
        """What `gains` at these levels asks of the model for each sample: a rollout and its exact completions."""
        return dense_iteration(
            plans.exact(len(self.sigmas) - 1),
            trained_steps=0,
            guided=self.model.forwards(self.guidance_scale) > 1,
            kl=False,
            noisy=coefficients(self.sigmas, levels, self.dynamics).noisy,
        )

    def gains(
        self, levels: Sequence[float], draw: int, progress: Callable[[int], object] = lambda samples: None
    ) -> Tensor:
        """Gains of N samples, each with a prompt of its own as far as there are enough.

        Args:
            levels: noise level of every step.
            draw: which samples; the same draw gives the same noise and prompts at any levels.
            progress: is told the size of every batch.

        Returns:
            [N, T] float64 on the CPU; NaN = missing.

        Raises:
            UserError: (reward) the reward failed, or more scores are missing than `max_missing`.
        """

        def work(samples: slice) -> Tensor:
            rewards = self._state_rewards(self._batch(levels, draw, samples))
            return reward_gains(rewards.T[:, None])[:, 0]

        return self._all(self.count, work, progress)

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

        def work(samples: slice) -> Tensor:
            batch = self._batch(levels, draw, samples)
            before = self._state_rewards(batch)
            still = torch.zeros(2, branches, len(batch.index), dtype=torch.float64)
            steps = [
                self._branched(batch, step, branches) - before[step] if noisy else still
                for step, noisy in enumerate(table.noisy)
            ]
            return torch.stack(steps).permute(3, 1, 2, 0)

        gains = self._all(max(2, self.count // branches), work, progress)
        return step_consistency(gains[:, 0], table.table[:, C], gains[:, 1])

    def _all(self, count: int, work: Callable[[slice], Tensor], progress: Callable[[int], object]) -> Tensor:
        """The joined results of `work` on samples 0..count-1, as many at a time as the memory allows."""
        parts = []
        for part in self.rows.each(slice(0, count), work):
            parts.append(part)
            progress(len(part))
        return torch.cat(parts)

    def _batch(self, levels: Sequence[float], draw: int, samples: slice) -> _Batch:
        model, steps = self.model, len(self.sigmas) - 1
        # prompts go on from draw to draw; the samples that judge come after those of draw 0
        first = self.count * {0: 0, HELD_OUT_DRAW: 1}.get(draw, draw + 1)
        index = torch.arange(samples.start, samples.stop, device=model.device)
        chosen = [(first + sample) % len(self.prompts) for sample in index.tolist()]
        prompts = [self.prompts.prompts[prompt] for prompt in chosen]
        words: dict[str, Any] = {"seed": self.seed, "sample_index": index, "epoch": draw}
        trajectory = rollout(
            model,
            gaussian(model.latent_shape, step=steps, stream=Stream.CALIBRATION, **words),
            model.encode(prompts),
            coefficients(self.sigmas, levels, self.dynamics).to(model.device),
            **words,
            guidance_scale=self.guidance_scale,
            stream=Stream.CALIBRATION,
        )
        return _Batch(trajectory, prompts, [self.prompts.metadata[prompt] for prompt in chosen], index)

    def _branched(self, batch: _Batch, step: int, branches: int) -> Tensor:
        """Rewards [2, K, B] of completions after a step that is taken K times from the same state; second, mirrored."""
        trajectory, scores = batch.trajectory, []
        drift, pull = trajectory.coefficients.table[step, A], trajectory.coefficients.table[step, B]
        mean = drift * trajectory.latents[step] + pull * trajectory.velocities[step]
        for branch in range(branches):
            state, _ = ops.sde_step(
                trajectory.latents[step],
                trajectory.velocities[step],
                trajectory.coefficients.table,
                step,
                seed=self.seed,
                sample_index=batch.index,
                epoch=_BRANCH_DRAW,
                stream=branch_stream(branch),
            )
            for arrival in (state, 2 * mean - state):
                clean = sample_ode(
                    self.model,
                    arrival,
                    trajectory.conditioning,
                    self.sigmas[step + 1 :],
                    guidance_scale=self.guidance_scale,
                )
                scores.append(self._scores(self.model.decode(clean)[None], batch)[0])
        return torch.stack(scores).unflatten(0, (branches, 2)).transpose(0, 1)

    def _state_rewards(self, batch: _Batch) -> Tensor:
        """Rewards [T+1, B] of the completions of a batch's states."""
        exact = Lookahead(self.model, plans.exact(len(self.sigmas) - 1), chunk=len(batch.index))
        clean = exact.complete(batch.trajectory)
        return self._scores(exact.images(clean, batch.trajectory.coefficients.noisy, "full"), batch)

    def _scores(self, images: Tensor, batch: _Batch) -> Tensor:
        """Rewards [S, B] float64 on the CPU of images [S, B, 3, H, W]."""
        count = len(images)
        scores = score(self.reward, images.flatten(0, 1), batch.prompts * count, batch.metadata * count)
        if scores.missing_share > self.max_missing:
            raise UserError(
                f"{scores.missing_share:.0%} of the scores are missing, reward.max_missing allows "
                f"{self.max_missing:.0%}",
                ExitCode.REWARD,
            )
        return scores.values.double().view(count, -1).cpu()
