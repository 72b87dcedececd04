"""The lookahead monitor: while the policy moves, is the cheap lookahead still as good as it was?"""

from __future__ import annotations

from densegrpo_fast.config import Config
from densegrpo_fast.credit import registry
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.oom_backoff import OomBackoff
from densegrpo_fast.sampling.rollout import Rollout
from densegrpo_fast.training.agreement import compare, compare_branches
from densegrpo_fast.training.lookahead import lookahead_chunks
from densegrpo_fast.training.prompts import PromptBatch
from densegrpo_fast.training.rewarding import RewardBatch, RewardComputer


class LookaheadMonitor:
    """Scores one prompt's samples again, exactly: every step, full guidance, full decoder.

    The prompts take turns. There is nothing to monitor without a lookahead, nor with a credit method that a plan of its
    own defines.

    Args:
        config: the run's.
        model: the policy.
        rewards: decodes and scores.
    """

    def __init__(self, config: Config, model: FlowModel, rewards: RewardComputer):
        self.options, self.rewards = config.lookahead, rewards
        method = registry.find(config.credit.method)
        self.applies = (method.uses_lookahead or method.uses_branches) and method.plan is None
        chunk = lookahead_chunks(config, model, "full").forward
        exact = plans.exact(config.sampler.num_steps)
        rows = OomBackoff(chunk, "lookahead.chunk, of the lookahead monitor")
        self.exact = Lookahead(model, exact, chunk=rows, replan=plans.exact)

    def due(self, iteration: int) -> bool:
        """Whether an iteration (from 0) is looked at."""
        every = self.options.monitor_every
        return self.applies and every > 0 and iteration % every == 0

    def check(self, rollout: Rollout, rewards: RewardBatch, batch: PromptBatch, iteration: int) -> dict[str, float]:
        """In-group rank agreement with the exact lookahead, for the metrics (and the alarm `lookahead_drift`).

        Args:
            rollout, rewards, batch: the iteration's.
            iteration: from 0.

        Returns:
            `monitor/spearman_rewards`, `monitor/spearman_gains`, `monitor/spearman_gains_worst_step` and
            `monitor/sign_agreement`, NaN where all exact values of the group are equal.

        Raises:
            RewardError: the reward failed.
        """
        size = batch.group_size
        prompt = (iteration // self.options.monitor_every) % (len(batch.prompts) // size)
        branches, noisy = rollout.branches, rollout.coefficients.noisy
        states, share = size // branches, self.rewards.share
        rows, share = share.within(slice(prompt * states, (prompt + 1) * states))
        group = rollout.select(rows)
        clean = self.exact.rows.fitting(lambda _: self.exact.complete(group))
        dedup = group.dedup(own=True)
        values = self.rewards.rewards_of(dedup.different(clean), batch.select(share.samples(branches)))
        exact = group.group_rewards(share.gather(values, dim=1, branches=branches), size)
        if exact.branches is not None and rewards.branch_rewards is not None:
            own = rewards.branch_rewards[prompt, ..., -1].cpu()
            agreement = compare_branches(exact.branches[0, ..., 0], own, noisy)
        else:
            assert exact.states is not None and rewards.lookahead_rewards is not None
            agreement = compare(exact.states, rewards.lookahead_rewards[prompt : prompt + 1].cpu(), noisy)
        return {
            "monitor/spearman_rewards": agreement.spearman_rewards_mean,
            "monitor/spearman_gains": agreement.spearman_gains_mean,
            "monitor/spearman_gains_worst_step": agreement.spearman_gains_worst_step,
            "monitor/sign_agreement": agreement.sign_agreement,
        }
