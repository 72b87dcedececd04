"""One iteration's experience: trajectories, their rewards, and an advantage for every step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.config import Config
from densegrpo_fast.config_methods import credit_values
from densegrpo_fast.credit import registry
from densegrpo_fast.credit.dense import reward_gains
from densegrpo_fast.credit.evidence import Evidence
from densegrpo_fast.credit.normalize import Advantages
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
        lookahead_rewards: [P, G, T+1] float32, of every state's completion; None without a lookahead.
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
        """[P, G, T] the reward gain of each step; None without a lookahead."""
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
    options, completed = config.sampler, config.uses_lookahead
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
        keep_guidance=completed and config.lookahead.guidance == "reuse",
        keep_hidden=keep_hidden or (completed and config.lookahead.head is not None),
        cache=cache,
    )


class Judge:
    """Turns trajectories into rewards, and rewards into advantages by the configured credit method.

    For a method with a lookahead every state's completion is scored (DenseGRPO, arXiv 2601.20218, Eq 7-9), for one
    without only the final image.
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
        noisy, clean = trajectory.coefficients.noisy, None
        if self.lookahead is not None:
            with timer("lookahead"):
                self.lookahead.model.refresh()
                clean = self.lookahead.complete(trajectory)
        with timer("reward"):
            images = self._images(trajectory, clean)
            scores = self._score(images.flatten(0, 1), rows * len(images), metadata * len(images))
        # [P, G, K+1] with a lookahead and K noisy steps, [P, G, 1] without
        different = scores.values.view(len(images), -1, self.config.sampler.group_size).permute(1, 2, 0)
        evidence = Evidence(
            rewards=different[..., -1],
            noisy=noisy,
            latents=trajectory.latents,
            velocities=trajectory.velocities,
            sigmas=trajectory.coefficients.sigmas,
            lookahead_rewards=None if self.lookahead is None else different,
        )
        credit = self.config.credit
        advantages = registry.advantages(credit.method, evidence, credit_values(credit))
        if self.lookahead is None:
            return Outcome(evidence.rewards, None, advantages, scores, 0)
        scale = self.lookahead.guidance_scale(trajectory.guidance_scale)
        forwards = self.lookahead.evaluations(noisy) * self.model.forwards(scale)
        rewards = different[..., self.lookahead.positions(noisy)]
        return Outcome(evidence.rewards, rewards, advantages, scores, forwards)

    def _images(self, trajectory: Trajectory, clean: Tensor | None) -> Tensor:
        """[N, B, 3, H, W] of the completions that differ, N = K+1 for K noisy steps; without a lookahead, N = 1."""
        if self.lookahead is not None and clean is not None:
            return self.lookahead.different_images(clean, trajectory.coefficients.noisy, self.config.lookahead.decoder)
        parts = trajectory.latents[-1].split(self.config.lookahead.chunk)
        return torch.cat([self.model.decode(part) for part in parts])[None]

    def _score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        scores = score(self.reward, images, prompts, metadata)
        limit = self.config.reward.max_missing
        if scores.missing_share > limit:
            raise UserError(
                f"{scores.missing_share:.0%} of the scores are missing, reward.max_missing allows {limit:.0%}",
                ExitCode.REWARD,
            )
        return scores
