"""Samples of the starting policy, from which the lookahead's helpers learn before a run."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from tqdm import tqdm

from densegrpo_fast.config import Config
from densegrpo_fast.flow.dynamics import StepCoefficients
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.sampling.branches import Sampled
from densegrpo_fast.training import builders

_HELD_OUT = 8
"""One batch in so many is kept from training."""

Made = TypeVar("Made", bound=Sampled, covariant=True)


class Draw(Protocol[Made]):
    """How a batch is drawn: `experience.sample`, or `experience.draw` for branches too."""

    def __call__(
        self, config: Config, model: FlowModel, rows: list[str], coefficients: StepCoefficients, iteration: int, /
    ) -> Made:
        """Samples of the prompts `rows`, with the noise of an iteration."""


@dataclass(frozen=True)
class Drawn(Generic[Made]):
    """One iteration's samples.

    Attributes:
        samples: of B rows, group after group.
        rows, metadata: prompt and metadata of each row.
        held_out: whether they are to judge what the others trained.
    """

    samples: Made
    rows: list[str]
    metadata: list[dict[str, Any]]
    held_out: bool


def turns(config: Config) -> list[Sequence[int]]:
    """The steps with noise that the batches take turns with: every window, or all steps of it that branches leave."""
    trained = config.objective.trained_steps
    if config.sampler.branches is None:
        return [*builders.build_windows(config).reached()]
    return [trained] if isinstance(trained, list) else [*config.windows()]


def drawn(config: Config, model: FlowModel, samples: int, draw: Draw[Made]) -> Iterator[Drawn[Made]]:
    """Draw for training prompts as a run does, with noise that no iteration of a run has.

    Args:
        config: the run's; its `turns` are the same in both parts.
        model: the policy.
        samples: for training, rounded up to whole batches; those held out come on top.
        draw: makes a batch.
    """
    prompts, steps = builders.build_prompts(config), turns(config)
    training = math.ceil(samples / (config.data.num_prompts * config.sampler.group_size))
    count = training + math.ceil(training / (_HELD_OUT - 1))
    for number in tqdm(range(count), desc="samples", disable=None):
        rows, metadata = prompts.rows(number, config.sampler.group_size)
        kept = number % _HELD_OUT == 0
        turn = number // _HELD_OUT if kept else number - number // _HELD_OUT - 1
        coefficients = builders.build_coefficients(config, model, steps[turn % len(steps)])
        # iterations of training count up from 0, these down from the largest iteration
        yield Drawn(draw(config, model, rows, coefficients, 2**31 - 1 - number), rows, metadata, kept)
