"""Mixed credit: the advantage of the final image plus the advantage of each step, with coefficients.

Euphonium (arXiv 2602.04928, read in its code) adds an outcome advantage and a per-step process advantage with
coefficients 1 and 1; its process reward is the value that a separately trained latent reward model gives a step. Here
any per-step quantity can be the second term: `dense.reward_gains`, `value.state_rewards`, `return_to_go.returns_to_go`.
Euphonium adds two clipped losses, this adds the advantages before the one loss: the same gradient while no ratio is
clipped, as on the first update.
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from torch import Tensor

from densegrpo_fast.credit.dense import reward_gains
from densegrpo_fast.credit.normalize import Advantages, Normalize, Std, normalize_groups
from densegrpo_fast.credit.return_to_go import returns_to_go
from densegrpo_fast.credit.value import state_rewards

StepValue = Literal["gain", "value", "return_to_go"]


def mixed_advantages(
    rewards: Tensor,
    step_values: Tensor,
    *,
    terminal_coef: float = 1.0,
    dense_coef: float = 1.0,
    normalize: Normalize = "step",
    std: Std = "group",
    spread_floor: float = 0.0,
    clip: float | None = 5.0,
    epsilon: float = 1e-4,
) -> Advantages:
    """terminal_coef * (normalised reward of the image) + dense_coef * (normalised value of the step).

    Args:
        rewards: [P, G] float, of the final images; NaN = missing.
        step_values: [P, G, T] float, one value per step; NaN = missing.
        terminal_coef: weight of the image's advantage, at least 0.
        dense_coef: weight of the step's advantage, at least 0.
        normalize: of the step values; statistics over a group for each "step", or "joint" over all its steps.
        std: divide by the "group" or the "global" standard deviation.
        spread_floor: a group (or its step) with a smaller standard deviation in one term gets 0 in that term.
        clip: bound on the magnitude of the sum; None = none.
        epsilon: added to the standard deviations.

    Returns:
        values [P, G, T] float32. Where one of the two is missing, both are: half a sum is no sample of the sum.
        zero_spread is the mean over both terms, weighted by their coefficients.

    Raises:
        ValueError: a shape, a coefficient or an option is out of range, or both coefficients are 0.
    """
    if step_values.ndim != 3 or rewards.shape != step_values.shape[:2]:
        raise ValueError(
            "mixed_advantages: rewards [P, G] and step_values [P, G, T] must agree, "
            f"got {list(rewards.shape)} and {list(step_values.shape)}"
        )
    for name, coefficient in (("terminal_coef", terminal_coef), ("dense_coef", dense_coef)):
        if not (math.isfinite(coefficient) and coefficient >= 0):
            raise ValueError(f"mixed_advantages: {name} must be finite and at least 0, got {coefficient}")
    if terminal_coef + dense_coef == 0:
        raise ValueError("mixed_advantages: terminal_coef or dense_coef must be above 0, got 0 and 0")
    if clip is not None and not clip > 0:
        raise ValueError(f"mixed_advantages: clip must be above 0 or None, got {clip}")

    outcome = rewards.double().unsqueeze(-1).expand(step_values.shape)
    process = step_values.double()
    present = outcome.isfinite() & process.isfinite()
    options: dict[str, Any] = {"std": std, "spread_floor": spread_floor, "clip": None, "epsilon": epsilon}
    terminal = normalize_groups(outcome.where(present, math.nan), normalize="step", **options)
    dense = normalize_groups(process.where(present, math.nan), normalize=normalize, **options)
    values = terminal_coef * terminal.values + dense_coef * dense.values
    if clip is not None:
        values = values.clamp(-clip, clip)
    zero_spread = terminal_coef * terminal.zero_spread + dense_coef * dense.zero_spread
    return Advantages(values, zero_spread / (terminal_coef + dense_coef), dense.missing)


def lookahead_mixture_advantages(
    rewards: Tensor,
    lookahead_rewards: Tensor,
    *,
    step_value: StepValue = "gain",
    discount: float = 1.0,
    **options: Any,
) -> Advantages:
    """`mixed_advantages` of the final image and of a value that the lookahead gives each step.

    Args:
        rewards: [P, G] float, of the final images; NaN = missing.
        lookahead_rewards: [P, G, T+1] float; index = steps done, the last is the real final image, by the decoder of
            the others (in `rewards` it may be another one's); NaN = missing.
        step_value: "gain" = `dense.reward_gains`, "value" = `value.state_rewards`, "return_to_go" =
            `return_to_go.returns_to_go`.
        discount: of the return-to-go, in [0, 1].
        **options: of `mixed_advantages`.

    Returns:
        values [P, G, T] float32.

    Raises:
        ValueError: a shape, or an option is out of range.
    """
    exact = lookahead_rewards.double()
    match step_value:
        case "gain":
            values = reward_gains(exact)
        case "value":
            values = state_rewards(exact)
        case "return_to_go":
            values = returns_to_go(exact, discount)
        case _:
            raise ValueError(
                f"lookahead_mixture_advantages: step_value must be one of {', '.join(get_args(StepValue))}, "
                f"got {step_value!r}"
            )
    return mixed_advantages(rewards, values, **options)
