"""Known reasons why an unchanged policy's importance ratio is not 1, each with the switch that takes it away."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

from densegrpo_fast.doctor import neutral
from densegrpo_fast.doctor.loop import Loop, lora_layers


@dataclass(frozen=True)
class Suspect:
    """One possible reason.

    Attributes:
        name: how reports and JSON call it.
        cause: what differs between rollout and replay if it is guilty.
        remedy: what to do then.
        neutral: gives the loop without this difference.
        applies: whether the loop could suffer from it at all.
    """

    name: str
    cause: str
    remedy: str
    neutral: Callable[[Loop], AbstractContextManager[Loop]]
    applies: Callable[[Loop], bool] = lambda loop: True


def _adapted(loop: Loop) -> bool:
    return bool(lora_layers(loop.model.network))


SUSPECTS = (
    Suspect(
        "dropout",
        "dropout is active, so every forward draws its own mask",
        "put the network in eval mode in both phases, or set every dropout probability to 0",
        neutral.no_dropout,
    ),
    Suspect(
        "storage",
        "states or log-probabilities are stored in fewer digits than they were computed with",
        "keep latents and log-probabilities of the trajectory in float32, or round the state before its "
        "log-probability is computed",
        neutral.exact_storage,
    ),
    Suspect(
        "timestep",
        "the network is told another timestep in one phase, such as one rounded to a half precision",
        "compute the timestep in float32 by the same code in both phases",
        neutral.grid_timesteps,
    ),
    Suspect(
        "autocast",
        "one phase runs under autocast and the other does not",
        "run both phases with or without torch.autocast",
        neutral.no_autocast,
    ),
    Suspect(
        "adapter_off",
        "the adapter is switched off in one phase",
        "enable the adapter again after passes of the reference policy",
        neutral.enabled_adapter,
        _adapted,
    ),
    Suspect(
        "lora_merge",
        "the adapter is merged into the weights in one phase, which rounds them",
        "leave it unmerged in both phases, or compute the old log-probabilities with the unmerged policy",
        neutral.unmerged_adapter,
        _adapted,
    ),
    Suspect(
        "attention",
        "attention is computed by different kernels or processors",
        "set the same attention backend and processors for both phases",
        neutral.one_attention,
    ),
    Suspect(
        "batch_shape",
        "a sample's velocity depends on the batch that it is evaluated in, and the batches differ",
        "replay the rows that were rolled out together, as many to a forward: sampler.micro_batch for both",
        neutral.single_rows,
    ),
    Suspect(
        "gradient_mode",
        "the forward computes other numbers when gradients are recorded",
        "look for what depends on it: compiled graphs, checkpointing, kernels chosen by requires_grad",
        neutral.no_gradient,
    ),
)
"""Reasons, the particular ones before the general ones."""

AMPLIFIER = Suspect(
    "tiny_std",
    "a step injects so little noise that rounding errors of the velocity are large against it",
    "raise sampler.noise_level there, or leave the step out of objective.trained_steps",
    neutral.more_noise,
    lambda loop: bool(neutral.tiny_steps(loop)),
)
"""No reason by itself: it makes a small difference, whatever its reason, a visible one."""

BY_NAME = {suspect.name: suspect for suspect in (*SUSPECTS, AMPLIFIER)}
