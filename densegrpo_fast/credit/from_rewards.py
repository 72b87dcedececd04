"""Advantages of rewards that came from anywhere: a credit method called by its name, without a configuration."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from densegrpo_fast.common.suggest import did_you_mean
from densegrpo_fast.credit.normalize import Advantages, normalize_groups
from densegrpo_fast.credit.registry import COMMON, find


def advantages(lookahead_rewards: Tensor, method: str = "dense", **options: Any) -> Advantages:
    """Credit every step of the samples of some prompts, all steps being stochastic.

        advantages(rewards).values                         # DenseGRPO (arXiv 2601.20218, Eq 10)
        advantages(rewards, "return_to_go", discount=0.9, normalize="step")

    Args:
        lookahead_rewards: [P, G, T+1] float; index = steps done, the last is the real final image; NaN = missing.
        method: of `credit.method`, registered, or `file.py:NAME`; one that needs more than rewards (coca, branch,
            granular) is refused.
        **options: of the method's function; those with a default may be left out.

    Returns:
        values [P, G, T] float32.

    Raises:
        TypeError: rewards are not floating point.
        ValueError: the shape of lookahead_rewards, an unknown method or option, or one that is lacking.
    """
    if lookahead_rewards.ndim != 3 or lookahead_rewards.shape[-1] < 2:
        raise ValueError(
            "advantages: lookahead_rewards must have shape [P, G, T+1] with T >= 1, "
            f"got {list(lookahead_rewards.shape)}"
        )
    if not lookahead_rewards.is_floating_point():
        raise TypeError(f"advantages: lookahead_rewards must be floating point, got {lookahead_rewards.dtype}")
    steps = lookahead_rewards.shape[-1] - 1
    known = {
        "rewards": lookahead_rewards[..., -1],
        "lookahead_rewards": lookahead_rewards,
        "steps": tuple(range(steps)),
        "num_steps": steps,
        "noisy": (True,) * steps,
    }
    credit = find(method)
    if absent := [need for need in credit.needs if need not in known]:
        raise ValueError(f"advantages: method {method} needs {', '.join(absent)}, not rewards alone")
    function = credit.function()
    takes = {name: parameter for name, parameter in inspect.signature(function).parameters.items() if name not in known}
    for name in options:
        if name not in takes:
            raise ValueError(
                f"advantages: method {method} has no option {name!r}{did_you_mean(name, takes)} "
                f"(it takes {', '.join(takes)})"
            )
    usual = inspect.signature(normalize_groups).parameters
    given = {name: usual[name].default for name in COMMON if name in takes} | options
    if lacking := [name for name, own in takes.items() if own.default is own.empty and name not in given]:
        raise ValueError(f"advantages: method {method} needs the options {', '.join(lacking)}")
    judged: Advantages = function(**{need: known[need] for need in credit.needs}, **given)
    if judged.values.shape != (expected := (*lookahead_rewards.shape[:2], steps)):
        raise ValueError(f"advantages: method {method} must return {list(expected)}, got {list(judged.values.shape)}")
    return judged
