"""The best path of every state for each number of evaluations, by dynamic programming over the states.

Agreement is a sum over states and steps: the rewards of a state depend on its own path, the gains of a step on the
paths of the two states that it joins. So states form a chain, and the greatest sum for every number of evaluations is
found exactly without trying all combinations (Viterbi's algorithm, with the evaluations so far as part of the state).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from densegrpo_fast.fidelity.path_tree import Path
from densegrpo_fast.training.agreement import spearman

Scored = Mapping[tuple[int, Path], Tensor]
"""Rewards [P, G] of the completions of one state along one path; the image is state T, with the path ()."""


@dataclass(frozen=True)
class Chain:
    """States whose completions are to be chosen, and how well every choice agrees with the exact rewards.

    Attributes:
        choices: of K states, in their order, the paths.
        states: per state [A] float64, what each path brings.
        steps: for each of the K-1 pairs of neighbours [A, B] float64, what each pair of paths brings.
    """

    choices: tuple[tuple[Path, ...], ...]
    states: tuple[Tensor, ...]
    steps: tuple[Tensor, ...]

    def best(self, floor: float = -1.0) -> list[tuple[Path, ...]]:
        """For each number of evaluations the paths with the greatest sum; without those that fewer can equal.

        Args:
            floor: what a step should bring at least: the fewer steps are below it the better, whatever the sum.
        """
        lengths = [torch.tensor([len(path) for path in paths]) for paths in self.choices]
        budget = sum(int(count.max()) for count in lengths) + 1
        # more than all correlations together can differ
        penalty = 4.0 * len(self.choices) + 1
        # [A, E]: the greatest sum so far, by the path of the state that was reached and by evaluations
        sums = _moved(self.states[0][:, None], lengths[0], budget)
        origins: list[Tensor] = []
        for brings, step, count in zip(self.states[1:], self.steps, lengths[1:], strict=True):
            value, origin = (sums[:, None] + (step - penalty * (step < floor))[..., None]).max(0)
            origins.append(origin)
            sums = _moved(value + brings[:, None], count, budget)
        found: list[tuple[Path, ...]] = []
        highest = -torch.inf
        for evaluations, column in enumerate(sums.T):
            value, last = column.max(0)
            if value > highest + 1e-9:
                highest = float(value)
                found.append(self._traced(origins, lengths, int(last), evaluations))
        return found

    def _traced(
        self, origins: Sequence[Tensor], lengths: Sequence[Tensor], last: int, evaluations: int
    ) -> tuple[Path, ...]:
        """The paths by which the last state's choice came to its sum."""
        picks = [last]
        for origin, count in zip(reversed(origins), reversed(lengths), strict=False):
            evaluations -= int(count[picks[-1]])
            picks.append(int(origin[picks[-1], evaluations]))
        return tuple(paths[pick] for paths, pick in zip(self.choices, reversed(picks), strict=True))


def chain_of(table: Scored, exact: Mapping[int, Tensor], num_steps: int, *, gains: bool) -> Chain:
    """How well each path of each state agrees with the exact rewards, as mean in-group Spearman correlations.

    Args:
        table: of all states that are completed and, for gains, of the image.
        exact: [P, G] per state, the reference's.
        num_steps: T. The states 0..T-2 are ranked, and their gains.
        gains: whether each state's reward is compared with the next one's too, or alone, as that of branches is, which
            then counts as the step's.

    Returns:
        The states in order, the image as the last one.
    """
    own = sorted({num_steps, *(state for state, _ in table)})
    choices = {state: tuple(path for at, path in table if at == state) or ((),) for state in own}
    completed = {s: torch.stack([table[s, path] for path in choices[s]]) for s in own if (s, choices[s][0]) in table}
    states = {state: torch.zeros(len(choices[state]), dtype=torch.float64) for state in own}
    steps = []
    for state, onward in pairwise(own):
        by_reward = _agreement(exact[state], completed[state])
        if state > num_steps - 2:
            step = torch.zeros(len(choices[state]), len(choices[onward]), dtype=torch.float64)
        elif not gains:
            step = by_reward[:, None].repeat(1, len(choices[onward]))
        else:
            states[state] = by_reward
            gain = exact[onward] - exact[state]
            step = torch.stack([_agreement(gain, completed[onward] - rewards) for rewards in completed[state]])
        steps.append(step)
    return Chain(tuple(choices.values()), tuple(states.values()), tuple(steps))


def _agreement(exact: Tensor, cheap: Tensor) -> Tensor:
    """[A] float64 mean over groups of the correlation of [P, G] with each of [A, P, G]; 0 where there is none."""
    return spearman(exact.expand_as(cheap), cheap).nanmean(-1).nan_to_num(0.0)


def _moved(values: Tensor, count: Tensor, budget: int) -> Tensor:
    """[A, E] of values [A, e], each row later by its `count` of evaluations; -inf where it has none."""
    moved = values.new_full((len(values), budget), -torch.inf)
    for row, (own, later) in enumerate(zip(values, count.tolist(), strict=True)):
        kept = own[: budget - later]
        moved[row, later : later + len(kept)] = kept
    return moved
