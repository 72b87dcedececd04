"""The cheapest plan whose rewards agree with the exact ones: chosen on some groups, to be judged on others.

Two kinds of plan are searched on the same completions: every set of nodes, which all states share, and for each number
of evaluations the best path of each state (`paths.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain

import torch
from torch import Tensor

from densegrpo_fast.fidelity.measure import (
    Batch,
    Variant,
    agreement_of,
    batches,
    completed,
    cost_of,
    decoding,
    flops_ratio,
    lookahead_of,
    pictures,
    reference,
    score,
)
from densegrpo_fast.fidelity.path_tree import Path, completions, node_sets
from densegrpo_fast.fidelity.paths import Scored, chain_of
from densegrpo_fast.fidelity.target import FidelityTarget
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.dedup import CompletionDedup
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.plan import Plan
from densegrpo_fast.training.agreement import Agreement


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
    """A plan that the search looked at.

    Attributes:
        variant: the plan, and how it completes and decodes.
        forwards: network forwards of its lookahead per trajectory.
        iteration: operations of the dense iteration over those of the sparse one; None where they are not known.
        agreement: on the groups that were searched.
    """

    variant: Variant
    forwards: int | float
    iteration: float | None
    agreement: Agreement


def search(
    target: FidelityTarget,
    groups: range,
    *,
    ways: Sequence[Variant],
    max_nodes: int,
    group_size: int,
    seed: int,
    worst: float = -1.0,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Candidate]:
    """Judge every set of at most `max_nodes` nodes, and the best paths of so many evaluations for each state.

    Args:
        target: what is measured.
        groups: indices of the prompts to search on.
        ways: how to complete and decode, every plan in each of them; their own plans have no part in it, and none has a
            head, which is for one plan.
        max_nodes: evaluations of the longest path.
        group_size: G.
        seed: of all noise.
        worst: what the gains' correlation should reach in every step, which the paths are chosen for too.
        progress: is told how many groups are done.

    Returns:
        All candidates, cheapest first, by operations of the iteration where they are known and else by forwards; of
        equal cost the preview decoder before the full one, and the better agreement of the gains first. Of plans that
        complete alike the first is kept, and a copy or a cache only with plans that evaluate something.
    """
    judge = reference(target.coefficients.num_steps)
    ways = list(dict.fromkeys(replace(way, plan=judge.plan) for way in ways))
    parts: dict[Variant, list[Scored]] = {way: [] for way in ways}
    exact: list[Tensor] = []
    done = 0
    for batch in batches(target, groups, group_size=group_size, seed=seed):
        lookahead = lookahead_of(target, judge, batch)
        exact.extend(score(target, batch, images) for _, images in pictures(target, lookahead, batch, [judge]))
        for completing in dict.fromkeys(map(completed, ways)):
            scored: dict[Variant, dict[tuple[int, Path], Tensor]] = {
                way: {} for way in ways if completed(way) == completing
            }
            lookahead = lookahead_of(target, completing, batch)
            for state, path, clean in _completions(target, lookahead, batch, max_nodes):
                for way, found in scored.items():
                    found[state, path] = _decoded(target, batch, clean, way)
            for way, found in scored.items():
                parts[way].append(found)
        done += len(batch.rows) // group_size
        progress(done)

    truth, candidates = torch.cat(exact), []
    for way in ways:
        table = _joined(parts[way])
        for plan in _plans(target, table, truth, max_nodes, worst):
            if not plan.evaluations and (way.copy or way.cache):
                continue
            variant = replace(way, plan=plan)
            agreement = agreement_of(target, truth, assemble(table, plan, states_of(target)))
            forwards = cost_of(variant, target, group_size).lookahead.forwards
            candidates.append(Candidate(variant, forwards, flops_ratio(variant, target, group_size), agreement))
    return sorted(candidates, key=_order)


def cheapest(candidates: Sequence[Candidate], thresholds: Thresholds) -> Candidate | None:
    """The first candidate, in the order of `search`, that meets the thresholds."""
    return next((candidate for candidate in candidates if thresholds.met_by(candidate.agreement)), None)


def longest_path(target: FidelityTarget) -> int:
    """Most evaluations that a completion can take: one at every step that is left to the first state completed."""
    return max(0, target.coefficients.num_steps - 1 - min(states_of(target)))


def states_of(target: FidelityTarget) -> list[int]:
    """For each reward that a variant is measured by, the state whose completion it is that of; T is the image."""
    if target.branched:
        return [step + 1 for step, noisy in enumerate(target.coefficients.noisy) if noisy]
    return CompletionDedup(target.coefficients.noisy).representatives


def assemble(table: Scored, plan: Plan, states: Sequence[int]) -> Tensor:
    """Rewards [P, G, S] by a plan, from those of single paths.

    Args:
        table: [P, G] per state and path.
        plan: whose paths are in the table.
        states: of which S rewards are, as `states_of` has them.
    """
    return torch.stack([table[state, (*plan.paths, ())[state]] for state in states], dim=-1)


def _plans(target: FidelityTarget, table: Scored, truth: Tensor, max_nodes: int, worst: float) -> Iterator[Plan]:
    """The node sets, then the best paths; of those that complete the measured states alike only the first."""
    steps, columns = target.coefficients.num_steps, states_of(target)
    own = sorted({*columns} - {steps})
    exact = {state: truth[..., columns.index(state)] for state in columns}
    best = chain_of(table, exact, steps, gains=not target.branched)

    def single(paths: tuple[Path, ...]) -> Plan:
        chosen = dict(zip(own, paths, strict=False))
        return plans.own_paths(steps, [chosen.get(state, ()) for state in range(steps)])

    shared = (plans.nodes(steps, nodes) if nodes else plans.one_step(steps) for nodes in node_sets(steps, max_nodes))
    seen = set()
    # the paths with and without an eye on the worst step
    for plan in chain(shared, map(single, (*best.best(), *best.best(floor=worst)))):
        paths = tuple(plan.paths[state] for state in own)
        if paths not in seen:
            seen.add(paths)
            yield plan


def _completions(
    target: FidelityTarget, lookahead: Lookahead, batch: Batch, max_nodes: int
) -> Iterator[tuple[int, Path, Tensor]]:
    """Clean latents of every state along every path, and of the image as state T where a reward is measured there."""
    rollout = batch.rollout
    yield from completions(lookahead, rollout, max_nodes=max_nodes)
    last = rollout.coefficients.num_steps
    if last in states_of(target):
        yield last, (), rollout.state(last).latents


def _joined(parts: Sequence[Scored]) -> Scored:
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _order(candidate: Candidate) -> tuple[int | float, bool, float]:
    gains = candidate.agreement.spearman_gains_mean
    cost = candidate.forwards if candidate.iteration is None else candidate.iteration
    return cost, candidate.variant.decoder == "full", -gains if gains == gains else 0.0


def _decoded(target: FidelityTarget, batch: Batch, clean: Tensor, way: Variant) -> Tensor:
    """Rewards [P', G] of one clean latent per row."""
    model = decoding(target, way)
    images = torch.cat([model.decode(part, way.decoder) for part in clean.split(target.chunk)])
    return score(target, batch, images[None])[..., 0]
