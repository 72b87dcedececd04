"""Which signature generation a host's step is: by its parameters, then by what it computes.

Parameters alone do not tell: forks keep a signature and change the formula, the noise level or a default. So the
host's own function runs once on a few numbers, scoring and sampling, and it is replaced only if ours returns the same.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat._patch import CompatError
from densegrpo_fast.compat.flow_grpo.step import VERSIONS, step_function
from densegrpo_fast.compat.flow_grpo.tracker import PerPromptStatTracker
from densegrpo_fast.flow import schedule

_V1 = ("prev_sample", "generator", "determistic")
_V2 = ("noise_level", "prev_sample", "generator")
SIGNATURES: dict[tuple[str, ...], str] = {
    _V1: "V1",
    (*_V1, "noise_level"): "V1",
    _V2: "V2",
    (*_V2, "sde_type"): "V3",
    (*_V2, "sde_type", "return_sqrt_dt"): "V3g",
    (*_V1, "return_pixel_log_prob", "return_dt_and_std_dev_t"): "Wan",
}
"""Parameters after (scheduler, model_output, timestep, sample) -> generation."""

_DEFAULT_LEVEL = 0.7


def detect_version(step: Callable[..., Any]) -> str:
    """Generation of a host's `sde_step_with_logprob` by its parameter names.

    Raises:
        CompatError: no generation has these parameters.
    """
    try:
        names = tuple(inspect.signature(step).parameters)
    except (TypeError, ValueError) as error:
        raise CompatError(f"sde_step_with_logprob of the host has no signature to read: {error}") from error
    if names[1:4] != ("model_output", "timestep", "sample") or names[4:] not in SIGNATURES:
        known = "; ".join(f"{version}: {', '.join(rest)}" for rest, version in SIGNATURES.items())
        raise CompatError(
            f"sde_step_with_logprob of the host takes ({', '.join(names)}), which is no known generation "
            f"(after sample, {known}). Nothing was replaced."
        )
    return SIGNATURES[names[4:]]


def replacement_of(
    host: Callable[..., Any], *, version: str | None = None, rng: str = "host", seed: int | None = None
) -> tuple[Callable[..., tuple[Tensor, ...]], str]:
    """Our step in place of a host's, after comparing the two.

    Args:
        host: the host's own function.
        version: one of `VERSIONS`; None detects it.
        rng, seed: as in `step_function`.

    Returns:
        the replacement and a few words on it.

    Raises:
        CompatError: an unknown signature, another one than `version`, or different results.
    """
    found = detect_version(host)
    if version is not None and version != found:
        raise CompatError(
            f"version {version} was asked for, but the host's sde_step_with_logprob has the parameters of {found}; "
            "leave version out to take that"
        )
    formulas: list[dict[str, Any]] = [{"sde_type": "sde"}]
    if found == "V2":
        formulas.append({"sde_type": "cps"})
    elif found == "V1":
        formulas = [{"noise_level": _v1_noise_level(host)}]
    for formula in formulas:
        if not _difference(host, _with_defaults_of(host, step_function(found, **formula)), found):
            step = _with_defaults_of(host, step_function(found, rng=rng, seed=seed, **formula))
            constants = ", ".join(f"{name} {value}" for name, value in formula.items() if found in ("V1", "V2"))
            return step, f"{found}{', ' * bool(constants)}{constants}, rng {rng}"
    reason = _difference(host, step_function(found, **formulas[0]), found)
    raise CompatError(
        f"sde_step_with_logprob of the host has the parameters of {found} but not its results: {reason}. It was "
        "changed in this copy of the host, so nothing was replaced."
    )


def tracker_replacement(host: Any) -> tuple[type[PerPromptStatTracker], str]:
    """`PerPromptStatTracker` in place of a host's, after comparing the two on a few rewards.

    Raises:
        CompatError: the host's differs.
    """
    prompts, rewards = ["b", "a", "b", "a", "b"], [0.1, 0.7, 0.4, 0.2, 0.45]
    cases = [(flag, kind, rows) for flag in (False, True) for kind in ("grpo", "rwr", "sft", "dpo") for rows in (1, 2)]
    for global_std, kind, width in cases:
        values = rewards if width == 1 else [[reward, 2 * reward * reward] for reward in rewards]
        if kind in ("sft", "dpo") and width == 2:
            continue
        ours = PerPromptStatTracker(global_std).update(prompts, values, type=kind)
        try:
            theirs = host(global_std).update(prompts, values, type=kind)
        except Exception as error:
            raise CompatError(f"PerPromptStatTracker of the host cannot be replaced: {error!r}") from error
        if theirs.shape != ours.shape or abs(theirs - ours).max() > 1e-12:
            raise CompatError(f'PerPromptStatTracker of the host computes other advantages for type "{kind}"')
    # A class of its own, so that undoing the patch does not touch other uses of ours.
    return type("PerPromptStatTracker", (PerPromptStatTracker,), {}), "float64, as the host's"


class _ProbeScheduler:
    """A grid of three steps with the two lookups that the hosts use."""

    def __init__(self) -> None:
        self.sigmas = schedule.sd3_sigmas(3)
        self.timesteps = self.sigmas[:-1] * 1000

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        return int((self.timesteps == timestep).nonzero()[0])


def _probe(step: Callable[..., Any], *, ndim: int, scored: bool, **options: Any) -> tuple[Tensor, ...]:
    """Results of a step on rows at two steps of the probe's grid; torch's generator is left as it was."""
    state = torch.get_rng_state()
    try:
        with torch.no_grad(), torch.device("cpu"):
            scheduler = _ProbeScheduler()
            ramp = torch.linspace(-1, 1, 12, dtype=torch.float32).reshape(2, 3, *[1] * (ndim - 3), 2)
            prev = {"prev_sample": 0.3 * ramp + 0.1} if scored else {}
            return step(scheduler, ramp.cos(), scheduler.timesteps[[0, 2]], ramp, **prev, **options)
    finally:
        torch.set_rng_state(state)


def _difference(host: Callable[..., Any], ours: Callable[..., Any], version: str) -> str:
    """What differs between two steps of a generation; empty when nothing does."""
    options: list[dict[str, Any]] = [{}]
    if version in ("V3", "V3g"):
        options += [{"sde_type": "sde", "noise_level": 0.5}, {"sde_type": "cps", "noise_level": 0.5}]
    if version == "V3g":
        options.append({"return_sqrt_dt": True})
    if version == "V2":
        options.append({"noise_level": 0.5})
    if version in ("V1", "Wan"):
        options.append({"determistic": True})
    if version == "Wan":
        options.append({"return_dt_and_std_dev_t": True})
    for case in options:
        for scored in (True, False):
            call = f"{'scoring' if scored else 'sampling'} with {case or 'its defaults'}"
            ndim = 5 if version == "Wan" else 4
            try:
                theirs = _probe(host, ndim=ndim, scored=scored, **case)
            except Exception as error:
                return f"{call} it raised {error!r}"
            expected = _probe(ours, ndim=ndim, scored=scored, **case)
            if len(theirs) != len(expected):
                return f"{call} it returned {len(theirs)} values, not {len(expected)}"
            for place, (their, our) in enumerate(zip(theirs, expected, strict=True)):
                if their.shape != our.shape or their.dtype != our.dtype:
                    return f"{call} value {place + 1} is {their.dtype} {list(their.shape)}"
                if not torch.allclose(their, our, rtol=1e-4, atol=1e-5, equal_nan=True):
                    return f"{call} value {place + 1} differs by {float((their - our).abs().max()):.3g}"
    return ""


def _v1_noise_level(host: Callable[..., Any]) -> float:
    """The noise level in the source, or in the default, of a V1 step: the fourth value is proportional to it."""
    try:
        theirs = _probe(host, ndim=4, scored=True)[3]
        ours = _probe(step_function("V1", noise_level=_DEFAULT_LEVEL), ndim=4, scored=True)[3]
        return round(float((_DEFAULT_LEVEL * theirs / ours).mean()), 4)
    except Exception:
        return _DEFAULT_LEVEL


def _with_defaults_of(host: Callable[..., Any], step: Callable[..., Any]) -> Callable[..., Any]:
    """Give our step the host's default values where the two have the same number of them."""
    theirs = getattr(host, "__defaults__", None)
    if isinstance(step, FunctionType) and theirs and len(theirs) == len(step.__defaults__ or ()):
        step.__defaults__ = theirs
    return step


__all__ = ["SIGNATURES", "VERSIONS", "detect_version", "replacement_of", "tracker_replacement"]
