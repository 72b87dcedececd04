"""Flow-GRPO's `PerPromptStatTracker`: rewards to advantages by prompt, in numpy's float64 arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import TYPE_CHECKING, Any

from densegrpo_fast.compat.patch import CompatError

if TYPE_CHECKING:
    import numpy as np

TYPES = ("grpo", "rwr", "sft", "dpo")


class PerPromptStatTracker:
    """Advantages relative to the other samples of the same prompt.

    Attributes:
        global_std: divide by the standard deviation of all rewards of a call, not of the prompt's.
        stats: prompt -> rewards seen since `clear`, [n] or [n, T] float64.
        history_prompts: hashes of all prompts ever seen.
    """

    def __init__(self, global_std: bool = False) -> None:
        self.global_std = global_std
        self.stats: dict[str, np.ndarray] = {}
        self.history_prompts: set[int] = set()

    def update(self, prompts: Sequence[str], rewards: Any, type: str = "grpo") -> np.ndarray:
        """Record rewards and return their advantages.

        Args:
            prompts: N prompts; equal strings are one group.
            rewards: [N], or [N, T] with statistics over the first axis.
            type: "grpo" (reward - mean) / (std + 1e-4); "rwr" the reward itself; "sft" 1 for the best of a prompt, 0
                for the rest; "dpo" 1 for the best, -1 for the worst (the second and first if all are equal), 0 for
                the rest.

        Returns:
            advantages in the shape of `rewards`, float64.

        Raises:
            ValueError: an unknown type, lengths that differ, or "dpo" with rewards [N, T] or a prompt seen once.
        """
        import numpy as np

        if type not in TYPES:
            raise ValueError(f"type must be one of {', '.join(TYPES)}, got {type!r}")
        names = np.array(prompts)
        rewards = np.array(rewards, dtype=np.float64)
        if names.shape != rewards.shape[:1]:
            raise ValueError(f"prompts and rewards must have the same length, got {names.shape} and {rewards.shape}")
        unique, group = np.unique(names, return_inverse=True)
        advantages = np.zeros_like(rewards)
        for number, prompt in enumerate(unique):
            rows = np.flatnonzero(group == number)
            new, old = rewards[rows], self.stats.get(prompt)
            self.stats[prompt] = new if old is None else np.concatenate([old, new])
            self.history_prompts.add(hash(prompt))
            if type == "grpo":
                spread = rewards if self.global_std else self.stats[prompt]
                mean = np.mean(self.stats[prompt], axis=0, keepdims=True)
                advantages[rows] = (new - mean) / (np.std(spread, axis=0, keepdims=True) + 1e-4)
            elif type == "rwr":
                advantages[rows] = new
            elif type == "sft":
                advantages[rows] = new == new.max()
            else:
                if new.ndim != 1 or len(new) < 2:
                    raise ValueError(f'type "dpo" needs 2 or more rewards [N] per prompt, got shape {new.shape}')
                best, worst = int(new.argmax()), int(new.argmin())
                best, worst = (1, 0) if best == worst else (best, worst)
                advantages[rows[best]], advantages[rows[worst]] = 1.0, -1.0
        return advantages

    def get_stats(self) -> tuple[float, int]:
        """Mean number of rewards per prompt since `clear`, and the number of prompts ever seen."""
        sizes = [len(rewards) for rewards in self.stats.values()]
        return (sum(sizes) / len(sizes) if sizes else 0), len(self.history_prompts)

    def clear(self) -> None:
        """Forget the rewards, not the prompts."""
        self.stats = {}


def tracker_replacement(host: Any) -> tuple[type[PerPromptStatTracker], str]:
    """`PerPromptStatTracker` in place of a host's, after comparing the two on a few rewards.

    Raises:
        CompatError: the host's differs.
    """
    prompts, rewards = ["b", "a", "b", "a", "b"], [0.1, 0.7, 0.4, 0.2, 0.45]
    wide = [[reward, 2 * reward * reward] for reward in rewards]
    for global_std, kind, values in product((False, True), TYPES, (rewards, wide)):
        if kind in ("sft", "dpo") and values is wide:
            continue
        ours = PerPromptStatTracker(global_std).update(prompts, values, type=kind)
        try:
            theirs = host(global_std).update(prompts, values, type=kind)
        except Exception as error:
            raise CompatError(f"PerPromptStatTracker of the host cannot be replaced: {error!r}") from error
        if theirs.shape != ours.shape or abs(theirs - ours).max() > 1e-12:
            raise CompatError(f'PerPromptStatTracker of the host computes other advantages for type "{kind}"')
    # A class of its own, so that undoing the patch does not touch other uses of ours.
    return type("PerPromptStatTracker", (PerPromptStatTracker,), {}), "float64, as the host's"
