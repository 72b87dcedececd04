"""From a host's step to our ops: its signature, then coefficients, mean, sampling, scoring.

All formulas are those of `flow.dynamics`; what a host does differently is data here: a mean without the score, a
log-density without its constants, what it returns where there is no noise. There the hosts' log-probabilities are NaN
or infinite, but the ops take finite coefficients: a noise-free step is scored by its distance, and the host's own
factor of that distance is applied to the result (`HostTable`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from inspect import Parameter, Signature
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat.host_values import host_values
from densegrpo_fast.compat.rng import PhiloxNoise
from densegrpo_fast.flow import ops, reference
from densegrpo_fast.flow.dynamics import LOG_PROB_CONST, LOG_PROB_SCALE, A, B, C, Family, coefficients

Row = tuple[float, ...]
"""One row of `dynamics.coefficients`."""


def as_host(body: Callable[..., Any], name: str, signature: Signature) -> Callable[..., Any]:
    """A function of a host's name and signature.

    Args:
        body: takes the first argument by place and the others by name.
        name: of the function, or `Class.name`.
        signature: as the host has it.
    """
    parameters = dict(signature.parameters)
    first, *_ = parameters
    defaults = {key: value.default for key, value in parameters.items() if value.default is not Parameter.empty}

    def call(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(parameters, args, strict=False), **kwargs)
        options = defaults | given
        if len(given) != len(args) + len(kwargs) or options.keys() != parameters.keys():
            signature.bind(*args, **kwargs)  # raises, and says what is wrong
        return body(options.pop(first), **options)

    call.__module__, call.__name__, call.__qualname__ = body.__module__, name.rpartition(".")[2], name
    call.__signature__ = signature  # type: ignore[attr-defined]
    call.__doc__ = f"The host's {name}; see the docstring of the module."
    return call


@dataclass(frozen=True, eq=False)
class HostTable:
    """Coefficients of steps on one device.

    Attributes:
        rows: [T, 6] float32, columns as in `flow.dynamics`, log-probability columns as the host has them.
        usable: the same for the ops, all finite.
        factor: [T] float32, of the ops' log-probabilities; None where all are 1.
    """

    rows: Tensor
    usable: Tensor
    factor: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, device: torch.device, *, nowhere: bool = False) -> HostTable:
        """Make the table of rows [T, 6] float32 that lie on the CPU.

        Args:
            rows: coefficients; only the log-probability columns may have entries that are not finite.
            device: where the table is to lie.
            nowhere: add a row T of NaN; the ops take it on an accelerator only.
        """
        scale = rows[:, LOG_PROB_SCALE]
        silent = ~scale.isfinite()
        usable = rows.clone()
        usable[silent, LOG_PROB_SCALE], usable[silent, LOG_PROB_CONST] = 1.0, 0.0
        tensors = [rows, usable, scale.where(silent, 1.0)]
        if nowhere:
            tensors = [torch.cat([tensor, torch.full_like(tensor[:1], math.nan)]) for tensor in tensors]
        # without waiting for the device
        rows, usable, factor = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return cls(rows, usable, factor if silent.any() else None)

    def log_prob(self, latents: Tensor, velocity: Tensor, next_latents: Tensor, index: int | Tensor) -> Tensor:
        """log_prob of a next state, [B], in the compute dtype; differentiable in `velocity`.

        Args:
            latents, velocity, next_latents: [B, ...].
            index: step of every row: one int, or [B] int64.
        """
        return self._scaled(ops.sde_log_prob(latents, velocity, next_latents.detach(), self.usable, index), index)

    def draw(
        self, philox: PhiloxNoise, latents: Tensor, velocity: Tensor, index: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """A next state with noise from counters, and its log_prob, without gradient; arguments as for `log_prob`."""
        next_latents, log_prob = philox.step(latents, velocity, self.usable, index)
        return next_latents, self._scaled(log_prob, index)

    def _scaled(self, log_prob: Tensor, index: int | Tensor) -> Tensor:
        return log_prob if self.factor is None else log_prob * self.factor[index]


@lru_cache(maxsize=256)
def host_table(rows: Sequence[Sequence[float]], device: torch.device) -> HostTable:
    """`HostTable.of` rows of numbers; kept, so that later steps copy nothing. Not to be changed in place."""
    # Later calls may need gradients even if this one may not.
    with torch.inference_mode(False):
        return HostTable.of(torch.tensor(rows, dtype=torch.float32), device)


@dataclass(frozen=True)
class Step:
    """A step that all rows of a batch take.

    Attributes:
        rows: coefficients of the steps of its grid, as they are in `table`; rows that no one asked for may be missing
            or 0.
        index: its own place.
        sigma, next_sigma: noise levels before and after it.
    """

    rows: tuple[Row, ...]
    index: int
    sigma: float
    next_sigma: float

    @property
    def row(self) -> Row:
        """Its coefficients."""
        return self.rows[self.index]

    @property
    def dt(self) -> float:
        """Change of the noise level, negative."""
        return self.next_sigma - self.sigma

    def table(self, device: torch.device) -> HostTable:
        """The rows on a device."""
        return host_table(self.rows, device)


@lru_cache(maxsize=64)
def second_places(timesteps: tuple[float, ...]) -> dict[float, int]:
    """Timestep -> its step; as in diffusers, one that occurs twice means its second place."""
    places: dict[float, list[int]] = {}
    for place, value in enumerate(timesteps):
        places.setdefault(value, []).append(place)
    return {value: found[min(1, len(found) - 1)] for value, found in places.items()}


def unit_grid(sigmas: Tensor) -> tuple[float, ...]:
    """The float32 values of a grid; a first value that the host's shift has rounded to 1 +- 2e-7 is 1.

    Raises:
        TypeError: not a floating point tensor.
        ValueError: not one-dimensional.
    """
    if not isinstance(sigmas, Tensor) or not sigmas.is_floating_point():
        raise TypeError(f"sigmas must be a floating point tensor, got {type(sigmas).__name__}")
    if sigmas.ndim != 1:
        raise ValueError(f"sigmas must have shape [T+1], got {list(sigmas.shape)}")
    values = host_values(sigmas)
    return (1.0, *values[1:]) if values and abs(values[0] - 1) < 2e-7 else values


def grid_step(
    sigmas: Tensor,
    index: int,
    family: Family,
    noise_level: float,
    *,
    euler_mean: bool = False,
    constants: bool = True,
) -> Step:
    """Coefficients of one step of a host's grid.

    Args:
        sigmas: the host's grid, [T+1], on any device.
        index: step, in [0, T).
        family: name of the sampler.
        noise_level: its strength.
        euler_mean: noise around Euler's mean instead of the sampler's.
        constants: whether the log-density has its constants.

    Raises:
        IndexError: there is no such step.
        TypeError, ValueError: grid or noise level are not usable.
    """
    grid = unit_grid(sigmas)
    if not 0 <= index < len(grid) - 1:
        raise IndexError(f"index must be in [0, {len(grid) - 1}), a step of the {len(grid)} sigmas, got {index}")
    rows = host_rows(grid, family, float(noise_level), euler_mean, constants)
    return Step(rows, index, grid[index], grid[index + 1])


@lru_cache(maxsize=256)
def host_rows(
    grid: tuple[float, ...],
    family: Family,
    noise_level: float,
    euler_mean: bool = False,
    constants: bool = True,
    sigma_max: float | None = None,
) -> tuple[Row, ...]:
    """Rows of a grid with the hosts' log-probabilities, also where there is no noise: see `grid_step`."""
    table = coefficients(torch.tensor(grid, dtype=torch.float32), noise_level, family, sigma_max=sigma_max).table
    rows = table.tolist()
    for place, row in enumerate(rows):
        if euler_mean:
            row[A], row[B] = 1.0, grid[place + 1] - grid[place]
        if not constants:
            row[LOG_PROB_CONST] = 0.0
        if row[C] == 0 and family == "cps":
            row[LOG_PROB_SCALE] = 1.0
        elif row[C] == 0 and family != "ode":
            row[LOG_PROB_SCALE], row[LOG_PROB_CONST] = (math.nan, math.nan) if constants else (math.inf, 0.0)
    return tuple(map(tuple, rows))


