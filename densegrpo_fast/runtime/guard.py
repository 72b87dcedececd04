"""The drift guard: while the policy moves, is the cheap lookahead still as good as it was?"""

from __future__ import annotations

import logging
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.config import Config
from densegrpo_fast.credit import registry
from densegrpo_fast.fidelity.statistics import compare
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.completion_head import CompletionHead
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.runtime.chunks import lookahead_chunks
from densegrpo_fast.runtime.experience import Outcome, complete_in
from densegrpo_fast.runtime.head_training import Examples, HeadRefresher, examples_of
from densegrpo_fast.runtime.row_budget import RowBudget
from densegrpo_fast.runtime.scoring import score
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.cost import Evaluations, guard_check, lookahead_evaluations
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.sharing import Sharing
from densegrpo_fast.sampling.trajectory import Trajectory
from densegrpo_fast.sampling.tree import Sampled

logger = logging.getLogger(__name__)


class DriftGuard:
    """Scores one prompt's trajectories again, exactly: every step, full guidance, full decoder.

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
        return method.uses_lookahead and method.plan is None and every > 0 and iteration % every == 0

    def check(
        self,
        trajectory: Sampled,
        rows: list[str],
        metadata: list[dict[str, Any]],
        outcome: Outcome,
        iteration: int,
    ) -> dict[str, float]:
        """In-group rank agreement with the exact lookahead, for the metrics; a warning where it is below the alarm.

        Returns:
            `guard/spearman_rewards`, `guard/spearman_gains`, `guard/spearman_gains_worst_step` and
            `guard/sign_agreement`, NaN where all exact values of the group are equal; `nfe/guard`; and with a head that
            learns, `guard/head_explained` (what it was worth before it learnt: see `HeadRefresher.refresh`) and
            `guard/head_rows` (that it learnt from, forward and backward).

        Raises:
            UserError: (reward) the reward failed.
        """
        assert outcome.lookahead_rewards is not None and isinstance(trajectory, Trajectory)
        options, size = self.config.lookahead, self.config.sampler.group_size
        prompt = (iteration // options.guard_every) % (len(rows) // size)
        group = slice(prompt * size, (prompt + 1) * size)
        chosen, noisy = trajectory.select(group), trajectory.coefficients.noisy
        clean = self.forwards.fitting(partial(complete_in, self.exact, chosen))
        different = Sharing(noisy).different(clean)
        decoded = self.decodes.each(slice(0, len(different)), lambda part: self.model.decode(different[part], "full"))
        count = len(different) // size
        scores = score(self.reward, torch.cat(list(decoded)), rows[group] * count, metadata[group] * count)
        exact = scores.values.view(count, 1, size).permute(1, 2, 0)[..., Sharing(noisy).positions]
        found = asdict(compare(exact, outcome.lookahead_rewards[prompt : prompt + 1].cpu()))
        if found["spearman_gains_mean"] < options.guard_alarm:
            logger.warning(
                "iteration %d: gains of %r agree with exact ones at a rank correlation of %.2f only; "
                "choose a plan with more nodes (python -m densegrpo_fast.fidelity --search --adapter ...)",
                iteration + 1,
                rows[group.start],
                found["spearman_gains_mean"],
            )
        record = {
            "guard/spearman_rewards": found["spearman_rewards_mean"],
            "guard/spearman_gains": found["spearman_gains_mean"],
            "guard/spearman_gains_worst_step": found["spearman_gains_worst_step"],
            "guard/sign_agreement": found["sign_agreement"],
        }
        cost = guard_check(
            self.exact.plan_for(chosen.num_steps),
            guided=chosen.guidance_scale != 1.0,
            noisy=noisy,
            shared=chosen.shared,
        )
        if self.lookahead is not None and self.refresher is not None:
            learned, own = self._refresh(self.lookahead, self.refresher, chosen, clean, group.start, iteration)
            record, cost = record | learned, replace(cost, cheap=own)
        return record | {"nfe/guard": cost.forwards * size}

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
            guided=chosen.guidance_scale != 1.0,
            guidance=lookahead.guidance,
            noisy=chosen.coefficients.noisy,
            shared=lookahead.sharing(chosen).group,
        )
        if not parts:
            return {}, used
        examples = Examples.joined(parts)
        before = refresher.refresh(examples, iteration)
        return {"guard/head_explained": before, "guard/head_rows": refresher.rows(len(examples))}, used
