"""The reward contract: forms of scores, missing scores, broken rewards."""

from __future__ import annotations

import asyncio
import math
import os
import threading

import numpy as np
import pytest
import torch

from densegrpo_fast.common.errors import RewardError
from densegrpo_fast.rewards.base import RewardMixture, missing_share

IMAGES = torch.linspace(0, 1, 3 * 3 * 4 * 4).reshape(3, 3, 4, 4)
PROMPTS = ["a red circle", "a blue square", "two green crosses"]


def returning(output):
    return lambda images, prompts, metadata: output


@pytest.mark.parametrize(
    "output",
    [
        [1, 0.5, None],
        (1.0, 0.5, float("nan")),
        ([1.0, 0.5, math.inf], {"detail": "x"}),
        torch.tensor([1.0, 0.5, math.nan], dtype=torch.float64, requires_grad=True),
        (np.array([1.0, 0.5, -math.inf]), {}),
        [np.float32(1.0), torch.tensor(0.5), None],
        [True, np.float64(0.5), 1e300],
    ],
    ids=["list", "tuple", "flow_grpo", "tensor", "array", "scalars", "too_large_for_float32"],
)
def test_every_form_of_scores_gives_the_same_values(output):
    scores = RewardMixture({"r": (returning(output), 2.0)})(IMAGES, PROMPTS)
    assert scores.values.dtype == torch.float32 and not scores.values.requires_grad
    torch.testing.assert_close(scores.values, torch.tensor([2.0, 1.0, math.nan]), equal_nan=True)
    torch.testing.assert_close(scores.per_reward["r"], torch.tensor([1.0, 0.5, math.nan]), equal_nan=True)
    assert scores.missing_share == pytest.approx(1 / 3)


def test_two_scores_in_a_tuple_are_not_taken_for_the_flow_grpo_form():
    scores = RewardMixture({"r": (returning((0.25, 0.75)), 1.0)})(IMAGES[:2], PROMPTS[:2])
    assert scores.values.tolist() == [0.25, 0.75]


def test_a_mixture_is_a_weighted_sum_and_missing_where_any_term_is():
    mixture = RewardMixture({"a": (returning([1.0, None, 3.0]), 2.0), "b": (returning([0.5, 1.0, None]), -1.0)})
    scores = mixture(IMAGES, PROMPTS)
    # 2 * 1 - 0.5 = 1.5; the other two pictures each lack one score
    torch.testing.assert_close(scores.values, torch.tensor([1.5, math.nan, math.nan]), equal_nan=True)
    assert scores.missing_share == pytest.approx(2 / 3)


def test_a_reward_with_weight_zero_is_only_observed():
    mixture = RewardMixture({"a": (returning([1.0, 2.0, 3.0]), 1.0), "seen": (returning([None, 5.0, 5.0]), 0.0)})
    scores = mixture(IMAGES, PROMPTS)
    assert scores.values.tolist() == [1.0, 2.0, 3.0]
    assert scores.per_reward["seen"].isnan().tolist() == [True, False, False]


def test_rewards_see_images_prompts_and_metadata():
    seen = {}

    def reward(images, prompts, metadata):
        seen.update(images=images, prompts=prompts, metadata=metadata, grad=torch.is_grad_enabled())
        return images.mean((1, 2, 3))

    mixture = RewardMixture({"r": (reward, 1.0)})
    scores = mixture(IMAGES, PROMPTS, [{"n": 0}, {"n": 1}, {"n": 2}])
    torch.testing.assert_close(scores.values, IMAGES.mean((1, 2, 3)))
    assert seen["prompts"] == PROMPTS and seen["metadata"][2] == {"n": 2} and seen["grad"] is False
    mixture(IMAGES, PROMPTS)
    assert seen["metadata"] == [{}, {}, {}]