def mean_of(latents: Tensor, velocity: Tensor, row: Row) -> Tensor:
    """Mean of the next state, in the compute dtype; Euler's step to the bit where A is 1."""
    dtype = reference.compute_dtype(latents, velocity)
    return torch.add(velocity.to(dtype) * row[B], latents.to(dtype), alpha=row[A])


def is_narrower(velocity: Tensor, latents: Tensor) -> bool:
    """Whether the velocity has fewer bits than the state, so that a host rounds its products.

    A host's sigmas are 0-dimensional and do not widen a product: with a 16-bit velocity each product is rounded to 16
    bits before it is added to the state, and a sigma on an accelerator, or one in front on the CPU, before it is
    multiplied. To round alike, products have to be written with the host's own tensors, in the host's order.
    """
    return torch.finfo(velocity.dtype).bits < torch.finfo(latents.dtype).bits


def equivalent_velocity(products: Sequence[tuple[float, Tensor]], latents: Tensor, b: float) -> Tensor:
    """Velocity whose product with B is a sum of rounded products.

    Args:
        products: (weight, product with the velocity, [B, ...]); weights are applied in the dtype of `latents`.
        latents: state.
        b: coefficient B of the step.
    """
    terms = [product.to(latents.dtype) * (weight / b) for weight, product in products]
    return terms[0] if len(terms) == 1 else terms[0] + terms[1]


