"""Every option of a training run, and what the options say about each other.

The models hold no default values: those live in the presets (`configs/*.yaml`), so that a number is written
in one place. `sampling` and `learning` have the option groups, `yaml_files` reads and writes files, `cli` adds
the command line. Nothing here imports torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints, model_validator
from pydantic.fields import FieldInfo

from densegrpo_fast.common.fingerprint import fingerprint
from densegrpo_fast.config.base import Section
from densegrpo_fast.config.branching import branching_problem
from densegrpo_fast.config.calibration import CalibrationOptions, calibration_problem
from densegrpo_fast.config.learning import (
    CreditOptions,
    EmaOptions,
    EvaluationOptions,
    ObjectiveOptions,
    OptimizerOptions,
    RewardOptions,
    RunOptions,
)
from densegrpo_fast.config.methods import credit_problem, noisy_among, remainder_problem
from densegrpo_fast.config.nodes import nodes_problem
from densegrpo_fast.config.objectives import objective_problem
from densegrpo_fast.config.rewards import score_affecting
from densegrpo_fast.config.sampling import (
    DataOptions,
    LookaheadOptions,
    LoraOptions,
    ModelOptions,
    SamplerOptions,
    WindowOptions,
)
from densegrpo_fast.credit import registry
from densegrpo_fast.sampling.windows import Windows, remaining_steps

_CHECKS = (
    credit_problem,
    objective_problem,
    remainder_problem,
    calibration_problem,
    branching_problem,
    nodes_problem,
)


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

    @model_validator(mode="after")
    def _options_agree(self) -> Config:
        steps = self.sampler.num_steps
        problems = (self._window_problem, self._trained_steps_problem, self._noise_problem, self._lookahead_problem)
        for find in problems:
            problem = find()
            if problem:
                raise ValueError(f"{problem} (sampler.num_steps is {steps})")
        for check in _CHECKS:
            problem = check(self)
            if problem:
                raise ValueError(problem)
        if bool(self.model.height) != bool(self.model.width):
            raise ValueError(
                "model.height, model.width: expected both 0 or both set, "
                f"got {self.model.height} and {self.model.width}"
            )
        samples, rows = self.data.num_prompts * self.sampler.group_size, self.sampler.micro_batch
        kind, product = "samples", "data.num_prompts x sampler.group_size"
        if self.sampler.branches is not None:
            samples //= self.sampler.branches
            kind, product = "trunks", f"{product} / sampler.branches"
        if samples % rows:
            raise ValueError(
                f"sampler.micro_batch: expected a divisor of the {samples} {kind} of an iteration ({product}), "
                f"got {rows}"
            )
        if (samples // rows) % self.optimizer.updates_per_iteration:
            raise ValueError(
                f"optimizer.updates_per_iteration: expected a divisor of the {samples // rows} micro-batches of an "
                f"iteration, got {self.optimizer.updates_per_iteration}"
            )
        return self

    def _noise_problem(self) -> str | None:
        given = self.sampler.noise_level
        if isinstance(given, list) and len(given) != self.sampler.num_steps:
            return f"sampler.noise_level: expected one number per step, got {len(given)}"
        if self.sampler.dynamics == "cps" and max(self.noise_levels) > 1:
            return f"sampler.noise_level: expected at most 1 with dynamics cps, got {max(self.noise_levels)}"
        trained = self.objective.trained_steps
        for candidates in [trained] if isinstance(trained, list) else self.windows():
            if noisy := noisy_among(self, candidates):
                deterministic = len(candidates) - len(noisy)
                if isinstance(trained, int) and trained <= deterministic:
                    return (
                        f"objective.trained_steps: expected at least {deterministic + 1} to draw where "
                        f"{deterministic} of the steps {candidates[0]}..{candidates[-1]} inject no noise, got {trained}"
                    )
                continue
            if any(self.noise_levels[step] for step in candidates):
                return (
                    "objective.trained_steps: expected a step that injects noise, which the last one of dynamics "
                    f"{self.sampler.dynamics} does not, got {trained}"
                )
            where = "" if self.window.size is None else f" of the window {candidates[0]}..{candidates[-1]}"
            return f"sampler.noise_level: expected noise in at least one trained step{where}, got 0 in all of them"
        return None

    def _window_problem(self) -> str | None:
        size, first, steps = self.window.size, self.window.first, self.sampler.num_steps
        if size is None:
            return None
        last = steps - 2 if self.window.last is None else self.window.last
        if last > steps - 2:
            return f"window.last: expected at most {steps - 2}, got {last}"
        if first > last:
            return f"window.first: expected at most {last}, got {first}"
        if first + size - 1 > last:
            return f"window.size: expected a window that fits the steps {first}..{last}, got {size}"
        return None

    def _lookahead_problem(self) -> str | None:
        steps, nodes, n = self.sampler.num_steps, self.lookahead.nodes, self.lookahead.n
        for name in ("head", "cache"):
            if self.model.compile is not None and getattr(self.lookahead, name) is not None:
                hides = "expected null with model.compile, which hides the network's blocks"
                return f"lookahead.{name}: {hides}, got {getattr(self.lookahead, name)}"
        refresh = self.lookahead.head_refresh
        if refresh and self.lookahead.head is None:
            return f"lookahead.head_refresh: expected 0 without lookahead.head, got {refresh}"
        if refresh and not self.lookahead.monitor_every:
            return f"lookahead.head_refresh: expected 0 without lookahead.monitor_every, got {refresh}"
        if nodes and nodes[-1] > steps - 1:
            return f"lookahead.nodes: expected steps in 1..{steps - 1}, got {nodes}"
        if n is not None and n > steps:
            return f"lookahead.n: expected 1..{steps}, got {n}"
        paths = self.lookahead.paths
        if paths and len(paths) != steps:
            return f"lookahead.paths: expected a list for each of the {steps} states, got {len(paths)}"
        for state, path in enumerate(paths):
            if sorted({*path}) != path or not {*path} <= {*range(state + 1, steps)}:
                within = f"increasing steps in {state + 1}..{steps - 1}" if state < steps - 1 else "[]"
                return f"lookahead.paths[{state}]: expected {within}, got {path}"
        return None

    def _trained_steps_problem(self) -> str | None:
        steps, trained = self.sampler.num_steps, self.objective.trained_steps
        if isinstance(trained, list):
            if not trained or sorted(set(trained)) != trained:
                return f"objective.trained_steps: expected increasing step indices, got {trained}"
            if trained[-1] > steps - 1:
                return f"objective.trained_steps: expected steps in 0..{steps - 1}, got {trained}"
            if self.window.size is not None:
                return f"objective.trained_steps: expected all_but_last or a number with a window, got {trained}"
        elif isinstance(trained, int) and trained > (most := self.window.size or steps - 1):
            return f"objective.trained_steps: expected at most {most} steps to draw, got {trained}"
        return None

    @property
    def uses_lookahead(self) -> bool:
        """Whether the credit method needs completions of intermediate states."""
        return registry.find(self.credit.method).uses_lookahead

    @property
    def uses_branches(self) -> bool:
        """Whether the credit method compares branches of one state."""
        return registry.find(self.credit.method).uses_branches

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

    def self_contained(self) -> Config:
        """The same settings without the file that the noise levels came from: `sampler.noise_level` holds them."""
        return self.model_copy(update={"sampler": self.sampler.model_copy(update={"calibration": None})})

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
        where and how long the run goes on, how often it evaluates, samples and saves, which file the noise
        levels came from, where rewards are computed, and how memory is saved.
        """
        settings = self.model_dump(mode="json", exclude={"preset", "run"})
        settings["reward"]["options"] = score_affecting(self.reward.options)
        del settings["evaluation"]["every"], settings["sampler"]["calibration"]
        del settings["model"]["gradient_checkpointing"], settings["model"]["prompt_cache"]
        return settings

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
