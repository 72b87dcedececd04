"""Flow-Factory: the `step` of its `FlowMatchEulerDiscreteSDEScheduler`, on this package's ops.

    import densegrpo_fast.compat.flow_factory as fast
    fast.install()          # before or after Flow-Factory has been imported

or, without a change, `python -m densegrpo_fast.launch --host flow_factory script.py ...`. The method of the class is
replaced, so that schedulers that exist already take it, too.

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
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat.compare import first_equal, known_version
from densegrpo_fast.compat.host_values import host_tensor, host_values, read_ahead
from densegrpo_fast.compat.hosts import HOSTS, signature_of
from densegrpo_fast.compat.patch import Build, CompatError, Patch, install_host, uninstall_host
from densegrpo_fast.compat.probes import flow_factory_calls
from densegrpo_fast.compat.rng import host_noise, make_noise, philox_samples
from densegrpo_fast.compat.steps import (
    Row,
    as_host,
    host_rows,
    host_table,
    mean_of,
    philox_normal,
    second_places,
)
from densegrpo_fast.flow.dynamics import STD_DEV, A, B, C, Family

__all__ = [
    "FIXES",
    "CompatError",
    "SDESchedulerOutput",
    "install",
    "philox_samples",
    "step",
    "step_function",
    "uninstall",
]

_logger = logging.getLogger(__name__)

FAMILY_OF: dict[str, Family] = {"Flow-SDE": "flow_sde", "Dance-SDE": "dance", "CPS": "cps", "ODE": "ode"}
"""Family behind each of the host's dynamics."""

FIXES = HOSTS["flow_factory"].fixes
"""Flaws of the host that `install(fixes=...)` takes away, one by one; all are kept unless named."""

NAME = "FlowMatchEulerDiscreteSDEScheduler.step"
RESULTS = ("next_latents", "next_latents_mean", "std_dev_t", "dt", "log_prob", "noise_pred")
TIMESTEPS_PER_SIGMA = 1000


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
            index = 0 if len(place.rows) == 1 else torch.arange(len(latents), device=latents.device)
            log_prob = host_table(place.rows, latents.device).log_prob(latents, velocity, next_latents, index)
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

    return as_host(step, NAME, signature_of(NAME))


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
        table = host_table(tuple((*row, dt) for row, dt in zip(self.rows, self.dts, strict=True)), latents.device).rows
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
    grid, timesteps = host_values(scheduler.sigmas), host_values(scheduler.timesteps)
    if timestep_next is None:
        steps = _schedule_steps(scheduler, timestep)
        values = tuple(timesteps[step] for step in steps)
        pairs = [(grid[step], grid[step + 1]) for step in steps]
        known: tuple[int | None, ...] = steps
    else:
        # divided in the timesteps' own dtype, as the host does
        times = (host_tensor(time) if isinstance(time, Tensor) else time for time in (timestep, timestep_next))
        before, after = (_numbers(time / TIMESTEPS_PER_SIGMA) for time in times)
        count = max(len(before), len(after))
        pairs = list(zip(_repeated(before, count), _repeated(after, count), strict=True))
        values = tuple(_repeated(_numbers(timestep), count))
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


def _schedule_steps(scheduler: Any, timestep: float | Tensor) -> tuple[int, ...]:
    """Places of timesteps in the schedule; the second one where a timestep occurs twice, as in diffusers."""
    # On an accelerator the host takes integers for timesteps.
    known = isinstance(timestep, Tensor) and timestep.device.type == "cpu" and not timestep.is_floating_point()
    if isinstance(timestep, int) or known:
        _logger.warning("the integer timestep %s is taken as the index of a step, as the host takes it", timestep)
        index = int(timestep)
        if not 0 <= index < len(scheduler.timesteps):
            raise ValueError(f"timestep {index} is not the index of one of {len(scheduler.timesteps)} steps")
        return (index,)
    if not isinstance(timestep, (float, Tensor)):
        raise TypeError(f"timestep must be a number or a tensor, got {type(timestep).__name__}")
    if isinstance(timestep, Tensor) and timestep.ndim > 1:
        raise ValueError(f"timestep must be a scalar or have shape [B], got {list(timestep.shape)}")
    places, values = second_places(host_values(scheduler.timesteps)), _numbers(timestep)
    for value in values:
        if value not in places:
            raise ValueError(f"timestep {value} is not in the scheduler's timesteps {list(places)}")
    return tuple(places[value] for value in values)


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


def _first(values: Sequence[float], wanted: float, otherwise: int | None) -> int | None:
    return values.index(wanted) if wanted in values else otherwise


def _repeated(values: Sequence[Any], count: int) -> Sequence[Any]:
    return values if len(values) == count else [values[0]] * count if len(values) == 1 else values


@lru_cache(maxsize=256)
def _index_tensor(steps: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(steps).to(device)


step = step_function()
"""Of the newest version, with the host's random numbers."""


def install(
    *,
    rng: str = "host",
    seed: int | None = None,
    fixes: Collection[str] = (),
    say: Callable[[str], None] | None = None,
) -> Patch:
    """Replace the scheduler's `step` by ours, now or as soon as Flow-Factory is imported.

    The original is first compared with its replacement on a few numbers. Calling it again with the same options changes
    nothing; with others, it replaces anew.

    Args:
        rng: "host" keeps the host's random numbers; "philox" takes counters (`philox_samples`).
        seed: of "philox".
        fixes: names of `FIXES`.
        say: receives a line for each replacement; default: the log, at level INFO.

    Returns:
        the patch: `.messages` says what was replaced, `.uninstall()` or the end of a `with` block undoes it.

    Raises:
        CompatError: the host is not installed, or its step is not the one that is known here.
        ValueError: an option is wrong.
    """
    return install_host("flow_factory", _replacements, say, rng=rng, seed=seed, fixes=fixes)


def uninstall() -> None:
    """Put the host's own step back; nothing happens if nothing is replaced."""
    uninstall_host("flow_factory")


def _replacements(rng: str, seed: int | None, fixes: frozenset[str]) -> Mapping[str, Build]:
    forms = {
        f"{'with' if round_trip else 'without'} round trip, Dance-SDE's std {'injected' if injected else 'as given'}": (
            round_trip,
            injected,
        )
        for round_trip in (True, False)
        for injected in (False, True)
    }

    def build(host: Any) -> tuple[Any, str]:
        known_version(host, NAME)
        candidates = {
            words: step_function(round_trip=round_trip, dance_std_injected=injected)
            for words, (round_trip, injected) in forms.items()
        }
        words = first_equal(host, NAME, candidates, flow_factory_calls())
        output_type = host.__globals__.get("SDESchedulerOutput")
        if not hasattr(output_type, "from_dict"):
            raise CompatError(f"{host.__module__} has no SDESchedulerOutput to return results in; nothing was replaced")
        ours = step_function(
            rng=rng,
            seed=seed,
            round_trip=forms[words][0] or "round_trip" in fixes,
            dance_std_injected=forms[words][1],
            output_type=output_type,
        )
        return ours, ", ".join([words, f"rng {rng}", *(f"fix {fix}" for fix in sorted(fixes))])

    return {NAME: build}
