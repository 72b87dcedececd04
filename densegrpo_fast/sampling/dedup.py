"""Which completions of a rollout are one and the same, so that each is computed once.

Two reasons. States that a noise-free step joins lie on one ODE path: they share the completion of the last of them.
And where all samples of a prompt start from one noise, they are the same sample until the first step that injects any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class CompletionDedup:
    """The different completions of B samples over T steps, in the order of states, then rows.

    Attributes:
        noisy: [T] whether each step injects noise.
        group: rows, in consecutive blocks, that have prompt and initial noise in common; 1 = each row its own.
        completed: the J states to complete, increasing, with each the one whose completion it shares; None = all of
            0..T.
    """

    noisy: tuple[bool, ...]
    group: int = 1
    completed: tuple[int, ...] | None = None

    @cached_property
    def shared_with(self) -> list[int]:
        """For each of 0..T the state whose completion it shares: the first not followed by a noise-free step."""
        last = list(range(len(self.noisy) + 1))
        for step in reversed(range(len(self.noisy))):
            if not self.noisy[step]:
                last[step] = last[step + 1]
        return last

    @property
    def representatives(self) -> list[int]:
        """`shared_with` of the J states."""
        return self.shared_with if self.completed is None else [self.shared_with[state] for state in self.completed]

    @cached_property
    def states(self) -> list[int]:
        """The states with a completion of their own, increasing; T is the image itself."""
        return sorted(set(self.representatives))

    @property
    def positions(self) -> list[int]:
        """For each of the J states the position of its completion in `states`."""
        return [self.states.index(representative) for representative in self.representatives]

    def stride(self, state: int) -> int:
        """Rows that share one completion of a state: the group as long as no step before it has injected noise."""
        return 1 if any(self.noisy[:state]) else self.group

    def rows(self, state: int, values: Tensor) -> Tensor:
        """Of what belongs to the B rows at a state, that of the first row of each that share: [B / stride, ...]."""
        stride = self.stride(state)
        return values if stride == 1 else values[::stride]

    def spread(self, state: int, values: Tensor) -> Tensor:
        """The reverse of `rows`: each completion's values for all rows that share it, [B, ...]."""
        stride = self.stride(state)
        return values if stride == 1 else values.repeat_interleave(stride, dim=0)

    def samples(self, batch: int) -> list[int]:
        """For each different completion which of the B rows it belongs to, the first where several share it."""
        return [row for state in self.states for row in range(0, batch, self.stride(state))]

    def different(self, values: Tensor) -> Tensor:
        """The different completions [m, ...] of all J states' [J, B, ...]."""
        places = self.states if self.completed is None else [self.completed.index(state) for state in self.states]
        return torch.cat([self.rows(state, values[j]) for state, j in zip(self.states, places, strict=True)])

    def broadcast(self, values: Tensor, batch: int) -> Tensor:
        """What the different completions have [m, ...], for each of `states` and B rows: [K, B, ...]."""
        parts = values.split([batch // self.stride(state) for state in self.states])
        return torch.stack([self.spread(state, part) for state, part in zip(self.states, parts, strict=True)])

    def every_state(self, values: Tensor) -> Tensor:
        """What the different completions have [..., K], for each of 0..T: [..., T+1], NaN where none is its own."""
        found = values.new_full((*values.shape[:-1], len(self.shared_with)), torch.nan)
        for place, state in enumerate(self.states):
            found[..., [j for j, other in enumerate(self.shared_with) if other == state]] = values[..., place, None]
        return found

    def per_trajectory(self, count: Callable[[int], int]) -> int | float:
        """The sum over all different completions of `count(state)`, as one trajectory's share of it."""
        total = sum((Fraction(count(state), self.stride(state)) for state in self.states), Fraction())
        return int(total) if total.denominator == 1 else float(total)
