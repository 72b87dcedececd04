"""Scoring beside the work that makes the pictures: the same scores in the same order, and really beside it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.rewards.base import RewardMixture, Scores
from densegrpo_fast.run_files.metrics import read_metrics
from densegrpo_fast.training.rewarding import Scoring

SECONDS = 60.0
"""After which a wait for the other thread has failed; nothing here takes that long."""


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float | None]:
    return [None if "number" not in m else float(x.mean()) + m["number"] for x, m in zip(images, metadata, strict=True)]


async def later(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
    return [float(len(prompt)) for prompt in prompts]


def parts(sizes: list[int]) -> list[tuple[Tensor, list[str], list[dict[str, Any]]]]:
    generator, found, done = torch.Generator().manual_seed(0), [], 0
    for size in sizes:
        numbers = range(done, done + size)
        metadata = [{"number": 10 * n} if n % 4 else {} for n in numbers]
        found.append((torch.rand(size, 3, 4, 4, generator=generator), ["x" * n for n in numbers], metadata))
        done += size
    return found


def scored(reward: RewardMixture, overlap: bool, sizes: list[int]) -> Scores:
    with Scoring(reward, overlap=overlap) as scoring:
        for part in parts(sizes):
            scoring.add(*part)
        return scoring.result()


@pytest.mark.parametrize("sizes", [[5], [1, 1, 1, 1, 1, 1], [3, 4, 2]])
def test_parts_score_what_all_score_together(sizes: list[int]) -> None:
    reward = RewardMixture({"brightness": (brightness, 1.0), "later": (later, 0.5)})
    together, beside = scored(reward, False, sizes), scored(reward, True, sizes)
    assert together.values.isnan().any() and len(together.values) == sum(sizes)
    torch.testing.assert_close(beside.values, together.values, rtol=0, atol=0, equal_nan=True)
    assert beside.per_reward.keys() == together.per_reward.keys()
    for name, values in together.per_reward.items():
        torch.testing.assert_close(beside.per_reward[name], values, rtol=0, atol=0, equal_nan=True)


def test_without_overlap_the_reward_is_called_once() -> None:
    calls: list[tuple[int, int]] = []

    def reward(images: Tensor, *_: Any) -> list[float]:
        calls.append((len(images), threading.get_ident()))
        return [0.0] * len(images)

    scored(RewardMixture({"r": (reward, 1.0)}), False, [2, 3])
    scored(RewardMixture({"r": (reward, 1.0)}), True, [2, 3])
    here = threading.get_ident()
    assert calls[0] == (5, here)
    # beside: one thread for both parts, and not this one
    assert [size for size, _ in calls[1:]] == [2, 3]
    assert len({thread for _, thread in calls[1:]}) == 1 and calls[1][1] != here


def test_the_next_part_is_made_while_one_is_scored() -> None:
    made = [threading.Event() for _ in range(4)]
    overlapped: list[bool] = []

    def patient(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        # the score of part n waits until part n+1 has been made: by turns that would never be
        following = len(overlapped) + 1
        overlapped.append(following == len(made) or made[following].wait(SECONDS))
        return [0.0] * len(images)

    with Scoring(RewardMixture({"patient": (patient, 1.0)}), overlap=True) as scoring:
        for event, part in zip(made, parts([1, 1, 1, 1]), strict=True):
            event.set()
            scoring.add(*part)
        assert len(scoring.result().values) == 4
    assert overlapped == [True] * 4


def test_pictures_do_not_pile_up() -> None:
    number, ready, waiting = 8, 0, []
    lock = threading.Lock()

    def slow(images: Tensor, *_: Any) -> list[float]:
        nonlocal ready
        with lock:
            ready += 1
        return [0.0]

    with Scoring(RewardMixture({"slow": (slow, 1.0)}), overlap=True) as scoring:
        for taken, part in enumerate(parts([1] * number)):
            scoring.add(*part)
            with lock:
                waiting.append(taken + 1 - ready)
        scoring.result()
    # taken and not scored: the one in the works, and one behind it
    assert max(waiting) <= 2 and ready == number


def failing_at(number: int) -> tuple[Callable[..., list[float]], list[int]]:
    seen: list[int] = []

    def reward(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float]:
        seen.append(len(seen))
        if seen[-1] >= number:
            raise RuntimeError(f"no score for part {seen[-1]}")
        return [0.0] * len(images)

    return reward, seen


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_failure_ends_it_as_it_would_have_here(number: int) -> None:
    before = threading.enumerate()
    reward, seen = failing_at(number)
    with pytest.raises(UserError, match=f"'r' raised RuntimeError: no score for part {number}") as caught:
        scored(RewardMixture({"r": (reward, 1.0)}), True, [1] * 4)
    assert exit_code_of(caught.value) == ExitCode.REWARD
    assert number < len(seen) <= 4
    assert set(threading.enumerate()) <= set(before)


def test_whatever_else_goes_wrong_leaves_no_thread() -> None:
    before, started = threading.enumerate(), threading.Event()

    def reward(images: Tensor, *_: Any) -> list[float]:
        started.set()
        return [0.0] * len(images)

    with (
        pytest.raises(KeyboardInterrupt),
        Scoring(RewardMixture({"r": (reward, 1.0)}), overlap=True) as scoring,
    ):
        scoring.add(*parts([1])[0])
        assert started.wait(SECONDS)
        raise KeyboardInterrupt
    assert set(threading.enumerate()) <= set(before)


def test_nothing_to_score() -> None:
    for overlap in (False, True):
        with pytest.raises(ValueError, match="no "), Scoring(RewardMixture({"r": (later, 1.0)}), overlap=overlap) as s:
            s.result()


def test_scores_put_together_and_picked() -> None:
    one, two = (Scores(torch.tensor(v), {"r": torch.tensor(v)}) for v in ([1.0, 2.0], [3.0]))
    assert Scores.joined([one, two]).values.tolist() == [1.0, 2.0, 3.0]
    picked = Scores.joined([one, two]).select(torch.tensor([2, 0, 0]))
    assert picked.values.tolist() == picked.per_reward["r"].tolist() == [3.0, 1.0, 1.0]


@pytest.mark.ci
@pytest.mark.parametrize("method", ["dense", "sparse"])
def test_training_is_the_same_either_way(train: Any, tmp_path: Path, method: str) -> None:
    options = {"run.iterations": 2, "evaluation.every": 0, "lookahead.chunk": 3, "credit.method": method}
    for overlap in ("true", "false"):
        assert train(tmp_path / overlap, **options, **{"reward.overlap": overlap}) == 0
    beside, alone = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("true", "false"))
    for one, other in zip(beside, alone, strict=True):
        assert {k: v for k, v in one.items() if not k.startswith(("time/", "memory/", "cpu_seconds"))} == {
            k: v for k, v in other.items() if not k.startswith(("time/", "memory/", "cpu_seconds"))
        }


def test_a_reward_that_fails_on_its_thread_stops_the_run(
    train: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plugin = tmp_path / "mine.py"
    plugin.write_text(
        "import threading\n"
        "def reward(images, prompts, metadata):\n"
        "    if threading.current_thread() is not threading.main_thread():\n"
        "        raise RuntimeError('out of ink')\n"
        "    return [0.5] * len(images)\n"
    )
    options = {"reward.terms": f"{{'{plugin}:reward': 1.0}}", "reward.overlap": "true", "lookahead.chunk": 2}
    assert train(tmp_path / "run", **options) == ExitCode.REWARD
    assert "out of ink" in capsys.readouterr().err
