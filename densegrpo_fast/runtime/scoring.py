"""Scoring pictures in a run: a reward that fails ends it with a message and an exit code."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from densegrpo_fast.exit_codes import ExitCode, UserError
from densegrpo_fast.rewards.base import RewardError, RewardMixture, Scores


def score(reward: RewardMixture, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Scores:
    """Scores of N pictures [N, 3, H, W] in [0, 1].

    Raises:
        UserError: (reward) a reward raised or returned something unusable.
    """
    try:
        return reward(images, prompts, metadata)
    except RewardError as error:
        raise UserError(str(error), ExitCode.REWARD) from error
