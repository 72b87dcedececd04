"""Flow-GRPO's `sde_step_with_logprob` in every signature generation, on this package's ops.

The positional order and the fourth value changed over time (`hosts.SIGNATURES`); `detect_version` tells which one a
host has.

    generation   fourth value
    V1           std_dev * sqrt(-dt)
    V2, V3       std_dev
    V3g          std_dev; with return_sqrt_dt, sqrt(-dt) as a fifth value
    Wan          std_dev * sqrt(-dt); with return_dt_and_std_dev_t, std_dev and a fifth value sqrt(-dt) instead

A penalty computed as (mean difference)^2 / (2 fourth^2) is the KL divergence in V1 and Wan, and also for 'cps', whose
std_dev is that of the injected noise; for 'sde' in the others it is (-dt) times that. So the fourth value decides what
a script's beta means.

Arguments and results, all generations:
    model_output    velocity, noise minus data, [B, ...]
    timestep        entries of `scheduler.timesteps`, [1] or [B]
    sample          state, [B, ...]
    noise_level     strength a of the noise
    prev_sample     the next state, to be scored; None samples one
    generator       of the noise; None is torch's global generator
    determistic     take Euler's step, and still score it under the noisy step
    ->  prev_sample [B, ...], log_prob [B], mean [B, ...], fourth and fifth value [1 or B, 1, ...]
V2 and later compute and return float32. V1 converts nothing: its noise has the dtype of `model_output`, a given
`prev_sample` comes back as it is, and float64 stays float64. `mean` carries the gradient to `model_output`; log_prob
is differentiable in `model_output`, not in `sample`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from densegrpo_fast.calibration.store import Calibration
from densegrpo_fast.compat.compare import first_equal, parameters_of, results_of
from densegrpo_fast.compat.flow_grpo.levels import levels_at, read_levels
from densegrpo_fast.compat.flow_grpo.schedule import schedule_of
from densegrpo_fast.compat.hosts import SIGNATURES, signature_of
from densegrpo_fast.compat.patch import CompatError
from densegrpo_fast.compat.probes import sde_calls
from densegrpo_fast.compat.rng import host_noise, make_noise
from densegrpo_fast.compat.steps import as_host
from densegrpo_fast.flow import reference
from densegrpo_fast.flow.dynamics import STD_DEV, A, B, C, Family

Version = Literal["V1", "V2", "V3", "V3g", "Wan"]
VERSIONS: tuple[str, ...] = get_args(Version)

FAMILY_OF: dict[str, Family] = {"sde": "flow_sde", "cps": "cps"}
"""Family behind each of the hosts' `sde_type`s."""

NAME = "sde_step_with_logprob"


def step_function(
    version: str = "V3g",
    *,
    rng: str = "host",
    seed: int | None = None,
    sde_type: str = "sde",
    noise_level: float = 0.7,
    noise_levels: str | Path | Calibration | None = None,
    signature: inspect.Signature | None = None,
) -> Callable[..., tuple[Tensor, ...]]:
    """Make a `sde_step_with_logprob` of one signature generation.

    Args:
        version: one of `VERSIONS`.
        rng: "host" draws exactly what the host draws, from its generators; also for steps that use no noise.
            "philox" draws from counters, see `rng.PhiloxNoise`, and takes no notice of `generator`.
        seed: of "philox"; None takes `torch.initial_seed()`.
        sde_type: default of V3 and V3g; the formula of V1 and V2, which have no such argument (FlowCPS's V2 is "cps").
        noise_level: default of the argument; in the V1 scripts that have none, the constant in their source.
        noise_levels: file of `densegrpo_fast.calibrate`, or what `read_calibration` returns: its level of each step
            takes the place of any noise level but 0. A call for other dynamics, another grid, or a step that was not
            calibrated raises a ValueError (the last not for timesteps on an accelerator: log_prob is then NaN).
        signature: of the result, with defaults of its own; default: that of the generation.

    Raises:
        ValueError: an unknown version, rng or sde_type.
        UsageError: the file cannot be read.
    """
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
    _check_type(sde_type)
    noise, calibration = make_noise(rng, seed), read_levels(noise_levels)
    level = 1.0 if version == "Wan" else noise_level
    if signature is None:
        defaults = {"sde_type": sde_type, "noise_level": level}
        newest = signature_of(NAME, "V1 with noise_level" if version == "V1" else version)
        parameters = [own.replace(default=defaults.get(key, own.default)) for key, own in newest.parameters.items()]
        signature = newest.replace(parameters=parameters)

    def step(
        scheduler: Any,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        prev_sample: Tensor | None = None,
        generator: torch.Generator | None = None,
        noise_level: float = level,
        sde_type: str = sde_type,
        determistic: bool = False,
        return_sqrt_dt: bool = False,
        return_pixel_log_prob: bool = False,
        return_dt_and_std_dev_t: bool = False,
    ) -> tuple[Tensor, ...]:
        # Nothing is read from the device once the schedule has been.
        if version in ("V1", "Wan") and prev_sample is not None and generator is not None:
            raise ValueError("give prev_sample, to score a transition, or generator, to sample one; not both")
        _check_type(sde_type)
        if version != "V1":
            model_output, sample = model_output.float(), sample.float()
            prev_sample = prev_sample if prev_sample is None else prev_sample.float()
        schedule = schedule_of(scheduler)
        index, length = schedule.find(timestep)
        if length not in (1, len(sample)):
            raise ValueError(f"timestep must have 1 entry or one per row ({len(sample)}), got {length}")
        device = sample.device
        family: Family = "wan" if version == "Wan" else FAMILY_OF[sde_type]
        strength: float | tuple[float, ...] = float(noise_level)
        if calibration is not None and noise_level != 0:
            known = [index] if isinstance(index, int) else index.tolist() if index.device.type == "cpu" else []
            strength = levels_at(calibration, schedule, family, known)
        table = schedule.table(family, strength, device)
        if isinstance(index, Tensor):
            index = index.to(device)
            rows, dt = table.rows.index_select(0, index), schedule.dt(device).index_select(0, index)
            index = index.expand(len(sample))
        else:
            rows, dt = table.rows[index].expand(length, -1), schedule.dt(device)[index].expand(length)
        columns = [column.reshape(length, *[1] * (sample.ndim - 1)) for column in (*rows.unbind(1), dt)]
        dt = columns[-1]

        dtype = reference.compute_dtype(sample, model_output)
        latents, velocity = sample.to(dtype), model_output.to(dtype)
        mean = columns[A] * latents + columns[B] * velocity
        log_prob = None
        if prev_sample is None and noise is None:
            prev_sample = mean + columns[C] * host_noise(model_output, generator)
        elif prev_sample is None and noise is not None and not determistic:
            prev_sample, log_prob = table.draw(noise, latents, velocity, index)
        if determistic or prev_sample is None:
            prev_sample = latents + dt * velocity
        if log_prob is None or (torch.is_grad_enabled() and velocity.requires_grad):
            log_prob = table.log_prob(latents, velocity, prev_sample.to(dtype), index)
        injected = version in ("V1", "Wan") and not return_dt_and_std_dev_t
        fifth = ((-dt).sqrt(),) if return_sqrt_dt or return_dt_and_std_dev_t else ()
        return prev_sample, log_prob, mean, columns[C if injected else STD_DEV], *fifth

    return as_host(step, NAME, signature)


