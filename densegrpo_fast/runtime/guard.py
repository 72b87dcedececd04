"""The drift guard: while the policy moves, is the cheap lookahead still as good as it was?"""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Any

from densegrpo_fast.config import Config
from densegrpo_fast.credit import registry
from densegrpo_fast.fidelity.statistics import compare
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.runtime.experience import Outcome
from densegrpo_fast.runtime.scoring import score
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.trajectory import Trajectory

logger = logging.getLogger(__name__)


class DriftGuard:
    """Scores one prompt's trajectories again, exactly: every step, full guidance, full decoder.

    The prompts take turns. There is nothing to guard without a lookahead, nor with a credit method that a plan of its
    own defines.
    """

    def __init__(self, config: Config, model: FlowModel, reward: RewardMixture):
        self.config, self.model, self.reward = config, model, reward
        self.exact = Lookahead(model, plans.exact(config.sampler.num_steps), chunk=config.lookahead.chunk)

    def due(self, iteration: int) -> bool:
        """Whether an iteration (from 0) is looked at."""
        every = self.config.lookahead.guard_every
        method = registry.find(self.config.credit.method)
        return method.uses_lookahead and method.plan is None and every > 0 and iteration % every == 0

    def check(
        self,
        trajectory: Trajectory,
        rows: list[str],
        metadata: list[dict[str, Any]],
        outcome: Outcome,
        iteration: int,
    ) -> dict[str, float]:
        """In-group rank agreement with the exact lookahead, for the metrics; a warning where it is below the alarm.

        Returns:
            `guard/spearman_rewards`, `guard/spearman_gains` and `guard/sign_agreement`; NaN where all exact values of
            the group are equal.

        Raises:
            UserError: (reward) the reward failed.
        """
        assert outcome.lookahead_rewards is not None
        options, size = self.config.lookahead, self.config.sampler.group_size
        prompt = (iteration // options.guard_every) % (len(rows) // size)
        group = slice(prompt * size, (prompt + 1) * size)
        chosen, noisy = trajectory.select(group), trajectory.coefficients.noisy
        images = self.exact.different_images(self.exact.complete(chosen), noisy, "full")
        count = len(images)
        scores = score(self.reward, images.flatten(0, 1), rows[group] * count, metadata[group] * count)
        exact = scores.values.view(count, 1, size).permute(1, 2, 0)[..., self.exact.positions(noisy)]
        found = asdict(compare(exact, outcome.lookahead_rewards[prompt : prompt + 1].cpu()))
        if found["spearman_gains_mean"] < options.guard_alarm:
            logger.warning(
                "iteration %d: gains of %r agree with exact ones at a rank correlation of %.2f only; "
                "choose a plan with more nodes (python -m densegrpo_fast.fidelity --search --adapter ...)",
                iteration + 1,
                rows[group.start],
                found["spearman_gains_mean"],
            )
        return {
            "guard/spearman_rewards": found["spearman_rewards_mean"],
            "guard/spearman_gains": found["spearman_gains_mean"],
            "guard/sign_agreement": found["sign_agreement"],
        }
