"""Samples of the starting policy, from which a preview decoder learns before a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from densegrpo_fast.common.progress import PhaseProgress
from densegrpo_fast.config import Config
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling.rollout import Rollout
from densegrpo_fast.training.prompts import PromptBatch
from densegrpo_fast.training.trainer import Trainer

_HELD_OUT = 8
"""One batch in so many is kept from training."""


@dataclass(frozen=True)
class PolicySamples:
    """One iteration's samples.

    Attributes:
        rollout: of B samples, group after group.
        batch: their prompts.
        held_out: whether what the others trained is to be judged on them.
    """

    rollout: Rollout
    batch: PromptBatch
    held_out: bool


def no_reward() -> RewardMixture:
    """A stand-in where no picture is scored, so that no reward has to be loaded."""
    return RewardMixture({"none": (lambda images, prompts, metadata: [0.0] * len(images), 1.0)})


def policy_alone(config: Config, *, tiny: bool = False, reward: RewardMixture | None = None) -> Trainer:
    """A trainer whose policy is to be sampled and no more: nothing is built that completions evaluate or keep.

    Args:
        config, tiny: as for `Trainer`.
        reward: None = `no_reward`.

    Raises:
        UserError: as `Trainer`.
    """
    bare = {"copy_dtype": None, "cache": None, "graphs": False}
    lookahead = config.lookahead.model_copy(update=bare)
    return Trainer(
        config.model_copy(update={"lookahead": lookahead}),
        tiny=tiny,
        reward=no_reward() if reward is None else reward,
    )


def policy_samples(
    trainer: Trainer, samples: int, turns: Sequence[Sequence[int]] | None = None
) -> Iterator[PolicySamples]:
    """Sample for training prompts as a run does, with noise that no iteration of a run has.

    Training samples and held-out ones take turns with the same windows of noisy steps.

    Args:
        trainer: of the run, whose `sample` is used.
        samples: for training, rounded up to whole batches; those held out come on top.
        turns: noisy steps that batches take turns with; None = those of the run.
    """
    config, steps = trainer.config, trainer.schedule.at(0)
    turns = trainer.schedule.turns() if turns is None else turns
    training = math.ceil(samples / (config.data.num_prompts * config.sampler.group_size))
    count = training + math.ceil(training / (_HELD_OUT - 1))
    with PhaseProgress("sampling", count, "batches") as progress:
        for number in range(count):
            batch = trainer.prompts.batch(number)
            held_out = number % _HELD_OUT == 0
            turn = number // _HELD_OUT if held_out else number - number // _HELD_OUT - 1
            coefficients = trainer.schedule.coefficients(turns[turn % len(turns)])
            # iterations of training count up from 0, these down from the largest one
            rollout = trainer.sample(batch, replace(steps, coefficients=coefficients), 2**31 - 1 - number)
            progress()
            yield PolicySamples(rollout, batch, held_out)
