"""Rewards of trajectories in the conventions of Flow-GRPO's scripts: by name, by row, perhaps still to come."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor

from densegrpo_fast.credit.dense import reward_gains

RewardFunction = Callable[[Any, Any, Any], Any]
"""`fn(images, prompts, metadata) -> (scores, info)`; scores are B numbers, or a dict of them by name."""


class Tracker(Protocol):
    """Flow-GRPO's `PerPromptStatTracker`."""

    def update(self, prompts: Any, rewards: Any) -> Any:
        """Advantages [N, T] of rewards [N, T], relative to the other rows of the same prompt."""


def scoring(
    reward_fn: RewardFunction, prompts: Sequence[str], metadata: Sequence[Any], executor: Executor | None
) -> Callable[[Any], Future[Any]]:
    """A function that has images scored, by the executor if there is one, else before it returns."""

    def score(images: Any) -> Future[Any]:
        if executor is not None:
            return executor.submit(reward_fn, images, prompts, metadata)
        done: Future[Any] = Future()
        done.set_result(reward_fn(images, prompts, metadata))
        return done

    return score


class DenseRewards:
    """Rewards of every state's completion; waits for those still to come when it is first asked for them.

    A reward of None, NaN or infinity is missing: NaN here and in the gains that it decides.

    Attributes:
        evaluations: model evaluations per trajectory that the completions took, a guided one counted once.
    """

    def __init__(
        self,
        pending: Sequence[tuple[Sequence[int], Sequence[Future[Any]]]],
        prompts: list[str],
        key: str,
        tracker: Tracker | None,
        evaluations: float,
    ):
        """Take calls of the reward function.

        Args:
            pending: groups of rows, each with the calls that score its states 0..T.
            prompts: of all B rows.
            key: name of the reward that is credited.
            tracker: for `advantages`.
            evaluations: see above.
        """
        self._pending, self._prompts, self._key, self._tracker = pending, prompts, key, tracker
        self.evaluations = evaluations

    @cached_property
    def scores(self) -> dict[str, Tensor]:
        """Every reward by name, [B, T+1] float32; index = steps done, the last is the real end image.

        Raises:
            ValueError: the reward function returned no reward of the credited name, or not one number per image.
        """
        states = len(self._pending[0][1])
        scores: dict[str, Tensor] = {}
        for rows, calls in self._pending:
            for state, call in enumerate(calls):
                for name, values in _by_name(call.result(), len(rows), self._key).items():
                    column = scores.setdefault(name, torch.full((len(self._prompts), states), math.nan))
                    column[list(rows), state] = values
        return scores

    @property
    def rewards(self) -> Tensor:
        """The credited reward, [B, T+1] float32."""
        return self.scores[self._key]

    @property
    def gains(self) -> Tensor:
        """What each step added to the credited reward, [B, T] float32 (DenseGRPO, Eq 7-9)."""
        return reward_gains(self.rewards.double()[None])[0].float()

    @property
    def missing(self) -> float:
        """Share of the rewards that are missing, in [0, 1]."""
        return self.rewards.isnan().double().mean().item()

    @cached_property
    def advantages(self) -> Tensor:
        """The tracker's advantages of the gains, [B, T] float32, each step on its own.

        A row with a missing reward is kept from the tracker and gets 0.

        Raises:
            ValueError: no tracker was given.
        """
        if self._tracker is None:
            raise ValueError("advantages need the tracker argument of dense_rewards")
        gains = self.gains
        whole = gains.isfinite().all(dim=1)
        advantages = torch.zeros_like(gains)
        if whole.any():
            prompts = [prompt for prompt, present in zip(self._prompts, whole.tolist(), strict=True) if present]
            advantages[whole] = torch.as_tensor(self._tracker.update(prompts, gains[whole].double().numpy())).float()
        return advantages

    def result(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Like the future of a script's `executor.submit(reward_fn, ...)`: the end images' rewards [B] by name.

        "gains" [B, T] is beside them.
        """
        return {**{name: values[:, -1] for name, values in self.scores.items()}, "gains": self.gains}, {}


def _by_name(output: Any, count: int, key: str) -> dict[str, Tensor]:
    """[count] float32 per name; entries of a dict that are not one value per image are left out."""
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Mapping):
        output = output[0]
    if not isinstance(output, Mapping):
        output = {key: output}
    found = {name: _numbers(values) for name, values in output.items() if _length(values) == count}
    if key not in found:
        raise ValueError(
            f"reward_fn must return {count} numbers as {key!r}, one per image, got entries "
            f"{ {name: _length(values) for name, values in output.items()} }"
        )
    return found


def _length(values: Any) -> int | None:
    return len(values) if hasattr(values, "__len__") and getattr(values, "ndim", 1) == 1 else None


def _numbers(values: Any) -> Tensor:
    if not isinstance(values, Tensor):
        values = torch.tensor([math.nan if value is None else float(value) for value in values])
    values = values.detach().to("cpu", torch.float32)
    return values.where(values.isfinite(), math.nan)
