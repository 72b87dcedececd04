"""The cheapest node set whose rewards agree with the exact ones: chosen on some groups, to be judged on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from densegrpo_fast.fidelity.measure import Batch, Variant, cost_of, reference, score, trajectories
from densegrpo_fast.fidelity.statistics import Agreement, compare
from densegrpo_fast.fidelity.subject import Subject
from densegrpo_fast.models.base import Decoder
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.lookahead import Guidance, Lookahead
from densegrpo_fast.sampling.path_tree import Path, completions, node_sets, path_after
from densegrpo_fast.sampling.trajectory import Trajectory

Scored = dict[tuple[int, Path], Tensor]
"""Rewards [P, G] of the completions of one state along one path."""


@dataclass(frozen=True)
class Thresholds:
    """What a plan must reach.

    Attributes:
        rewards: mean in-group Spearman correlation of the rewards.
        gains: the same of the gains.
        worst: of the gains in the worst step.
    """

    rewards: float
    gains: float
    worst: float

    def met_by(self, agreement: Agreement) -> bool:
        """Whether all three are reached; what could not be measured (NaN) does not."""
        return (
            agreement.spearman_rewards_mean >= self.rewards
            and agreement.spearman_gains_mean >= self.gains
            and agreement.spearman_gains_worst_step >= self.worst
        )


@dataclass(frozen=True)
class Candidate:
    """A node set that the search looked at.

    Attributes:
        variant: the plan with its guidance and decoder.
        forwards: network forwards of its lookahead per trajectory.
        agreement: on the groups that were searched.
    """

    variant: Variant
    forwards: int | float
    agreement: Agreement


def search(
    subject: Subject,
    groups: range,
    *,
    guidances: Sequence[Guidance],
    decoders: Sequence[Decoder],
    max_nodes: int,
    group_size: int,
    seed: int,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Candidate]:
    """Judge every set of at most `max_nodes` nodes, with every guidance and decoder.

    Args:
        subject: what is measured.
        groups: indices of the prompts to search on.
        guidances, decoders: to combine with every node set.
        max_nodes: size of the largest set.
        group_size: G.
        seed: of all noise.
        progress: is told how many groups are done.

    Returns:
        All candidates, cheapest first; of equally many forwards the preview decoder before the full one, and the better
        agreement of the gains first.
    """
    steps = subject.coefficients.num_steps
    combinations = [(guidance, decoder) for guidance in guidances for decoder in decoders]
    parts: dict[tuple[Guidance, Decoder], list[Scored]] = {combination: [] for combination in combinations}
    exact: list[Tensor] = []
    ends: dict[Decoder, list[Tensor]] = {decoder: [] for decoder in decoders}
    done = 0
    for batch in trajectories(subject, groups, group_size=group_size, seed=seed):
        exact.append(_exact(subject, batch))
        for decoder in decoders:
            ends[decoder].append(_decoded(subject, batch, batch.trajectory.latents[-1], decoder))
        for guidance in guidances:
            scored: dict[Decoder, Scored] = {decoder: {} for decoder in decoders}
            tree = completions(subject.model, batch.trajectory, max_nodes=max_nodes, guidance=guidance)
            for state, path, clean in tree:
                for decoder in decoders:
                    scored[decoder][state, path] = _decoded(subject, batch, clean, decoder)
            for decoder in decoders:
                parts[guidance, decoder].append(scored[decoder])
        done += len(batch.rows) // group_size
        progress(done)

    truth = torch.cat(exact)
    candidates = []
    for guidance, decoder in combinations:
        table = _joined(parts[guidance, decoder])
        end = torch.cat(ends[decoder])
        for nodes in node_sets(steps, max_nodes):
            plan = plans.nodes(steps, nodes) if nodes else plans.one_step(steps)
            variant = Variant(plan, guidance, decoder)
            rewards = assemble(table, end, nodes, subject.coefficients.noisy)
            forwards = cost_of(variant, subject, group_size).lookahead.forwards
            candidates.append(Candidate(variant, forwards, compare(truth, rewards, subject.coefficients.noisy)))
    return sorted(candidates, key=_order)


def cheapest(candidates: Sequence[Candidate], thresholds: Thresholds) -> Candidate | None:
    """The first candidate, in the order of `search`, that meets the thresholds."""
    return next((candidate for candidate in candidates if thresholds.met_by(candidate.agreement)), None)


def assemble(table: Scored, end: Tensor, nodes: Path, noisy: tuple[bool, ...]) -> Tensor:
    """Lookahead rewards [P, G, T+1] of a node set from those of single paths.

    Args:
        table: [P, G] per state and path.
        end: [P, G], rewards of the final images.
        nodes: the set.
        noisy: [T], whether each step injects noise.
    """
    owners = Lookahead.owners(noisy)
    states = [end if owner == len(noisy) else table[owner, path_after(nodes, owner)] for owner in owners]
    return torch.stack(states, dim=-1)


def _order(candidate: Candidate) -> tuple[int | float, bool, float]:
    gains = candidate.agreement.spearman_gains_mean
    return candidate.forwards, candidate.variant.decoder == "full", -gains if gains == gains else 0.0


def _exact(subject: Subject, batch: Batch[Trajectory]) -> Tensor:
    variant = reference(subject.coefficients.num_steps)
    lookahead = Lookahead(subject.model, variant.plan, guidance=variant.guidance, chunk=subject.chunk)
    clean = lookahead.complete(batch.trajectory)
    return score(subject, batch, lookahead.images(clean, subject.coefficients.noisy, variant.decoder))


def _decoded(subject: Subject, batch: Batch[Trajectory], clean: Tensor, decoder: Decoder) -> Tensor:
    """Rewards [P', G] of one clean latent per row."""
    images = torch.cat([subject.model.decode(part, decoder) for part in clean.split(subject.chunk)])
    return score(subject, batch, images[None])[..., 0]


def _joined(parts: list[Scored]) -> Scored:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