def test_async_rewards_wait_for_each_other():
    async def run():
        return RewardMixture({"first": (first, 1.0), "second": (second, 1.0)})(IMAGES, PROMPTS)

    def pair():
        # each waits for the other, so only rewards that really run at the same time can finish
        arrived = [asyncio.Event(), asyncio.Event()]

        def make(mine, other):
            async def reward(images, prompts, metadata):
                arrived[mine].set()
                await asyncio.wait_for(arrived[other].wait(), timeout=5)
                return [float(mine)] * len(prompts)

            return reward

        return make(0, 1), make(1, 0)

    first, second = pair()
    scores = RewardMixture({"first": (first, 1.0), "second": (second, 1.0)})(IMAGES, PROMPTS)
    assert scores.values.tolist() == [1.0, 1.0, 1.0]
    first, second = pair()
    assert asyncio.run(run()).values.tolist() == [1.0, 1.0, 1.0], "inside a running loop, as in a notebook"


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([1.0, 2.0], "must return 3 scores, one per image, got 2"),
        (torch.zeros(3, 1), r"must return 3 real scores, got torch.float32 of shape \[3, 1\]"),
        (torch.zeros(3, dtype=torch.complex64), "real scores"),
        ([1.0, "0.5", 2.0], "number or None per image, got '0.5' for image 1"),
        ([1.0, [2.0], 2.0], r"got \[2.0\] for image 1"),
        (0.5, "list or tensor of 3 scores, got float"),
        (None, "got NoneType"),
        ({"avg": [1, 2, 3]}, "got dict"),
    ],
)
def test_scores_that_break_the_contract_are_refused_by_the_rewards_name(output, message):
    with pytest.raises(RewardError, match=f"reward 'mine' .*{message}") as caught:
        RewardMixture({"mine": (returning(output), 1.0)})(IMAGES, PROMPTS)
    assert caught.value.name == "mine"


def test_a_raising_reward_is_named_and_keeps_its_cause():
    def broken(images, prompts, metadata):
        raise KeyError("quotes")

    async def broken_later(images, prompts, metadata):
        raise TimeoutError("server silent")

    with pytest.raises(RewardError, match="reward 'ocr' raised KeyError: 'quotes'") as caught:
        RewardMixture({"ocr": (broken, 1.0)})(IMAGES, PROMPTS)
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(RewardError, match="reward 'judge' raised TimeoutError: server silent") as caught:
        RewardMixture({"fine": (returning([1, 2, 3]), 1.0), "judge": (broken_later, 1.0)})(IMAGES, PROMPTS)
    assert isinstance(caught.value.__cause__, TimeoutError)


def test_a_mixture_refuses_bad_terms_and_bad_inputs():
    ones = returning([1.0, 1.0, 1.0])
    with pytest.raises(ValueError, match="weight other than 0"):
        RewardMixture({"r": (ones, 0.0)})
    with pytest.raises(ValueError, match="weight of 'r' must be finite, got nan"):
        RewardMixture({"r": (ones, math.nan)})
    with pytest.raises(TypeError, match="'r' must be callable, got str"):
        RewardMixture({"r": ("scenes", 1.0)})
    mixture = RewardMixture({"r": (ones, 1.0)})
    with pytest.raises(ValueError, match=r"float \[N, 3, H, W\] or .*, got torch.uint8"):
        mixture(IMAGES.to(torch.uint8), PROMPTS)
    with pytest.raises(ValueError, match="3 images need as many prompts and metadata, got 2 and 3"):
        mixture(IMAGES, PROMPTS[:2])
    with pytest.raises(ValueError, match="got 3 and 1"):
        mixture(IMAGES, PROMPTS, [{}])


def test_a_reward_that_writes_into_what_it_gets_harms_nobody():
    def greedy(images, prompts, metadata):
        images.zero_()
        prompts.clear()
        metadata[0]["n"]["deep"] = 1
        metadata.clear()
        return [0.0] * 3

    def seeing(images, prompts, metadata):
        return [images[i].mean() + len(prompts[i]) + metadata[i]["n"].get("deep", 0) for i in range(3)]

    images, metadata = IMAGES.clone(), [{"n": {}} for _ in range(3)]
    expected = RewardMixture({"seen": (seeing, 1.0)})(images, PROMPTS, metadata).values
    scores = RewardMixture({"greedy": (greedy, 1.0), "seen": (seeing, 1.0)})(images, PROMPTS, metadata)
    assert torch.equal(scores.per_reward["seen"], expected)
    assert torch.equal(images, IMAGES) and metadata == [{"n": {}}] * 3


