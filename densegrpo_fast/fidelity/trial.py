"""A short measurement on a run's own model: which lookaheads keep the order of its rewards, and how its gradients vary.

The model with its fresh adapter samples the first training prompts, with the run's sampler, reward and seed. The first
groups tell which ways to complete (guidance, decoder) are worth a closer look, the others compare plans in these, from
all steps on down. The gradients of the same groups' steps tell what it costs to draw some of the steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.config import Config
from densegrpo_fast.fidelity.measure import Batch, agreement_of, cost_of
from densegrpo_fast.fidelity.search import Candidate, Thresholds, ladder, search
from densegrpo_fast.fidelity.target import FidelityTarget, pipeline_target
from densegrpo_fast.fidelity.variance import step_gradients
from densegrpo_fast.fidelity.variants import Variant, reference
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.objective.policy import Objective
from densegrpo_fast.rewards.base import Scores
from densegrpo_fast.sampling.cost import Evaluations, sparse_iteration
from densegrpo_fast.sampling.lookahead import Guidance
from densegrpo_fast.sampling.oom_backoff import OomBackoff
from densegrpo_fast.sampling.plan import Plan
from densegrpo_fast.training.memory import free_bytes, readable
from densegrpo_fast.training.models import build_model, default_device
from densegrpo_fast.training.prompts import PromptSet
from densegrpo_fast.training.rewarding import RewardBatch
from densegrpo_fast.training.trainer import Trainer

FEWEST, MOST = 8, 16
"""Groups: as many as cost at most `ITERATIONS`, but at least the fewest."""
ITERATIONS = 10.0
"""Operations of a trial, in the run's iterations with one reward per picture."""
_FAR = 0.1
"""A way whose longest plans miss a threshold by more in the first groups is not looked at any further."""


@dataclass(frozen=True)
class Row:
    """A candidate, and of how many groups its figures are."""

    candidate: Candidate
    groups: int

    def reaches(self, thresholds: Thresholds) -> bool:
        """Whether its mean correlations are above the thresholds by at least a standard error, which few groups have
        much of."""
        found = self.candidate.agreement
        rewards = found.spearman_rewards_mean - found.spearman_rewards_error
        gains = found.spearman_gains_mean - found.spearman_gains_error
        return thresholds.met_by(replace(found, spearman_rewards_mean=rewards, spearman_gains_mean=gains))


