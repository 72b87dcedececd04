"""DPM-Solver++: a multistep solver of the flow's ODE, and of its reverse SDE, that remembers a prediction of data.

Source: Lu et al. 2022, "DPM-Solver++" (arXiv 2211.01095), algorithm 2 and appendix on SDEs, for the path
x = (1 - sigma) * data + sigma * noise, so alpha = 1 - sigma and the half log-SNR is lambda = ln((1 - sigma) / sigma). A
step from sigma to sigma' with h = lambda' - lambda, the predictions m_0 at sigma and m_1 one step earlier:

    next = latents_weight * latents + data_weights[0] * m_0 + data_weights[1] * m_1 + std * noise

    ODE  latents_weight = sigma'/sigma            H = h     std = 0
    SDE  latents_weight = sigma'/sigma * e^(-h)   H = 2h    std = sigma' * sqrt(1 - e^(-2h))

The data weigh alpha' * (1 - e^(-H)) at order 1; order 2 adds k * (m_0 - m_1) * h / h_1, where h_1 is the step before,
and k = alpha' * (1 - e^(-H)) / 2 for "midpoint", alpha' * (1 - (1 - e^(-H)) / H) for "heun". At sigma 1 and sigma' 0,
where a lambda is infinite, these have finite limits, which are what is computed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from densegrpo_fast.flow import reference
from densegrpo_fast.flow.dynamics import gaussian_constants
from densegrpo_fast.flow.schedule import check_sigmas

SolverType = Literal["midpoint", "heun"]

SOLVER_TYPES: tuple[str, ...] = get_args(SolverType)
ORDERS = (1, 2)


@dataclass(frozen=True)
class SolverStep:
    """One step as an affine map of latents and predictions of data, in float64.

    Attributes:
        latents_weight: of the state.
        data_weights: of the prediction at this state and, at order 2, of the one before.
        std: of the noise; 0 for the ODE.
        sigma: noise level of the state.
    """

    latents_weight: float
    data_weights: tuple[float, ...]
    std: float
    sigma: float

    def row(self) -> list[float]:
        """The step as a row of `dynamics` in latents and velocity, without the part of the earlier prediction.

        data = latents - sigma * velocity; STD_DEV is that of the noise.

        Returns:
            6 numbers; a step without noise has 0 in its last four, as there.
        """
        current = self.data_weights[0]
        scale, constant = gaussian_constants(self.std) if self.std > 0 else (0.0, 0.0)
        return [self.latents_weight + current, -current * self.sigma, self.std, self.std, scale, constant]


def solver_step(
    sigmas: Sequence[float], step: int, *, order: int = 2, solver_type: str = "midpoint", stochastic: bool = False
) -> SolverStep:
    """Weights of one step.

    Args:
        sigmas: grid, [T+1], strictly decreasing in [0, 1].
        step: index in [0, T); order 2 needs step >= 1.
        order: 1 or 2.
        solver_type: "midpoint" or "heun"; they differ at order 2.
        stochastic: solve the reverse SDE instead of the ODE.

    Raises:
        ValueError: an argument is out of range.
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(map(str, ORDERS))}, got {order!r}")
    if solver_type not in SOLVER_TYPES:
        raise ValueError(f"solver_type must be one of {', '.join(SOLVER_TYPES)}, got {solver_type!r}")
    if not order - 1 <= step < len(sigmas) - 1:
        raise ValueError(f"step must be in [{order - 1}, {len(sigmas) - 1}) at order {order}, got {step}")
    sigma, next_sigma = sigmas[step], sigmas[step + 1]
    if not 0 <= next_sigma < sigma <= 1:
        raise ValueError(f"sigmas must decrease in [0, 1], got {sigma} and {next_sigma} at step {step}")

    h = _half_log_snr(next_sigma) - _half_log_snr(sigma)
    span = 2 * h if stochastic else h
    gained = -math.expm1(-span)
    weights = [(1 - next_sigma) * gained]
    if order == 2:
        earlier = _half_log_snr(sigma) - _half_log_snr(sigmas[step - 1])
        # Once noise is gone the step is infinite: the prediction of data is then taken as it is.
        slope = h / earlier if math.isfinite(h) else 0.0
        bend = gained / 2 if solver_type == "midpoint" else 1 - gained / span
        correction = (1 - next_sigma) * bend * slope
        weights = [weights[0] + correction, -correction]
    kept = math.exp(-h) if stochastic else 1.0
    std = next_sigma * math.sqrt(gained) if stochastic else 0.0
    return SolverStep(next_sigma / sigma * kept, tuple(weights), std, sigma)


def combine(latents: Tensor, data: Sequence[Tensor], step: SolverStep) -> Tensor:
    """Mean of the next state.

    Args:
        latents: state, [B, ...] floating.
        data: predictions of data, the newest first, same shape; as many as the step has weights, or more.
        step: weights.

    Returns:
        [B, ...] in the compute dtype (float32, or float64 if an input is).

    Raises:
        ValueError: too few predictions.
    """
    if len(data) < len(step.data_weights):
        raise ValueError(f"a step of order {len(step.data_weights)} needs as many predictions, got {len(data)}")
    dtype = reference.compute_dtype(latents, *data)
    mean = step.latents_weight * latents.to(dtype)
    for weight, prediction in zip(step.data_weights, data, strict=False):
        mean = torch.add(mean, prediction.to(dtype), alpha=weight)
    return mean


class DPMSolver:
    """The ODE solver with its memory, for sampling.

    The first step has order 1, for want of a memory, and so has the last one onto sigma 0.
    """

    def __init__(self, sigmas: Tensor, *, order: int = 2, solver_type: str = "midpoint") -> None:
        """Args: grid [T+1] floating (float32 values are used); `order` and `solver_type` as in `solver_step`.

        Raises:
            TypeError, ValueError: not a usable grid, or an argument out of range.
        """
        check_sigmas(sigmas)
        grid = sigmas.detach().to("cpu", torch.float32).tolist()
        self._steps = [
            solver_step(grid, step, order=1 if step == 0 or grid[step + 1] == 0 else order, solver_type=solver_type)
            for step in range(len(grid) - 1)
        ]
        self._data: list[Tensor] = []
        self._next = 0

    def step(self, latents: Tensor, velocity: Tensor, index: int) -> Tensor:
        """Next state. Steps are taken in order, each once; step 0 forgets the past.

        Args:
            latents: state, [B, ...] floating.
            velocity: model output there, noise minus data, same shape.
            index: step, in [0, T).

        Returns:
            [B, ...] in the dtype of `latents`.

        Raises:
            ValueError: the step before this one was not the last one taken.
        """
        if index not in (0, self._next):
            raise ValueError(f"steps must be taken in order: expected 0 or {self._next}, got {index}")
        self._next = index + 1
        dtype = reference.compute_dtype(latents, velocity)
        weights = self._steps[index]
        earlier = [] if index == 0 else self._data[:1]
        self._data = [latents.to(dtype) - weights.sigma * velocity.to(dtype), *earlier]
        return combine(latents, self._data, weights).to(latents.dtype)


def _half_log_snr(sigma: float) -> float:
    if sigma in (0.0, 1.0):
        return math.inf if sigma == 0 else -math.inf
    return math.log1p(-sigma) - math.log(sigma)
