"""The drift guard: while the policy moves, is the cheap lookahead still as good as it was?"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.config import Config
from densegrpo_fast.credit import registry
from densegrpo_fast.fidelity.statistics import Agreement, compare, compare_branches
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.completion_head import CompletionHead
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.runtime.chunks import lookahead_chunks
from densegrpo_fast.runtime.costs import CostLog
from densegrpo_fast.runtime.experience import Outcome, complete_in
from densegrpo_fast.runtime.head_training import Examples, HeadRefresher, examples_of
from densegrpo_fast.runtime.row_budget import RowBudget
from densegrpo_fast.runtime.scoring import score
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.cost import Evaluations, lookahead_evaluations
from densegrpo_fast.sampling.guard_cost import GuardCost, branched_guard_check, guard_check
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.sharing import Sharing
from densegrpo_fast.sampling.trajectory import Trajectory
from densegrpo_fast.sampling.tree import Sampled, Tree


class DriftGuard:
    """Scores one prompt's trajectories, or branches, again, exactly: every step, full guidance, full decoder.

    The prompts take turns. There is nothing to guard without a lookahead, nor with a credit method that a plan of its
    own defines. The exact completions also show the lookahead's completion head what the policy does by then, which it
    learns from if `lookahead.head_refresh` says so.

    Args:
        config: the run's.
        model: the policy.
        reward: that it is trained with.
        lookahead: what is guarded.

    Attributes:
        refresher: trains the completion head; None without one, or if it stays as it is.
    """

    def __init__(self, config: Config, model: FlowModel, reward: RewardMixture, lookahead: Lookahead | None):
        self.config, self.model, self.reward, self.lookahead = config, model, reward, lookahead
        head, steps = None if lookahead is None else lookahead.head, config.lookahead.head_refresh
        self.refresher = HeadRefresher(head, steps, config.seed) if steps and isinstance(head, CompletionHead) else None
        exact = plans.exact(config.sampler.num_steps)
        chunks = lookahead_chunks(config, model, "full")
        self.exact = Lookahead(model, exact, chunk=chunks.forward, replan=plans.exact)
        self.forwards = RowBudget(chunks.forward, "lookahead.chunk, of the drift guard")
        self.decodes = RowBudget(chunks.decode, "lookahead.chunk, of the drift guard's decodes")

    def due(self, iteration: int) -> bool:
        """Whether an iteration (from 0) is looked at."""
        every = self.config.lookahead.guard_every
        method = registry.find(self.config.credit.method)
        completes = method.uses_lookahead or method.uses_branches
        return completes and method.plan is None and every > 0 and iteration % every == 0

    def check(
        self,
        trajectory: Sampled,
        rows: list[str],
        metadata: list[dict[str, Any]],
        outcome: Outcome,
        iteration: int,
        costs: CostLog,
    ) -> dict[str, float]:
        """In-group rank agreement with the exact lookahead, for the metrics (and the alarm `lookahead_drift`).

        Args:
            trajectory, rows, metadata, outcome: the iteration's.
            iteration: from 0.
            costs: is told what the check asked for.

        Returns:
            `guard/spearman_rewards`, `guard/spearman_gains`, `guard/spearman_gains_worst_step` and
            `guard/sign_agreement`, NaN where all exact values of the group are equal; and with a head that learns,
            `guard/head_explained` (what it was worth before it learnt: see `HeadRefresher.refresh`) and
            `guard/head_rows` (that it learnt from, forward and backward).

        Raises:
            UserError: (reward) the reward failed.
        """
        size = self.config.sampler.group_size
        prompt = (iteration // self.config.lookahead.guard_every) % (len(rows) // size)
        group = slice(prompt * size, (prompt + 1) * size)
        about = rows[group], metadata[group]
        if isinstance(trajectory, Tree):
            found, cost = self._branches(trajectory, *about, outcome, prompt)
            learned: dict[str, float] = {}
        else:
            found, cost, learned = self._trajectories(trajectory.select(group), *about, outcome, prompt, iteration)
        costs.guard(cost, size)
        return learned | {
            "guard/spearman_rewards": found.spearman_rewards_mean,
            "guard/spearman_gains": found.spearman_gains_mean,
            "guard/spearman_gains_worst_step": found.spearman_gains_worst_step,
            "guard/sign_agreement": found.sign_agreement,
        }

    def _trajectories(
        self,
        chosen: Trajectory,
        rows: list[str],
        metadata: list[dict[str, Any]],
        outcome: Outcome,
        prompt: int,
        iteration: int,
    ) -> tuple[Agreement, GuardCost, dict[str, float]]:
        """Agreement on a prompt's chosen trajectories, its cost for each, and what else is logged."""
        assert outcome.lookahead_rewards is not None
        size, noisy = len(rows), chosen.coefficients.noisy
        clean = self.forwards.fitting(partial(complete_in, self.exact, chosen))
        different = Sharing(noisy).different(clean)
        exact = self._rewards(different, rows, metadata)[..., Sharing(noisy).positions]
        found = compare(exact, outcome.lookahead_rewards[prompt : prompt + 1].cpu(), noisy)
        cost = guard_check(
            self.exact.plan_for(chosen.num_steps),
            guided=self.model.forwards(chosen.guidance_scale) > 1,
            noisy=noisy,
            shared=chosen.shared,
        )
        learned: dict[str, float] = {}
        if self.lookahead is not None and self.refresher is not None:
            learned, own = self._refresh(self.lookahead, self.refresher, chosen, clean, prompt * size, iteration)
            cost = replace(cost, cheap=own, head_rows=learned.get("guard/head_rows", 0) / size)
        return found, cost, learned

    def _branches(
        self, tree: Tree, rows: list[str], metadata: list[dict[str, Any]], outcome: Outcome, prompt: int
    ) -> tuple[Agreement, GuardCost]:
        """The same of a prompt's branches; a completion head, which is for trajectories, has no part in it."""
        assert outcome.branch_rewards is not None
        own = outcome.branch_rewards[prompt].cpu()  # [N, C, K]
        chosen = tree.select(slice(prompt * len(own), (prompt + 1) * len(own)))

        def completions(chunk: int) -> Tensor:
            self.exact.chunk = chunk
            return chosen.completions(self.exact)

        exact = self._rewards(self.forwards.fitting(completions).flatten(0, 1), rows, metadata).view_as(own)
        noisy = tree.coefficients.noisy
        cost = branched_guard_check(
            self.exact.plan_for(len(noisy)),
            branches=tree.branches,
            guided=self.model.forwards(tree.guidance_scale) > 1,
            noisy=noisy,
        )
        return compare_branches(exact, own, noisy), cost

    def _rewards(self, clean: Tensor, rows: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Rewards [1, G, S] of clean latents [S*G, ...], S for each of a group's rows, by the full decoder."""
        decoded = self.decodes.each(slice(0, len(clean)), lambda part: self.model.decode(clean[part], "full"))
        count = len(clean) // len(rows)
        scores = score(self.reward, torch.cat(list(decoded)), rows * count, metadata * count)
        return scores.values.view(count, 1, len(rows)).permute(1, 2, 0)

    def _refresh(
        self,
        lookahead: Lookahead,
        refresher: HeadRefresher,
        chosen: Trajectory,
        clean: Tensor,
        first: int,
        iteration: int,
    ) -> tuple[dict[str, float], Evaluations]:
        """Let the head learn; what is logged of it, and the evaluations per trajectory that showed it the examples."""
        parts = examples_of(lookahead, refresher.head, chosen, clean, first)
        used = lookahead_evaluations(
            lookahead.plan_for(chosen.num_steps),
            guided=self.model.forwards(chosen.guidance_scale) > 1,
            guidance=lookahead.guidance,
            noisy=chosen.coefficients.noisy,
            shared=lookahead.sharing(chosen).group,
        )
        if not parts:
            return {}, used
        examples = Examples.joined(parts)
        before = refresher.refresh(examples, iteration)
        return {"guard/head_explained": before, "guard/head_rows": refresher.rows(len(examples))}, used
