"""The prompts of a run, for training and held out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.embedded import scenes
from densegrpo_fast.training.evaluation import HeldOut
from densegrpo_fast.training.prompts import BUILT_IN, PromptSampler, PromptSet, built_in_prompts, load_prompts

_SENTENCES = 600
"""Built-in training (and at most held-out) sentences; the six categories take turns until each runs out."""


@dataclass(frozen=True)
class TrainingPrompts:
    """The training prompts and the order in which iterations use them."""

    prompts: PromptSet
    sampler: PromptSampler

    def rows(self, iteration: int, group_size: int) -> tuple[list[str], list[dict[str, Any]]]:
        """Prompts and metadata of the B = P*G samples of an iteration; row p*G + g is sample g of prompt p."""
        chosen = [index for index in self.sampler.batch(iteration) for _ in range(group_size)]
        return [self.prompts.prompts[i] for i in chosen], [self.prompts.metadata[i] for i in chosen]

    def used(self, iterations: int) -> list[str]:
        """The prompts that so many iterations use, each once."""
        indices = {index for iteration in range(iterations) for index in self.sampler.batch(iteration)}
        return [self.prompts.prompts[index] for index in sorted(indices)]


def build_prompts(config: Config) -> TrainingPrompts:
    """Training prompts: the embedded model's sentences, a set of the package, or a file.

    Raises:
        UsageError: the file cannot be read or holds something else than prompts.
    """
    prompts = _prompt_set(config.data.prompts, held_out=False)
    return TrainingPrompts(prompts, PromptSampler(len(prompts), config.data.num_prompts, config.seed))


def build_held_out(config: Config) -> HeldOut:
    """The held-out evaluation; its prompts and noise do not depend on the run's seed, so runs can be compared.

    Raises:
        UserError: as `build_prompts`.
    """
    options = config.evaluation
    prompts = _prompt_set(config.data.eval_prompts, held_out=True)
    return HeldOut(
        list(prompts.prompts[: options.num_prompts]),
        list(prompts.metadata[: options.num_prompts]),
        samples_per_prompt=options.samples_per_prompt,
        num_steps=options.num_steps,
        guidance_scale=config.evaluation_guidance_scale,
        seed=0,
        chunk=config.sampler.micro_batch * (config.sampler.branches or 1),
    )


def _prompt_set(source: str, held_out: bool) -> PromptSet:
    if source == "scenes":
        prompts = scenes.prompts(held_out=held_out, count=_SENTENCES)
        return PromptSet(tuple(prompts), tuple({} for _ in prompts))
    if source in BUILT_IN:
        return built_in_prompts(source, held_out)
    try:
        return load_prompts(source)
    except UsageError as error:
        raise UsageError(f"data.{'eval_prompts' if held_out else 'prompts'}: {error}") from None
