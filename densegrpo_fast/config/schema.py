"""All options of a run in one object, and what follows from them. Nothing here imports torch.

`sections.py` and `learning_sections.py` have the option groups, `checks.py` what they say about each other,
`yaml_files.py` reads and writes files, `cli.py` adds the command line.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Annotated, Any

from pydantic import Field, StringConstraints, model_validator
from pydantic.fields import FieldInfo

from densegrpo_fast.common.aliases import comparable_settings
from densegrpo_fast.common.fingerprint import fingerprint
from densegrpo_fast.config import checks
from densegrpo_fast.config.fields import Section
from densegrpo_fast.config.learning_sections import (
    CreditOptions,
    EmaOptions,
    ObjectiveOptions,
    OptimizerOptions,
    RewardOptions,
)
from densegrpo_fast.config.sections import (
    CalibrationOptions,
    DataOptions,
    DistributedOptions,
    EvaluationOptions,
    LookaheadOptions,
    LoraOptions,
    ModelOptions,
    RunOptions,
    SamplerOptions,
    WindowOptions,
)
from densegrpo_fast.credit import registry
from densegrpo_fast.rewards.registry import score_affecting
from densegrpo_fast.sampling.windows import Windows, remaining_steps

_DETERMINISTIC_END = ("cps", "precise")
"""Dynamics whose last step, which ends at sigma 0, injects no noise."""
_MOST_ROWS = 64
"""Rows of an automatic micro-batch, at most."""


class Config(Section):
    """All options of a run."""

    preset: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,99}$")] = Field(
        description="name of the settings; only used to name the run directory"
    )
    seed: int = Field(ge=0, lt=2**63, description="key of every random number of the run")
    model: ModelOptions
    lora: LoraOptions
    data: DataOptions
    sampler: SamplerOptions
    window: WindowOptions
    calibration: CalibrationOptions
    lookahead: LookaheadOptions
    reward: RewardOptions
    credit: CreditOptions
    objective: ObjectiveOptions
    optimizer: OptimizerOptions
    ema: EmaOptions
    evaluation: EvaluationOptions
    run: RunOptions
    distributed: DistributedOptions

    @model_validator(mode="before")
    @classmethod
    def _automatic_micro_batch(cls, settings: Any) -> Any:
        """`sampler.micro_batch: auto` as a number; it stays where the numbers that it depends on are wrong."""
        if not isinstance(settings, dict) or _at(settings, "sampler.micro_batch") != "auto":
            return settings
        needed = ("data.num_prompts", "sampler.group_size", "optimizer.updates_per_iteration")
        numbers = [_at(settings, key) for key in needed]
        branches = _at(settings, "sampler.branches") or 1
        if not all(isinstance(number, int) and number > 0 for number in (*numbers, branches)):
            return settings
        prompts, size, updates = numbers
        rows = max(prompts * size // branches // updates, 1)
        chosen = max(divisor for divisor in range(1, min(rows, _MOST_ROWS) + 1) if rows % divisor == 0)
        return settings | {"sampler": settings["sampler"] | {"micro_batch": chosen}}

    @model_validator(mode="after")
    def _options_agree(self) -> Config:
        if problem := checks.problem(self):
            raise ValueError(problem)
        return self

    @property
    def adapter_rank(self) -> int:
        """Rank of the adapter that is trained; 0 where all weights are."""
        return self.lora.rank if self.model.train == "lora" else 0

    @property
    def uses_lookahead(self) -> bool:
        """Whether the credit method needs completions of intermediate states."""
        return registry.find(self.credit.method).uses_lookahead

    @property
    def uses_branches(self) -> bool:
        """Whether the credit method compares branches of one state."""
        return registry.find(self.credit.method).uses_branches

    @property
    def credit_scope(self) -> registry.Scope:
        """Whether a step's advantages need the rewards of its two states alone ("local") or of others too ("whole")."""
        if self.credit.smoothing or self.credit.closeness:
            return "whole"  # smoothed rewards are made of all along a trajectory, and the best one is told by its end
        return registry.find(self.credit.method).scope(self.credit.method_options())

    def schedule(self) -> Windows:
        """Which steps of each iteration are stochastic."""
        options, steps = self.window, self.sampler.num_steps
        if options.size is None:
            return Windows("none", steps)
        return Windows(
            options.schedule,
            steps,
            size=options.size,
            first=options.first,
            last=steps - 2 if options.last is None else options.last,
            stride=options.stride,
            every=options.every,
            seed=self.seed,
        )

    def windows(self) -> list[range]:
        """Every window that an iteration may have; without windows the steps 0..T-2, which are all that is trained."""
        return [range(self.sampler.num_steps - 1)] if self.window.size is None else self.schedule().reached()

    def lengths(self) -> list[int]:
        """Every number of steps that a trajectory may have, falling: `window.remainder_share` may leave some out."""
        if self.window.size is None:
            return [self.sampler.num_steps]
        ends = {window.stop for window in self.windows()}
        after = {end: remaining_steps(self.sampler.num_steps - end, self.window.remainder_share) for end in ends}
        return sorted({end + left for end, left in after.items()}, reverse=True)

    @property
    def noise_levels(self) -> tuple[float, ...]:
        """The noise level of every step. T numbers."""
        given = self.sampler.noise_level
        return tuple(given) if isinstance(given, list) else (given,) * self.sampler.num_steps

    def noisy_among(self, steps: Iterable[int]) -> list[int]:
        """Those of some steps that inject noise where an iteration lets them, in their order."""
        end = self.sampler.num_steps - 1 if self.sampler.dynamics in _DETERMINISTIC_END else None
        return [step for step in steps if step != end and self.noise_levels[step]]

    def trainable_steps(self) -> list[int]:
        """The steps that some iteration may train, increasing."""
        trained = self.objective.trained_steps
        return trained if isinstance(trained, list) else sorted({step for window in self.windows() for step in window})

    def deterministic_steps(self) -> list[int]:
        """The steps that training may train although they inject no noise, increasing."""
        trainable = self.trainable_steps()
        return sorted({*trainable} - {*self.noisy_among(trainable)})

    def calibrated_steps(self) -> list[int]:
        """The steps whose noise levels a calibration finds, increasing: those in which some iteration may inject noise.

        With trajectories all of every window, with branches those that may be trained.
        """
        if self.sampler.branches is not None:
            return self.trainable_steps()
        return sorted({step for window in self.schedule().reached() for step in window})

    def calibration_start(self) -> tuple[float, ...]:
        """The noise levels that a calibration starts from: the configuration's, and 0 in all but `calibrated_steps`."""
        steps = self.calibrated_steps()
        return tuple(level if step in steps else 0.0 for step, level in enumerate(self.noise_levels))

    def calibration_settings(self) -> dict[str, Any]:
        """What balanced gains depend on beside the sampler's steps, as plain JSON data without this machine's paths."""
        return {
            "model": _portable(self.model.path),
            "prompts": _portable(self.data.prompts),
            "reward": {_portable(name): weight for name, weight in self.reward.terms.items()},
            "guidance_scale": self.sampler.guidance_scale,
            "drawn": "trajectories" if self.sampler.branches is None else "branches",
        }

    def self_contained(self) -> Config:
        """The same settings as a run stores them: without the file that the noise levels came from, which
        `sampler.noise_level` holds, and without `run.overwrite`, which has had its effect."""
        sampler = self.sampler.model_copy(update={"calibration": None})
        return self.model_copy(update={"sampler": sampler, "run": self.run.model_copy(update={"overwrite": False})})

    @property
    def output_dir(self) -> Path:
        """The run directory: `run.output_dir`, or `runs/PRESET-SEED`."""
        return Path(self.run.output_dir or Path("runs") / f"{self.preset}-{self.seed}")

    @property
    def evaluation_guidance_scale(self) -> float:
        """Guidance of the evaluation: its own, or the sampler's."""
        own = self.evaluation.guidance_scale
        return self.sampler.guidance_scale if own is None else own

    def resume_settings(self) -> dict[str, Any]:
        """The options that a run must keep to be continued, as nested JSON data.

        Left out is what changes neither the weights nor the meaning of a logged number: the preset's name,
        where, on how many processes and how long the run goes on, how often it evaluates, samples and saves, which
        file the noise levels came from, by what `lookahead.plan auto` chose, where rewards are computed, and how
        memory is saved. The length of the run stays in where `credit.closeness` fades by it.
        """
        settings = self.model_dump(mode="json", exclude={"preset", "run", "distributed"})
        settings["reward"]["options"] = score_affecting(self.reward.options)
        del settings["evaluation"]["every"], settings["sampler"]["calibration"]
        del settings["model"]["gradient_checkpointing"], settings["model"]["prompt_cache"]
        # what was chosen by them stands in the other options
        del settings["lookahead"]["budget"], settings["lookahead"]["fidelity"]
        if self.credit.closeness:
            settings["run"] = {"iterations": self.run.iterations}
        return comparable_settings(settings)

    def fingerprint(self) -> str:
        """SHA-256 over `resume_settings()`, 64 hexadecimal digits: equal when a run may be continued."""
        return fingerprint(self.resume_settings())


def options() -> dict[str, FieldInfo]:
    """Every option by its dotted key, such as `sampler.num_steps`, in the order of the configuration."""
    found: dict[str, FieldInfo] = {}
    for name, field in Config.model_fields.items():
        if name in sections():
            found |= {f"{name}.{key}": option for key, option in sections()[name].model_fields.items()}
        else:
            found[name] = field
    return found


def sections() -> dict[str, type[Section]]:
    """The option groups by name, in the order of the configuration."""
    return {
        name: field.annotation
        for name, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
    }


def _at(settings: dict[str, Any], key: str) -> Any:
    """The value under section.option, None where there is none."""
    section, _, name = key.partition(".")
    options = settings.get(section)
    return options.get(name) if isinstance(options, dict) else None


def _portable(text: str) -> str:
    """A path without the directories of this machine."""
    return PurePath(text).name if PurePath(text).is_absolute() else text
