"""Every lookahead path of every state at once, with shared beginnings evaluated once: what a plan search needs.

The completions of one state form a tree: its root is the state with the rollout's velocity, and a child evaluates the
model once more, at a later grid index. Any node set is then a choice of one path per state, at no further evaluation.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch
from torch import Tensor

from densegrpo_fast.flow import ops
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.sampling.lookahead import Guidance, Lookahead
from densegrpo_fast.sampling.trajectory import Trajectory

Path = tuple[int, ...]
"""Increasing grid indices at which a completion evaluates the model."""


@torch.no_grad()
def completions(
    model: FlowModel, trajectory: Trajectory, *, max_nodes: int, guidance: Guidance = "full"
) -> Iterator[tuple[int, Path, Tensor]]:
    """Complete every state along every path.

    Args:
        model: the policy.
        trajectory: its rollout; states that a noise-free step joins to the next are left out, as their completions are
            that one's.
        max_nodes: evaluations of the longest path, at least 0.
        guidance: after a state's first velocity, as in `Lookahead`.

    Yields:
        (state, path, clean latents [B, ...] float32), one evaluation of B rows each, except for the empty paths.
    """
    sigmas, steps, conditioning = trajectory.coefficients.sigmas, trajectory.num_steps, trajectory.conditioning
    scale = trajectory.guidance_scale if guidance == "full" else 1.0

    def jump(latents: Tensor, velocity: Tensor, start: int, end: int) -> Tensor:
        rows = len(latents)
        return ops.euler_jump(latents, velocity, sigmas[start].expand(rows), sigmas[end].expand(rows))

    for state in sorted(set(Lookahead.owners(trajectory.coefficients.noisy)) - {steps}):
        pending: list[tuple[Path, Tensor, Tensor]] = [((), trajectory.latents[state], trajectory.velocities[state])]
        while pending:
            path, latents, velocity = pending.pop()
            here = path[-1] if path else state
            yield state, path, jump(latents, velocity, here, steps)
            for node in range(here + 1, steps) if len(path) < max_nodes else ():
                arrived = jump(latents, velocity, here, node)
                sigma = sigmas[node].expand(len(arrived))
                onward = model.velocity(arrived, sigma, conditioning, scale).combined()
                if guidance == "reuse" and trajectory.guidance_terms is not None:
                    onward = onward + trajectory.guidance_terms[node]
                pending.append(((*path, node), arrived, onward))


def node_sets(num_steps: int, max_nodes: int) -> list[Path]:
    """All sets of at most `max_nodes` grid indices in 1..T-1, the empty one first."""
    return [path for size in range(max_nodes + 1) for path in combinations(range(1, num_steps), size)]


def path_after(nodes: Path, state: int) -> Path:
    """The part of a node set that lies ahead of a state."""
    return tuple(node for node in nodes if node > state)
