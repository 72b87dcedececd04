"""Every policy loss and every weighting of the steps by its name.

A policy loss is a function that is called once per iteration, with the step coefficients of its sampler and the trained
steps, and the options that it has by keyword. It returns the loss of one step's `Pairs`:

    def hinge(coefficients, steps, *, margin):
        def loss(pairs):
            rise = pairs.log_prob - pairs.old_log_prob
            losses = (margin * pairs.advantages.abs() - pairs.advantages * rise).relu()
            return (pairs.weight * losses).mean(), {}

        return loss

The mapping holds metrics, 0-d tensors without gradient; what it leaves out of those that `ppo_clip_loss` has is filled
in for the plain ratio. A weighting is a function from coefficients (and options) to a weight [T] of every step, of any
unit: `step_weights` divides it by its mean over the steps that a run trains. One line makes either an option of
training: in this package an entry below, anywhere else

    POLICIES.register("hinge", PolicyLoss(hinge, options=("margin",)))
    STEP_WEIGHTS.register("late", StepWeighting(lambda coefficients: 1 - coefficients.sigmas[:-1]))

before the configuration is read; or, with no registration, the `PolicyLoss` or `StepWeighting` itself by where it is:

    --objective.policy mine.py:HINGE --objective.arguments '{margin: 0.1}' --objective.step_weight mine.py:LATE

`options` are keys of the section `objective` or, for what that does not have, of `objective.arguments`. Functions of
this package are imported when they are first called: this file needs no torch, so that the configuration can read it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from densegrpo_fast.common.plugins import Registry, resolve

if TYPE_CHECKING:
    from torch import Tensor

    from densegrpo_fast.objective.pairs import Loss


@dataclass(frozen=True)
class PolicyLoss:
    """How a loss comes from log-probabilities and advantages, and what it asks of the sampler.

    Attributes:
        prepare: the function, or where it is as `module:name`.
        options: options that it takes.
        variance: whether the log-probability must carry the variance of the step, which that of cps does not.
        noise: whether every trained step must inject noise.
        adds_kl: whether the loss holds the KL term, `pairs.kl_coef * pairs.kl.mean()`; else it is added to it.
    """

    prepare: str | Callable[..., Loss]
    options: tuple[str, ...] = ()
    variance: bool = False
    noise: bool = False
    adds_kl: bool = False

    def function(self) -> Callable[..., Loss]:
        """The function itself."""
        return resolve(self.prepare)


@dataclass(frozen=True)
class StepWeighting:
    """How much each step counts in the loss.

    Attributes:
        compute: the function, or where it is as `module:name`.
        options: options that it takes.
    """

    compute: str | Callable[..., Tensor]
    options: tuple[str, ...] = ()

    def function(self) -> Callable[..., Tensor]:
        """The function itself."""
        return resolve(self.compute)


_HERE = __package__

POLICIES = Registry(
    PolicyLoss,
    "policy",
    {
        "clip": PolicyLoss(f"{_HERE}.clip:clip_policy", ("clip_range",), adds_kl=True),
        "guard": PolicyLoss(
            f"{_HERE}.guard:guard_policy", ("clip_range", "guard_weight"), variance=True, noise=True, adds_kl=True
        ),
        "dppo": PolicyLoss(f"{_HERE}.dppo:dppo_policy", ("dppo_threshold",), adds_kl=True),
    },
)

STEP_WEIGHTS = Registry(
    StepWeighting,
    "step weight",
    {
        "none": StepWeighting(f"{_HERE}.weights:none"),
        "noise_aware": StepWeighting(f"{_HERE}.weights:noise_aware"),
        "flash": StepWeighting(f"{_HERE}.weights:flash"),
        "proportionate": StepWeighting(f"{_HERE}.weights:proportionate"),
    },
)
