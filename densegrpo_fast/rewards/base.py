"""The reward contract, and the weighted mixture of several rewards.

A reward is any callable `reward(images, prompts, metadata)`:

* images: [N, 3, H, W] float in [0, 1], on any device; prompts: N sentences; metadata: N dicts;
* of videos it scores some frames each, whose mean counts, unless it has a true attribute `takes_videos`: then it is
  given [N, 3, F, H, W];
* it returns N scores (list, tuple, array or tensor), or `(scores, info)` as Flow-GRPO's rewards do;
* it may be async;
* a score of `None`, NaN or infinity is *missing*: the reward could not judge this picture. Missing is not
  zero: such a sample stays out of its group's statistics and gets advantage 0. So is every score of a picture with a
  number that is not finite; the rewards see a black one in its place.

A reward from outside of the package is given copies, so that it may write into them, and whatever it does ends as a
`RewardError` under its name (`common.plugins.fenced`).
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import math
import threading
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.common.errors import RewardError
from densegrpo_fast.common.pictures import chosen_frames, finite_pictures
from densegrpo_fast.common.plugins import fenced, is_package_code

Reward = Callable[[Tensor, list[str], list[dict[str, Any]]], Any]
"""`reward(images, prompts, metadata)`, returning scores as the module docstring says."""


@dataclass(frozen=True)
class Scores:
    """What a mixture thinks of N pictures.

    Attributes:
        values: [N] float32 on the CPU, the weighted sum; NaN = missing.
        per_reward: each reward's own unweighted scores, [N] float32; NaN = missing.
        finite: [N] bool, whether the picture holds finite numbers alone, without which it has no scores; None = all do.
    """

    values: Tensor
    per_reward: dict[str, Tensor]
    finite: Tensor | None = None

    def select(self, index: Tensor) -> Scores:
        """The scores of the pictures that `index` [n] int64 names, any number of times each."""
        per_reward = {name: values[index] for name, values in self.per_reward.items()}
        return Scores(self.values[index], per_reward, None if self.finite is None else self.finite[index])

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """The scores of several parts as one, in their order.

        Raises:
            ValueError: there are no parts.
        """
        if not parts:
            raise ValueError("Scores.joined: no scores")
        names = parts[0].per_reward
        return cls(
            torch.cat([part.values for part in parts]),
            {name: torch.cat([part.per_reward[name] for part in parts]) for name in names},
            torch.cat([part._finite() for part in parts]),
        )

    def _finite(self) -> Tensor:
        return torch.ones(len(self.values), dtype=torch.bool) if self.finite is None else self.finite

    @property
    def not_finite(self) -> int:
        """Number of pictures that hold numbers that are not finite."""
        return int((~self._finite()).sum())

    @property
    def missing_share(self) -> float:
        """Share of the pictures whose weighted sum is missing, in [0, 1]."""
        return missing_share(self.values)


Scorer = Callable[[Tensor, list[str], list[dict[str, Any]]], Scores]
"""A `RewardMixture`, or what stands in for one."""


def missing_share(values: Tensor) -> float:
    """Share of NaN among scores of any shape, in [0, 1]; 0 where there are no scores."""
    return values.isnan().double().mean().item() if values.numel() else 0.0


class RewardMixture:
    """Weighted sum of rewards; a picture that one of them cannot judge is missing in the sum.

    A reward with weight 0 is only observed: it is scored and reported, and neither its scores nor its missing
    ones reach the sum. Async rewards run concurrently with one another.
    """

    def __init__(self, terms: Mapping[str, tuple[Reward, float]], timeout: float | None = None, frames: int = 1):
        """Make the mixture.

        Args:
            terms: name -> (reward, weight); weights are finite and may be negative.
            timeout: seconds that a call may take where a reward is from outside of the package; the mixture then
                calls on a thread of its own, which it leaves behind when the time is over. None = no limit.
            frames: of a video that a reward of pictures scores.

        Raises:
            TypeError: a reward is not callable.
            ValueError: no term has a weight other than 0, a weight is not finite, or the timeout is not above 0.
        """
        if timeout is not None and not 0 < timeout < math.inf:
            raise ValueError(f"RewardMixture: timeout must be above 0, got {timeout}")
        for name, (reward, weight) in terms.items():
            if not callable(reward):
                raise TypeError(f"RewardMixture: reward {name!r} must be callable, got {type(reward).__name__}")
            if not math.isfinite(weight):
                raise ValueError(f"RewardMixture: the weight of {name!r} must be finite, got {weight}")
        if not any(weight for _, weight in terms.values()):
            raise ValueError(f"RewardMixture: terms needs a weight other than 0, got the names {sorted(terms)}")
        self.terms = dict(terms)
        self.timeout = None if all(is_package_code(reward) for reward, _ in terms.values()) else timeout
        self.frames, self._running = frames, ""

    @torch.no_grad()
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[dict[str, Any]] | None = None
    ) -> Scores:
        """Score pictures with every reward.

        Args:
            images: [N, 3, H, W] float in [0, 1], or videos [N, 3, F, H, W].
            prompts: N sentences.
            metadata: N dicts; empty ones if None.

        Raises:
            ValueError: images, prompts and metadata disagree in number or shape.
            RewardError: a reward raised, returned a wrong number of scores, or one that is not a number.
        """
        if images.ndim not in (4, 5) or images.shape[1] != 3 or not images.is_floating_point():
            raise ValueError(
                "RewardMixture: images must be float [N, 3, H, W] or [N, 3, F, H, W], got "
                f"{images.dtype} {list(images.shape)}"
            )
        count = len(images)
        rows = [{} for _ in range(count)] if metadata is None else list(metadata)
        if len(prompts) != count or len(rows) != count:
            raise ValueError(
                f"RewardMixture: {count} images need as many prompts and metadata, got {len(prompts)} and {len(rows)}"
            )
        finite = finite_pictures(images)
        # a reward need not know of NaN, and what it says of such a picture is left out; a GPU would wait to be asked
        if images.device.type != "cpu" or not finite.all():
            images = images.where(finite.view(-1, *[1] * (images.ndim - 1)), 0.0)
        score = partial(self._per_reward, images, list(prompts), rows)
        per_reward = score() if self.timeout is None else self._in_time(score, images.device, self.timeout)
        finite = finite.cpu()
        per_reward = {name: values.where(finite, math.nan) for name, values in per_reward.items()}
        total = torch.zeros(count, dtype=torch.float64)
        for name, (_, weight) in self.terms.items():
            if weight:
                total += weight * per_reward[name].double()
        return Scores(_only_finite(total), per_reward, finite)

    def _per_reward(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> dict[str, Tensor]:
        """[N] scores of each reward, NaN = missing."""
        outputs, counts = dict[str, Any](), dict[str, int]()
        for name, (reward, _) in self.terms.items():
            self._running = name
            arguments = (images, list(prompts), metadata)
            if images.ndim == 5 and not getattr(reward, "takes_videos", False):
                frames = chosen_frames(images, self.frames)
                each = [row for row in range(len(images)) for _ in range(frames.shape[1])]
                arguments = (frames.flatten(0, 1), [prompts[row] for row in each], [metadata[row] for row in each])
            counts[name] = len(arguments[0])
            if not is_package_code(reward):
                arguments = (arguments[0].clone(), list(arguments[1]), copy.deepcopy(arguments[2]))
            with _named(name):
                outputs[name] = reward(*arguments)
        if pending := {name: output for name, output in outputs.items() if inspect.isawaitable(output)}:
            self._running = " or ".join(pending)
            outputs |= _await_all(pending)
        scores = {name: _scores(name, outputs[name], counts[name]) for name in self.terms}
        if images.ndim == 4:
            return scores
        return {name: values.view(len(images), -1).mean(1) for name, values in scores.items()}

    def _in_time(
        self, score: Callable[[], dict[str, Tensor]], device: torch.device, seconds: float
    ) -> dict[str, Tensor]:
        """`score` on a thread that is given up after so many seconds."""
        done: list[dict[str, Tensor]] = []
        failed: list[BaseException] = []

        @torch.no_grad()
        def work() -> None:
            try:
                # a thread starts on the first device, whichever the run's is
                if device.type == "cuda":
                    torch.cuda.set_device(device)
                done.append(score())
            except BaseException as error:  # the caller's to raise
                failed.append(error)

        thread = threading.Thread(target=work, name="rewards", daemon=True)
        thread.start()
        thread.join(seconds)
        if failed:
            raise failed[0]
        if not done:
            raise RewardError(
                f"reward {self._running!r} did not return within {seconds:g} s, the limit of reward.timeout",
                self._running,
            )
        return done[0]


def _named(name: str) -> AbstractContextManager[None]:
    """Whatever is raised within becomes the reward's error."""
    return fenced(f"reward {name!r}", partial(RewardError, name=name))


