"""The file of a calibration: what training reads of it, and what it must have been made for. No torch here."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.common.files import read_plainly
from densegrpo_fast.common.fingerprint import fingerprint

FORMAT = "densegrpo-fast calibration 1"
"""First key of every file; the number is the format's."""

DIGEST = "sha256"
"""Last key of a file: SHA-256 over the canonical JSON of all others. Files of an earlier version have none."""

_KEYS = {"format", "dynamics", "num_steps", "steps", "sigmas", "noise_level_is", "noise_level", "settled", "rule"}
_KEYS |= {"unbalanceable", "hopeless", "settings", "before", "after", "rounds"}
_KEYS |= {"command", "commit", "hardware", "versions", DIGEST}
"""Keys of a file; among others there may be what once was `DIGEST`."""

_MOST_STEPS = 1000
"""As many as `sampler.num_steps` may be."""

_AGAIN = "make one with python -m densegrpo_fast.calibrate"


@dataclass(frozen=True)
class Calibration:
    """Noise levels, and the sampler that they were found for.

    Attributes:
        path: the file.
        dynamics: family of the stochastic step.
        noise_level: of every step, T numbers.
        sigmas: the grid, T+1 numbers from noise to image.
        steps: those whose levels were found, increasing; the others had no noise. Files of an earlier version do not
            say, and have all of them.
        settings: what else it was made with, plain JSON data.
    """

    path: Path
    dynamics: str
    noise_level: tuple[float, ...]
    sigmas: tuple[float, ...]
    steps: tuple[int, ...]
    settings: dict[str, Any]

    @property
    def num_steps(self) -> int:
        """Number of steps T."""
        return len(self.noise_level)

    def check_sampler(self, num_steps: int, dynamics: str, steps: Sequence[int]) -> None:
        """Refuse a sampler of another length or family, or with noise in other steps.

        Args:
            num_steps: T.
            dynamics: family of the stochastic step.
            steps: those that may have noise. The levels of the others are of no use, and need not be there.

        Raises:
            UsageError: naming the difference.
        """
        if self.num_steps != num_steps:
            self._refuse(f"was made for {self.num_steps} steps, sampler.num_steps is {num_steps}")
        if self.dynamics != dynamics:
            self._refuse(f"was made for dynamics {self.dynamics}, sampler.dynamics is {dynamics}")
        if not {*steps} <= {*self.steps}:
            self._refuse(f"was made with noise in the steps {list(self.steps)}, this run may have it in {list(steps)}")

    def check_sigmas(self, sigmas: Sequence[float], tolerance: float = 1e-6) -> None:
        """Refuse a schedule with other noise levels sigma.

        Raises:
            UsageError: naming the first difference.
        """
        for step, (made, here) in enumerate(zip(self.sigmas, sigmas, strict=True)):
            if abs(made - here) > tolerance:
                self._refuse(f"was made for another schedule: its sigma {step} is {made:.6g}, this model's {here:.6g}")

    def _refuse(self, problem: str) -> None:
        raise UsageError(f"sampler.calibration: {self.path} {problem}; {_AGAIN}")


def read_calibration(path: Path, option: str = "sampler.calibration") -> Calibration:
    """Read a calibration's file.

    Args:
        path: the file.
        option: that named it, for the message.

    Raises:
        UsageError: it cannot be read, or is none.
    """
    try:
        document = json.loads(read_plainly(path))
    except OSError as error:
        raise UsageError(f"{option}: cannot read {path}: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise UsageError(f"{option}: {path} is not JSON; {_AGAIN}") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UsageError(f'{option}: {path} is no "{FORMAT}"; {_AGAIN}')
    content = {key: value for key, value in document.items() if key != DIGEST}
    try:
        intact = len(content) == len(document) or document[DIGEST] == fingerprint(content)
    except ValueError:  # NaN and infinities, which a file never has
        intact = False
    if not intact or not {*document} <= _KEYS:
        raise UsageError(f"{option}: {path} is damaged, or was changed by hand; {_AGAIN}")
    levels: Any = document.get("noise_level")
    sigmas: Any = document.get("sigmas")
    dynamics = document.get("dynamics")
    settings = document.get("settings", {})
    numbered = _numbers(levels) and _numbers(sigmas) and len(levels) <= _MOST_STEPS
    if numbered and isinstance(dynamics, str) and isinstance(settings, dict):
        every = range(len(levels))
        steps = document.get("steps", list(every))
        known = isinstance(steps, list) and steps == [step for step in every if step in steps]
        if known and len(sigmas) == len(levels) + 1:
            numbers, grid = tuple(map(float, levels)), tuple(map(float, sigmas))
            return Calibration(path, dynamics, numbers, grid, tuple(steps), settings)
    raise UsageError(
        f"{option}: {path} is broken: expected dynamics, noise_level of every step, one sigma more, and "
        f"increasing steps; {_AGAIN}",
    )


def _numbers(value: Any) -> TypeGuard[list[float]]:
    return isinstance(value, list) and all(
        isinstance(item, int | float) and not isinstance(item, bool) and abs(item) <= sys.float_info.max
        for item in value
    )
