"""Recalibration of the noise levels while a run goes on: its options, and what they say about the sampler's.

Nothing here imports torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field, model_validator

from densegrpo_fast.config.base import Section

if TYPE_CHECKING:
    from densegrpo_fast.config.schema import Config

SIGNS = 8
"""Fewest samples whose signs can move a level."""


class CalibrationOptions(Section):
    """Finding the noise level of each step again during training (DenseGRPO's calibration; see also calibrate)."""

    every: int = Field(
        ge=0,
        description="iterations between two calibrations of the noisy steps' levels on the policy as it is then, the "
        "first before the first iteration; 0 = never",
    )
    samples: int = Field(ge=SIGNS, le=65536, description="trajectories of a calibration round")
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
