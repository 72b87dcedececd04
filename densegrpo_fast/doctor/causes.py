"""Known reasons why an unchanged policy's importance ratio is not 1, each with the switch that takes it away."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from densegrpo_fast.doctor import ablations
from densegrpo_fast.doctor.loop import Loop, lora_layers


@dataclass(frozen=True)
class Cause:
    """One possible reason.

    Attributes:
        name: how reports and JSON call it.
        cause: what differs between rollout and replay if it is guilty.
        remedy: what to do then.
        ablation: gives the loop without this difference.
        applies: whether the loop could suffer from it at all.
    """

    name: str
    cause: str
    remedy: str
    ablation: Callable[[Loop], AbstractContextManager[Loop]]
    applies: Callable[[Loop], bool] = lambda loop: True


def _adapted(loop: Loop) -> bool:
    return bool(lora_layers(loop.model.network))


CAUSES = (
    Cause(
        "dropout",
        "dropout is active, so every forward draws its own mask",
        "put the network in eval mode in both phases, or set every dropout probability to 0",
        ablations.no_dropout,
    ),
    Cause(
        "storage",
        "states or log-probabilities are stored in fewer digits than they were computed with",
        "keep latents and log-probabilities of the trajectory in float32, or round the state before its "
        "log-probability is computed",
        ablations.exact_storage,
    ),
    Cause(
        "timestep",
        "the network is told another timestep in one phase, such as one rounded to a half precision",
        "compute the timestep in float32 by the same code in both phases",
        ablations.grid_timesteps,
    ),
    Cause(
        "autocast",
        "one phase runs under autocast and the other does not",
        "run both phases with or without torch.autocast",
        ablations.no_autocast,
    ),
    Cause(
        "adapter_off",
        "the adapter is switched off in one phase",
        "enable the adapter again after passes of the reference policy",
        ablations.enabled_adapter,
        _adapted,
    ),
    Cause(
        "lora_merge",
        "the adapter is merged into the weights in one phase, which rounds them",
        "leave it unmerged in both phases, or compute the old log-probabilities with the unmerged policy",
        ablations.unmerged_adapter,
        _adapted,
    ),
    Cause(
        "attention",
        "attention is computed by different kernels or processors",
        "set the same attention backend and processors for both phases",
        ablations.one_attention,
    ),
    Cause(
        "batch_shape",
        "a sample's velocity depends on the batch that it is evaluated in, and the batches differ",
        "replay the rows that were rolled out together, as many to a forward: sampler.micro_batch for both",
        ablations.single_rows,
    ),
    Cause(
        "gradient_mode",
        "the forward computes other numbers when gradients are recorded",
        "look for what depends on it: compiled graphs, checkpointing, kernels chosen by requires_grad",
        ablations.no_gradient,
    ),
)
"""Reasons, the particular ones before the general ones."""

AMPLIFIER = Cause(
    "tiny_std",
    "a step injects so little noise that rounding errors of the velocity are large against it",
    "raise sampler.noise_level there, or leave the step out of objective.trained_steps",
    ablations.more_noise,
    lambda loop: bool(ablations.tiny_steps(loop)),
)
"""No reason by itself: it makes a small difference, whatever its reason, a visible one."""

BY_NAME = {cause.name: cause for cause in (*CAUSES, AMPLIFIER)}
