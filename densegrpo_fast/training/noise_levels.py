"""The noise levels of a training run, which may be found again every so many iterations on the policy as it then is."""

from __future__ import annotations

from densegrpo_fast.calibration.rules import Limits, Staircase, calibrate
from densegrpo_fast.common.errors import CheckpointError
from densegrpo_fast.common.progress import PhaseProgress
from densegrpo_fast.config import Config
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.rewards.base import Scorer
from densegrpo_fast.training.distributed import World
from densegrpo_fast.training.gain_meter import GainMeter
from densegrpo_fast.training.prompts import PromptSet

_ITERATIONS = 2**24
"""More than a run has: a calibration's draws are so many iterations of its noise apart."""


class NoiseLevels:
    """Levels of the T steps: the configuration's, and with `calibration.every` what the staircase has made of them.

    A calibration is that of the calibrate command, with samples of its own: their noise depends on the seed and the
    iteration alone.

    Attributes:
        levels: noise level of every step, T numbers.
    """

    def __init__(
        self, config: Config, model: FlowModel, reward: Scorer, prompts: PromptSet, world: World | None = None
    ):
        self.config, self.model, self.reward, self.prompts = config, model, reward, prompts
        self.world = World() if world is None else world
        self.levels = config.noise_levels
        self._noisy = config.calibrated_steps()

    def due(self, iteration: int) -> bool:
        """Whether the levels are found again before an iteration (from 0)."""
        every = self.config.calibration.every
        return every > 0 and iteration % every == 0

    def calibrate(self, iteration: int) -> dict[str, float]:
        """Find the levels again, from those that they are.

        Args:
            iteration: from 0.

        Returns:
            `calibration/rounds`, and `calibration/imbalance`, the largest absolute imbalance of a step's signs at the
            old levels.

        Raises:
            RewardError: the reward failed, or too many scores are missing.
        """
        options = self.config.calibration
        levels = [level if step in self._noisy else 0.0 for step, level in enumerate(self.levels)]
        rule = Staircase(levels, Limits(options.lowest, options.highest))
        meter = GainMeter.of(self.config, self.model, self.reward, self.prompts, options.samples, self.world)

        with PhaseProgress("calibration", options.rounds * options.samples, "samples at most") as progress:

            def measure(levels: tuple[float, ...], draw: int) -> list[list[float]]:
                return meter.gains(levels, iteration + _ITERATIONS * draw, progress).T.tolist()

            rounds = calibrate(rule, measure, options.rounds)
        first = [measured for measured in rounds if measured.levels == tuple(levels)][:1]
        imbalances = [abs(signs.imbalance) for measured in first for signs in measured.signs if signs.decided]
        self.levels = tuple(
            new if step in self._noisy else old
            for step, (new, old) in enumerate(zip(rule.result, self.levels, strict=True))
        )
        return {
            "calibration/rounds": len(rounds),
            "calibration/imbalance": max(imbalances, default=0.0),
        }

    def metrics(self) -> dict[str, float]:
        """`noise_level/step_K` for the metrics, if the levels may change."""
        if not self.config.calibration.every:
            return {}
        return {f"noise_level/step_{step}": level for step, level in enumerate(self.levels)}

    def state(self) -> list[float]:
        """What a checkpoint keeps."""
        return list(self.levels)

    def restore(self, state: list[float] | None) -> None:
        """Go on with a checkpoint's levels; None = it has none, and the configuration's were never changed.

        Raises:
            CheckpointError: they are for another number of steps.
        """
        if state is None:
            return
        if len(state) != len(self.levels):
            raise CheckpointError("the checkpoint holds noise levels for another number of steps")
        self.levels = tuple(state)
