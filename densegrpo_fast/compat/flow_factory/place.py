"""Where Flow-Factory's steps are: the noise levels behind timesteps, and the coefficients of each row.

A schedule's tensors and the call's own timesteps are read in one copy, and once (`_host_values`): a schedule costs one
wait, a stored batch another, and no step any.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat._host_values import host_tensor, host_values, read_ahead
from densegrpo_fast.compat._steps import Row, device_table, host_rows
from densegrpo_fast.flow.dynamics import Family

_logger = logging.getLogger(__name__)

TIMESTEPS_PER_SIGMA = 1000


@dataclass(frozen=True)
class Place:
    """The step of every row of a batch, or of all rows alike.

    Attributes:
        rows: coefficients, 1 or B rows of `dynamics`.
        dts: change of the noise level, as many.
        steps: place in the schedule, as many; None where a noise level is not in it.
        timesteps: as they were asked for.
    """

    rows: tuple[Row, ...]
    dts: tuple[float, ...]
    steps: tuple[int | None, ...]
    timesteps: tuple[float, ...]

    def columns(self, latents: Tensor) -> list[Tensor]:
        """Coefficients and dt as [1 or B, 1, ...] float32 tensors on the device of `latents`."""
        table = device_table(tuple((*row, dt) for row, dt in zip(self.rows, self.dts, strict=True)), latents.device)
        return [column.reshape(-1, *[1] * (latents.ndim - 1)) for column in table.unbind(1)]

    def indices(self, device: torch.device) -> int | Tensor:
        """Places in the schedule, for counters.

        Raises:
            ValueError: a noise level is not in the schedule.
        """
        for step, timestep in zip(self.steps, self.timesteps, strict=True):
            if step is None:
                raise ValueError(f'timestep {timestep} is not in the schedule, whose steps rng="philox" counts')
        if len(self.steps) == 1:
            return int(self.steps[0] or 0)
        return _index_tensor(self.steps, device)


def places_of(
    scheduler: Any,
    timestep: float | Tensor,
    timestep_next: float | Tensor | None,
    noise_level: float | Tensor | None,
    family: Family,
    sigma_max: float | None,
    batch: int,
) -> Place:
    """Coefficients of a call of the host's step; arguments as there.

    Args:
        batch: number of rows.

    Raises:
        ValueError: a timestep that is not in the schedule where it has to be, or values that do not belong together.
        TypeError: a timestep of another type.
    """
    schedule = (scheduler.sigmas, scheduler.timesteps, getattr(scheduler, "current_sde_steps", None))
    read_ahead(*(value for value in (*schedule, timestep, timestep_next, noise_level) if isinstance(value, Tensor)))
    grid = host_values(scheduler.sigmas)
    if timestep_next is None:
        steps = _schedule_steps(scheduler, timestep)
        values = tuple(scheduler_timesteps(scheduler)[step] for step in steps)
        pairs = [(grid[step], grid[step + 1]) for step in steps]
        known: tuple[int | None, ...] = steps
    else:
        before, after = _sigmas(timestep), _sigmas(timestep_next)
        count = max(len(before), len(after))
        pairs = list(zip(_repeated(before, count), _repeated(after, count), strict=True))
        values = tuple(_repeated(_numbers(timestep), count))
        timesteps = scheduler_timesteps(scheduler)
        known = tuple(
            _first(grid[:-1], sigma, _first(timesteps, value, None))
            for (sigma, _), value in zip(pairs, values, strict=True)
        )
    levels = _levels(scheduler, noise_level, known, values)
    count = max(len(pairs), len(levels))
    if count not in (1, batch) or any(len(own) not in (1, count) for own in (pairs, levels)):
        raise ValueError(
            f"timestep, timestep_next and noise_level must have 1 entry or one per row ({batch}), got {len(pairs)} and "
            f"{len(levels)}"
        )
    entries = list(zip(*(_repeated(own, count) for own in (pairs, levels, known, values)), strict=True))
    entries = entries[:1] if len(set(entries)) == 1 else entries
    inner = float(sigma_max or grid[1])
    return Place(
        rows=tuple(host_rows(pair, family, level, sigma_max=inner)[0] for pair, level, *_ in entries),
        dts=tuple(after - before for (before, after), *_ in entries),
        steps=tuple(step for *_, step, _ in entries),
        timesteps=tuple(value for *_, value in entries),
    )


def scheduler_timesteps(scheduler: Any) -> tuple[float, ...]:
    """Values of a scheduler's timesteps."""
    return host_values(scheduler.timesteps)


