"""What making a completion head takes, exactly counted: rollouts, completions and the head's own rows."""

from __future__ import annotations

from time import perf_counter

from densegrpo_fast.config import Config
from densegrpo_fast.models.completion_head import HeadCost
from densegrpo_fast.sampling.branches import BranchedRollout, Sampled
from densegrpo_fast.sampling.cost import IterationCost, branched_iteration, dense_iteration
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.training.costs import CostLog
from densegrpo_fast.training.head_examples import showing

_TFLOP = 1e12


class HeadCounter:
    """Adds up what is drawn to make a head; the clock runs from the start on.

    Args:
        config: the run's.
        exact: the exact lookahead, which evaluates the policy.
        lookahead: that the head is for, and has.
    """

    def __init__(self, config: Config, exact: Lookahead, lookahead: Lookahead):
        self.config, self.exact, self.lookahead = config, exact, lookahead
        self.start, self._policy, self._cheap = perf_counter(), 0.0, 0.0

    def add(self, drawn: Sampled) -> None:
        """Add the rollout of samples, their exact completions, and the evaluations that show the head what it sees."""
        samples = drawn.batch * drawn.branches
        cost = self._exactly(drawn)
        self._policy += samples * (cost.rollout + cost.lookahead).forwards
        self._cheap += samples * showing(self.exact, self.lookahead, drawn).forwards

    def total(self, learned: int, judged: int) -> HeadCost:
        """All of it.

        Args:
            learned: rows that the head has learnt from, forward and backward.
            judged: rows that it was judged by.
        """
        prices, tflop = CostLog(self.config, self.exact.model, self.lookahead).prices, None
        if prices is not None:
            # a backward through the head costs two forwards
            head = (3 * learned + judged) * prices.unit.head
            tflop = (self._policy * prices.unit.forward + self._cheap * prices.lookahead + head) / _TFLOP
        forwards = round(self._policy + self._cheap)
        return HeadCost(forwards, 0, learned + judged, tflop, perf_counter() - self.start)

    def _exactly(self, drawn: Sampled) -> IterationCost:
        """Rollout and exact completions, per sample."""
        noisy = drawn.coefficients.noisy
        plan, guided = self.exact.plan_for(len(noisy)), self.exact.model.forwards(drawn.guidance_scale) > 1
        if isinstance(drawn, BranchedRollout):
            return branched_iteration(
                plan, branches=drawn.branches, trained_steps=0, guided=guided, kl=False, noisy=noisy
            )
        return dense_iteration(plan, trained_steps=0, guided=guided, kl=False, noisy=noisy, shared=drawn.shared)
