"""The best paths of every state against all combinations there are."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from densegrpo_fast.fidelity.search import Chain, Path, chain_of
from densegrpo_fast.training import agreement

STEPS = 4
PATHS: dict[int, list[Path]] = {0: [(), (1,), (3,), (1, 2)], 1: [(), (2,), (2, 3)], 2: [(), (3,)], 3: [()], 4: [()]}


@pytest.fixture
def table() -> dict[tuple[int, Path], Tensor]:
    """Rewards [P, G] of 3 groups of 5, at random."""
    generator = torch.Generator().manual_seed(2)
    return {(state, path): torch.randn(3, 5, generator=generator) for state, paths in PATHS.items() for path in paths}


def assembled(table: dict[tuple[int, Path], Tensor], paths: tuple[Path, ...]) -> Tensor:
    return torch.stack([table[state, path] for state, path in enumerate(paths)], dim=-1)


@pytest.mark.parametrize("floor", [-1.0, 0.1])
def test_no_other_paths_agree_better(table: dict[tuple[int, Path], Tensor], floor: float) -> None:
    """Rewards of states 0..2 and their gains, summed over the units; below the floor as few steps as possible."""
    exact = torch.randn(3, 5, STEPS + 1, generator=torch.Generator().manual_seed(3))
    exact[..., STEPS] = table[STEPS, ()]
    best: dict[int, tuple[int, float]] = {}
    for paths in product(*PATHS.values()):
        found = agreement.compare(exact, assembled(table, paths))
        value = (
            -sum(gain < floor for gain in found.spearman_gains),
            sum((*found.spearman_rewards, *found.spearman_gains)),
        )
        evaluations = sum(map(len, paths))
        best[evaluations] = max(value, best.get(evaluations, value))
    chain = chain_of(table, {state: exact[..., state] for state in range(STEPS + 1)}, STEPS, gains=True)
    chosen = {sum(map(len, paths)): paths for paths in chain.best(floor)}
    reached = (-STEPS, -9.0)
    for evaluations in range(max(best) + 1):
        # what fewer evaluations reach needs no more
        assert (evaluations in chosen) == (best[evaluations] > reached)
        reached = max(reached, best[evaluations])
        if evaluations in chosen:
            found = agreement.compare(exact, assembled(table, chosen[evaluations]))
            total = sum((*found.spearman_rewards, *found.spearman_gains))
            assert total == pytest.approx(best[evaluations][1])
            assert sum(gain < floor for gain in found.spearman_gains) == -best[evaluations][0]


def test_branches_have_no_neighbours(table: dict[tuple[int, Path], Tensor]) -> None:
    """Each state for itself; states 1 and 2 alone, and no image."""
    exact = {state: torch.randn(3, 5, generator=torch.Generator().manual_seed(4 + state)) for state in (1, 2)}
    own = {key: rewards for key, rewards in table.items() if key[0] in exact}
    chain = chain_of(own, exact, STEPS, gains=False)
    *chosen, image = chain.best()[-1]
    assert image == ()
    for state, path in zip(exact, chosen, strict=True):
        scores = {
            other: agreement.spearman(exact[state], rewards).mean()
            for (at, other), rewards in own.items()
            if at == state
        }
        assert path == max(scores, key=lambda other: scores[other])


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_any_chain_is_solved_exactly(data: st.DataObject) -> None:
    """Whole numbers, so that sums are exact and ties are ties."""
    sizes = data.draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))
    choices = tuple(
        tuple(tuple(range(length)) for length in data.draw(st.permutations(range(size + 1)))[:size]) for size in sizes
    )
    number = st.integers(-3, 3).map(float)

    def drawn(*shape: int) -> Tensor:
        count = torch.Size(shape).numel()
        return torch.tensor(data.draw(st.lists(number, min_size=count, max_size=count)), dtype=torch.float64).view(
            shape
        )

    states = tuple(drawn(size) for size in sizes)
    steps = tuple(drawn(size, onward) for size, onward in zip(sizes, sizes[1:], strict=False))
    totals: dict[int, float] = {}
    for picks in product(*map(range, sizes)):
        total = sum(float(values[pick]) for values, pick in zip(states, picks, strict=True))
        total += sum(float(step[a, b]) for step, a, b in zip(steps, picks, picks[1:], strict=False))
        evaluations = sum(len(paths[pick]) for paths, pick in zip(choices, picks, strict=True))
        totals[evaluations] = max(total, totals.get(evaluations, total))
    expected, highest = [], -torch.inf
    for evaluations in sorted(totals):
        if totals[evaluations] > highest:
            highest = totals[evaluations]
            expected.append((evaluations, highest))
    found = []
    for paths in Chain(choices, states, steps).best(floor=-99.0):
        picks = [own.index(path) for own, path in zip(choices, paths, strict=True)]
        total = sum(float(values[pick]) for values, pick in zip(states, picks, strict=True))
        total += sum(float(step[a, b]) for step, a, b in zip(steps, picks, picks[1:], strict=False))
        found.append((sum(map(len, paths)), total))
    assert found == expected
