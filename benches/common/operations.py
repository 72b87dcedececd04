"""Floating-point operations of a recorded run, counted from its settings: what runs are compared at equal compute by.

Every iteration is counted by the closed forms of `densegrpo_fast.sampling.cost` on the embedded model's architecture
(`densegrpo_fast.models.flops`): forwards of rollout, lookahead, replay and KL, decodes, and backward passes, each 1.1
forwards there because the base has no gradient. Calibrations and the lookahead monitor's re-scorings come on top where
the run recorded their forwards (`nfe`), each forward with its share of decodes. Rewards are not counted (the embedded
model's own is image analysis), nor are held-out evaluations, as in the training seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from densegrpo_fast.common.aliases import complete_settings
from densegrpo_fast.config import Config
from densegrpo_fast.config.yaml_files import BASE_PRESET, read_settings

if TYPE_CHECKING:
    from densegrpo_fast.training.schedule import Schedule

TERA = 1e12
CHECKS = ("calibration", "monitor", "guard")
"""Phases that not every iteration has; "guard" is the name that older records have for the monitor."""


def operations(settings: Mapping[str, Any], run: Mapping[str, Any]) -> list[float] | None:
    """TFLOP that a run had spent at each of its evaluations; None where its model, lookahead or settings are not known.

    Known is the embedded model.

    Args:
        settings: of its variant, as a study records them; options that are newer than the record are the base preset's.
        run: as in `comparison`.
    """
    try:
        config = config_of(settings, run["seed"])
    except ValidationError:
        return None
    if config.model.path != "embedded" or config.model.height:
        return None
    counted = IterationOperations(config)
    spent, found, done = 0.0, [], 0
    for point in run["points"]:
        while done < point["iteration"]:
            spent += counted.iteration(done)
            done += 1
        extra = sum(point["nfe"].get(phase, 0.0) * counted.per_forward(phase) for phase in CHECKS)
        found.append((spent + extra) / TERA)
    return found


def config_of(settings: Mapping[str, Any], seed: int) -> Config:
    """The configuration that a study's settings are of.

    Raises:
        pydantic.ValidationError: they have options that are not known any more.
    """
    complete = read_settings(BASE_PRESET)
    for key, value in complete_settings(settings).items():
        complete[key] = complete[key] | value if isinstance(value, Mapping) else value
    return Config.model_validate(complete | {"seed": seed})


class IterationOperations:
    """Counts the operations of a configuration's iterations, all rows together."""

    def __init__(self, config: Config):
        from densegrpo_fast.models.flops import cached_forward, embedded

        self.config, self.samples = config, config.data.num_prompts * config.sampler.group_size
        self.schedule = schedule_of(config)
        self.branches = config.sampler.branches
        rank, targets = config.lora.rank, tuple(config.lora.targets)
        self.unit = _unit(rank, targets)
        # of a lookahead forward, with the adapter merged into a copy or features taken over
        self.ahead = self.unit.forward if config.lookahead.copy_dtype is None else self.unit.reference_forward
        if config.lookahead.cache is not None:
            merged = config.lookahead.copy_dtype is not None
            self.ahead = cached_forward(embedded(), lora_rank=0 if merged else rank, lora_targets=targets)
        self._known: dict[tuple[tuple[bool, ...], tuple[int, ...]], float] = {}

    def iteration(self, iteration: int) -> float:
        """Operations of an iteration (from 0), without calibration and monitor."""
        noisy, trained = self._noisy(iteration), tuple(self.schedule.trained_steps(iteration))
        if (noisy, trained) not in self._known:
            self._known[noisy, trained] = self.samples * self.cost(noisy, trained).flops(self.unit, self.ahead)
        return self._known[noisy, trained]

    def forwards(self, iteration: int) -> float:
        """Network forwards of an iteration (NFE), likewise."""
        trained = self.schedule.trained_steps(iteration)
        return self.samples * self.cost(self._noisy(iteration), trained).forwards

    def cost(self, noisy: tuple[bool, ...], trained: Sequence[int]) -> Any:
        """A sample's share of an iteration with noise in some steps, of which some are trained: `IterationCost`."""
        from densegrpo_fast.fidelity.price import step_cost

        guided = self.config.sampler.guidance_scale != 1.0
        return step_cost(self.config, self.schedule, noisy, trained, guided=guided)

    def per_forward(self, phase: str) -> float:
        """Operations per forward of one of `CHECKS` with its share of decodes, by the first iteration's noise.

        Both complete states by every step, with full guidance and the full decoder.
        """
        from densegrpo_fast.sampling import plan as plans
        from densegrpo_fast.sampling.cost import branched_iteration, dense_iteration, lookahead_evaluations

        config = self.config
        guided = config.sampler.guidance_scale != 1.0
        if phase == "calibration":
            reached = {step for window in config.schedule().reached() for step in window}
            noisy = tuple(level > 0 and step in reached for step, level in enumerate(config.noise_levels))
            cost = dense_iteration(plans.exact(len(noisy)), trained_steps=0, guided=guided, kl=False, noisy=noisy)
            return cost.flops(self.unit) / cost.forwards
        noisy = self._noisy(0)
        exact = plans.exact(len(noisy))
        if self.branches is not None:
            tree = branched_iteration(
                exact, branches=self.branches, trained_steps=0, guided=guided, kl=False, noisy=noisy
            )
            decodes = tree.full_decodes * self.unit.full_decode / tree.lookahead.forwards
            return self.unit.forward + decodes
        shared = config.sampler.group_size if config.sampler.shared_noise else 1
        forwards = lookahead_evaluations(exact, guided=guided, noisy=noisy, shared=shared).forwards
        # one picture for each noisy step's state, and the image
        decodes = (sum(noisy) + 1) * self.unit.full_decode
        return self.unit.forward + decodes / forwards if forwards else 0.0

    def _noisy(self, iteration: int) -> tuple[bool, ...]:
        """[T] whether each step that an iteration takes injects noise."""
        from densegrpo_fast.sampling.windows import remaining_steps

        config, levels = self.config, self.config.noise_levels
        window, steps = self.schedule.noisy_steps(iteration), config.sampler.num_steps
        if config.window.size is not None:
            after = window[-1] + 1
            steps = after + remaining_steps(steps - after, config.window.remainder_share)
        return tuple(step in window and levels[step] > 0 for step in range(steps))


def schedule_of(config: Config, sigmas: Any = None) -> Schedule:
    """Which steps a configuration's iterations take; that does not depend on the model, so there need not be one.

    Args:
        sigmas: [T+1] of the steps, where the weights of drawn steps matter; None = SD3's.
    """
    import torch

    from densegrpo_fast.flow.schedule import sd3_sigmas
    from densegrpo_fast.training.schedule import Schedule

    grid: Any = SimpleNamespace(
        device=torch.device("cpu"), sigmas=lambda steps: sd3_sigmas(steps, shift=3.0) if sigmas is None else sigmas
    )
    return Schedule(config, grid)


def draws(config: Config, sigmas: Any = None) -> list[Any]:
    """Every set of steps that iterations train: `densegrpo_fast.fidelity.price.Draw`."""
    from densegrpo_fast.fidelity import price

    return price.draws(schedule_of(config, sigmas))


@lru_cache
def _unit(rank: int, targets: tuple[str, ...]) -> Any:
    """`ModelFlops` of the embedded model with such an adapter."""
    from densegrpo_fast.models.flops import count, embedded

    return count(embedded(), lora_rank=rank, lora_targets=targets)