def philox_normal(philox: PhiloxNoise, like: Tensor, step_index: int | Tensor, num_steps: int) -> Tensor:
    """Standard normal numbers of some steps' counters, without a step around them.

    Args:
        philox: counters to draw from.
        like: gives shape, dtype and device.
        step_index: step of every row, in [0, T): one int, or [B] int64.
        num_steps: T.
    """
    zero = torch.zeros_like(like)
    table = host_table(((0.0, 0.0, 1.0, 1.0, 0.0, 0.0),) * num_steps, like.device).rows
    return philox.step(zero, zero, table, step_index)[0]


def score(latents: Tensor, velocity: Tensor, next_latents: Tensor, step: Step) -> Tensor:
    """log_prob of a next state, [B], in the compute dtype; differentiable in `velocity`."""
    dtype = reference.compute_dtype(latents, velocity)
    tensors = latents.to(dtype), velocity.to(dtype), next_latents.detach().to(dtype)
    return step.table(latents.device).log_prob(*tensors, step.index)


def sample(
    latents: Tensor,
    velocity: Tensor,
    step: Step,
    philox: PhiloxNoise | None,
    draw: Callable[[Tensor], Tensor],
    mean: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw a next state.

    Args:
        latents, velocity: as for `mean_of`.
        step: where the noise has its strength from.
        philox: counters to draw from; None takes `draw`.
        draw: makes the host's noise for a mean; noise that is narrower than the mean is multiplied in its own dtype.
        mean: `mean_of` these, if it is known.

    Returns:
        next state, with the gradient of the mean if the noise is the host's; its log_prob.
    """
    dtype = reference.compute_dtype(latents, velocity)
    if philox is not None:
        with torch.no_grad():
            next_latents, log_prob = step.table(latents.device).draw(
                philox, latents.to(dtype), velocity.to(dtype), step.index
            )
        if not (torch.is_grad_enabled() and velocity.requires_grad):
            return next_latents, log_prob
        return next_latents, score(latents, velocity, next_latents, step)
    mean = mean_of(latents, velocity, step.row) if mean is None else mean
    noise = draw(mean)
    if is_narrower(noise, mean):
        next_latents = mean + step.table(mean.device).rows[step.index, C] * noise
    else:
        next_latents = torch.add(mean, noise, alpha=step.row[C])
    return next_latents, score(latents, velocity, next_latents, step)