class Trial:
    """What is measured, and on what.

    Attributes:
        model: the policy, with its adapter.
        target: what is measured on: the model, the first training prompts, the reward.
        reference: exact completions, which every candidate is compared with and which is one itself.
        promising: the ways that were looked at beyond the first groups.
        steps: the K steps that the run may train, of which some may be drawn.
        products: [K, K] float64, mean inner products of these steps' gradients within a group.
        groups: how many are measured, each of `size` samples.
        notes: for people, what was left out and why.

    Args:
        config: the run's, with exact completions, all steps trained, and updates replayed.
        tiny: whether a model that is not in the package is replaced by a tiny random one, as in a dry run.
        groups: at least 2; None = from `FEWEST` to `MOST`, as `ITERATIONS` allows.

    Raises:
        UserError: the model, a reward or a prompt file cannot be loaded or does not fit.
    """

    def __init__(self, config: Config, *, tiny: bool = False, groups: int | None = None):
        self.config, self.notes = config, list[str]()
        model = build_model(config, default_device(), dry_run=tiny)
        assert isinstance(model, DiffusersModel)
        # of the policy's loss alone: a fresh adapter's KL has no gradient
        objective = config.objective.model_copy(update={"kl_coef": 0.0})
        self.trainer = Trainer(config.model_copy(update={"objective": objective}), model=model)
        self.model, self.schedule = model, self.trainer.schedule
        self.size = config.sampler.branches or config.sampler.group_size
        self.target = self._target(MOST if groups is None else groups)
        self.reference, self.plans = reference(config.sampler.num_steps), ladder(self.target)
        self.ways, self.steps = self._ways(), tuple(self.schedule.candidates(0))
        self.promising = self.ways
        affordable = [count for count in range(FEWEST, MOST + 1) if self.iterations(count) <= ITERATIONS]
        self.groups = groups or max(affordable, default=FEWEST)
        self.products = torch.zeros(len(self.steps), len(self.steps), dtype=torch.float64)
        self._exact: list[Tensor] = []

    def compare(self, thresholds: Thresholds) -> list[Row]:
        """The candidates; if the memory runs out, again with fewer rows per forward.

        Args:
            thresholds: what a variant must come near to in the first groups.

        Raises:
            RewardError: the reward failed; SetupError: the memory does not even allow a single row.
        """
        rows = OomBackoff(self.target.chunk, "lookahead.chunk, of lookahead.plan auto")
        return rows.fitting(lambda chunk: self._compare(replace(self.target, chunk=chunk), thresholds))

    def outline(self) -> str:
        """What will be measured, and the most that it costs."""
        return (
            f"to be measured are {len(self.plans)} plans with {len(self.ways)} variants each on {self.groups} "
            f"groups of {self.size} samples of the first training prompts, by at most as many operations as "
            f"{self.iterations(self.groups):.1f} iterations with one reward per picture"
        )

    def iterations(self, groups: int, ways: Sequence[Variant] | None = None) -> float:
        """Operations of a trial of so many groups, in the run's replayed iterations with one reward per picture.

        Args:
            ways: that are looked at beyond the first groups; None = all.
        """
        target, sampler = self.target, self.config.sampler
        assert target.flops is not None
        unit = target.flops

        def sparse(kl: bool) -> float:
            how: dict[str, Any] = {"guided": target.guided, "guidance_gradient": target.guidance_gradient}
            return sparse_iteration(sampler.num_steps, trained_steps=target.trained_steps, kl=kl, **how).flops(unit)

        def completed(variant: Variant) -> float:
            none, cost = Evaluations(), cost_of(variant, target, self.size)
            ahead = target.cheap_flops.get((variant.copy, variant.cache))
            return replace(cost, rollout=none, policy=none, reference=none).flops(unit, ahead)

        def compared(some: Sequence[Variant], plans: Sequence[Plan]) -> float:
            return sum(completed(replace(way, plan=plan)) for way in some for plan in plans)

        first = _first(groups)
        own = groups * (sparse(kl=False) + completed(self.reference))
        own += first * compared(self.ways, [*self.plans[:2], *self.plans[2:][-1:]])
        own += (groups - first) * compared(self.ways if ways is None else ways, self.plans[1:])
        run = self.config.data.num_prompts * sampler.group_size * sparse(kl=self.config.objective.kl_coef > 0)
        return self.size * own / run

    def _target(self, groups: int) -> FidelityTarget:
        """The model, as many of the first training prompts, and the reward."""
        prompts, order = self.trainer.prompts.prompts, self.trainer.prompts.sampler
        batches = (order.batch(iteration) for iteration in range(-(-groups // order.num_prompts)))
        chosen = [index for batch in batches for index in batch][:groups]
        some = PromptSet(tuple(prompts.prompts[i] for i in chosen), tuple(prompts.metadata[i] for i in chosen))
        self.model.prepare(list(some.prompts))
        on_gpu, free = self.model.device.type == "cuda", free_bytes(self.model.device)
        needs = sum(p.numel() for p in self.model.network.parameters()) * (2 if on_gpu else 4)
        copies = ["bfloat16" if on_gpu else "float32"]
        if free is not None and 2 * needs > free:
            copies = []
            self.notes.append(f"no copy with the adapter merged: it takes {readable(needs)} of {readable(free)} free")
        made = (self.model, self.trainer.reward, some)
        return pipeline_target(self.config, None, groups, copy_dtypes=copies, made=made)

    def _ways(self) -> list[Variant]:
        """Every way to complete and decode, with the exact plan in each."""
        guidances: list[Guidance] = ["full"]
        if self.target.guided:
            guidances += ["cond_only"] if self.target.branched else ["cond_only", "reuse"]
        copy = next(iter(self.target.copies), None)
        return [
            Variant(self.reference.plan, guidance, decoder, copy)
            for guidance in guidances
            for decoder in self.target.decoders
        ]

    def _compare(self, target: FidelityTarget, thresholds: Thresholds) -> list[Row]:
        self.products.zero_()
        self._exact.clear()
        first = _first(self.groups)
        options: dict[str, Any] = {"max_nodes": 0, "group_size": self.size, "seed": self.config.seed}
        options["observe"] = self._observe
        looked = search(target, range(first), ways=self.ways, named=self.plans[:2], **options)
        near = Thresholds(thresholds.rewards - _FAR, thresholds.gains - _FAR, -inf)
        met = {replace(c.variant, plan=self.reference.plan) for c in looked if near.met_by(c.agreement)}
        self.promising = [way for way in self.ways if way in met]
        rest = range(first, self.groups)
        found = search(target, rest, ways=self.promising, named=self.plans[1:], **options)
        rows = {candidate.variant: Row(candidate, first) for candidate in looked}
        rows |= {candidate.variant: Row(candidate, len(rest)) for candidate in found}
        exact = torch.cat(self._exact)
        forwards = cost_of(self.reference, target, self.size).lookahead.forwards
        own = Candidate(self.reference, forwards, None, agreement_of(target, exact, exact))
        return [*({self.reference: Row(own, self.groups)} | rows).values()]

    def _observe(self, batch: Batch, exact: Tensor) -> None:
        """Keep a batch's exact rewards, and add the inner products of its groups' gradients."""
        self._exact.append(exact)
        rollout, scores = batch.rollout, Scores(exact.flatten(), {})
        rewards = RewardBatch(exact[..., -1], exact, None, scores)
        if self.target.branched:
            # [P, G, M] -> [P, 1, G, M, 1]: all branches of a group leave one trajectory
            rewards = RewardBatch(exact[..., -1], None, exact[:, None, ..., None], scores)
        advantages = self.trainer.credit(rollout, rewards).values.flatten(0, 1).to(self.model.device)
        weights, settings = self.schedule.step_weights(), self.trainer.learner.options.objective
        objective = Objective(settings, rollout.coefficients, list(self.steps), weights)
        rows = rollout.batch // len(exact)
        for group in range(len(exact)):
            own = slice(group * rows, (group + 1) * rows)
            gradients = step_gradients(self.trainer, rollout, advantages, objective, self.steps, own)
            self.products += (gradients @ gradients.T).double().cpu() / self.groups


def _first(groups: int) -> int:
    """Of so many groups those that every way is tried on."""
    return max(1, groups // 4)
