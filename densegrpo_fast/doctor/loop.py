"""The loop under examination: one rollout, and the replay of its steps by the unchanged policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.flow.dynamics import StepCoefficients
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.sampling.rollout import Rollout
from densegrpo_fast.training.trainer import Trainer

Sample = Callable[[StepCoefficients], Rollout]
Replay = Callable[[Rollout, int], Tensor]

_MICRO_BATCHES = 2
_ADAPTER_SHARE = 0.05


@dataclass(frozen=True)
class Loop:
    """The two phases whose log-probabilities must agree.

    Attributes:
        model: the policy, which both phases evaluate.
        coefficients: of the sampler.
        steps: indices of the steps that are replayed, all of them stochastic.
        rollout: draws a trajectory of B samples.
        replay: log-probabilities [B] of one step of a trajectory, as training computes them.
    """

    model: FlowModel
    coefficients: StepCoefficients
    steps: tuple[int, ...]
    rollout: Sample
    replay: Replay

    def deviations(self) -> tuple[float, ...]:
        """The largest |ratio - 1| over the samples of each replayed step, after one rollout."""
        trajectory = self.rollout(self.coefficients)
        largest = []
        for step in self.steps:
            log_ratio = self.replay(trajectory, step).detach().double() - trajectory.log_probs[step].double()
            largest.append(log_ratio.expm1().abs().max().item())
        return tuple(largest)

    def unsteadiness(self) -> float:
        """The largest difference between the log-probabilities of two replays of the same trajectory."""
        trajectory = self.rollout(self.coefficients)
        differences = [(self.replay(trajectory, s) - self.replay(trajectory, s)).abs().max().item() for s in self.steps]
        return max(differences)


def configured_loop(trainer: Trainer) -> Loop:
    """The loop of training: its sampler, its split into micro-batches, gradients, and the KL's reference pass.

    Two micro-batches are drawn where an iteration has as many, for the prompts of the first iteration. Replayed are
    the steps that training may train.
    """
    config, learner = trainer.config, trainer.learner
    size = config.sampler.micro_batch
    steps = trainer.schedule.at(0)
    batch = trainer.prompts.batch(0).select(slice(_MICRO_BATCHES * size * (config.sampler.branches or 1)))
    table, candidates = trainer.schedule.coefficients(), trainer.schedule.candidates(0)

    def rollout(coefficients: StepCoefficients) -> Rollout:
        return trainer.sample(batch, replace(steps, coefficients=coefficients), 0)

    def replay(rollout: Rollout, step: int) -> Tensor:
        parts = [slice(start, start + size) for start in range(0, rollout.batch, size)]
        return torch.cat([learner.replay(rollout, step, part).log_prob.detach() for part in parts])

    return Loop(trainer.model, table, tuple(step for step in candidates if table.noisy[step]), rollout, replay)


@torch.no_grad()
def randomize_lora_(network: Any, seed: int = 0) -> None:
    """Give every LoRA that is still zero a random update of 5% of its layer's weights, in norm.

    A fresh adapter adds exact zeros: whatever is wrong with it would only show once it has learnt something.
    """
    for layer in lora_layers(network):
        generator = torch.Generator().manual_seed(seed)
        base = layer.get_base_layer().weight
        for name in layer.active_adapters:
            down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
            if up.count_nonzero():
                continue
            up.copy_(torch.randn(up.shape, generator=generator))
            update = layer.scaling[name] * (up @ down)
            up.mul_(_ADAPTER_SHARE * base.float().norm() / update.float().norm())


def lora_layers(network: Any) -> list[Any]:
    """The adapted layers of a network; none if peft is not installed."""
    try:
        from peft.tuners.lora import LoraLayer
    except ModuleNotFoundError:
        return []
    return [module for module in network.modules() if isinstance(module, LoraLayer)]
