"""Remote reward: a reward in another process or on another machine, asked over HTTP.

For rewards whose packages cannot live beside the trainer's (ImageReward, HPSv2, GenEval, ...), and for sharing one GPU
between several runs. Pictures travel as PNG in base64 inside JSON; `server.py` is the other end:

    POST URL/score    {"images": [PNG, ...], "prompts": [...], "metadata": [{...}, ...]}
                      answered by {"scores": [number or null, ...]}, null = missing
    GET URL/health    answered by {"status": "ok"}

A request that fails in spite of its retries leaves its pictures without a score; how many may be missing is the run's
`reward.max_missing`.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from densegrpo_fast.common.pictures import encode_png, to_bytes
from densegrpo_fast.rewards.http import Endpoint, HttpFailure

logger = logging.getLogger(__name__)

Reply = list[float | None]


class Pending:
    """Scores on their way: requests run while other rewards work; awaiting gathers them.

    Args:
        url: whom they were asked of, for the log.
        calls: for each request its pictures' number and its future, whose `HttpFailure` means that they are missing.
    """

    def __init__(self, url: str, calls: Sequence[tuple[int, Future[Reply]]]):
        self.url, self._calls = url, calls

    def __await__(self) -> Generator[Any, None, Reply]:
        return self._gather().__await__()

    async def _gather(self) -> Reply:
        scores: Reply = []
        missing: Counter[str] = Counter()
        for count, future in self._calls:
            try:
                part: Reply = await asyncio.wrap_future(future)
                scores += part
            except HttpFailure as failure:
                scores += [None] * count
                missing[str(failure)] += count
        for problem, count in missing.items():
            logger.warning("reward server %s: %s; %d scores are missing", self.url, problem, count)
        return scores

    def __del__(self) -> None:
        # what nobody waits for any more need not be asked
        for _, future in self._calls:
            future.cancel()


@dataclass(kw_only=True, eq=False)
class HttpReward(Endpoint):
    """Base of the rewards that ask a server, several requests at a time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._pool = ThreadPoolExecutor(max_workers=self.own_concurrency, thread_name_prefix="reward")

    def submit(self, ask: Callable[..., Reply], parts: Sequence[tuple[Any, ...]]) -> Pending:
        """Start `ask(pictures, *rest)` for each part; pictures are [N, H, W, 3] uint8."""
        return Pending(self.address, [(len(part[0]), self._pool.submit(ask, *part)) for part in parts])


@dataclass(kw_only=True, eq=False)
class RemoteReward(HttpReward):
    """The remote reward. Its options beside `batch` are those of `http.Endpoint`.

    Args:
        batch: pictures per request.

    Raises:
        OSError: the server's `/health` is not ok.
        ValueError: an option is out of range.
    """

    batch: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch < 1:
            raise ValueError(f"batch: expected a number above 0, got {self.batch}")
        try:
            self.call("GET", "/health", parse=_healthy)
        except HttpFailure as failure:
            raise OSError(
                f"no reward server at {self.address} (asked {self.address}/health): {failure}; start one with "
                "python -m densegrpo_fast.rewards.server"
            ) from None

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]] | None = None) -> Pending:
        """Start scoring pictures; awaiting the result gives the scores.

        Args:
            images: [N, 3, H, W] float in [0, 1]; sent in 8 bits.
            prompts: N sentences.
            metadata: N mappings of JSON data.
        """
        pictures = to_bytes(images)
        rows = metadata if metadata is not None else [{}] * len(prompts)
        starts = range(0, len(pictures), self.batch)
        cut = [slice(start, start + self.batch) for start in starts]
        return self.submit(self._ask, [(pictures[part], prompts[part], rows[part]) for part in cut])

    def _ask(self, pictures: np.ndarray, prompts: list[str], metadata: list[dict[str, Any]]) -> Reply:
        payload = {"images": [encode_png(picture) for picture in pictures], "prompts": prompts, "metadata": metadata}
        return self.call("POST", "/score", payload, parse=lambda data: _scores(data, len(pictures)))


def _healthy(data: Any) -> None:
    if not isinstance(data, dict) or data.get("status") != "ok":
        raise ValueError(f'expected {{"status": "ok"}}, got {str(data)[:200]}')


def _scores(data: Any, count: int) -> Reply:
    scores = data.get("scores") if isinstance(data, dict) else None
    if not isinstance(scores, list):
        raise ValueError(f'expected {{"scores": [...]}}, got {str(data)[:200]}')
    if len(scores) != count:
        raise ValueError(f"expected {count} scores, one per picture, got {len(scores)}")
    return [_score(score) for score in scores]


def _score(score: Any) -> float | None:
    if score is None:
        return None
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise ValueError(f"expected numbers or null as scores, got {str(score)[:100]!r}")
    try:
        value = float(score)
    except OverflowError:
        return None
    return value if math.isfinite(value) else None
