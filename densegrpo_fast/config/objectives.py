"""Which policy loss and step weights a configuration may have, and with what. Nothing here imports torch.

One from outside of the package is an exception: its file is run when the configuration is checked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from densegrpo_fast.config.methods import arguments_problem, deterministic_steps
from densegrpo_fast.objective.registry import POLICIES, STEP_WEIGHTS

if TYPE_CHECKING:
    from densegrpo_fast.config.schema import Config

_GUARDED = {"paper": ("flow_sde", "dance")}
"""Dynamics for which a weight of GRPO-Guard is defined; for the others, all with a variance."""
_NO_VARIANCE = ("cps",)
"""Dynamics whose log-probability leaves out the variance of the step."""


def objective_problem(config: Config) -> str | None:
    """What is wrong with the policy loss among the other options, beginning with the key; None = nothing."""
    objective, dynamics = config.objective, config.sampler.dynamics
    try:
        key = "policy"
        policy = POLICIES.find(objective.policy)
        key = "step_weight"
        weighting = STEP_WEIGHTS.find(objective.step_weight)
    except ValueError as error:
        return f"objective.{key}: {error}"
    takes = dict.fromkeys((*policy.options, *weighting.options))
    whose = f"policy {objective.policy} with step_weight {objective.step_weight}"
    if problem := arguments_problem(objective, "objective.arguments", objective.arguments, takes, whose):
        return problem
    if policy.variance and dynamics in _NO_VARIANCE:
        able = " or ".join(name for name in POLICIES.names() if not POLICIES.find(name).variance)
        return (
            f"objective.policy: {objective.policy} needs a log-probability with a variance, sampler.dynamics "
            f"{dynamics} has none; expected {able} with it"
        )
    defined = _GUARDED.get(objective.guard_weight, (dynamics,))
    if "guard_weight" in takes and dynamics not in defined:
        return (
            f"objective.guard_weight: {objective.guard_weight} is defined for sampler.dynamics "
            f"{' and '.join(defined)}, expected jacobian or none with {dynamics}"
        )
    if policy.noise and (deterministic := deterministic_steps(config)):
        needs = f"{objective.policy} needs noise in every trained step"
        return f"objective.policy: {needs}, {dynamics} injects none in {deterministic}"
    return None
