"""One iteration's experience: trajectories, their rewards, and an advantage for every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.config import Config, CreditOptions
from densegrpo_fast.credit.dense import dense_advantages, reward_gains
from densegrpo_fast.credit.normalize import Advantages
from densegrpo_fast.credit.sparse import sparse_advantages
from densegrpo_fast.exit_codes import ExitCode, UserError
from densegrpo_fast.flow.dynamics import StepCoefficients
from densegrpo_fast.models.base import Cache, FlowModel
from densegrpo_fast.rewards.base import RewardMixture, Scores
from densegrpo_fast.runtime.metrics import PhaseTimer
from densegrpo_fast.runtime.scoring import score
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import initial_noise, rollout
from densegrpo_fast.sampling.trajectory import Trajectory


@dataclass(frozen=True)
class Outcome:
    """What the rewards make of a batch of trajectories.

    Attributes:
        rewards: [P, G] float32 of the final images; NaN = missing.
        lookahead_rewards: [P, G, T+1] float32, of every state's completion; None with sparse credit.
        advantages: [P, G, T].
        scores: of every image that was scored, for the metrics.
        forwards: network forwards per trajectory that the lookahead took (NFE).
    """

    rewards: Tensor
    lookahead_rewards: Tensor | None
    advantages: Advantages
    scores: Scores
    forwards: int

    @property
    def gains(self) -> Tensor | None:
        """[P, G, T] the reward gain of each step; None with sparse credit."""
        return None if self.lookahead_rewards is None else reward_gains(self.lookahead_rewards)


def sample(
    config: Config,
    model: FlowModel,
    rows: list[str],
    coefficients: StepCoefficients,
    iteration: int,
    *,
    keep_hidden: bool = False,
    cache: Cache | None = None,
) -> Trajectory:
    """Roll the policy out on the B = P*G rows of an iteration; all noise is a function of (seed, iteration, row).

    What the configured lookahead needs is kept, features in its `cache`; `keep_hidden` keeps the hidden tokens in any
    case.
    """
    options, dense = config.sampler, config.credit.method == "dense"
    index = torch.arange(len(rows), device=model.device)
    first = index - index % options.group_size if options.shared_noise else index
    return rollout(
        model,
        initial_noise(model, first, seed=config.seed, epoch=iteration),
        model.encode(rows),
        coefficients,
        sample_index=index,
        seed=config.seed,
        epoch=iteration,
        guidance_scale=options.guidance_scale,
        micro_batch=options.micro_batch,
        keep_guidance=dense and config.lookahead.guidance == "reuse",
        keep_hidden=keep_hidden or (dense and config.lookahead.head is not None),
        cache=cache,
    )


class Judge:
    """Turns trajectories into rewards and rewards into advantages.

    With a lookahead, every state's completion is scored and each step is credited with its gain (DenseGRPO, arXiv
    2601.20218, Eq 7-10). Without, only the final image is scored and every step gets its advantage (Flow-GRPO).
    """

    def __init__(self, config: Config, model: FlowModel, reward: RewardMixture, lookahead: Lookahead | None):
        self.config, self.model, self.reward, self.lookahead = config, model, reward, lookahead
        self.cache = None if lookahead is None else lookahead.cache

    def judge(
        self, trajectory: Trajectory, rows: list[str], metadata: list[dict[str, Any]], timer: PhaseTimer
    ) -> Outcome:
        """Complete, decode and score the trajectories of the B rows, timing the phases "lookahead" and "reward".

        Raises:
            UserError: (reward) a reward failed, or more scores are missing than `reward.max_missing` allows.
        """
        if self.lookahead is None:
            return self._sparse(trajectory, rows, metadata, timer)
        return self._dense(self.lookahead, trajectory, rows, metadata, timer)

    def _sparse(
        self, trajectory: Trajectory, rows: list[str], metadata: list[dict[str, Any]], timer: PhaseTimer
    ) -> Outcome:
        with timer("reward"):
            parts = trajectory.latents[-1].split(self.config.lookahead.chunk)
            images = torch.cat([self.model.decode(part) for part in parts])
            scores = self._score(images, rows, metadata)
        rewards = scores.values.view(-1, self.config.sampler.group_size)
        advantages = sparse_advantages(rewards, trajectory.num_steps, **_spread(self.config.credit))
        return Outcome(rewards, None, advantages, scores, 0)

    def _dense(
        self,
        lookahead: Lookahead,
        trajectory: Trajectory,
        rows: list[str],
        metadata: list[dict[str, Any]],
        timer: PhaseTimer,
    ) -> Outcome:
        states, noisy = trajectory.num_steps + 1, trajectory.coefficients.noisy
        with timer("lookahead"):
            lookahead.model.refresh()
            clean = lookahead.complete(trajectory)
        with timer("reward"):
            images = lookahead.images(clean, noisy, self.config.lookahead.decoder)
            scores = self._score(images.flatten(0, 1), rows * states, metadata * states)
        rewards = scores.values.view(states, -1, self.config.sampler.group_size).permute(1, 2, 0)
        credit = self.config.credit
        advantages = dense_advantages(rewards, normalize=credit.normalize, **_spread(credit))
        scale = lookahead.guidance_scale(trajectory.guidance_scale)
        forwards = lookahead.evaluations(noisy) * self.model.forwards(scale)
        return Outcome(rewards[..., -1], rewards, advantages, scores, forwards)

    def _score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        scores = score(self.reward, images, prompts, metadata)
        limit = self.config.reward.max_missing
        if scores.missing_share > limit:
            raise UserError(
                f"{scores.missing_share:.0%} of the scores are missing, reward.max_missing allows {limit:.0%}",
                ExitCode.REWARD,
            )
        return scores


def _spread(credit: CreditOptions) -> dict[str, Any]:
    return {"std": credit.std, "spread_floor": credit.spread_floor, "clip": credit.clip}
