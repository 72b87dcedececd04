"""Held-out evaluation: the same prompts and initial noise every time, deterministic sampler, full decoder."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.common.errors import RewardError
from densegrpo_fast.common.pictures import still
from densegrpo_fast.common.progress import PhaseProgress
from densegrpo_fast.config import Config
from densegrpo_fast.flow.noise import Stream
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling.oom_backoff import OomBackoff
from densegrpo_fast.sampling.rollout import initial_noise, sample_ode
from densegrpo_fast.training.distributed import World
from densegrpo_fast.training.prompts import prompt_set


@dataclass(frozen=True)
class Evaluation:
    """Scores of one evaluation.

    Attributes:
        scores: per reward, and under "reward" their weighted sum: [N, S] float32 on the CPU, N prompts by S samples;
            NaN = missing.
        images: [N, 3, H, W] float32, the first sample of each prompt.
    """

    scores: dict[str, Tensor]
    images: Tensor

    def means(self) -> dict[str, float]:
        """Mean of each score over everything present."""
        return {name: values.nanmean().item() for name, values in self.scores.items()}

    def metrics(self) -> dict[str, float]:
        """The means as metrics, `eval/NAME`."""
        return {f"eval/{name}": value for name, value in self.means().items()}


class HeldOut:
    """Held-out prompts with their initial noise.

    Args:
        prompts: N sentences.
        metadata: N mappings, what the rewards know of each sentence.
        samples_per_prompt: S.
        num_steps: Euler steps of the sampler.
        guidance_scale: 1 = off.
        seed: key of the noise; the same seed gives the same noise in every run and at every iteration.
        chunk: rows per forward.
    """

    def __init__(
        self,
        prompts: list[str],
        metadata: list[dict[str, Any]],
        *,
        samples_per_prompt: int,
        num_steps: int,
        guidance_scale: float,
        seed: int,
        chunk: int,
    ):
        self.prompts, self.metadata, self.samples = prompts, metadata, samples_per_prompt
        self.num_steps, self.guidance_scale = num_steps, guidance_scale
        self.seed, self.rows = seed, OomBackoff(chunk, "sampler.micro_batch, of evaluations")

    @classmethod
    def of(cls, config: Config) -> HeldOut:
        """A run's; prompts and noise do not depend on the run's seed, so runs can be compared.

        Raises:
            UsageError: the prompt file cannot be read or holds something else than prompts.
        """
        options = config.evaluation
        prompts = prompt_set(config.data.eval_prompts, held_out=True)
        return cls(
            list(prompts.prompts[: options.num_prompts]),
            list(prompts.metadata[: options.num_prompts]),
            samples_per_prompt=options.samples_per_prompt,
            num_steps=options.num_steps,
            guidance_scale=config.evaluation_guidance_scale,
            seed=0,
            chunk=config.sampler.micro_batch * (config.sampler.branches or 1),
        )

    @torch.no_grad()
    def evaluate(
        self,
        model: FlowModel,
        reward: RewardMixture,
        world: World | None = None,
        name: str = "held-out evaluation",
    ) -> Evaluation:
        """Draw and score all pictures with the model as it stands.

        Args:
            world: the processes that share the pictures; each gets all scores. None = this one alone.
            name: what its progress is called, which the main process shows of its own pictures.

        Raises:
            RewardError: a reward failed.
        """
        total = len(self.prompts) * self.samples
        share = (World() if world is None else world).share(total)
        index = share.rows.tolist()
        rows = [self.prompts[sample // self.samples] for sample in index]
        noise = initial_noise(model, share.rows, seed=self.seed, iteration=0, stream=Stream.EVALUATION)
        conditioning, sigmas = model.encode(rows), model.sigmas(self.num_steps)
        noise = model.start(noise, sigmas)

        def draw(part: slice) -> Tensor:
            chosen = conditioning.select(part)
            latents = sample_ode(model, noise[part], chosen, sigmas, guidance_scale=self.guidance_scale)
            return model.decode(latents)

        parts = []
        stream = None if share.world.main else io.StringIO()
        with PhaseProgress(name, len(rows), "pictures", stream) as progress:
            for images in self.rows.each(slice(0, len(rows)), draw):
                parts.append(images)
                progress(len(images))
        images = torch.cat(parts)
        metadata = [self.metadata[sample // self.samples] for sample in index]
        try:
            scores = share.gather_scores(reward(images, rows, metadata))
        except RewardError as error:
            if error.name is None or reward.terms[error.name][1]:
                raise
            advice = "it is only observed beside the training reward: leave it out of reward.observed"
            raise RewardError(f"{error}; {advice}", error.name) from error
        shape = (len(self.prompts), self.samples)
        per_reward = {name: values.view(shape) for name, values in scores.per_reward.items()}
        first = torch.arange(0, total, self.samples)
        return Evaluation({"reward": scores.values.view(shape), **per_reward}, share.pick(still(images), first).cpu())
