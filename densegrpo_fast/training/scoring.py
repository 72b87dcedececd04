"""Scoring pictures in a run, at once or beside the work that makes further ones.

A reward that fails ends the run with a message and an exit code, wherever it ran.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Semaphore
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.rewards.base import RewardMixture, Scores

_AHEAD = 2
"""Parts that may be scored or waiting at a time: what else is made waits, so that pictures do not pile up."""


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

    def __init__(self, reward: RewardMixture, *, overlap: bool):
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
            return joined([future.result() for future in self._futures])
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


def joined(parts: Sequence[Scores]) -> Scores:
    """The scores of several parts as one, in their order.

    Raises:
        ValueError: there are no parts.
    """
    if not parts:
        raise ValueError("joined: no scores")
    names = parts[0].per_reward
    return Scores(
        torch.cat([part.values for part in parts]),
        {name: torch.cat([part.per_reward[name] for part in parts]) for name in names},
    )


def chosen(scores: Scores, index: Tensor) -> Scores:
    """The scores of the pictures that `index` [n] int64 names, any number of times each."""
    return Scores(scores.values[index], {name: values[index] for name, values in scores.per_reward.items()})
