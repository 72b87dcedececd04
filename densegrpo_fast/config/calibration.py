"""Calibrated noise levels: of which steps, what their file must have been made for, and finding them during a run.

Nothing here imports torch.
"""

from __future__ import annotations

import logging
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from pydantic import Field, model_validator

from densegrpo_fast.calibration.store import Calibration, read_calibration
from densegrpo_fast.config.base import Section
from densegrpo_fast.config.methods import trainable_steps

if TYPE_CHECKING:
    from densegrpo_fast.config.schema import Config

logger = logging.getLogger(__name__)

SIGNS = 8
"""Fewest samples whose signs can move a level."""


class CalibrationOptions(Section):
    """Finding the noise level of each step again during training (DenseGRPO's calibration; see also calibrate)."""

    every: int = Field(
        ge=0,
        description="iterations between two calibrations of the noisy steps' levels on the policy as it is then, the "
        "first before the first iteration; 0 = never",
    )
    samples: int = Field(ge=SIGNS, le=65536, description="trajectories, or trunks, of a calibration round")
    rounds: int = Field(ge=1, le=1000, description="rounds of a calibration, at most")
    lowest: float = Field(ge=0.01, le=3, description="lowest noise level that a calibration may choose")
    highest: float = Field(ge=0.01, le=3, description="highest noise level that a calibration may choose")

    @model_validator(mode="after")
    def _a_range(self) -> CalibrationOptions:
        if self.lowest > self.highest:
            raise ValueError(f"calibration.lowest: expected at most calibration.highest, {self.highest}")
        return self


def calibration_problem(config: Config) -> str | None:
    """What is wrong with the recalibration among the other options, beginning with the key; None = nothing."""
    options, dynamics = config.calibration, config.sampler.dynamics
    if options.every and dynamics == "cps" and options.highest > 1:
        return f"calibration.highest: expected at most 1 with sampler.dynamics cps, got {options.highest}"
    return None


def calibrated_steps(config: Config) -> list[int]:
    """The steps whose noise levels a calibration finds, increasing: those in which some iteration may inject noise.

    With trajectories all of every window, with branches those that may be trained.
    """
    if config.sampler.branches is not None:
        return trainable_steps(config)
    return sorted({step for window in config.schedule().reached() for step in window})


def start_levels(config: Config) -> tuple[float, ...]:
    """The noise levels that a calibration starts from: the configuration's, and 0 in all but `calibrated_steps`."""
    steps = calibrated_steps(config)
    return tuple(level if step in steps else 0.0 for step, level in enumerate(config.noise_levels))


def circumstances(config: Config) -> dict[str, Any]:
    """What balanced gains depend on beside the sampler's steps, as plain JSON data without this machine's paths."""
    return {
        "model": _portable(config.model.path),
        "prompts": _portable(config.data.prompts),
        "reward": {_portable(name): weight for name, weight in config.reward.terms.items()},
        "guidance_scale": config.sampler.guidance_scale,
        "drawn": "trajectories" if config.sampler.branches is None else "branches",
    }


def fitting_calibration(config: Config) -> Calibration | None:
    """The file of `sampler.calibration`, if it fits the configuration's sampler as far as that can be told without the
    model; None without one.

    What else it was made for and the run does not have is a warning, for balance may survive it: the file's
    `circumstances`, and noise in further steps, after which a step starts from other states.

    Raises:
        UsageError: it cannot be read, or was made for other dynamics, another number of steps, or without noise
            in a step that may have it here.
    """
    if config.sampler.calibration is None:
        return None
    made, steps = read_calibration(Path(config.sampler.calibration)), calibrated_steps(config)
    made.check_sampler(config.sampler.num_steps, config.sampler.dynamics, steps)
    others = [
        f"{key} {made.settings[key]} (here {own})"
        for key, own in circumstances(config).items()
        if made.settings.get(key, own) != own
    ]
    if list(made.steps) != steps:
        others.append(f"noise in the steps {list(made.steps)} (here {steps})")
    if others:
        logger.warning(
            "sampler.calibration: %s was made with %s; gains need not be balanced here", made.path, ", ".join(others)
        )
    return made


def _portable(text: str) -> str:
    """A path without the directories of this machine."""
    return PurePath(text).name if PurePath(text).is_absolute() else text
