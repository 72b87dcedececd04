"""Flow-GRPO's `sde_step_with_logprob` in every signature generation, on this package's ops.

The positional order and the fourth value changed over time; `detect` tells which one a host has.

    generation  arguments after (scheduler, model_output, timestep, sample)             fourth value
    V1          prev_sample, generator, determistic, noise_level                         std_dev * sqrt(-dt)
    V2          noise_level, prev_sample, generator                                      std_dev
    V3          V2, sde_type                                                             std_dev
    V3g         V3, return_sqrt_dt: sqrt(-dt) as a fifth value                           std_dev
    Wan         prev_sample, generator, determistic, return_pixel_log_prob,              std_dev * sqrt(-dt);
                return_dt_and_std_dev_t: std_dev and a fifth value sqrt(-dt) instead     see left

A penalty computed as (mean difference)^2 / (2 fourth^2) is the KL divergence in V1 and Wan, and also for 'cps', whose
std_dev is that of the injected noise; for 'sde' in the others it is (-dt) times that. So the fourth value decides what
a script's beta means. "determistic" is the hosts' spelling.

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

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from densegrpo_fast.compat.flow_grpo.rng import PhiloxNoise, host_noise, make_noise
from densegrpo_fast.compat.flow_grpo.schedule import schedule_of
from densegrpo_fast.flow import reference
from densegrpo_fast.flow.dynamics import STD_DEV, A, B, C, Family

Version = Literal["V1", "V2", "V3", "V3g", "Wan"]
VERSIONS: tuple[str, ...] = get_args(Version)

FAMILY_OF: dict[str, Family] = {"sde": "flow_sde", "cps": "cps"}
"""Family behind each of the hosts' `sde_type`s."""


@dataclass(frozen=True)
class _Transition:
    prev_sample: Tensor
    log_prob: Tensor
    mean: Tensor
    std_dev: Tensor
    step_std: Tensor
    sqrt_dt: Tensor


def step_function(
    version: str = "V3g",
    *,
    rng: str = "host",
    seed: int | None = None,
    sde_type: str = "sde",
    noise_level: float = 0.7,
) -> Callable[..., tuple[Tensor, ...]]:
    """Make a `sde_step_with_logprob` of one signature generation.

    Args:
        version: one of `VERSIONS`.
        rng: "host" draws exactly what the host draws, from its generators; also for steps that use no noise.
            "philox" draws from counters, see `rng.PhiloxNoise`, and takes no notice of `generator`.
        seed: of "philox"; None takes `torch.initial_seed()`.
        sde_type: default of V3 and V3g; the formula of V1 and V2, which have no such argument (FlowCPS's V2 is "cps").
        noise_level: default of the argument; in the V1 scripts that have none, the constant in their source.

    Raises:
        ValueError: an unknown version, rng or sde_type.
    """
    if version not in VERSIONS:
        raise ValueError(f"version must be one of {', '.join(VERSIONS)}, got {version!r}")
    _family(sde_type)
    noise = make_noise(rng, seed)
    made = _MAKERS[version](noise, sde_type, noise_level)
    made.__name__ = made.__qualname__ = "sde_step_with_logprob"
    made.__doc__ = f"Flow-GRPO's SDE step, signature generation {version}; see the module's docstring."
    return made


def _make_v1(noise: PhiloxNoise | None, sde_type: str, level: float) -> Callable[..., tuple[Tensor, ...]]:
    def step(
        self: Any,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        prev_sample: Tensor | None = None,
        generator: torch.Generator | None = None,
        determistic: bool = False,
        noise_level: float = level,
    ) -> tuple[Tensor, ...]:
        _not_both(prev_sample, generator)
        family = _family(sde_type)
        done = _transition(
            self, model_output, timestep, sample, prev_sample, generator, noise, family, noise_level, determistic
        )
        given = prev_sample if prev_sample is not None and not determistic else done.prev_sample
        return given, done.log_prob, done.mean, done.step_std

    return step


def _make_v2(noise: PhiloxNoise | None, sde_type: str, level: float) -> Callable[..., tuple[Tensor, ...]]:
    v3g = _make_v3g(noise, sde_type, level)

    def step(
        self: Any,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        noise_level: float = level,
        prev_sample: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, ...]:
        return v3g(self, model_output, timestep, sample, noise_level, prev_sample, generator)

    return step


