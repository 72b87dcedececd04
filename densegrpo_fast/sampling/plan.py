"""Lookahead plans: at which later grid points each state of a trajectory evaluates the model on its way to the image.

A state j (j steps done) always starts with the velocity the rollout computed there. Its *path* is the increasing tuple
of later grid indices at which it evaluates again; after the last one it jumps to sigma 0. The empty path is the
one-step estimate; the path through every later index is DenseGRPO's n = t completion (arXiv 2601.20218, Eq 7).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Plan:
    """Paths of the T states that have steps left.

    Attributes:
        name: how it was asked for, e.g. "nodes{3,6}".
        paths: per state 0..T-1 its increasing tuple of grid indices in (state, T).
    """

    name: str
    paths: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        for state, path in enumerate(self.paths):
            points = (state, *path, self.num_steps)
            if any(a >= b for a, b in zip(points, points[1:], strict=False)):
                raise ValueError(
                    f"plan {self.name}: the path of state {state} must increase within "
                    f"{state + 1}..{self.num_steps - 1}, got {path}"
                )

    @property
    def num_steps(self) -> int:
        return len(self.paths)

    @property
    def evaluations(self) -> int:
        """Model evaluations per trajectory when every step is stochastic (a guided one counts once)."""
        return sum(len(path) for path in self.paths)

    def nodes(self) -> list[int]:
        """Grid indices at which any state evaluates, increasing."""
        return sorted({step_index for path in self.paths for step_index in path})


def nodes(num_steps: int, points: Sequence[int]) -> Plan:
    """Every state evaluates at all of `points` that lie ahead of it.

    Raises:
        ValueError: a point is outside 1..T-1 or the points do not increase.
    """
    points = tuple(points)
    if any(not 1 <= point < num_steps for point in points) or list(points) != sorted(set(points)):
        raise ValueError(
            f"lookahead nodes must increase within 1..{num_steps - 1} for {num_steps} steps, got {list(points)}"
        )
    paths = tuple(tuple(point for point in points if point > state) for state in range(num_steps))
    return Plan(f"nodes{{{','.join(map(str, points))}}}", paths)


def exact(num_steps: int) -> Plan:
    """Every remaining step of the grid: DenseGRPO's default."""
    return Plan("exact", nodes(num_steps, range(1, num_steps)).paths)


def exact_but_last(num_steps: int) -> Plan:
    """`exact` without the terminal step's own evaluation (sigma .0089 on SD3's 10-step grid)."""
    return Plan("exact_but_last", nodes(num_steps, range(1, num_steps - 1)).paths)


def one_step(num_steps: int) -> Plan:
    """No evaluation: the clean estimate from the rollout's own velocity."""
    return Plan("one_step", ((),) * num_steps)


def n_step(num_steps: int, n: int) -> Plan:
    """DenseGRPO's n-step completion: a state with t steps left visits the labels floor(t (n-i) / n), i = 1..n-1.

    The paper gives the grid for n = 2 (t -> floor(t/2) -> 0); other n follow the same rule. States with t < n use
    n = t.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n_step needs n >= 1, got {n}")
    paths = []
    for state in range(num_steps):
        left = num_steps - state
        count = min(n, left)
        labels = (left * (count - i) // count for i in range(1, count))
        paths.append(tuple(num_steps - label for label in labels))
    return Plan(f"n_step{{{n}}}", tuple(paths))


def strided(num_steps: int, stride: int) -> Plan:
    """Every state takes one step of the grid, then steps of `stride` grid points while these fit, and jumps to sigma 0.

    The completions of Granular-GRPO (arXiv 2510.01982), whose grid after step k is sigmas[:k+2] and sigmas[k+2::stride]
    and whose image is the clean prediction at the last point but one. So the last jump may be up to stride - 1 grid
    points longer: of 16 steps, state 8 by stride 2 evaluates 9, 11, 13. Stride 1 is `exact`.

    Raises:
        ValueError: stride is below 1.
    """
    if stride < 1:
        raise ValueError(f"strided needs a stride of at least 1, got {stride}")
    paths = tuple(tuple(range(j + 1, num_steps + 1 - stride, stride)) for j in range(num_steps))
    return Plan(f"strided{{{stride}}}", paths)


def own_paths(num_steps: int, paths: Sequence[Sequence[int]]) -> Plan:
    """Every state goes its own way: what a search finds when it looks at each state by itself.

    Args:
        num_steps: T.
        paths: of the states 0..T-1.

    Raises:
        ValueError: there is not one path for each of the T states, or one does not increase within state+1..T-1.
    """
    if len(paths) != num_steps:
        raise ValueError(f"lookahead paths must be one for each of the {num_steps} states, got {len(paths)}")
    written = ":".join(",".join(map(str, path)) or "-" for path in paths)
    return Plan(f"paths{{{written}}}", tuple(tuple(path) for path in paths))


def make_plan(
    kind: str,
    num_steps: int,
    points: Sequence[int] = (),
    n: int = 1,
    paths: Sequence[Sequence[int]] = (),
) -> Plan:
    """A plan by its configured name: exact, exact_but_last, nodes, n_step, one_step or paths.

    Raises:
        ValueError: the name is unknown, or its parameters do not fit `num_steps`.
    """
    match kind:
        case "exact":
            return exact(num_steps)
        case "exact_but_last":
            return exact_but_last(num_steps)
        case "nodes":
            return nodes(num_steps, points)
        case "n_step":
            return n_step(num_steps, n)
        case "one_step":
            return one_step(num_steps)
        case "paths":
            return own_paths(num_steps, paths)
    known = "exact, exact_but_last, nodes, n_step, one_step or paths"
    raise ValueError(f"unknown lookahead plan {kind!r}, expected {known}")
