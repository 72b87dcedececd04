"""Which credit methods and objectives a configuration may combine, and with what. Nothing here imports torch.

A credit method from outside of the package is an exception: its file is run when the configuration is checked.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from densegrpo_fast.credit import registry
from densegrpo_fast.outside import is_outside
from densegrpo_fast.sampling.windows import remaining_steps
from densegrpo_fast.suggest import did_you_mean

if TYPE_CHECKING:
    from densegrpo_fast.config.learning import CreditOptions
    from densegrpo_fast.config.schema import Config

OUTSIDE = "path.py:NAME"

_GUARDED = {"paper": ("flow_sde", "dance")}
"""Dynamics for which a weight of GRPO-Guard is defined; for the others, all with a variance."""
_NO_VARIANCE = ("cps",)
"""Dynamics whose log-probability leaves out the variance of the step."""
_QUIET_END = ("cps", "precise")
"""Dynamics whose last step, which ends at sigma 0, injects no noise."""


def credit_names() -> str:
    """The registered credit methods, for a description."""
    return ", ".join(registry.names())


def check_method(name: str) -> str:
    """The name of a credit method, if it is registered or has the form of one from outside.

    Raises:
        ValueError: neither.
    """
    if name not in registry.names() and not is_outside(name):
        raise ValueError(
            f'unknown method "{name}"{did_you_mean(name, registry.names())} '
            f"(known: {credit_names()}; your own CreditMethod: module:NAME or {OUTSIDE})"
        )
    return name


def credit_values(credit: CreditOptions) -> dict[str, Any]:
    """Every option that a credit method may take, by its name: the section's own, and `credit.arguments`."""
    return credit.model_dump(exclude={"method", "arguments"}) | credit.arguments


def credit_problem(config: Config) -> str | None:
    """What is wrong with the credit method among the other options, beginning with the key; None = nothing."""
    credit = config.credit
    try:
        method = registry.find(credit.method)
    except ValueError as error:
        return f"credit.method: {error}"
    return (
        _smoothing_problem(config, method)
        or _arguments_problem(credit, method)
        or _plan_problem(config, method)
        or _coefficients_problem(config, method.options)
    )


def _smoothing_problem(config: Config, method: registry.CreditMethod) -> str | None:
    given, name = config.credit.smoothing, config.credit.method
    if given and not method.uses_lookahead:
        return f"credit.smoothing: expected 0 with credit.method {name}, which has no lookahead, got {given}"
    if given and config.window.size == 1:
        return f"credit.smoothing: expected 0 with one noisy step, between whose ends no state lies, got {given}"
    return None


def _arguments_problem(credit: CreditOptions, method: registry.CreditMethod) -> str | None:
    own = set(type(credit).model_fields)
    for name in credit.arguments:
        if name in own:
            return f"credit.arguments: {name} is an option of its own, credit.{name}"
        if name not in method.options:
            takes = [option for option in method.options if option not in own]
            hint = did_you_mean(name, takes) or f"; it takes {', '.join(takes) if takes else 'none'}"
            return f'credit.arguments: method {credit.method} has no argument "{name}"{hint}'
    lacking = [option for option in method.options if option not in own and option not in credit.arguments]
    if lacking:
        return f"credit.arguments: method {credit.method} needs {', '.join(lacking)}"
    return None


def _plan_problem(config: Config, method: registry.CreditMethod) -> str | None:
    if method.plan is None or config.lookahead.plan == method.plan:
        return None
    return (
        f"lookahead.plan: expected {method.plan}, by which the rewards of credit.method {config.credit.method} are "
        f"defined, got {config.lookahead.plan}"
    )


def _coefficients_problem(config: Config, taken: Iterable[str]) -> str | None:
    credit, steps = config.credit, config.sampler.num_steps
    if "window" in taken and steps % credit.window:
        return f"credit.window: expected a divisor of the {steps} steps, got {credit.window}"
    if "terminal_coef" in taken and credit.terminal_coef + credit.dense_coef == 0:
        return "credit.terminal_coef, credit.dense_coef: expected one above 0, got 0 and 0"
    return None


def remainder_problem(config: Config) -> str | None:
    """What is wrong with the steps after the window among the other options, beginning with the key; None = nothing."""
    window, lookahead = config.window, config.lookahead
    if window.size is None:
        for name, plain in (("remainder", "euler"), ("remainder_share", 1)):
            if (given := getattr(window, name)) != plain:
                return f"window.{name}: expected {plain} without windows, after which no step would come, got {given}"
        return None
    if window.remainder == "dpm_solver":
        left = max(
            remaining_steps(config.sampler.num_steps - reached.stop, window.remainder_share)
            for reached in config.windows()
        )
        if left < 3:
            return (
                "window.remainder: the first and the last step of dpm_solver are Euler's, so it wants at least 3 steps "
                f"after a window, got {left}"
            )
    if window.remainder_share < 1 and config.uses_lookahead:
        whole = "with window.remainder_share below 1, which leaves out grid points, got"
        if lookahead.plan == "nodes":
            return f"lookahead.plan: expected exact, exact_but_last, n_step or one_step {whole} nodes"
        for name in ("head", "cache"):
            if (given := getattr(lookahead, name)) is not None:
                return f"lookahead.{name}: expected null {whole} {given}"
    if window.remainder == "dpm_solver" and config.uses_lookahead and lookahead.head is not None:
        return (
            "lookahead.head: a head corrects Euler's last jump; expected null with window.remainder dpm_solver, "
            f"got {lookahead.head}"
        )
    return None


def objective_problem(config: Config) -> str | None:
    """What is wrong with the policy loss among the other options, beginning with the key; None = nothing."""
    objective, dynamics = config.objective, config.sampler.dynamics
    if objective.policy != "guard":
        return None
    if dynamics in _NO_VARIANCE:
        return (
            f"objective.policy: guard needs a log-probability with a variance, sampler.dynamics {dynamics} has none; "
            "expected clip or dppo with it"
        )
    defined = _GUARDED.get(objective.guard_weight, (dynamics,))
    if dynamics not in defined:
        return (
            f"objective.guard_weight: {objective.guard_weight} is defined for sampler.dynamics "
            f"{' and '.join(defined)}, expected jacobian or none with {dynamics}"
        )
    if quiet := quiet_steps(config):
        return f"objective.policy: guard needs noise in every trained step, {dynamics} injects none in {quiet}"
    return None


def trainable_steps(config: Config) -> list[int]:
    """The steps that some iteration may train, increasing."""
    trained = config.objective.trained_steps
    return trained if isinstance(trained, list) else sorted({step for window in config.windows() for step in window})


def quiet_steps(config: Config) -> list[int]:
    """The steps that training may train although they inject no noise."""
    ends = {config.sampler.num_steps - 1} if config.sampler.dynamics in _QUIET_END else set()
    return [step for step in trainable_steps(config) if step in ends or not config.noise_levels[step]]
