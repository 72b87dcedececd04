"""The lookahead monitor: while the policy moves, is the cheap lookahead still as good as it was?"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.config import Config
from densegrpo_fast.credit import registry
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.completion_head import CompletionHead
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.branches import BranchedRollout, Sampled
from densegrpo_fast.sampling.dedup import CompletionDedup
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.monitor_cost import MonitorCost, branched_monitor_check, monitor_check
from densegrpo_fast.sampling.trajectory import Trajectory
from densegrpo_fast.training.agreement import Agreement, compare, compare_branches
from densegrpo_fast.training.chunks import lookahead_chunks
from densegrpo_fast.training.costs import CostLog
from densegrpo_fast.training.experience import RewardBatch
from densegrpo_fast.training.head_examples import Examples, exactly_completed, examples_of, showing
from densegrpo_fast.training.head_training import HeadRefresher
from densegrpo_fast.training.oom_backoff import OomBackoff


class LookaheadMonitor:
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
        self.forwards = OomBackoff(chunks.forward, "lookahead.chunk, of the lookahead monitor")
        self.decodes = OomBackoff(chunks.decode, "lookahead.chunk, of the lookahead monitor's decodes")

    def due(self, iteration: int) -> bool:
        """Whether an iteration (from 0) is looked at."""
        every = self.config.lookahead.monitor_every
        method = registry.find(self.config.credit.method)
        completes = method.uses_lookahead or method.uses_branches
        return completes and method.plan is None and every > 0 and iteration % every == 0

    def check(
        self,
        trajectory: Sampled,
        rows: list[str],
        metadata: list[dict[str, Any]],
        outcome: RewardBatch,
        iteration: int,
        costs: CostLog,
    ) -> dict[str, float]:
        """In-group rank agreement with the exact lookahead, for the metrics (and the alarm `lookahead_drift`).

        Args:
            trajectory, rows, metadata, outcome: the iteration's.
            iteration: from 0.
            costs: is told what the check asked for.

        Returns:
            `monitor/spearman_rewards`, `monitor/spearman_gains`, `monitor/spearman_gains_worst_step` and
            `monitor/sign_agreement`, NaN where all exact values of the group are equal; and with a head that learns,
            `monitor/head_explained` (what it was worth before it learnt: see `HeadRefresher.refresh`) and
            `monitor/head_rows` (that it learnt from, forward and backward).

        Raises:
            RewardError: the reward failed.
        """
        size = self.config.sampler.group_size
        prompt = (iteration // self.config.lookahead.monitor_every) % (len(rows) // size)
        group = slice(prompt * size, (prompt + 1) * size)
        about = rows[group], metadata[group]
        if isinstance(trajectory, BranchedRollout):
            trunks = size // trajectory.branches
            chosen: Sampled = trajectory.select(slice(prompt * trunks, (prompt + 1) * trunks))
        else:
            chosen = trajectory.select(group)
        line, clean = self._completed(chosen)
        if isinstance(chosen, BranchedRollout):
            found, cost = self._branches(chosen, clean, *about, outcome, prompt)
        else:
            found, cost = self._trajectories(chosen, clean, *about, outcome, prompt)
        learned: dict[str, float] = {}
        if self.lookahead is not None and self.refresher is not None:
            learned = self._refresh(self.lookahead, self.refresher, line, clean, group.start, iteration)
            cheap = showing(self.exact, self.lookahead, chosen)
            cost = replace(cost, cheap=cheap, head_rows=learned.get("monitor/head_rows", 0) / size)
        costs.monitor(cost, size)
        return learned | {
            "monitor/spearman_rewards": found.spearman_rewards_mean,
            "monitor/spearman_gains": found.spearman_gains_mean,
            "monitor/spearman_gains_worst_step": found.spearman_gains_worst_step,
            "monitor/sign_agreement": found.sign_agreement,
        }

    def _completed(self, chosen: Sampled) -> tuple[Trajectory, Tensor]:
        """What a head that learns is shown, and the exact completions [T+1, B, ...] of its states."""
        shown = self.exact if self.lookahead is None or self.refresher is None else self.lookahead

        def completed(chunk: int) -> tuple[Trajectory, Tensor]:
            self.exact.chunk = chunk
            return exactly_completed(self.exact, shown, chosen)

        return self.forwards.fitting(completed)

    def _trajectories(
        self,
        chosen: Trajectory,
        clean: Tensor,
        rows: list[str],
        metadata: list[dict[str, Any]],
        outcome: RewardBatch,
        prompt: int,
    ) -> tuple[Agreement, MonitorCost]:
        """Agreement on a prompt's chosen trajectories, and its cost for each."""
        assert outcome.lookahead_rewards is not None
        noisy = chosen.coefficients.noisy
        different = CompletionDedup(noisy).different(clean)
        exact = self._rewards(different, rows, metadata)[..., CompletionDedup(noisy).positions]
        cost = monitor_check(
            self.exact.plan_for(chosen.num_steps),
            guided=self.model.forwards(chosen.guidance_scale) > 1,
            noisy=noisy,
            shared=chosen.shared,
        )
        return compare(exact, outcome.lookahead_rewards[prompt : prompt + 1].cpu(), noisy), cost

    def _branches(
        self,
        chosen: BranchedRollout,
        clean: Tensor,
        rows: list[str],
        metadata: list[dict[str, Any]],
        outcome: RewardBatch,
        prompt: int,
    ) -> tuple[Agreement, MonitorCost]:
        """The same of a prompt's branches."""
        assert outcome.branch_rewards is not None
        own = outcome.branch_rewards[prompt].cpu()  # [N, C, K]
        led_to = torch.stack([clean[step + 1] for step in chosen.steps])
        exact = self._rewards(led_to.flatten(0, 1), rows, metadata).view_as(own)
        noisy = chosen.coefficients.noisy
        cost = branched_monitor_check(
            self.exact.plan_for(len(noisy)),
            branches=chosen.branches,
            guided=self.model.forwards(chosen.guidance_scale) > 1,
            noisy=noisy,
        )
        return compare_branches(exact, own, noisy), cost

    def _rewards(self, clean: Tensor, rows: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        """Rewards [1, G, S] of clean latents [S*G, ...], S for each of a group's rows, by the full decoder."""
        decoded = self.decodes.each(slice(0, len(clean)), lambda part: self.model.decode(clean[part], "full"))
        count = len(clean) // len(rows)
        scores = self.reward(torch.cat(list(decoded)), rows * count, metadata * count)
        return scores.values.view(count, 1, len(rows)).permute(1, 2, 0)

    def _refresh(
        self,
        lookahead: Lookahead,
        refresher: HeadRefresher,
        line: Trajectory,
        clean: Tensor,
        first: int,
        iteration: int,
    ) -> dict[str, float]:
        """Let the head learn; what is logged of it."""
        parts = examples_of(lookahead, refresher.head, line, clean, first)
        if not parts:
            return {}
        explained, rows = refresher.refresh(Examples.joined(parts), iteration)
        return {"monitor/head_explained": explained, "monitor/head_rows": rows}
