"""Flow-GRPO's `pipeline_with_logprob` for SD3, plain and fast.

    plain  every step is stochastic        -> image, all_latents [N+1], all_log_probs [N][, means of the states [N]]
    fast   only those of a window are      -> image, all_latents [w+1], all_log_probs [w], all_timesteps [w]

The lists hold one tensor per step, [B, ...] or [B]; what lies outside the window is not returned. The window
[start, start + w) of a call is drawn by Python's `random`, start from lo..hi-w of `sde_window_range` = (lo, hi); size 0
means every step but the last. Outside it the steps take the same path at noise level 0, noise drawn and thrown away.

A host's function runs once on a stand-in pipeline of a few numbers, and is replaced only if ours returns the same
there. A copy that was changed is left alone, and goes on calling the step that was replaced in it.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat.flow_grpo.sd3 import Rollout, Run, Step, decode, prepare, roll_out
from densegrpo_fast.compat.flow_grpo.step import NAME as STEP
from densegrpo_fast.compat.flow_grpo.step import step_function
from densegrpo_fast.compat.hosts import HOSTS, signature_of
from densegrpo_fast.compat.probes import sd3_call
from densegrpo_fast.compat.steps import as_host

NAME = "pipeline_with_logprob"


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
    form: str,
    step: Callable[[], Step],
    *,
    float32: bool = True,
    signature: inspect.Signature | None = None,
) -> Callable[..., Any]:
    """Make a `pipeline_with_logprob`.

    Args:
        form: "plain" or "fast".
        step: gives the step function to use; asked at every call.
        float32: as in `sd3.prepare`.
        signature: of the result; default: the form's own.
    """

    @torch.no_grad()
    def sampler(pipeline: Any, **options: Any) -> tuple[Any, ...]:
        run = prepare(pipeline, options, float32=float32)
        num_steps = len(run.timesteps)
        window = window_of(options, num_steps) if form == "fast" else (0, num_steps)
        levels = window_levels(window, options["noise_level"], num_steps)
        done = sample(run, step(), levels, options.get("sde_type"))
        image = decode(pipeline, done.latents[-1], options["output_type"])
        pipeline.maybe_free_model_hooks()
        if form == "plain":
            means = (done.means,) if options.get("return_prev_sample_mean") else ()
            return image, done.latents, done.log_probs, *means
        inside = slice(*window)
        states = done.latents[window[0] : window[1] + 1]
        return image, states, done.log_probs[inside], list(run.timesteps[inside])

    return as_host(sampler, NAME, signature or signature_of(NAME, form))


_step = step_function("V3g")
pipeline_with_logprob = make_pipeline("plain", lambda: _step)
pipeline_with_logprob_fast = make_pipeline("fast", lambda: _step)


def pipeline_replacement(host: Callable[..., Any], *, float32: bool = False) -> tuple[Callable[..., Any], str]:
    """Our `pipeline_with_logprob` in place of a host's; the host's own, with the reason, if it is not known.

    Args:
        host: the host's own function.
        float32: keep the states in float32 even where the host rounds them after scoring.
    """
    signature = inspect.signature(host)
    form = next((form for form in ("plain", "fast") if has_form(signature, form)), None)
    if form is None:
        return host, left("its arguments are not known", host)

    def make(keep: bool) -> Callable[..., Any]:
        return make_pipeline(str(form), step_of(host), float32=keep, signature=signature)

    kept, reason = states_of(host, make, windowed=form == "fast")
    if kept is None:
        return host, left(reason, host)
    if kept:
        return make(True), f"{form}, float32 states"
    return make(float32), f"{form}, states {'kept in float32' if float32 else 'in the dtype of the prompts'}"


def has_form(signature: inspect.Signature, form: str) -> bool:
    """Whether the arguments are a form's; the last ones may be missing, down to those that define it."""
    names, known = list(signature.parameters)[1:], list(signature_of(NAME, form).parameters)[1:]
    needed = [name for name in known if name not in ("return_prev_sample_mean", "sde_type")]
    return names == known[: len(names)] and len(names) >= len(needed)


def left(reason: str, host: Callable[..., Any]) -> str:
    """Why a host's function is left as it is, and whether the step that it calls is one that is replaced."""
    step = inspect.unwrap(host).__globals__.get(STEP)
    home = getattr(step, "__module__", "")
    replaced = home.startswith("densegrpo_fast.") or home in {entry.module for entry in HOSTS["flow_grpo"].replaced}
    return f"left as it is: {reason}; it calls {'the' if replaced else 'no'} replaced step"


def step_of(host: Callable[..., Any]) -> Callable[[], Step]:
    """Looks up the step that a host's function would call now."""
    module = inspect.unwrap(host).__globals__
    return lambda: module[STEP]


def states_of(
    host: Callable[..., Any],
    make: Callable[[bool], Callable[..., Any]],
    *,
    windowed: bool = True,
    rounded_tolerance: float = 1e-5,
) -> tuple[bool | None, str]:
    """Whether a host keeps float32 states, by which of our two variants agrees with it; None and a reason if none.

    Args:
        host: the host's function.
        make: our function, given whether its states are float32.
        windowed: whether it takes a window.
        rounded_tolerance: absolute, for the variant that rounds, where ours does not round all that the host does.
    """
    module = inspect.unwrap(host).__globals__
    if STEP not in module:
        return None, f"its module has no {STEP}"
    windows = [{"sde_window_size": 2, "sde_window_range": (1, 4)}] if windowed else []
    cases: list[dict[str, Any]] = [{}, {"guidance_scale": 1.0}, {"noise_level": 0.5}, *windows]
    agreeing = [True, False]
    original, state, python = module[STEP], torch.get_rng_state(), random.getstate()
    module[STEP] = _step
    try:
        for case in cases:
            try:
                theirs = sd3_call(host, case)
            except Exception as error:
                return None, f"it raised {error!r} when tried"
            reasons = {}
            for keep in agreeing:
                reason = _difference(theirs, sd3_call(make(keep), case), 1e-5 if keep else rounded_tolerance)
                if reason:
                    reasons[keep] = f"{reason} with states {'in float32' if keep else 'in the dtype of the prompts'}"
            agreeing = [keep for keep in agreeing if keep not in reasons]
            if not agreeing:
                return None, f"its results are others ({'; '.join(reasons.values())})"
    finally:
        module[STEP] = original
        torch.set_rng_state(state)
        random.setstate(python)
    return agreeing[0], ""


def _difference(theirs: Any, ours: Any, atol: float, place: str = "results") -> str:
    """Where two nested results differ; empty when they agree."""
    if isinstance(ours, Tensor):
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            return f"{place} of another shape or dtype"
        near = torch.allclose(theirs.float(), ours.float(), rtol=1e-4, atol=atol, equal_nan=True)
        return "" if near else f"{place} differ by {float((theirs.float() - ours.float()).abs().max()):.3g}"
    keys: Sequence[Any]
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
        if len(theirs) != len(ours):
            return f"{place}: {len(theirs)} entries, not {len(ours)}"
        keys = range(len(ours))
    elif isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        if set(theirs) != set(ours):
            return f"{place} with other names"
        keys = list(ours)
    else:
        return "" if theirs == ours else f"{place} differ"
    reasons = (_difference(theirs[key], ours[key], atol, f"{place}[{key!r}]") for key in keys)
    return next((reason for reason in reasons if reason), "")
