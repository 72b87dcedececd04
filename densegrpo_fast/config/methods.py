"""Which credit method a configuration may have, and with what. Nothing here imports torch.

A credit method from outside of the package is an exception: its file is run when the configuration is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from densegrpo_fast.common.plugins import Registry, is_outside
from densegrpo_fast.common.suggest import did_you_mean
from densegrpo_fast.credit import registry
from densegrpo_fast.sampling.windows import remaining_steps

if TYPE_CHECKING:
    from densegrpo_fast.config.base import Section
    from densegrpo_fast.config.learning import CreditOptions
    from densegrpo_fast.config.schema import Config

OUTSIDE = "path.py:NAME"

_QUIET_END = ("cps", "precise")
"""Dynamics whose last step, which ends at sigma 0, injects no noise."""


def check_name(registry: Registry[Any], name: str) -> str:
    """A name, if it is registered or has the form of one from outside.

    Raises:
        ValueError: neither.
    """
    known = registry.names()
    if name not in known and not is_outside(name):
        raise ValueError(
            f'unknown {registry.what} "{name}"{did_you_mean(name, known)} '
            f"(known: {', '.join(known)}; your own {registry.kind.__name__}: module:NAME or {OUTSIDE})"
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
        or arguments_problem(credit, "credit.arguments", credit.arguments, method.options, f"method {credit.method}")
        or _plan_problem(config, method)
        or _coefficients_problem(config, method.options)
    )


def _smoothing_problem(config: Config, method: registry.CreditMethod) -> str | None:
    given, name = config.credit.smoothing, config.credit.method
    if given and not method.uses_lookahead:
        return f"credit.smoothing: expected 0 with credit.method {name}, which has no lookahead, got {given}"
    if given and all(len(noisy_among(config, window)) < 2 for window in config.schedule().reached()):
        return f"credit.smoothing: expected 0 with one noisy step, between whose ends no state lies, got {given}"
    return None


def arguments_problem(
    section: Section, key: str, arguments: dict[str, Any], takes: Iterable[str], whose: str
) -> str | None:
    """What is wrong with the arguments of what may come from outside, beginning with the key; None = nothing.

    Args:
        section: whose other options may be taken, too.
        key: of the arguments.
        arguments: by their names.
        takes: every option that is taken.
        whose: what takes them, for the message.
    """
    own, group = set(type(section).model_fields), key.partition(".")[0]
    wanted = [option for option in takes if option not in own]
    for name in arguments:
        if name in own:
            return f"{key}: {name} is an option of its own, {group}.{name}"
        if name not in wanted:
            hint = did_you_mean(name, wanted) or f"; it takes {', '.join(wanted) if wanted else 'none'}"
            return f'{key}: {whose} has no argument "{name}"{hint}'
    if lacking := [option for option in wanted if option not in arguments]:
        return f"{key}: {whose} needs {', '.join(lacking)}"
    return None


def _plan_problem(config: Config, method: registry.CreditMethod) -> str | None:
    if method.plan is None:
        return None
    defined = f"{method.plan}, by which the rewards of credit.method {config.credit.method} are defined"
    if config.lookahead.plan != method.plan:
        return f"lookahead.plan: expected {defined}, got {config.lookahead.plan}"
    if (head := config.lookahead.head) is not None:
        return f"lookahead.head: expected null with {defined}, got {head}"
    return None


def _coefficients_problem(config: Config, taken: Iterable[str]) -> str | None:
    credit = config.credit
    if "window" in taken:
        for steps in config.lengths():
            if steps % credit.window:
                left = "" if steps == config.sampler.num_steps else " that window.remainder_share leaves"
                return f"credit.window: expected a divisor of the {steps} steps{left}, got {credit.window}"
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
        if lookahead.plan in ("nodes", "paths"):
            return f"lookahead.plan: expected exact, exact_but_last, n_step or one_step {whole} {lookahead.plan}"
        for name in ("head", "cache"):
            if (given := getattr(lookahead, name)) is not None:
                return f"lookahead.{name}: expected null {whole} {given}"
    if window.remainder == "dpm_solver" and config.uses_lookahead and lookahead.head is not None:
        return (
            "lookahead.head: a head corrects Euler's last jump; expected null with window.remainder dpm_solver, "
            f"got {lookahead.head}"
        )
    return None


def trainable_steps(config: Config) -> list[int]:
    """The steps that some iteration may train, increasing."""
    trained = config.objective.trained_steps
    return trained if isinstance(trained, list) else sorted({step for window in config.windows() for step in window})


def deterministic_steps(config: Config) -> list[int]:
    """The steps that training may train although they inject no noise."""
    trainable = trainable_steps(config)
    return sorted({*trainable} - {*noisy_among(config, trainable)})


def noisy_among(config: Config, steps: Sequence[int]) -> list[int]:
    """Those of some steps that inject noise where an iteration lets them, in their order."""
    end = config.sampler.num_steps - 1 if config.sampler.dynamics in _QUIET_END else None
    return [step for step in steps if step != end and config.noise_levels[step]]
