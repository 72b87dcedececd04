"""Flow-Factory's `FlowMatchEulerDiscreteSDEScheduler.step` on this package's ops.

    step(self, noise_pred, timestep, latents, next_latents, timestep_next, generator, noise_level, compute_log_prob,
         return_dict, return_kwargs, dynamics_type, sigma_max)
        -> an output with next_latents, next_latents_mean, std_dev_t, dt, log_prob, noise_pred; or, without return_dict,
           (next_latents, next_latents_mean, noise_pred, log_prob, std_dev_t, dt)

    self            the scheduler: sigmas [T+1], timesteps [T], noise_level, dynamics_type, is_eval, current_sde_steps
    noise_pred      velocity, noise minus data, [B, ...]
    timestep        an entry of `timesteps` (number, scalar or [B]), or the index of one as an integer
    latents         state, [B, ...]
    next_latents    the next state, to be scored; None draws one
    timestep_next   where the step goes, scalar or [B], which makes sigma timestep / 1000; None goes to the next entry
    generator       of the noise, one or one per row; None is torch's global generator
    noise_level     strength, a number or one per row; None is the scheduler's inside its SDE steps, 0 outside
    dynamics_type   "Flow-SDE", "Dance-SDE", "CPS" or "ODE"; None is the scheduler's
    sigma_max       inner sigma of Flow-SDE at sigma 1; None is sigmas[1]

Everything is computed and returned in float32: states [B, ...], log_prob [B] (None unless computed; NaN for a
noise-free Flow-SDE or Dance-SDE), std_dev_t and dt [B, 1, ...]. The mean carries the gradient, log_prob that to
`noise_pred`. A drawn state is rounded to the dtype of `latents` before it is scored (`round_trip`); earlier versions of
the host did not.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat._host_table import host_table
from densegrpo_fast.compat._steps import mean_of, philox_normal
from densegrpo_fast.compat.flow_factory.place import Place, places_of
from densegrpo_fast.compat.flow_grpo.rng import host_noise, make_noise
from densegrpo_fast.flow.dynamics import STD_DEV, A, B, C, Family

_logger = logging.getLogger(__name__)

FAMILY_OF: dict[str, Family] = {"Flow-SDE": "flow_sde", "Dance-SDE": "dance", "CPS": "cps", "ODE": "ode"}
"""Family behind each of the host's dynamics."""

PARAMETERS = (
    "self",
    "noise_pred",
    "timestep",
    "latents",
    "next_latents",
    "timestep_next",
    "generator",
    "noise_level",
    "compute_log_prob",
    "return_dict",
    "return_kwargs",
    "dynamics_type",
    "sigma_max",
)
RESULTS = ("next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred")


@dataclass
class SDESchedulerOutput:
    """Stands for the host's class where the host is not installed."""

    next_latents: Tensor | None = None
    next_latents_mean: Tensor | None = None
    std_dev_t: Tensor | None = None
    dt: Tensor | None = None
    log_prob: Tensor | None = None
    noise_pred: Tensor | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SDESchedulerOutput:
        """From fields by name; other names are dropped."""
        return cls(**{name: value for name, value in data.items() if name in RESULTS})


def step_function(
    *,
    rng: str = "host",
    seed: int | None = None,
    round_trip: bool = True,
    dance_std_injected: bool = False,
    output_type: Any = SDESchedulerOutput,
) -> Callable[..., Any]:
    """Make a `step`, to be called with a scheduler or to be an attribute of its class.

    Args:
        rng: "host" draws what the host draws, from its generators; "philox" draws from counters.
        seed: of "philox"; None takes `torch.initial_seed()`.
        round_trip: whether a drawn state is rounded to the dtype of `latents` before it is scored.
        dance_std_injected: whether std_dev_t of "Dance-SDE" includes sqrt(-dt).
        output_type: class of the results, with `from_dict`.

    Raises:
        ValueError: an unknown rng, or a seed that it does not take.
    """
    noise = make_noise(rng, seed)

    def step(
        self: Any,
        noise_pred: Tensor,
        timestep: float | Tensor,
        latents: Tensor,
        next_latents: Tensor | None = None,
        timestep_next: float | Tensor | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        noise_level: float | Tensor | None = None,
        compute_log_prob: bool = True,
        return_dict: bool = True,
        return_kwargs: Sequence[str] = RESULTS,
        dynamics_type: str | None = None,
        sigma_max: float | None = None,
    ) -> Any:
        dynamics = dynamics_type or self.dynamics_type
        if dynamics not in FAMILY_OF:
            raise ValueError(f"dynamics_type must be one of {', '.join(FAMILY_OF)}, got {dynamics!r}")
        family = FAMILY_OF[dynamics]
        level = 0.0 if self.is_eval or family == "ode" else noise_level
        place = places_of(self, timestep, timestep_next, level, family, sigma_max, len(latents))
        stored = latents.dtype
        velocity, latents = noise_pred.float(), latents.float()
        columns = place.columns(latents)

        if len(place.rows) == 1:
            mean = mean_of(latents, velocity, place.rows[0])
        else:
            mean = torch.addcmul(velocity * columns[B], latents, columns[A])
        if next_latents is not None:
            next_latents = next_latents.float()
        elif family == "ode":
            next_latents = mean
        else:
            if noise is None:
                drawn = host_noise(velocity, generator)
            else:
                drawn = philox_normal(noise, velocity, place.indices(latents.device), len(self.timesteps))
            next_latents = torch.addcmul(mean, columns[C], drawn)
            if round_trip:
                next_latents = next_latents.to(stored).float()

        log_prob = None
        if compute_log_prob:
            log_prob = _log_prob(latents, velocity, next_latents, place)
        std = columns[C if family == "dance" and dance_std_injected else STD_DEV]
        rows = (len(latents), *[1] * (latents.ndim - 1))
        std, dt = std.expand(rows).clone(), columns[-1].expand(rows).clone()
        if not return_dict:
            return next_latents, mean, velocity, log_prob, std, dt
        known = dict(zip(RESULTS, (next_latents, mean, std, dt, log_prob, velocity), strict=True))
        for name in return_kwargs:
            if name not in known:
                _logger.warning("the step has no result %r; it has %s", name, ", ".join(RESULTS))
        return output_type.from_dict({name: known[name] for name in return_kwargs if name in known})

    step.__qualname__ = "FlowMatchEulerDiscreteSDEScheduler.step"
    return step


def _log_prob(latents: Tensor, velocity: Tensor, next_latents: Tensor, place: Place) -> Tensor:
    index: int | Tensor = 0 if len(place.rows) == 1 else torch.arange(len(latents), device=latents.device)
    return host_table(place.rows, latents.device).log_prob(latents, velocity, next_latents, index)
