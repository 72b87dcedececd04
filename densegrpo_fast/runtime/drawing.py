"""Trajectories of the starting policy, from which the lookahead's helpers learn before a run."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from densegrpo_fast.config import Config
from densegrpo_fast.models.base import Cache, FlowModel
from densegrpo_fast.runtime import builders
from densegrpo_fast.runtime.experience import sample
from densegrpo_fast.sampling.trajectory import Trajectory

_HELD_OUT = 8
"""One batch in so many is kept from training."""


@dataclass(frozen=True)
class Drawn:
    """One iteration's trajectories.

    Attributes:
        trajectory: B rows, group after group.
        rows, metadata: prompt and metadata of each row.
        held_out: whether they are to judge what the others trained.
    """

    trajectory: Trajectory
    rows: list[str]
    metadata: list[dict[str, Any]]
    held_out: bool


def drawn(
    config: Config, model: FlowModel, trajectories: int, *, keep_hidden: bool = False, cache: Cache | None = None
) -> Iterator[Drawn]:
    """Roll out training prompts as a run does, with noise that no iteration of a run has.

    Args:
        config: the run's; its windows take turns, in both parts.
        model: the policy.
        trajectories: for training, rounded up to whole batches; those held out come on top.
        keep_hidden, cache: as in `sample`.
    """
    prompts, windows = builders.build_prompts(config), builders.build_windows(config).reached()
    training = math.ceil(trajectories / (config.data.num_prompts * config.sampler.group_size))
    count = training + math.ceil(training / (_HELD_OUT - 1))
    for number in tqdm(range(count), desc="trajectories", disable=None):
        rows, metadata = prompts.rows(number, config.sampler.group_size)
        kept = number % _HELD_OUT == 0
        turn = number // _HELD_OUT if kept else number - number // _HELD_OUT - 1
        coefficients = builders.build_coefficients(config, model, windows[turn % len(windows)])
        # iterations of training count up from 0, these down from the largest epoch
        epoch = 2**31 - 1 - number
        trajectory = sample(config, model, rows, coefficients, epoch, keep_hidden=keep_hidden, cache=cache)
        yield Drawn(trajectory, rows, metadata, kept)
