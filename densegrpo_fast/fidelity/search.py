"""The cheapest plan whose rewards agree with the exact ones: chosen on some groups, to be compared on others.

Every state is completed along every path of few evaluations once (`completions`): paths that begin alike share theirs,
so any node set, which all states share, is a choice among them at no further evaluation. So is a path for each state,
of which `Chain` finds the best ones for every number of evaluations. Plans of more evaluations compete where they are
named, such as those of `ladder`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, combinations, pairwise

import torch
from torch import Tensor

from densegrpo_fast.fidelity.measure import (
    Batch,
    agreement_of,
    batches,
    cost_of,
    decoding,
    flops_ratio,
    lookahead_of,
    rewards_of,
    score,
    without_decoder,
)
from densegrpo_fast.fidelity.target import FidelityTarget
from densegrpo_fast.fidelity.variants import Variant, reference
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.dedup import CompletionDedup
from densegrpo_fast.sampling.lookahead import CompletionState, Lookahead
from densegrpo_fast.sampling.plan import Plan
from densegrpo_fast.sampling.rollout import Rollout
from densegrpo_fast.training.agreement import Agreement, spearman

Path = tuple[int, ...]
"""Increasing grid indices at which a completion evaluates the model."""

Scored = Mapping[tuple[int, Path], Tensor]
"""Rewards [P, G] of the completions of one state along one path; the image is state T, with the path ()."""


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
        iteration: operations of the iteration over those of the sparse one; None where they are not known.
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
    named: Sequence[Plan] = (),
    worst: float = -1.0,
    observe: Callable[[Batch, Tensor], object] = lambda batch, exact: None,
    progress: Callable[[int], object] = lambda done: None,
) -> list[Candidate]:
    """Compare every set of at most `max_nodes` nodes, the best paths of so many evaluations for each state, and others.

    Args:
        target: what is measured.
        groups: indices of the prompts to search on.
        ways: how to complete and decode, every plan in each of them; their own plans have no part in it.
        max_nodes: evaluations of the longest path.
        group_size: G.
        seed: of all noise.
        named: further plans, however many evaluations they take.
        worst: what the gains' correlation should reach in every step, which the paths are chosen for too.
        observe: is shown every batch, and its exact rewards as `measure` returns them.
        progress: is told how many groups are done.

    Returns:
        All candidates, cheapest first, by operations of the iteration where they are known and else by forwards; of
        equal cost the preview decoder before the full one, and the better agreement of the gains first. Of plans that
        complete alike the first is kept, and one that evaluates nothing once for each decoder, without copy and cache.
    """
    exactly = reference(target.coefficients.num_steps)
    ways = list(dict.fromkeys(replace(way, plan=exactly.plan) for way in ways))
    parts: dict[Variant, list[Scored]] = {way: [] for way in ways}
    # the others are among the paths
    longer = [plan for plan in named if any(len(plan.paths[s]) > max_nodes for s in completed_states(target))]
    measured = dict.fromkeys([exactly, *(replace(way, plan=plan) for way in ways for plan in longer)])
    whole: dict[Variant, list[Tensor]] = {variant: [] for variant in measured}
    done = 0
    for batch in batches(target, groups, group_size=group_size, seed=seed):
        for variant, rewards in rewards_of(target, [*measured], batch):
            whole[variant].append(rewards)
        observe(batch, whole[exactly][-1])
        for completing in dict.fromkeys(map(without_decoder, ways)):
            scored: dict[Variant, dict[tuple[int, Path], Tensor]] = {
                way: {} for way in ways if without_decoder(way) == completing
            }
            lookahead = lookahead_of(target, completing, batch)
            for state, path, clean in completions(lookahead, batch.rollout, max_nodes=max_nodes):
                for way, by_path in scored.items():
                    by_path[state, path] = _decoded(target, batch, clean, way)
            for way, by_path in scored.items():
                parts[way].append(by_path)
        done += len(batch.rows) // group_size
        progress(done)

    truth, candidates = torch.cat(whole[exactly]), dict[Variant, Candidate]()
    for way in ways:
        table = _joined(parts[way])
        found = {
            plan: assemble(table, plan, states_of(target))
            for plan in _plans(target, table, truth, max_nodes, worst, [plan for plan in named if plan not in longer])
        }
        found |= {plan: torch.cat(whole[replace(way, plan=plan)]) for plan in longer}
        for plan, cheap in found.items():
            variant = replace(way, plan=plan)
            if not plan.evaluations:
                # all ways that decode alike are the same
                variant = replace(variant, guidance=ways[0].guidance, copy=None, cache=None)
            if variant in candidates:
                continue
            agreement = agreement_of(target, truth, cheap)
            forwards = cost_of(variant, target, group_size).lookahead.forwards
            candidates[variant] = Candidate(variant, forwards, flops_ratio(variant, target, group_size), agreement)
    return sorted(candidates.values(), key=_order)


def cheapest(candidates: Sequence[Candidate], thresholds: Thresholds) -> Candidate | None:
    """The first candidate, in the order of `search`, that meets the thresholds."""
    return next((candidate for candidate in candidates if thresholds.met_by(candidate.agreement)), None)


def ladder(target: FidelityTarget) -> list[Plan]:
    """Plans from exact on down: all steps but the last, three quarters, half and a quarter of these, evenly spread over
    what lies ahead of the first completed state, and no step. Of those that complete alike the first."""
    steps, states = target.coefficients.num_steps, completed_states(target)
    first = min(states, default=steps)
    ahead = max(0, steps - 2 - first)
    candidates = [plans.exact(steps), plans.exact_but_last(steps)]
    for count in (ahead * share // 4 for share in (3, 2, 1)):
        if count:
            candidates.append(plans.nodes(steps, [first + round(i * ahead / count) for i in range(1, count + 1)]))
    candidates.append(plans.one_step(steps))
    different: dict[tuple[Path, ...], Plan] = {}
    for plan in candidates:
        different.setdefault(tuple(plan.paths[state] for state in states), plan)
    return list(different.values())


def completed_states(target: FidelityTarget) -> list[int]:
    """The states with a completion of their own that steps are left to, increasing."""
    return sorted({*states_of(target)} - {target.coefficients.num_steps})


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


@torch.no_grad()
def completions(lookahead: Lookahead, rollout: Rollout, *, max_nodes: int) -> Iterator[tuple[int, Path, Tensor]]:
    """Complete every state along every path: a tree, whose root is the state with the rollout's velocity.

    Args:
        lookahead: completes them, in every way but its own plan.
        rollout: what is completed; states that a noise-free step joins to the next are left out, as their completions
            are that one's.
        max_nodes: evaluations of the longest path, at least 0.

    Yields:
        (state, path, clean latents [B, ...] float32), one evaluation each, except for the empty paths, of B rows or of
        those among them with a completion of their own; last the image as state T, where it is one of the states.
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
    if steps in dedup.states:
        yield steps, (), rollout.state(steps).latents


