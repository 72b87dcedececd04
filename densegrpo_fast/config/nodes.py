"""Whether a lookahead's plan evaluates anything of what is completed. Nothing here imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from densegrpo_fast.config.schema import Config


def nodes_problem(config: Config) -> str | None:
    """What is wrong with the nodes or paths among the other options, beginning with the key; None = nothing.

    Where none lies ahead of any state that an iteration completes, the plan is one_step under another name. That is let
    pass from state T-2 on, where exact_but_last evaluates nothing either, and for some of several windows only: the
    same plan must then serve another one.
    """
    plan, steps = config.lookahead.plan, config.sampler.num_steps
    if plan not in ("nodes", "paths") or not (config.uses_lookahead or config.uses_branches):
        return None
    given = config.lookahead.nodes if plan == "nodes" else config.lookahead.paths
    completed = _completed(config)
    used = any(_evaluations(config, state) for states in completed for state in states)
    for states in completed:
        first = states[0]
        if any(_evaluations(config, state) for state in states) or (used and first >= steps - 2):
            continue
        if first >= steps - 1:
            return f"lookahead.plan: expected one_step where no state before {first} is completed, got {plan} {given}"
        expected = f"a step of {first + 1}..{steps - 1} among them"
        if plan == "paths":
            expected = f"a step in the path of a state that is completed ({', '.join(map(str, states))})"
        return (
            f"lookahead.{plan}: expected {expected}, got {given}: in an iteration whose first completed state is "
            f"{first} the plan would be one_step (or say so: lookahead.plan one_step)"
        )
    return None


def _evaluations(config: Config, state: int) -> int:
    """Steps of the plan that lie ahead of a state; the image is state T."""
    options = config.lookahead
    if options.plan == "paths":
        return len(options.paths[state]) if state < config.sampler.num_steps else 0
    return sum(step_index > state for step_index in options.nodes)


def _completed(config: Config) -> list[list[int]]:
    """The states that an iteration completes, increasing, for every choice of noisy steps that it may have.

    With trajectories these are the ones that a noisy step leaves, with branches those that a trained step leads to. Of
    the choices of drawn steps that begin alike only one is named that evaluates least.
    """
    levels, trained = config.noise_levels, config.objective.trained_steps
    if not config.uses_branches:
        noisy = ([step for step in window if levels[step]] for window in config.schedule().reached())
        return [steps for steps in noisy if steps]
    if isinstance(trained, list):
        return [[step + 1 for step in trained]]
    choices = []
    for window in config.windows():
        states = [step + 1 for step in window]
        count = trained if isinstance(trained, int) else len(states)
        for place in range(len(states) - count + 1):
            later = sorted(states[place + 1 :], key=lambda state: _evaluations(config, state))
            choices.append([states[place], *sorted(later[: count - 1])])
    return choices