def _make_v3(noise: PhiloxNoise | None, default: str, level: float) -> Callable[..., tuple[Tensor, ...]]:
    v3g = _make_v3g(noise, default, level)

    def step(
        self: Any,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        noise_level: float = level,
        prev_sample: Tensor | None = None,
        generator: torch.Generator | None = None,
        sde_type: str | None = default,
    ) -> tuple[Tensor, ...]:
        return v3g(self, model_output, timestep, sample, noise_level, prev_sample, generator, sde_type)

    return step


def _make_v3g(noise: PhiloxNoise | None, default: str, level: float) -> Callable[..., tuple[Tensor, ...]]:
    def step(
        self: Any,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        noise_level: float = level,
        prev_sample: Tensor | None = None,
        generator: torch.Generator | None = None,
        sde_type: str | None = default,
        return_sqrt_dt: bool | None = False,
    ) -> tuple[Tensor, ...]:
        prev_sample = prev_sample if prev_sample is None else prev_sample.float()
        family = _family(sde_type)
        done = _transition(
            self, model_output.float(), timestep, sample.float(), prev_sample, generator, noise, family, noise_level
        )
        fifth = (done.sqrt_dt,) if return_sqrt_dt else ()
        return done.prev_sample, done.log_prob, done.mean, done.std_dev, *fifth

    return step


def _make_wan(noise: PhiloxNoise | None, sde_type: str, level: float) -> Callable[..., tuple[Tensor, ...]]:
    def step(
        self: Any,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        prev_sample: Tensor | None = None,
        generator: torch.Generator | None = None,
        determistic: bool = False,
        return_pixel_log_prob: bool = False,
        return_dt_and_std_dev_t: bool = False,
    ) -> tuple[Tensor, ...]:
        _not_both(prev_sample, generator)
        prev_sample = prev_sample if prev_sample is None else prev_sample.float()
        done = _transition(
            self, model_output.float(), timestep, sample.float(), prev_sample, generator, noise, "wan", 1.0, determistic
        )
        last = (done.std_dev, done.sqrt_dt) if return_dt_and_std_dev_t else (done.step_std,)
        return done.prev_sample, done.log_prob, done.mean, *last

    return step


_MAKERS = {"V1": _make_v1, "V2": _make_v2, "V3": _make_v3, "V3g": _make_v3g, "Wan": _make_wan}


def _transition(
    scheduler: Any,
    velocity: Tensor,
    timestep: float | Tensor,
    sample: Tensor,
    prev_sample: Tensor | None,
    generator: torch.Generator | None,
    noise: PhiloxNoise | None,
    family: Family,
    noise_level: float,
    determistic: bool = False,
) -> _Transition:
    """One step: sampled, or given and scored. Nothing is read from the device once the schedule has been."""
    schedule = schedule_of(scheduler)
    index, length = schedule.find(timestep)
    if length not in (1, len(sample)):
        raise ValueError(f"timestep must have 1 entry or one per row ({len(sample)}), got {length}")
    device = sample.device
    table = schedule.table(family, float(noise_level), device)
    if isinstance(index, Tensor):
        index = index.to(device)
        rows, dt = table.rows.index_select(0, index), schedule.dt(device).index_select(0, index)
        index = index.expand(len(sample))
    else:
        rows, dt = table.rows[index].expand(length, -1), schedule.dt(device)[index].expand(length)
    per_row = [column.reshape(length, *[1] * (sample.ndim - 1)) for column in (*rows.unbind(1), dt)]
    dt = per_row[-1]

    drawn = velocity
    dtype = reference.compute_dtype(sample, velocity)
    sample, velocity = sample.to(dtype), velocity.to(dtype)
    mean = per_row[A] * sample + per_row[B] * velocity
    log_prob = None
    if prev_sample is None and noise is None:
        prev_sample = mean + per_row[C] * host_noise(drawn, generator)
    elif prev_sample is None and noise is not None and not determistic:
        prev_sample, log_prob = table.draw(noise, sample, velocity, index)
    if determistic or prev_sample is None:
        prev_sample = sample + dt * velocity
    if log_prob is None or (torch.is_grad_enabled() and velocity.requires_grad):
        log_prob = table.log_prob(sample, velocity, prev_sample.to(dtype), index)
    return _Transition(prev_sample, log_prob, mean, per_row[STD_DEV], per_row[C], (-dt).sqrt())


def _family(sde_type: str | None) -> Family:
    if sde_type not in FAMILY_OF:
        raise ValueError(f"sde_type must be one of {', '.join(FAMILY_OF)}, got {sde_type!r}")
    return FAMILY_OF[sde_type]


def _not_both(prev_sample: Tensor | None, generator: torch.Generator | None) -> None:
    if prev_sample is not None and generator is not None:
        raise ValueError("give prev_sample, to score a transition, or generator, to sample one; not both")
