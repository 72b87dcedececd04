"""From completions to rewards: pictures are decoded and scored, part after part, and sorted by prompt and state."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from threading import Semaphore
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.common.errors import NonFiniteError, RewardError, UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.credit.dense import reward_gains
from densegrpo_fast.models.base import Decoder, FlowModel
from densegrpo_fast.rewards.base import RewardMixture, Scorer, Scores
from densegrpo_fast.rewards.registry import create, resolve_alias
from densegrpo_fast.sampling.lookahead import Completions, Lookahead
from densegrpo_fast.sampling.oom_backoff import OomBackoff
from densegrpo_fast.sampling.rollout import Rollout
from densegrpo_fast.training.distributed import Share, World, iteration_share
from densegrpo_fast.training.lookahead import lookahead_chunks
from densegrpo_fast.training.meter import Meter, MeteredReward
from densegrpo_fast.training.prompts import PromptBatch
from densegrpo_fast.training.strips import StripRecorder

_AHEAD = 2
"""Parts that may be scored or waiting at a time: what else is made waits, so that pictures do not pile up."""
_TILED = "set model.vae_decode to tiled"


@dataclass(frozen=True)
class RewardBatch:
    """Rewards of an iteration's samples.

    Attributes:
        rewards: [P, G] float32 of the final images by the full decoder, [P, G*K] of the images of branches at K steps
            by the lookahead's; NaN = missing.
        lookahead_rewards: [P, G, T+1] float32 of every state's completion, all by the lookahead's decoder, so that
            gains compare like with like; NaN also of states that were not to be completed; None without a lookahead,
            and of branches.
        branch_rewards: [P, N, C, K, L] float32 of N trajectories' C branches at K steps, completed in L ways; None
            without branches.
        scores: of every image that was scored, those of `rewards` last, for the metrics.
    """

    rewards: Tensor
    lookahead_rewards: Tensor | None
    branch_rewards: Tensor | None
    scores: Scores

    @property
    def gains(self) -> Tensor | None:
        """[P, G, T] the reward gain of each step (DenseGRPO, arXiv 2601.20218, Eq 7-9); None without its rewards.

        NaN where either is missing, or was not to be completed.
        """
        return None if self.lookahead_rewards is None else reward_gains(self.lookahead_rewards)


class RewardComputer:
    """Decodes and scores completions.

    The completions of trajectories may be previews; a final reward is always that of the full decoder, so their ends
    are then decoded and scored twice.

    Args:
        config: the run's.
        model: the policy, whose decoders decode.
        reward: what scores.
        lookahead: the run's, or None.
        meter: counts the pictures that are scored; None = nothing does.
        share: the rows of an iteration that this process decodes and scores; None = all.

    Attributes:
        strip: keeps what is decoded and scored of a batch's first prompt, whose samples this process then holds first;
            None = nothing does.
    """

    def __init__(
        self,
        config: Config,
        model: FlowModel,
        reward: RewardMixture,
        lookahead: Lookahead | None,
        meter: Meter | None = None,
        share: Share | None = None,
    ):
        self.share = iteration_share(World(), config) if share is None else share
        self.model, self.overlap, self.max_missing = model, config.reward.overlap, config.reward.max_missing
        self.reward: Scorer = reward if meter is None else MeteredReward(reward, meter)
        self.strip: StripRecorder | None = None
        self.completes = lookahead is not None
        self.decoder: Decoder = "full" if lookahead is None else config.lookahead.decoder
        chunk = lookahead_chunks(config, model, "full").decode
        self.full_decodes = OomBackoff(chunk, "lookahead.chunk, of full decodes", _TILED)
        self.decodes = self.full_decodes if lookahead is None else lookahead.decode_rows
        self.scores_ends = config.uses_lookahead and self.decoder != "full"

    def score(self, rollout: Rollout, completions: Completions, batch: PromptBatch) -> RewardBatch:
        """Rewards of a rollout's completions; `rewards` are of its ends only where these are among them.

        Args:
            rollout, completions: of the rows that this process holds.
            batch: all of the iteration.

        Returns:
            The rewards of all samples, in every process.

        Raises:
            RewardError: a reward failed.
        """
        own = self.share.select(batch, rollout.branches)
        images = self._decoded(completions.clean, self.decoder, self.decodes)
        if self.strip is not None:
            images = self.strip.watching(images, rollout, completions)
        scores = self._scored(images, completions.samples, own).select(completions.index)
        completed = len(scores.values) // len(own.prompts)
        if self.scores_ends and rollout.coefficients.num_steps in rollout.completed:
            scores = Scores.joined([scores, self._final_scores(rollout, own)])
        scores = self.share.gather_scores(scores, rollout.branches)
        by_state, branches = None, None
        if self.completes:
            values = scores.values.view(-1, len(batch.prompts))[:completed]
            by_state, branches = rollout.group_rewards(values, batch.group_size)
        if branches is not None:
            rewards = RewardBatch(branches[..., -1].flatten(1), None, branches, scores)
        else:
            final = scores.values[-len(batch.prompts) :].view(-1, batch.group_size)
            rewards = RewardBatch(final, by_state, None, scores)
        if self.strip is not None:
            self.strip.rewarded(rollout, rewards.rewards, rewards.lookahead_rewards, rewards.branch_rewards)
        return rewards

    def rewards_of(self, clean: Tensor, batch: PromptBatch) -> Tensor:
        """Rewards [S, B] of clean latents [S*B, ...], S for each of the batch's rows, by the full decoder."""
        images = torch.cat(list(self._decoded(clean, "full", self.full_decodes)))
        count = len(clean) // len(batch.prompts)
        scores = self.reward(images, batch.prompts * count, batch.metadata * count)
        return scores.values.view(count, -1)

    def _decoded(self, clean: Tensor, decoder: Decoder, rows: OomBackoff) -> Iterator[Tensor]:
        """Images of clean latents [m, ...], part after part."""
        return rows.each(slice(0, len(clean)), lambda part: self.model.decode(clean[part], decoder))

    def _final_scores(self, rollout: Rollout, batch: PromptBatch) -> Scores:
        """Scores of the B trajectories' ends by the full decoder."""
        last, dedup = rollout.coefficients.num_steps, rollout.dedup()
        clean = dedup.rows(last, rollout.latents[last])
        samples = range(0, len(batch.prompts), dedup.stride(last))
        scores = self._scored(self._decoded(clean, "full", self.full_decodes), samples, batch)
        return scores.select(dedup.spread(last, torch.arange(len(clean))))

    def _scored(self, parts: Iterable[Tensor], samples: Sequence[int], batch: PromptBatch) -> Scores:
        """Scores of pictures that are made part after part, while they are made if `reward.overlap` says so.

        Args:
            samples: for each picture its place in the batch.
        """
        done = 0
        with Scoring(self.reward, overlap=self.overlap) as scoring:
            for images in parts:
                here = samples[done : done + len(images)]
                done += len(images)
                scoring.add(images, [batch.prompts[b] for b in here], [batch.metadata[b] for b in here])
            return scoring.result()


