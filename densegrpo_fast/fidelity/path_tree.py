"""Every lookahead path of every state at once, with shared beginnings evaluated once: what a plan search needs.

The completions of one state form a tree: its root is the state with the rollout's velocity, and a child evaluates the
model once more, at a later grid index. Any node set is then a choice of one path per state, at no further evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from densegrpo_fast.sampling.lookahead import CompletionState, Lookahead
from densegrpo_fast.sampling.rollout import Rollout

Path = tuple[int, ...]
"""Increasing grid indices at which a completion evaluates the model."""


@torch.no_grad()
def completions(lookahead: Lookahead, rollout: Rollout, *, max_nodes: int) -> Iterator[tuple[int, Path, Tensor]]:
    """Complete every state along every path.

    Args:
        lookahead: completes them, in every way but its own plan, and without its head, which is for that plan.
        rollout: what is completed; states that a noise-free step joins to the next are left out, as their completions
            are that one's.
        max_nodes: evaluations of the longest path, at least 0.

    Yields:
        (state, path, clean latents [B, ...] float32), one evaluation each, except for the empty paths, of B rows or of
        those among them with a completion of their own.
    """
    steps, dedup = rollout.coefficients.num_steps, lookahead.dedup(rollout)
    rollout = rollout.evaluated(lookahead)
    for state, root in lookahead.start(rollout).items():
        pending: list[tuple[Path, CompletionState]] = [((), root)]
        while pending:
            path, here = pending.pop()
            yield state, path, dedup.spread(state, lookahead.jump([here], steps, rollout.coefficients))
            for step_index in range(here.index + 1, steps) if len(path) < max_nodes else ():
                pending.append(((*path, step_index), lookahead.advance({state: here}, step_index, rollout)[state]))


def node_sets(num_steps: int, max_nodes: int) -> list[Path]:
    """All sets of at most `max_nodes` grid indices in 1..T-1, the empty one first."""
    return [path for size in range(max_nodes + 1) for path in combinations(range(1, num_steps), size)]


def path_after(nodes: Path, state: int) -> Path:
    """The part of a node set that lies ahead of a state."""
    return tuple(step_index for step_index in nodes if step_index > state)
