"""Flow-GRPO's `pipeline_with_logprob` for SD3, plain and fast.

    plain  every step is stochastic        -> image, all_latents [N+1], all_log_probs [N][, means of the states [N]]
    fast   only those of a window are      -> image, all_latents [w+1], all_log_probs [w], all_timesteps [w]

The lists hold one tensor per step, [B, ...] or [B]; what lies outside the window is not returned. The window
[start, start + w) of a call is drawn by Python's `random`, start from lo..hi-w of `sde_window_range` = (lo, hi); size 0
means every step but the last. Outside it the steps take the same path at noise level 0, noise drawn and thrown away.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat.flow_grpo.sd3 import ARGUMENTS, Rollout, Run, Step, decode, prepare, roll_out
from densegrpo_fast.compat.flow_grpo.step import step_function

PLAIN = {**ARGUMENTS, "return_prev_sample_mean": False}
"""Arguments of the plain form and their defaults."""

FAST = {**ARGUMENTS, "sde_window_size": 0, "sde_window_range": (0, 5), "sde_type": "sde"}
"""Arguments of the fast form and their defaults."""


@dataclass(frozen=True)
class Kept:
    """What a sampling call computed beyond its results.

    Attributes:
        velocities: [N, B, ...] float32, the guided velocity at every state.
        guidance_terms: the same shape, what guidance added to each.
        clean: [B, ...] the state at the end, in the dtype of the states.
    """

    velocities: Tensor
    guidance_terms: Tensor
    clean: Tensor


_keeping: ContextVar[list[Kept] | None] = ContextVar("densegrpo_fast_keeping", default=None)


@contextmanager
def keep_velocities() -> Iterator[list[Kept]]:
    """Within the context every SD3 sampling call of ours appends its velocities to the list.

    They are the first evaluations of a lookahead (`compat.dense_rewards`), which then need not be made again.
    """
    kept: list[Kept] = []
    token = _keeping.set(kept)
    try:
        yield kept
    finally:
        _keeping.reset(token)


def sample(run: Run, step: Step, levels: list[float], sde_type: str | None = None, progress: bool = True) -> Rollout:
    """`roll_out`, kept for whoever asked for it by `keep_velocities`."""
    kept = _keeping.get()
    done = roll_out(run, step, levels, sde_type=sde_type, keep_guidance=kept is not None, progress=progress)
    if kept is not None and done.velocities:
        kept.append(Kept(torch.stack(done.velocities), torch.stack(done.guidance_terms), done.latents[-1]))
    return done


def window_of(options: Mapping[str, Any], num_steps: int) -> tuple[int, int]:
    """First step of a call's window and the first step after it.

    Raises:
        ValueError: the window is larger than its range.
    """
    size, (low, high) = options["sde_window_size"], options["sde_window_range"]
    if size <= 0:
        return 0, num_steps - 1
    if high - size < low:
        raise ValueError(f"sde_window_size {size} does not fit into sde_window_range {(low, high)}")
    start = random.randint(low, high - size)
    return start, start + size


def window_levels(window: tuple[int, int], noise_level: float, num_steps: int) -> list[float]:
    """Noise level of each of the N steps: `noise_level` inside the window, 0 outside."""
    return [noise_level if window[0] <= step < window[1] else 0 for step in range(num_steps)]


def make_pipeline(
    form: Mapping[str, Any],
    step: Callable[[], Step],
    *,
    float32: bool = True,
    signature: inspect.Signature | None = None,
) -> Callable[..., Any]:
    """Make a `pipeline_with_logprob`.

    Args:
        form: `PLAIN` or `FAST`.
        step: gives the step function to use; asked at every call.
        float32: as in `sd3.prepare`.
        signature: of the result; default: the form's own arguments.
    """

    def plain(pipeline: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
        run = prepare(pipeline, options, float32=float32)
        done = sample(run, step(), [options["noise_level"]] * len(run.timesteps))
        image = decode(pipeline, done.latents[-1], options["output_type"])
        pipeline.maybe_free_model_hooks()
        means = (done.means,) if options.get("return_prev_sample_mean") else ()
        return image, done.latents, done.log_probs, *means

    def fast(pipeline: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
        run = prepare(pipeline, options, float32=float32)
        num_steps = len(run.timesteps)
        window = window_of(options, num_steps)
        levels = window_levels(window, options["noise_level"], num_steps)
        done = sample(run, step(), levels, options.get("sde_type"))
        image = decode(pipeline, done.latents[-1], options["output_type"])
        pipeline.maybe_free_model_hooks()
        inside = slice(*window)
        states = done.latents[window[0] : window[1] + 1]
        return image, states, done.log_probs[inside], list(run.timesteps[inside])

    body = fast if "sde_window_size" in form else plain
    return with_signature(body, "pipeline_with_logprob", signature or signature_of("self", form))


def signature_of(first: str, form: Mapping[str, Any]) -> inspect.Signature:
    """`(first, name=default, ...)`, all positional or by name."""
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    rest = [inspect.Parameter(name, kind, default=default) for name, default in form.items()]
    return inspect.Signature([inspect.Parameter(first, kind), *rest])


def with_signature(
    body: Callable[[Any, Mapping[str, Any]], Any], name: str, signature: inspect.Signature
) -> Callable[..., Any]:
    """A function of that signature, without gradient, that gives `body` its first argument and the others by name."""

    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        (_, pipeline), *rest = bound.arguments.items()
        with torch.no_grad():
            return body(pipeline, dict(rest))

    call.__name__ = call.__qualname__ = name
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = f"The host's {name}; see the docstring of the module."
    return call


_step = step_function("V3g")
pipeline_with_logprob = make_pipeline(PLAIN, lambda: _step)
pipeline_with_logprob_fast = make_pipeline(FAST, lambda: _step)