class Scoring:
    """Scores the pictures that are added to it part by part, and gives all scores in the order they were added.

        with Scoring(reward, overlap=True) as scoring:
            for images in parts:
                scoring.add(images, prompts, metadata)
            scores = scoring.result()

    Args:
        reward: the mixture.
        overlap: score each part on one thread of its own, in order, while the caller makes the next; at most two parts
            are in its hands at a time. Else nothing is scored before `result`, which scores all pictures in one call.
    """

    def __init__(self, reward: Scorer, *, overlap: bool):
        self.reward, self.overlap = reward, overlap
        self._parts: list[tuple[Tensor, list[str], list[dict[str, Any]]]] = []
        self._futures: list[Future[Scores]] = []
        self._free = Semaphore(_AHEAD)
        self._thread = ThreadPoolExecutor(1, "reward") if overlap else None

    def add(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> None:
        """Take a part [n, 3, H, W] of the pictures.

        Raises:
            RewardError: an earlier part's reward has failed.
        """
        if self._thread is None:
            self._parts.append((images, prompts, metadata))
            return
        self._free.acquire()
        for future in self._futures:
            if future.done():
                future.result()
        self._futures.append(self._thread.submit(self._score, images, prompts, metadata))

    def result(self) -> Scores:
        """Scores of all pictures so far.

        Raises:
            RewardError: a reward has failed, the first failure if there are several.
            ValueError: there are no pictures.
        """
        if self._thread is not None:
            return Scores.joined([future.result() for future in self._futures])
        if not self._parts:
            raise ValueError("Scoring.result: no pictures were added")
        images, prompts, metadata = zip(*self._parts, strict=True)
        return self.reward(torch.cat(images), sum(prompts, []), sum(metadata, []))

    def _score(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
        try:
            # a thread starts on the first device, whichever the run's is
            if images.device.type == "cuda":
                torch.cuda.set_device(images.device)
            return self.reward(images, prompts, metadata)
        finally:
            self._free.release()

    def __enter__(self) -> Scoring:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Drop what is not scored yet, and wait for what is being scored."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)


def check_missing(scores: Scores, allowed: float) -> None:
    """Refuse to go on with too many missing scores.

    Args:
        allowed: share of the scores, `reward.max_missing`.

    Raises:
        RewardError: more are missing; NonFiniteError: and pictures that are not finite are among them.
    """
    if scores.missing_share > allowed:
        problem = f"{scores.missing_share:.0%} of the scores are missing, reward.max_missing allows {allowed:.0%}"
        if count := scores.not_finite:
            problem += f"; {count} of {len(scores.values)} pictures hold numbers that are not finite"
            raise NonFiniteError(f"{problem}: the model, its adapter or its decoder made them, not the reward")
        raise RewardError(problem)


def build_reward(
    terms: Mapping[str, float],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    made: RewardMixture | None = None,
    timeout: float | None = None,
    frames: int = 1,
) -> RewardMixture:
    """The weighted mixture of the named rewards.

    Args:
        terms: reward name -> weight.
        options: reward name -> its options, as in `reward.options`.
        made: a mixture whose rewards are reused where the names agree, so that no model is loaded twice.
        timeout, frames: of the mixture.

    Raises:
        UsageError: a name or an option is wrong; RewardError: what a reward needs is not here.
    """
    ready = {} if made is None else made.terms
    try:
        rewards = {}
        for name in terms:
            kind, own = resolve_alias(name, options or {})
            rewards[name] = ready[name][0] if name in ready else create(kind, **own)
        return RewardMixture({name: (rewards[name], weight) for name, weight in terms.items()}, timeout, frames)
    except ValueError as error:
        raise UsageError(f"reward.terms, reward.options: {error}") from None
    except torch.OutOfMemoryError:
        raise RewardError(
            f"reward.terms: the GPU has no memory for the networks of {', '.join(terms)}: score on the CPU "
            "(--reward.options='{NAME: {device: cpu}}'), in another process (remote), or end what else runs there",
        ) from None
    except (ImportError, OSError) as error:
        raise RewardError(f"reward.terms, reward.options: {error}") from None


def configured_reward(config: Config) -> RewardMixture:
    """The mixture that a run trains with; `build_reward` says what it raises."""
    own = config.reward
    return build_reward(own.terms, own.options, timeout=own.timeout, frames=own.frames)


def build_observer(config: Config, training: RewardMixture | None = None) -> RewardMixture:
    """The mixture for held-out evaluation: the training reward, and the observed ones beside it.

    Args:
        training: the mixture that the run trains with, whose rewards are shared; None = make all of them.
    """
    terms = config.reward.terms
    # a reward that is both trained and observed keeps its weight
    observed = {name: 0.0 for name in config.reward.observed if name not in terms}
    own = config.reward
    return build_reward(terms | observed, own.options, training, own.timeout, own.frames)
