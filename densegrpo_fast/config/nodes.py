"""Whether the nodes of a lookahead's plan lie ahead of what is completed. Nothing here imports torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from densegrpo_fast.config.schema import Config


def nodes_problem(config: Config) -> str | None:
    """What is wrong with the nodes among the other options, beginning with the key; None = nothing.

    Where no node lies ahead of any state that an iteration completes, the plan is one_step under another name. That is
    let pass from state T-2 on, where exact_but_last evaluates nothing either, and for some of several windows only: the
    same nodes must then serve another one.
    """
    nodes, steps = config.lookahead.nodes, config.sampler.num_steps
    if config.lookahead.plan != "nodes" or not (config.uses_lookahead or config.uses_branches):
        return None
    completed = _first_completed(config)
    used = any(first < nodes[-1] for first in completed)
    for first in completed:
        if nodes[-1] > first or (used and first >= steps - 2):
            continue
        if first >= steps - 1:
            return f"lookahead.plan: expected one_step where no state before {first} is completed, got nodes {nodes}"
        return (
            f"lookahead.nodes: expected a step of {first + 1}..{steps - 1} among them, got {nodes}: in an iteration "
            f"whose first completed state is {first} the plan would be one_step (or say so: lookahead.plan one_step)"
        )
    return None


def _first_completed(config: Config) -> list[int]:
    """The first state that an iteration completes, for every choice of noisy steps that it may have.

    With trajectories it is the one that a noisy step leaves, with branches the one that a trained step leads to.
    """
    levels, trained = config.noise_levels, config.objective.trained_steps
    if not config.uses_branches:
        noisy = ([step for step in window if levels[step]] for window in config.schedule().reached())
        return [steps[0] for steps in noisy if steps]
    if isinstance(trained, list):
        return [trained[0] + 1]
    return [
        step + 1
        for window in config.windows()
        for step in window[: len(window) - (trained if isinstance(trained, int) else len(window)) + 1]
    ]
