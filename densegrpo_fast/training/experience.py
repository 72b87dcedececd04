"""One iteration's experience: trajectories, their rewards, and an advantage for every step."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.common.errors import RewardError
from densegrpo_fast.config import Config
from densegrpo_fast.credit import registry
from densegrpo_fast.credit.dense import reward_gains
from densegrpo_fast.credit.inputs import CreditInputs
from densegrpo_fast.credit.normalize import Advantages
from densegrpo_fast.credit.smoothing import smooth_rewards
from densegrpo_fast.flow.dynamics import C, StepCoefficients
from densegrpo_fast.models.base import Cache, Decoder, FlowModel
from densegrpo_fast.rewards.base import RewardMixture, Scores
from densegrpo_fast.run_files.metrics import PhaseTimer
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.branches import BranchedRollout, Sampled, branch_rollout
from densegrpo_fast.sampling.cost import IterationCost, branched_iteration, dense_iteration, sparse_iteration
from densegrpo_fast.sampling.dedup import CompletionDedup
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.rollout import initial_noise, rollout
from densegrpo_fast.sampling.trajectory import Trajectory
from densegrpo_fast.training.chunks import lookahead_chunks
from densegrpo_fast.training.oom_backoff import OomBackoff
from densegrpo_fast.training.scoring import Scoring, chosen, joined


@dataclass(frozen=True)
class RewardBatch:
    """What the rewards make of a batch of trajectories.

    Attributes:
        rewards: [P, G] float32 of the final images by the full decoder, [P, G*K] of the images of branches at K steps
            by the lookahead's; NaN = missing.
        lookahead_rewards: [P, G, T+1] float32, of every state's completion, all by the lookahead's decoder, so that
            gains compare like with like; None without a lookahead.
        advantages: [P, G, T].
        scores: of every image that was scored, those of `rewards` last, for the metrics.
        branch_rewards: [P, N, C, K] float32, of the finest completion of each of N trunks' C branches at K steps; None
            without branches.
    """

    rewards: Tensor
    lookahead_rewards: Tensor | None
    advantages: Advantages
    scores: Scores
    branch_rewards: Tensor | None = None

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
    cache: Cache | None = None,
) -> Trajectory:
    """Roll the policy out on the B = P*G rows of an iteration; all noise is a function of (seed, iteration, row).

    What the configured lookahead needs is kept, features in its `cache`.
    """
    options, completed = config.sampler, config.uses_lookahead
    index = torch.arange(len(rows), device=model.device)
    first = index - index % options.group_size if options.shared_noise else index
    trajectory = rollout(
        model,
        initial_noise(model, first, seed=config.seed, iteration=iteration),
        model.encode(rows),
        coefficients,
        sample_index=index,
        seed=config.seed,
        iteration=iteration,
        guidance_scale=options.guidance_scale,
        micro_batch=options.micro_batch,
        keep_guidance=completed and config.lookahead.guidance == "reuse",
        keep_hidden=completed and config.lookahead.head is not None,
        cache=cache,
    )
    return replace(trajectory, shared=options.group_size) if options.shared_noise else trajectory


def sample_branches(
    config: Config, model: FlowModel, rows: list[str], coefficients: StepCoefficients, iteration: int
) -> BranchedRollout:
    """Let trunks branch, for the B = P*G rows of an iteration, at the steps in which `coefficients` inject noise.

    Row p*G + n*C + c is branch c of trunk n of prompt p, with C = `sampler.branches`. All noise is a function of (seed,
    iteration, trunk, branch).
    """
    options, branches = config.sampler, config.sampler.branches
    assert branches is not None
    first = torch.arange(0, len(rows), branches, device=model.device)
    return branch_rollout(
        model,
        initial_noise(model, first, seed=config.seed, iteration=iteration),
        model.encode(rows),
        coefficients,
        branches=branches,
        sample_index=first,
        seed=config.seed,
        iteration=iteration,
        guidance_scale=options.guidance_scale,
        micro_batch=options.micro_batch,
    )


def draw(
    config: Config,
    model: FlowModel,
    rows: list[str],
    coefficients: StepCoefficients,
    iteration: int,
    *,
    cache: Cache | None = None,
) -> Sampled:
    """What an iteration trains on: `sample_branches` with `sampler.branches`, else `sample`."""
    if config.sampler.branches is not None:
        return sample_branches(config, model, rows, coefficients, iteration)
    return sample(config, model, rows, coefficients, iteration, cache=cache)


def draw_fitting(
    budget: OomBackoff,
    config: Config,
    model: FlowModel,
    rows: list[str],
    coefficients: StepCoefficients,
    iteration: int,
    *,
    cache: Cache | None = None,
) -> Sampled:
    """`draw` with the budget's rows per forward, drawn anew with fewer (the same noise) if the memory runs out."""

    def with_rows(micro_batch: int) -> Sampled:
        sampler = config.sampler.model_copy(update={"micro_batch": micro_batch})
        lowered = config.model_copy(update={"sampler": sampler})
        return draw(lowered, model, rows, coefficients, iteration, cache=cache)

    return budget.fitting(with_rows)