def _check_type(sde_type: str | None) -> None:
    if sde_type not in FAMILY_OF:
        raise ValueError(f"sde_type must be one of {', '.join(FAMILY_OF)}, got {sde_type!r}")


def detect_version(step: Callable[..., Any]) -> str:
    """Generation of a host's `sde_step_with_logprob` by its parameter names.

    Raises:
        CompatError: no generation has these parameters.
    """
    names = parameters_of(step, NAME)
    known = {tuple(signature_of(NAME, version).parameters)[1:]: version.split()[0] for version in SIGNATURES[NAME]}
    if names[1:] not in known:
        listed = "; ".join(f"{version}: {', '.join(rest[3:])}" for rest, version in known.items())
        raise CompatError(
            f"{NAME} of the host takes ({', '.join(names)}), which is no known generation (after sample, {listed}). "
            "Nothing was replaced."
        )
    return known[names[1:]]


def step_replacement(
    host: Callable[..., Any],
    *,
    version: str | None = None,
    rng: str = "host",
    seed: int | None = None,
    noise_levels: Calibration | None = None,
) -> tuple[Callable[..., tuple[Tensor, ...]], str]:
    """Our step in place of a host's, after comparing the two.

    Parameters alone do not tell: forks keep a signature and change the formula, the noise level or a default.

    Args:
        host: the host's own function.
        version: one of `VERSIONS`; None detects it.
        rng, seed, noise_levels: as in `step_function`.

    Returns:
        the replacement and a few words on it.

    Raises:
        CompatError: an unknown signature, another one than `version`, or different results.
    """
    found = detect_version(host)
    if version is not None and version != found:
        raise CompatError(
            f"version {version} was asked for, but the host's {NAME} has the parameters of {found}; leave version out "
            "to take that"
        )
    calls = sde_calls(found)
    forms: dict[str, dict[str, Any]] = {f"{found}, ": {}}
    if found == "V1":
        level = 0.7
        with suppress(Exception):  # the comparison below says what is wrong
            # the fourth value is proportional to the level
            theirs, ours = (results_of(calls[0][1], step)[3] for step in (host, step_function("V1")))
            level = round((level * theirs / ours).mean().item(), 4)
        forms = {f"V1, noise_level {level}, ": {"noise_level": level}}
    elif found == "V2":
        forms = {f"V2, sde_type {kind}, ": {"sde_type": kind} for kind in FAMILY_OF}
    signature = inspect.signature(host)
    candidates = {words: step_function(found, signature=signature, **form) for words, form in forms.items()}
    words = first_equal(host, NAME, candidates, calls, f"the parameters of {found} but not its results:")
    step = step_function(found, rng=rng, seed=seed, signature=signature, noise_levels=noise_levels, **forms[words])
    levels = "" if noise_levels is None else f", noise levels of {noise_levels.path.name}"
    return step, f"{words}rng {rng}{levels}"