def _schedule_steps(scheduler: Any, timestep: float | Tensor) -> tuple[int, ...]:
    """Places of timesteps in the schedule; the second one where a timestep occurs twice, as in diffusers."""
    if isinstance(timestep, int) or _is_index(timestep):
        _logger.warning("the integer timestep %s is taken as the index of a step, as the host takes it", timestep)
        index = int(timestep)
        if not 0 <= index < len(scheduler.timesteps):
            raise ValueError(f"timestep {index} is not the index of one of {len(scheduler.timesteps)} steps")
        return (index,)
    if not isinstance(timestep, (float, Tensor)):
        raise TypeError(f"timestep must be a number or a tensor, got {type(timestep).__name__}")
    if isinstance(timestep, Tensor) and timestep.ndim > 1:
        raise ValueError(f"timestep must be a scalar or have shape [B], got {list(timestep.shape)}")
    found = []
    places = _places(scheduler_timesteps(scheduler))
    for value in _numbers(timestep):
        if value not in places:
            raise ValueError(f"timestep {value} is not in the scheduler's timesteps {list(places)}")
        found.append(places[value])
    return tuple(found)


def _is_index(timestep: float | Tensor) -> bool:
    # On an accelerator the host takes integers for timesteps.
    return isinstance(timestep, Tensor) and timestep.device.type == "cpu" and not timestep.is_floating_point()


@lru_cache(maxsize=64)
def _places(timesteps: tuple[float, ...]) -> dict[float, int]:
    places: dict[float, list[int]] = {}
    for place, value in enumerate(timesteps):
        places.setdefault(value, []).append(place)
    return {value: found[min(1, len(found) - 1)] for value, found in places.items()}


def _levels(
    scheduler: Any, noise_level: float | Tensor | None, steps: Sequence[int | None], timesteps: Sequence[float]
) -> tuple[float, ...]:
    if noise_level is not None:
        return _numbers(noise_level)
    noisy = set(host_values(scheduler.current_sde_steps))
    grid = host_values(scheduler.sigmas)
    levels = []
    for step, timestep in zip(steps, timesteps, strict=True):
        if step is None:
            raise ValueError(
                f"timestep {timestep} is not in the schedule, so its noise level is not known; give noise_level"
            )
        levels.append(float(scheduler.noise_level) if _first(grid, grid[step], step) in noisy else 0.0)
    return tuple(levels)


def _numbers(value: float | Tensor) -> tuple[float, ...]:
    """Values as float32 numbers, which the host compares and computes with."""
    return host_values(host_tensor(value).float() if isinstance(value, Tensor) else torch.tensor(float(value)))


def _sigmas(timestep: float | Tensor) -> tuple[float, ...]:
    """timestep / 1000 in the timestep's own dtype, then in float32."""
    if isinstance(timestep, Tensor):
        return _numbers(host_tensor(timestep) / TIMESTEPS_PER_SIGMA)
    return _numbers(timestep / TIMESTEPS_PER_SIGMA)


def _first(values: Sequence[float], wanted: float, otherwise: int | None) -> int | None:
    return values.index(wanted) if wanted in values else otherwise


def _repeated(values: Sequence[Any], count: int) -> Sequence[Any]:
    return values if len(values) == count else [values[0]] * count if len(values) == 1 else values


@lru_cache(maxsize=256)
def _index_tensor(steps: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(steps).to(device)