def complete_in(lookahead: Lookahead, trajectory: Trajectory, chunk: int) -> Tensor:
    """Completions as `Lookahead.complete` gives them, from then on with at most `chunk` rows per forward."""
    lookahead.chunk = chunk
    return lookahead.complete(trajectory)


class RewardComputer:
    """Turns trajectories into rewards, and rewards into advantages by the configured credit method.

    For a method with a lookahead every state's completion is scored (DenseGRPO, arXiv 2601.20218, Eq 7-9), for one
    without only the final image, and for one with branches the image of each of them. The completions of trajectories
    may be previews; a final reward is always that of the full decoder, so their ends are then decoded and scored twice.
    """

    def __init__(self, config: Config, model: FlowModel, reward: RewardMixture, lookahead: Lookahead | None):
        self.config, self.model, self.reward, self.lookahead = config, model, reward, lookahead
        self.cache = None if lookahead is None else lookahead.cache
        self.chunk = lookahead_chunks(config, model, "full").decode if lookahead is None else lookahead.decode_chunk
        self.decodes = OomBackoff(self.chunk, "lookahead.chunk, of decodes", "set model.vae_decode to tiled")
        self.forwards = OomBackoff(0 if lookahead is None else lookahead.chunk, "lookahead.chunk")
        self.ends: OomBackoff | None = None
        if config.uses_lookahead and config.lookahead.decoder != "full":
            full = lookahead_chunks(config, model, "full").decode
            self.ends = OomBackoff(full, "lookahead.chunk, of full decodes", "set model.vae_decode to tiled")

    def judge(
        self, trajectory: Sampled, rows: list[str], metadata: list[dict[str, Any]], timer: PhaseTimer
    ) -> RewardBatch:
        """Complete, decode and score the trajectories of the B rows, timing the phases "lookahead" and "reward".

        Raises:
            RewardError: a reward failed, or more scores are missing than `reward.max_missing` allows.
        """
        if isinstance(trajectory, BranchedRollout):
            return self._judge_tree(trajectory, rows, metadata, timer)
        noisy, clean, batch = trajectory.coefficients.noisy, trajectory.latents[-1], len(rows)
        sharing = None if self.lookahead is None else self.lookahead.sharing(trajectory)
        if self.lookahead is not None and sharing is not None:
            with timer("lookahead"):
                self.lookahead.model.refresh()
                clean = sharing.different(self.forwards.fitting(partial(complete_in, self.lookahead, trajectory)))
        with timer("reward"):
            whose = list(range(batch)) if sharing is None else sharing.samples(batch)
            scores = self._score(self._images(clean), whose, rows, metadata)
            if sharing is not None:
                scores = chosen(scores, sharing.broadcast(torch.arange(len(clean)), batch).flatten())
            different = scores.values
            if self.ends is not None and sharing is not None:
                scores = joined([scores, self._final_scores(self.ends, trajectory, sharing, rows, metadata)])
            self._check_missing(scores)
        # [P, G, K+1] with a lookahead and K noisy steps, [P, G, 1] without
        different = different.view(-1, batch // self.config.sampler.group_size, self.config.sampler.group_size)
        different = different.permute(1, 2, 0)
        evidence = CreditInputs(
            rewards=scores.values[-batch:].view(different.shape[:2]),
            noisy=noisy,
            latents=trajectory.latents,
            velocities=trajectory.velocities,
            sigmas=trajectory.coefficients.sigmas,
            lookahead_rewards=None if self.lookahead is None else self._smoothed(different, trajectory.coefficients),
        )
        credit = self.config.credit
        advantages = registry.advantages(credit.method, evidence, credit.method_options())
        if self.lookahead is None or sharing is None:
            return RewardBatch(evidence.rewards, None, advantages, scores)
        return RewardBatch(evidence.rewards, different[..., sharing.positions], advantages, scores)

    def _judge_tree(
        self, tree: BranchedRollout, rows: list[str], metadata: list[dict[str, Any]], timer: PhaseTimer
    ) -> RewardBatch:
        """Score the images of all branches, in every way in which the credit method wants them completed."""
        assert self.lookahead is not None
        ways = self._ways(self.lookahead)

        def completions(chunk: int) -> Tensor:
            for way in ways:
                way.chunk = chunk
            reached = tree.reached_by(ways[0])
            return torch.stack([reached.completions(way) for way in ways])

        with timer("lookahead"):
            self.lookahead.model.refresh()
            clean = self.forwards.fitting(completions)  # [L, K, B, ...]
        with timer("reward"):
            count = clean.shape[0] * clean.shape[1]
            scores = self._score(self._images(clean.flatten(0, 2)), [*range(len(rows))] * count, rows, metadata)
            self._check_missing(scores)
        size, branches = self.config.sampler.group_size, tree.branches
        found = scores.values.view(*clean.shape[:2], -1, size).permute(2, 3, 1, 0)  # [P, G, K, L]
        rewards = found.unflatten(1, (size // branches, branches))
        evidence = CreditInputs(
            rewards=found[..., -1].nanmean(-1),
            noisy=tree.coefficients.noisy,
            latents=tree.twigs.latents,
            velocities=tree.twigs.velocities,
            sigmas=tree.coefficients.sigmas,
            branch_rewards=rewards,
        )
        credit = self.config.credit
        advantages = registry.advantages(credit.method, evidence, credit.method_options())
        return RewardBatch(found[..., -1].flatten(1), None, advantages, scores, rewards[..., -1])

    def cost(self, drawn: Sampled, trained_steps: int) -> IterationCost:
        """What an iteration on these samples asks of the model for each of them, if it trains so many steps."""
        noisy, options = drawn.coefficients.noisy, self._settings(drawn, trained_steps)
        if self.lookahead is None:
            return self.sparse_cost(drawn, trained_steps)
        options |= {"guidance": self.lookahead.guidance, "decoder": self.config.lookahead.decoder, "noisy": noisy}
        options["head"] = self.lookahead.head
        if isinstance(drawn, BranchedRollout):
            plan, *others = [way.plan_for(len(noisy)) for way in self._ways(self.lookahead)]
            return branched_iteration(plan, others=others, branches=drawn.branches, **options)
        options |= {"shared": self.lookahead.sharing(drawn).group}
        return dense_iteration(self.lookahead.plan_for(len(noisy)), **options)

    def sparse_cost(self, drawn: Sampled, trained_steps: int) -> IterationCost:
        """The same with one reward per image, and with trajectories instead of branches."""
        return sparse_iteration(drawn.coefficients.num_steps, **self._settings(drawn, trained_steps))

    def _settings(self, drawn: Sampled, trained_steps: int) -> dict[str, Any]:
        guided = self.model.forwards(drawn.guidance_scale) > 1
        return {"trained_steps": trained_steps, "guided": guided, "kl": self.config.objective.kl_coef > 0}

    def _ways(self, lookahead: Lookahead) -> list[Lookahead]:
        """The completions of a branch, the finest last."""
        if "granularities" not in registry.find(self.config.credit.method).options:
            return [lookahead]
        strides = sorted(self.config.credit.granularities, reverse=True)
        return [lookahead.by(plans.strided(lookahead.plan.num_steps, stride)) for stride in strides]

    def _smoothed(self, rewards: Tensor, coefficients: StepCoefficients) -> Tensor:
        """Rewards [P, G, K+1] of the different completions, as the credit method sees them."""
        strength = self.config.credit.smoothing
        if not strength:
            return rewards
        return smooth_rewards(rewards, coefficients.table[list(coefficients.noisy), C].to(rewards.device), strength)

    def _images(self, clean: Tensor) -> Iterator[Tensor]:
        """Images of clean latents [m, ...], part after part; without a lookahead by the full decoder."""
        decoder: Decoder = "full" if self.lookahead is None else self.config.lookahead.decoder
        return self.decodes.each(slice(0, len(clean)), lambda rows: self.model.decode(clean[rows], decoder))

    def _final_scores(
        self,
        ends: OomBackoff,
        trajectory: Trajectory,
        sharing: CompletionDedup,
        rows: list[str],
        metadata: list[dict[str, Any]],
    ) -> Scores:
        """Scores of the B trajectories' ends by the full decoder."""
        last, batch = trajectory.num_steps, len(rows)
        clean = sharing.rows(last, trajectory.latents[last])
        images = ends.each(slice(0, len(clean)), lambda part: self.model.decode(clean[part], "full"))
        whose = range(0, batch, sharing.stride(last))
        return chosen(self._score(images, whose, rows, metadata), sharing.spread(last, torch.arange(len(clean))))

    def _score(
        self, parts: Iterable[Tensor], whose: Sequence[int], rows: list[str], metadata: list[dict[str, Any]]
    ) -> Scores:
        """Scores of pictures that are made part after part, while they are made if `reward.overlap` says so.

        Args:
            parts: the pictures.
            whose: for each of them its place in rows and metadata.
        """
        done = 0
        with Scoring(self.reward, overlap=self.config.reward.overlap) as scoring:
            for images in parts:
                here = whose[done : done + len(images)]
                done += len(images)
                scoring.add(images, [rows[b] for b in here], [metadata[b] for b in here])
            return scoring.result()

    def _check_missing(self, scores: Scores) -> None:
        limit = self.config.reward.max_missing
        if scores.missing_share > limit:
            raise RewardError(
                f"{scores.missing_share:.0%} of the scores are missing, reward.max_missing allows {limit:.0%}",
            )