def _await_all(pending: Mapping[str, Awaitable[Any]]) -> dict[str, Any]:
    async def gather() -> list[Any]:
        return await asyncio.gather(*(finished(name, output) for name, output in pending.items()))

    async def finished(name: str, output: Awaitable[Any]) -> Any:
        with _named(name):
            return await output

    try:
        asyncio.get_running_loop()
    except RuntimeError:
        results = asyncio.run(gather())
    else:
        # inside a running loop (a notebook) a second one needs a thread of its own
        with ThreadPoolExecutor(max_workers=1) as pool:
            results = pool.submit(asyncio.run, gather()).result()
    return dict(zip(pending, results, strict=True))


def _scores(name: str, output: Any, count: int) -> Tensor:
    """[count] float32 on the CPU from whatever form of scores a reward returned.

    Raises:
        RewardError: it is none of the forms.
    """
    with fenced(f"what reward {name!r} returned", partial(RewardError, name=name), through=(RewardError,)):
        return _read_scores(name, output, count)


def _read_scores(name: str, output: Any, count: int) -> Tensor:
    # Flow-GRPO's form; the dict tells it from the scores of two pictures in a tuple
    if isinstance(output, tuple) and len(output) == 2 and isinstance(output[1], Mapping):
        output = output[0]
    if isinstance(output, Tensor) or hasattr(output, "__array__"):
        scores = torch.as_tensor(output).detach()
        if scores.is_complex() or list(scores.shape) != [count]:
            wrong = f"got {scores.dtype} of shape {list(scores.shape)}"
            raise RewardError(f"reward {name!r} must return {count} real scores, {wrong}", name)
        return _only_finite(scores)
    if not isinstance(output, (list, tuple)):
        kind = type(output).__name__
        raise RewardError(f"reward {name!r} must return a list or tensor of {count} scores, got {kind}", name)
    if len(output) != count:
        raise RewardError(f"reward {name!r} must return {count} scores, one per image, got {len(output)}", name)
    return _only_finite(torch.tensor([_number(name, i, score) for i, score in enumerate(output)], dtype=torch.float64))


def _number(name: str, index: int, score: Any) -> float:
    value = score.item() if getattr(score, "ndim", None) == 0 else score
    if value is None:
        return math.nan
    if not isinstance(value, Real):
        wrong = f"got {score!r} for image {index}"
        raise RewardError(f"reward {name!r} must return a number or None per image, {wrong}", name)
    try:
        return float(value)
    except OverflowError:  # as an infinity, too large a number is no score
        return math.nan


def _only_finite(scores: Tensor) -> Tensor:
    scores = scores.to("cpu", torch.float32)
    return scores.where(scores.isfinite(), math.nan)
