"""How much the policy gradient varies if an iteration trains only some of its steps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densegrpo_fast.fidelity.price import DRAWS, Draw
from densegrpo_fast.objective.policy import Objective
from densegrpo_fast.sampling.rollout import Rollout
from densegrpo_fast.training.trainer import Trainer


def step_gradients(
    trainer: Trainer, rollout: Rollout, advantages: Tensor, objective: Objective, steps: Sequence[int], rows: slice
) -> Tensor:
    """The gradients of the losses of some steps of some rows, each the rows' mean: [steps, parameters] float32.

    The trainer's parameters are left without a gradient.

    Args:
        trainer: of the policy that took the steps.
        rollout: that has the rows.
        advantages: [B, T] float32.
        objective: with the steps' weights.
        steps: which ones.
        rows: at most a micro-batch of them is evaluated at a time.
    """
    learner, found = trainer.learner, []
    count = rows.stop - rows.start
    for step in steps:
        learner.optimizer.zero_grad(set_to_none=True)

        def gradient(part: slice, step: int = step) -> object:
            weight = (part.stop - part.start) / count
            return learner.step_gradient(rollout, advantages, objective, step, part, weight)

        for _ in learner.rows.each(rows, gradient):
            pass
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in learner.parameters.values()]
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    learner.optimizer.zero_grad(set_to_none=True)
    return torch.stack(found)


def mean_square(products: Tensor, drawn: Sequence[Draw], candidates: Sequence[int]) -> float:
    """Mean square of a group's gradient, over groups and draws; its mean is the same however the steps are drawn.

    The square of that mean, the only part of it that is no variance, is about a hundredth of it on the embedded model
    (benches/iteration/gradient_variance.py), and more than a few groups can tell.

    Args:
        products: [K, K] float64, mean inner products of the K candidates' gradients within a group, of weighted losses.
        drawn: of `densegrpo_fast.fidelity.price.draws`.
        candidates: the K steps.
    """
    total = 0.0
    for draw in drawn:
        share = torch.zeros(len(candidates), dtype=torch.float64)
        for place, step in enumerate(candidates):
            if step in draw.steps:
                share[place] = float(draw.factors[step]) / len(draw.steps)
        total += draw.times / DRAWS * float(share @ products @ share)
    return total
