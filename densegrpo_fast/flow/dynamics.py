"""Every stochastic sampler of the field as one affine map per step: the only place with SDE formulas.

    mean         = A * latents + B * velocity
    next_latents = mean + C * noise
    log_prob     = -LOG_PROB_SCALE * mean_over_elements((next_latents - mean)^2) + LOG_PROB_CONST

A step is one row of a [T, 6] table, so a batch may mix steps; a noise-free (ODE) step is a row with C = 0.
With sigma -> sigma', dt = sigma' - sigma < 0 and noise level a, the families differ in the standard deviation
s:

    flow_sde  s = a*sqrt(sigma/(1-sigma)), with sigmas[1] for the inner sigma when sigma is 1
    dance     s = a
    wan       s = a*(sigmas[-1] + (sigmas[1] - sigmas[-1])*sigma)
              A = 1 + s^2*dt/(2*sigma),  B = (1 + s^2*(1-sigma)/(2*sigma))*dt,  C = s*sqrt(-dt)
    cps       s = sigma'*sin(a*pi/2)
    precise   s = sigma'*sqrt(1 - rho^2),  rho^2 = (sigma'*(1-sigma) / (sigma*(1-sigma')))^(a^2)
              A = (1-sigma') + q,  B = -sigma*(1-sigma') + (1-sigma)*q,  C = s,  q = sqrt(sigma'^2 - s^2)

Sources: Flow-GRPO (arXiv 2505.05470, eq. 6 and 11; DenseGRPO, arXiv 2601.20218, lets a vary by step),
DanceGRPO (2505.07818), Flow-CPS (2509.05952), Precise (2605.23522); wan is the variant of Flow-GRPO's Wan 2.1
pipeline.

Log-probabilities are Gaussian densities averaged over the elements. Only cps differs: its authors dropped
every constant, 1/(2 s^2) included, so its log_prob is the plain negative mean square.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor

from densegrpo_fast.flow.schedule import check_sigmas

if TYPE_CHECKING:
    from densegrpo_fast.flow.remainder import Remainder

Family = Literal["ode", "flow_sde", "cps", "dance", "precise", "wan"]

FAMILIES: tuple[str, ...] = get_args(Family)

A, B, C, STD_DEV, LOG_PROB_SCALE, LOG_PROB_CONST = range(6)
NUM_COLUMNS = 6


@dataclass(frozen=True, eq=False)
class StepCoefficients:
    """The affine map of every step of one sampler.

    Attributes:
        table: [T, 6] float32; columns A, B, C, STD_DEV, LOG_PROB_SCALE, LOG_PROB_CONST (this module's
            constants). STD_DEV is what the hosts' step functions return in fourth place. It is s, **without**
            sqrt(-dt), for flow_sde, dance and wan, so the noise really injected is column C. (Flow-GRPO
            before July 2025 and its Wan pipeline return column C instead.) For cps and precise it equals
            column C. It is 0 in an ODE row.
        sigmas: [T+1] float32, the grid the table was computed from.
        family: name of the sampler.
        noise_level: a for every step, length T.
        noisy: whether each step injects noise, length T; False for ODE rows (their log_prob is 0). On the host, so
            that nothing has to ask the device.
        remainder: how the steps after the last noisy one are taken if not by Euler's method (see `flow.remainder`).
    """

    table: Tensor
    sigmas: Tensor
    family: Family
    noise_level: tuple[float, ...]
    noisy: tuple[bool, ...]
    remainder: Remainder | None = None

    @property
    def num_steps(self) -> int:
        """Number of steps T."""
        return len(self.noise_level)

    def to(self, device: torch.device | str) -> StepCoefficients:
        """The same coefficients with their tensors on `device`."""
        return replace(
            self,
            table=self.table.to(device),
            sigmas=self.sigmas.to(device),
        )

    def only(self, steps: Collection[int]) -> StepCoefficients:
        """The same sampler with noise in `steps` alone; every other step is the exact Euler row of `coefficients`.

        Raises:
            ValueError: a step is outside 0..T-1.
        """
        if any(not 0 <= step < self.num_steps for step in steps):
            raise ValueError(f"only: steps must lie in 0..{self.num_steps - 1}, got {sorted(steps)}")
        kept = [step in steps for step in range(self.num_steps)]
        if all(kept):
            return self
        table = torch.zeros_like(self.table)
        table[:, A] = 1.0
        table[:, B] = self.sigmas.diff()
        # a mask would have to be sent to the device, which the host would wait for
        for step in steps:
            table[step] = self.table[step]
        return replace(
            self,
            table=table,
            noise_level=tuple(level if keep else 0.0 for level, keep in zip(self.noise_level, kept, strict=True)),
            noisy=tuple(noisy and keep for noisy, keep in zip(self.noisy, kept, strict=True)),
        )


def coefficients(
    sigmas: Tensor, noise_level: float | Sequence[float], family: Family, *, sigma_max: float | None = None
) -> StepCoefficients:
    """Tabulate the affine map of every step, in float64 on the host, from the grid's float32 values.

    A step of noise level 0, or whose standard deviation is 0, becomes an exact Euler row: A = 1, B = dt, the
    rest 0.

    Args:
        sigmas: grid, [T+1], strictly decreasing in [0, 1]; rounded to float32 first, because the model sees
            it so.
        noise_level: strength a of the noise, dimensionless, at least 0 (cps: at most 1); one value or one per
            step.
        family: one of `FAMILIES`. "ode" takes noise level 0 only.
        sigma_max: what flow_sde takes for the inner sigma at sigma 1, in [0, 1); None takes sigmas[1].

    Returns:
        coefficients on the CPU; move them with `.to(device)`.

    Raises:
        TypeError: `sigmas` is not a floating point tensor.
        ValueError: unknown family, bad grid or `sigma_max`, a noise level of wrong length or range, or one so small
            that the log-probability scale 1/(2 C^2) overflows float32.
    """
    if sigma_max is not None and not 0 <= sigma_max < 1:
        raise ValueError(f"sigma_max must be in [0, 1), got {sigma_max!r}")
    if family not in FAMILIES:
        raise ValueError(f"family must be one of {', '.join(FAMILIES)}, got {family!r}")
    check_sigmas(sigmas)
    sigmas = sigmas.detach().to("cpu", torch.float32)
    grid = sigmas.tolist()
    levels = _levels(noise_level, len(grid) - 1, family)
    rows = [_row(grid, step, level, family, sigma_max) for step, level in enumerate(levels)]
    table = torch.tensor(rows, dtype=torch.float64).to(torch.float32)
    if not table.isfinite().all():
        step = int((~table.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(f"noise_level {levels[step]!r} of step {step} is too small: 1/(2 C^2) overflows float32")
    return StepCoefficients(table, sigmas, family, levels, tuple((table[:, C] > 0).tolist()))


def gaussian_constants(std: float) -> tuple[float, float]:
    """LOG_PROB_SCALE and LOG_PROB_CONST of a normal distribution.

    Args:
        std: its standard deviation, positive.

    Returns:
        1/(2 std^2), infinite where that exceeds the range of floats; -ln(std) - ln(2 pi)/2.
    """
    variance = std * std
    return (1 / (2 * variance) if variance > 0 else math.inf), -math.log(std) - 0.5 * math.log(2 * math.pi)


def _levels(noise_level: float | Sequence[float], num_steps: int, family: str) -> tuple[float, ...]:
    given = [noise_level] * num_steps if isinstance(noise_level, (int, float)) else noise_level
    levels = tuple(float(level) for level in given)
    if len(levels) != num_steps:
        raise ValueError(f"noise_level must be one value or one per step ({num_steps}), got {len(levels)} values")
    highest = {"ode": 0.0, "cps": 1.0}.get(family, math.inf)
    if not all(math.isfinite(level) and 0 <= level <= highest for level in levels):
        bound = "finite and >= 0" if highest == math.inf else f"in [0, {highest:g}]"
        raise ValueError(f"noise_level must be {bound} for family {family!r}, got {noise_level!r}")
    return levels


def _row(grid: list[float], step: int, level: float, family: str, sigma_max: float | None) -> list[float]:
    sigma, next_sigma = grid[step], grid[step + 1]
    dt = next_sigma - sigma
    std_dev = _std_dev(grid, step, level, family, sigma_max)
    if std_dev == 0:
        return [1.0, dt, 0.0, 0.0, 0.0, 0.0]
    if family in ("cps", "precise"):
        # On the trigonometric families the noise replaces part of the old one: what is kept has std q.
        kept = math.sqrt(max(next_sigma**2 - std_dev**2, 0.0))
        a, b, c = (1 - next_sigma) + kept, -sigma * (1 - next_sigma) + (1 - sigma) * kept, std_dev
    else:
        drift = std_dev**2 / (2 * sigma)
        a, b, c = 1 + drift * dt, (1 + drift * (1 - sigma)) * dt, std_dev * math.sqrt(-dt)
    if family == "cps":
        return [a, b, c, std_dev, 1.0, 0.0]
    return [a, b, c, std_dev, *gaussian_constants(c)]


def _std_dev(grid: list[float], step: int, level: float, family: str, sigma_max: float | None) -> float:
    sigma, next_sigma = grid[step], grid[step + 1]
    if level == 0:
        return 0.0
    if family == "flow_sde":
        # sqrt(sigma/(1-sigma)) diverges at pure noise; Flow-GRPO borrows the second sigma inside the root
        # only.
        inner = sigma if sigma != 1 else grid[1] if sigma_max is None else sigma_max
        return level * math.sqrt(sigma / (1 - inner))
    if family == "dance":
        return level
    if family == "wan":
        return level * (grid[-1] + (grid[1] - grid[-1]) * sigma)
    if family == "cps":
        return next_sigma * math.sin(level * math.pi / 2)
    odds = next_sigma * (1 - sigma) / (sigma * (1 - next_sigma))
    # 1 - rho^2, with the digits that the subtraction would lose at small noise levels.
    renewed = 1.0 if odds == 0 else -math.expm1(level * level * math.log(odds))
    return next_sigma * math.sqrt(renewed)