def node_sets(num_steps: int, max_nodes: int) -> list[Path]:
    """All sets of at most `max_nodes` grid indices in 1..T-1, the empty one first."""
    return [path for size in range(max_nodes + 1) for path in combinations(range(1, num_steps), size)]


def path_after(nodes: Path, state: int) -> Path:
    """The part of a node set that lies ahead of a state."""
    return tuple(step_index for step_index in nodes if step_index > state)


@dataclass(frozen=True)
class Chain:
    """States whose completions are to be chosen, and how well every choice agrees with the exact rewards.

    Agreement is a sum over states and steps: the rewards of a state depend on its own path, the gains of a step on the
    paths of the two states that it joins. So states form a chain, and the greatest sum for every number of evaluations
    is found exactly without trying all combinations (Viterbi's algorithm, with the evaluations so far as part of the
    state).

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
        best: list[tuple[Path, ...]] = []
        highest = -torch.inf
        for evaluations, column in enumerate(sums.T):
            value, last = column.max(0)
            if value > highest + 1e-9:
                highest = float(value)
                best.append(self._traced(origins, lengths, int(last), evaluations))
        return best

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
    order = sorted({num_steps, *(state for state, _ in table)})
    choices = {state: tuple(path for at, path in table if at == state) or ((),) for state in order}
    completed = {s: torch.stack([table[s, path] for path in choices[s]]) for s in order if (s, choices[s][0]) in table}
    states = {state: torch.zeros(len(choices[state]), dtype=torch.float64) for state in order}
    steps = []
    for state, onward in pairwise(order):
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


def _plans(
    target: FidelityTarget, table: Scored, truth: Tensor, max_nodes: int, worst: float, named: Sequence[Plan]
) -> Iterator[Plan]:
    """The named plans, the node sets, then the best paths; of those that complete the measured states alike only the
    first."""
    steps, columns, states = target.coefficients.num_steps, states_of(target), completed_states(target)
    exact = {state: truth[..., columns.index(state)] for state in columns}
    best = chain_of(table, exact, steps, gains=not target.branched)

    def single(paths: tuple[Path, ...]) -> Plan:
        chosen = dict(zip(states, paths, strict=False))
        return plans.own_paths(steps, [chosen.get(state, ()) for state in range(steps)])

    shared = (plans.nodes(steps, nodes) if nodes else plans.one_step(steps) for nodes in node_sets(steps, max_nodes))
    seen = set()
    # the paths with and without an eye on the worst step
    for plan in chain(named, shared, map(single, (*best.best(), *best.best(floor=worst)))):
        paths = tuple(plan.paths[state] for state in states)
        if paths not in seen:
            seen.add(paths)
            yield plan


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


def _agreement(exact: Tensor, cheap: Tensor) -> Tensor:
    """[A] float64 mean over groups of the correlation of [P, G] with each of [A, P, G]; 0 where there is none."""
    return spearman(exact.expand_as(cheap), cheap).nanmean(-1).nan_to_num(0.0)


def _moved(values: Tensor, count: Tensor, budget: int) -> Tensor:
    """[A, E] of values [A, e], each row later by its `count` of evaluations; -inf where it has none."""
    moved = values.new_full((len(values), budget), -torch.inf)
    for row, later in enumerate(count.tolist()):
        fitting = values[row, : budget - later]
        moved[row, later : later + len(fitting)] = fitting
    return moved