class Hostile(list):
    """A list of scores whose every use fails."""

    def __len__(self):
        raise SystemExit(0)

    __iter__ = __repr__ = __len__


class Refusing(Exception):
    def __str__(self):
        raise ValueError("no message")


def raising(error):
    def reward(images, prompts, metadata):
        raise error

    return reward


def raising_later(error):
    async def reward(images, prompts, metadata):
        raise error

    return reward


@pytest.mark.parametrize("timeout", [None, 30.0], ids=["here", "on_a_thread"])
@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (raising(SystemExit(0)), "raised SystemExit: 0"),
        (raising_later(SystemExit(0)), "raised SystemExit: 0"),
        (raising(GeneratorExit()), "raised GeneratorExit"),
        (raising_later(asyncio.CancelledError()), "raised CancelledError"),
        (raising(Refusing()), r"raised Refusing: \(its message cannot be read\)"),
        (raising(StopIteration()), "raised StopIteration"),
        (returning(Hostile()), "returned raised SystemExit: 0"),
        (returning([Hostile(), 1.0, 2.0]), "returned raised SystemExit"),
        (returning(1.0 for _ in range(3)), "got generator"),
        (returning(torch.tensor([True, False, True]).to_sparse()), "returned raised"),
        (lambda: [0.0], "raised TypeError"),
    ],
)
def test_whatever_a_reward_does_is_its_own_error(reward, message, timeout):
    with pytest.raises(RewardError, match=f"reward 'mine' .*{message}") as caught:
        RewardMixture({"mine": (reward, 1.0)}, timeout)(IMAGES, PROMPTS)
    assert caught.value.name == "mine"


def test_a_score_too_large_for_a_float_is_missing():
    assert RewardMixture({"r": (returning([10**400, 1, -(10**400)]), 1.0)})(IMAGES, PROMPTS).missing_share > 0.6


def test_a_reward_that_hangs_is_left_behind():
    released = threading.Event()

    def hanging(images, prompts, metadata):
        released.wait(30)

    async def hanging_later(images, prompts, metadata):
        while not released.is_set():
            await asyncio.sleep(0.01)

    before = threading.enumerate()
    for reward in (hanging, hanging_later):
        with pytest.raises(RewardError, match="'slow' did not return within 0.05 s") as caught:
            RewardMixture({"fine": (returning([1, 2, 3]), 1.0), "slow": (reward, 1.0)}, 0.05)(IMAGES, PROMPTS)
        assert caught.value.name == "slow"
    released.set()
    for thread in set(threading.enumerate()) - set(before):
        thread.join()
    with pytest.raises(ValueError, match="timeout must be above 0, got 0"):
        RewardMixture({"fine": (returning([1, 2, 3]), 1.0)}, 0)


def test_a_reward_that_changes_directory_or_forks_is_brought_back(tmp_path, monkeypatch):
    # a reward that an earlier test gave up on would go back to a directory of its own
    for thread in threading.enumerate():
        if thread.name == "rewards":
            thread.join()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()

    def wandering(images, prompts, metadata):
        os.chdir(tmp_path / "elsewhere")
        return [1.0] * 3

    assert RewardMixture({"r": (wandering, 1.0)})(IMAGES, PROMPTS).values.tolist() == [1.0] * 3
    assert os.getcwd() == str(tmp_path)
    children = []

    def forking(images, prompts, metadata):
        children.append(os.fork())
        return [1.0] * 3

    assert RewardMixture({"r": (forking, 1.0)})(IMAGES, PROMPTS).values.tolist() == [1.0] * 3
    # the child has ended in the reward's place, and did not come here
    assert os.waitstatus_to_exitcode(os.waitpid(children[0], 0)[1]) == 1


def test_missing_share_counts_nan_over_any_shape():
    assert missing_share(torch.tensor([[1.0, math.nan], [math.nan, math.nan]])) == 0.75
    assert missing_share(torch.zeros(0)) == 0.0
