"""A calibration's noise level of every step, in the place of the one number that a host's script passes."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from densegrpo_fast.calibration.store import Calibration, read_calibration
from densegrpo_fast.compat.flow_grpo.schedule import Schedule

SAME_SIGMA = 1e-6
"""Largest difference between the grid of a calibration and the scheduler's."""


def read_levels(noise_levels: str | Path | Calibration | None) -> Calibration | None:
    """The levels of a file of `densegrpo_fast.calibrate`, or those that are loaded already.

    Raises:
        UsageError: it cannot be read, or is no such file.
    """
    if isinstance(noise_levels, str | Path):
        return read_calibration(Path(noise_levels), "noise_levels")
    return noise_levels


def levels_at(calibration: Calibration, schedule: Schedule, dynamics: str, steps: Iterable[int]) -> tuple[float, ...]:
    """Noise level of each of the scheduler's T steps.

    Args:
        calibration: what was found.
        schedule: the scheduler's grid.
        dynamics: that the host samples with.
        steps: those that are taken.

    Raises:
        ValueError: the calibration is for other dynamics, another grid or number of steps, or without noise in a step
            that is taken.
    """
    made, here = calibration.sigmas, schedule.sigmas
    problem = None
    if calibration.num_steps != schedule.num_steps:
        problem = f"for {calibration.num_steps} steps, the scheduler has {schedule.num_steps}"
    elif calibration.dynamics != dynamics:
        problem = f"for dynamics {calibration.dynamics}, this step's are {dynamics}"
    elif max(abs(one - other) for one, other in zip(made, here, strict=True)) > SAME_SIGMA:
        problem = f"for the sigmas {_shown(made)}, the scheduler's are {_shown(here)}"
    elif strange := {*steps} - {*calibration.steps}:
        problem = f"with noise in the steps {list(calibration.steps)}, this call has it in step {min(strange)}"
    if problem is not None:
        raise ValueError(f"noise_levels: {calibration.path} was made {problem}")
    return calibration.noise_level


def _shown(sigmas: Iterable[float]) -> str:
    return ", ".join(f"{sigma:.6g}" for sigma in sigmas)
