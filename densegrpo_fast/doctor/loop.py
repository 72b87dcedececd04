"""The loop under examination: one rollout, and the replay of its steps by the unchanged policy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.config import Config
from densegrpo_fast.flow.dynamics import StepCoefficients
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.sampling import replay as replaying
from densegrpo_fast.sampling.branches import Sampled
from densegrpo_fast.training import builders
from densegrpo_fast.training.experience import draw

Rollout = Callable[[StepCoefficients], Sampled]
Replay = Callable[[Sampled, int], Tensor]

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
    rollout: Rollout
    replay: Replay

    def deviations(self) -> tuple[float, ...]:
        """The largest |ratio - 1| over the samples of each replayed step, after one rollout."""
        trajectory = self.rollout(self.coefficients)
        found = []
        for step in self.steps:
            log_ratio = self.replay(trajectory, step).detach().double() - trajectory.log_probs[step].double()
            found.append(log_ratio.expm1().abs().max().item())
        return tuple(found)

    def unsteadiness(self) -> float:
        """The largest difference between the log-probabilities of two replays of the same trajectory."""
        trajectory = self.rollout(self.coefficients)
        differences = [(self.replay(trajectory, s) - self.replay(trajectory, s)).abs().max().item() for s in self.steps]
        return max(differences)


def configured_loop(config: Config, model: FlowModel) -> Loop:
    """The loop of training: its sampler, its split into micro-batches, gradients, and the KL's reference pass.

    Two micro-batches are drawn where an iteration has as many, for the prompts of the first iteration. Replayed are
    the steps that training may train.

    Args:
        config: of the run.
        model: with its adapter.
    """
    size = config.sampler.micro_batch
    rows, _ = builders.build_prompts(config).rows(0, config.sampler.group_size)
    rows = rows[: _MICRO_BATCHES * size * (config.sampler.branches or 1)]
    coefficients = builders.build_coefficients(config, model)
    chosen = config.objective.trained_steps
    if not isinstance(chosen, list):
        objective = config.objective.model_copy(update={"trained_steps": "all_but_last"})
        chosen = builders.trained_steps(config.model_copy(update={"objective": objective}), 0)

    def rollout(table: StepCoefficients) -> Sampled:
        return draw(config, model, rows, table, 0)

    def replay(trajectory: Sampled, step: int) -> Tensor:
        parts = []
        for start in range(0, trajectory.batch, size):
            part = slice(start, start + size)
            parts.append(replaying.replay(model, trajectory, step, part)[0].detach())
            if config.objective.kl_coef:
                replaying.reference_velocity(model, trajectory, step, part)
        return torch.cat(parts)

    return Loop(model, coefficients, tuple(step for step in chosen if coefficients.noisy[step]), rollout, replay)


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
