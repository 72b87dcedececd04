"""What a completion head learns from: where the lookahead's completions stand, and where the exact ones end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from densegrpo_fast.models.completion_head import CompletionHead
from densegrpo_fast.sampling.branches import BranchedRollout, Sampled
from densegrpo_fast.sampling.cost import Evaluations, lookahead_evaluations
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.trajectory import Trajectory


@dataclass(frozen=True)
class Examples:
    """What the head sees and what it should say, N rows; all on the CPU.

    Attributes:
        hidden: [N, tokens, D] in the network's dtype or half precision.
        latents, estimate, target: [N, C, H, W] float32; target = exact completion - estimate.
        state: [N] int64.
    """

    hidden: Tensor
    latents: Tensor
    estimate: Tensor
    target: Tensor
    state: Tensor

    def __len__(self) -> int:
        return len(self.state)

    @classmethod
    def joined(cls, parts: Sequence[Examples]) -> Examples:
        """The rows of all parts."""
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))

    def rows(self, index: Tensor | slice) -> Examples:
        """Some of the rows."""
        return Examples(*(tensor[index] for tensor in self.tensors().values()))

    def tensors(self) -> dict[str, Tensor]:
        """The attributes by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def row_bytes(self) -> int:
        """Memory of one row."""
        return sum(tensor[:1].nbytes for tensor in self.tensors().values())


def completed_by(lookahead: Lookahead, drawn: Sampled) -> Trajectory:
    """The trajectory whose states a lookahead completes: of a tree its twigs, reached by the lookahead."""
    return drawn.reached_by(lookahead).twigs if isinstance(drawn, BranchedRollout) else drawn


def exactly_completed(exact: Lookahead, lookahead: Lookahead, drawn: Sampled) -> tuple[Trajectory, Tensor]:
    """What a lookahead completes, and the exact completions [T+1, B, ...] of its states.

    The branches of a tree are reached once, unless the lookahead evaluates another model than the exact one.
    """
    own = completed_by(lookahead, drawn)
    return own, exact.complete(own if _alike(exact, lookahead) else completed_by(exact, drawn))


@torch.no_grad()
def examples_of(
    lookahead: Lookahead, head: CompletionHead, trajectory: Trajectory, ends: Tensor, first: int = 0
) -> list[Examples]:
    """Examples of each state that the head applies to, rows that share a completion once.

    Args:
        lookahead: brings the states to their last evaluation.
        head: that shall learn.
        trajectory: the rows [B] that the lookahead completes, with their hidden tokens.
        ends: [T+1, B, ...] their exact completions.
        first: as in `Lookahead.evaluate`.
    """
    sigmas, sharing, found = trajectory.coefficients.sigmas, lookahead.sharing(trajectory), []
    for state, last in lookahead.evaluate(trajectory, first).items():
        if not head.applies(state):
            continue
        assert last.hidden is not None
        estimate, hidden = last.latents - sigmas[last.index] * last.velocity, last.hidden
        found.append(
            Examples(
                hidden.half().cpu() if hidden.dtype.itemsize == 4 else hidden.cpu(),
                last.latents.cpu(),
                estimate.cpu(),
                (sharing.rows(state, ends[state]) - estimate).cpu(),
                torch.full((len(estimate),), state),
            )
        )
    return found


def showing(exact: Lookahead, lookahead: Lookahead, drawn: Sampled) -> Evaluations:
    """Evaluations per sample by which a head sees what the lookahead's own completions show it, the exact ones apart.

    Args:
        exact, lookahead, drawn: as in `exactly_completed`.
    """
    line = drawn.twigs if isinstance(drawn, BranchedRollout) else drawn
    guided = exact.model.forwards(line.guidance_scale) > 1
    found = lookahead_evaluations(
        lookahead.plan_for(line.num_steps),
        guided=guided,
        guidance=lookahead.guidance,
        noisy=line.coefficients.noisy,
        shared=lookahead.sharing(line).group,
    )
    if isinstance(drawn, BranchedRollout) and not _alike(exact, lookahead):
        found += Evaluations.of(len(drawn.inner), guided)
    return found


def _alike(exact: Lookahead, lookahead: Lookahead) -> bool:
    return exact.model is lookahead.model
