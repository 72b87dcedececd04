"""Flow-GRPO's advantage statistics against the definition, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from densegrpo_fast.compat.flow_grpo import PerPromptStatTracker
from densegrpo_fast.compat.flow_grpo.tracker import tracker_replacement
from densegrpo_fast.compat.patch import CompatError

np = pytest.importorskip("numpy")


@pytest.mark.parametrize("global_std", [False, True])
@pytest.mark.parametrize("rewards_of", [lambda r: r, lambda r: np.stack([r, r**2, 1 - r], 1)], ids=["N", "N,T"])
def test_tracker_grpo(global_std: bool, rewards_of: Callable[[Any], Any]) -> None:
    prompts = ["a cat", "a dog", "a cat", "a cat", "a dog", "a bird"]
    rewards = rewards_of(np.array([0.3, 0.9, 0.1, 0.8, 0.2, 0.5], dtype=np.float32))
    tracker = PerPromptStatTracker(global_std)
    found = tracker.update(prompts, rewards)
    assert found.dtype == np.float64 and found.shape == rewards.shape
    exact = rewards.astype(np.float64)
    for row, prompt in enumerate(prompts):
        group = exact[[other == prompt for other in prompts]]
        spread = exact if global_std else group
        expected = (exact[row] - group.mean(0)) / (spread.std(0) + 1e-4)
        np.testing.assert_allclose(found[row], expected, rtol=1e-12, atol=1e-12)
    assert tracker.get_stats() == (2.0, 3)
    tracker.clear()
    assert tracker.stats == {} and tracker.get_stats() == (0, 3)


def test_tracker_accumulates_until_cleared() -> None:
    tracker = PerPromptStatTracker()
    tracker.update(["a", "a"], [0.0, 1.0])
    found = tracker.update(["a", "a"], [2.0, 3.0])
    np.testing.assert_allclose(found, (np.array([2.0, 3.0]) - 1.5) / (np.std([0.0, 1, 2, 3]) + 1e-4))
    assert tracker.get_stats() == (4.0, 1)


def test_tracker_other_types() -> None:
    prompts, rewards = ["a", "b", "a", "b", "a"], [0.2, 5.0, 0.9, 5.0, 0.9]
    assert PerPromptStatTracker().update(prompts, rewards, type="rwr").tolist() == rewards
    assert PerPromptStatTracker().update(prompts, rewards, type="sft").tolist() == [0, 1, 1, 1, 1]
    assert PerPromptStatTracker().update(prompts, rewards, type="dpo").tolist() == [-1, -1, 1, 1, 0]
    with pytest.raises(ValueError, match="type must be one of grpo, rwr, sft, dpo, got 'ppo'"):
        PerPromptStatTracker().update(prompts, rewards, type="ppo")
    with pytest.raises(ValueError, match="needs 2 or more rewards"):
        PerPromptStatTracker().update(["a"], [1.0], type="dpo")
    with pytest.raises(ValueError, match="same length"):
        PerPromptStatTracker().update(["a"], [1.0, 2.0])


def test_a_tracker_that_differs_is_refused() -> None:
    assert issubclass(tracker_replacement(PerPromptStatTracker)[0], PerPromptStatTracker)

    class Other(PerPromptStatTracker):
        def update(self, prompts: Any, rewards: Any, type: str = "grpo") -> Any:
            return 2 * super().update(prompts, rewards, type)

    with pytest.raises(CompatError, match="computes other advantages"):
        tracker_replacement(Other)
    with pytest.raises(CompatError, match="cannot be replaced"):
        tracker_replacement(lambda global_std: None)
