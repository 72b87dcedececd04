"""Lookahead plans: paths and costs derived by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.sampling.plan import (
    Plan,
    exact,
    exact_but_last,
    make_plan,
    n_step,
    nodes,
    one_step,
    own_paths,
    strided,
)


def test_exact_visits_every_later_step() -> None:
    assert exact(4).paths == ((1, 2, 3), (2, 3), (3,), ())


def test_exact_but_last_skips_the_last_step_only() -> None:
    assert exact_but_last(4).paths == ((1, 2), (2,), (), ())


def test_one_step_visits_nothing() -> None:
    assert one_step(3).paths == ((), (), ())


def test_nodes_are_visited_from_every_state_before_them() -> None:
    assert nodes(5, [2, 4]).paths == ((2, 4), (2, 4), (4,), (4,), ())


def test_two_steps_go_by_half_of_the_remaining_steps() -> None:
    # State j has t = 10 - j steps left and visits the label floor(t/2), which is grid index 10 - floor(t/2):
    # t = 10 9 8 7 6 5 4 3 2 -> labels 5 4 4 3 3 2 2 1 1 -> indices 5 6 6 7 7 8 8 9 9; t = 1 goes straight to the end.
    assert n_step(10, 2).paths == ((5,), (6,), (6,), (7,), (7,), (8,), (8,), (9,), (9,), ())


def test_three_steps_go_by_two_thirds_and_one_third() -> None:
    # t = 7: labels floor(14/3) = 4 and floor(7/3) = 2, that is indices 3 and 5 of a 7-step grid.
    assert n_step(7, 3).paths[0] == (3, 5)


def test_n_step_between_its_extremes() -> None:
    assert n_step(6, 1).paths == one_step(6).paths
    assert n_step(6, 6).paths == n_step(6, 99).paths == exact(6).paths


def test_strides_start_at_the_state_after_the_branchs() -> None:
    # G2RPO's grid after step k = 0 of 6: the points 0 1, then 2 4 6; of k = 1: 0 1 2, then 3 5. A branch that reached
    # k + 1 evaluates there and at all later points but the last, whose place the image takes
    assert strided(6, 2).paths == ((1, 3), (2, 4), (3,), (4,), (), ())
    # 16 steps, branches of step 7 that have reached state 8: 9 11 13 after its own evaluation, of three apart 9 12
    assert strided(16, 2).paths[8] == (9, 11, 13) and strided(16, 3).paths[8] == (9, 12)
    assert strided(6, 1).paths == exact(6).paths and strided(6, 6).paths == one_step(6).paths
    with pytest.raises(ValueError, match="stride of at least 1, got 0"):
        strided(6, 0)


@settings(deadline=None, max_examples=50)
@given(num_steps=st.integers(1, 30), stride=st.integers(1, 32))
def test_strided_paths_are_the_sources_grid(num_steps: int, stride: int) -> None:
    grid = list(range(num_steps + 1))
    for state, path in enumerate(strided(num_steps, stride).paths):
        step = state - 1  # that led to the state; the first one's is made up
        points = grid[: step + 2] + grid[step + 2 :: stride]
        assert [state, *path] == points[step + 1 : -1]


@pytest.mark.parametrize(
    ("plan", "evaluations"),
    [
        # 9 + 8 + ... + 0
        (exact(10), 45),
        # 8 + 7 + ... + 0 for states 0..8
        (exact_but_last(10), 36),
        # states 0-3 visit both (8), states 4-6 the second (3)
        (nodes(10, [4, 7]), 11),
        # 3 * 3 + 2 * 2 + 2 * 1
        (nodes(10, [3, 5, 7]), 15),
        (n_step(10, 2), 9),
        (one_step(10), 0),
    ],
    ids=lambda value: value.name if isinstance(value, Plan) else "",
)
def test_costs_by_hand(plan: Plan, evaluations: int) -> None:
    assert plan.evaluations == evaluations
    assert plan.num_steps == 10


@settings(deadline=None, max_examples=50)
@given(num_steps=st.integers(1, 30), n=st.integers(1, 40))
def test_n_step_paths_increase_and_have_the_asked_length(num_steps: int, n: int) -> None:
    for state, path in enumerate(n_step(num_steps, n).paths):
        assert all(a < b for a, b in pairwise((state, *path, num_steps)))
        assert len(path) == min(n, num_steps - state) - 1


def test_all_nodes_of_a_plan_are_listed_once() -> None:
    assert n_step(10, 2).nodes() == [5, 6, 7, 8, 9]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("exact", exact(4)),
        ("exact_but_last", exact_but_last(4)),
        ("nodes", nodes(4, [1, 3])),
        ("n_step", n_step(4, 2)),
        ("one_step", one_step(4)),
        ("paths", Plan("paths{2,3:2:-:-}", ((2, 3), (2,), (), ()))),
    ],
)
def test_plans_by_name(kind: str, expected: Plan) -> None:
    assert make_plan(kind, 4, points=[1, 3], n=2, paths=[[2, 3], [2], [], []]) == expected


@pytest.mark.parametrize("points", [[0, 2], [4], [-1], [2, 2], [3, 1]])
def test_nodes_outside_the_grid_or_out_of_order_are_refused(points: list[int]) -> None:
    with pytest.raises(ValueError, match="must increase within 1..3 for 4 steps"):
        nodes(4, points)


def test_other_mistakes_are_refused() -> None:
    with pytest.raises(ValueError, match="n >= 1, got 0"):
        n_step(4, 0)
    with pytest.raises(ValueError, match="unknown lookahead plan 'exakt'"):
        make_plan("exakt", 4)
    with pytest.raises(ValueError, match="path of state 1 must increase within 2..2"):
        Plan("own", ((1, 2), (1,), ()))
    with pytest.raises(ValueError, match="one for each of the 3 states, got 2"):
        own_paths(3, [[1], []])
    with pytest.raises(ValueError, match=r"paths\{3:-:-\}: the path of state 0 must increase within 1..2"):
        own_paths(3, [[3], [], []])
