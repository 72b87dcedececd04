"""Option groups of what is learned from the samples: reward, credit, objective, optimizer, evaluation and the run."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from densegrpo_fast.config.base import PositiveInt, Section, StepIndex, Text
from densegrpo_fast.config.methods import check_name
from densegrpo_fast.config.rewards import check_names
from densegrpo_fast.credit.registry import METHODS
from densegrpo_fast.objective.registry import POLICIES, STEP_WEIGHTS


class RewardOptions(Section):
    """What a good image is."""

    terms: dict[str, float] = Field(
        min_length=1, description="reward name -> weight; your own as module:function or path.py:function"
    )
    observed: list[Text] = Field(description="further rewards that only the held-out evaluation reports")
    options: dict[Text, dict[str, JsonValue]] = Field(
        description="reward name -> its options, such as {pickscore: {model: DIRECTORY}}; the option use: NAME gives a "
        "name of your own to a reward, such as {hpsv2: {use: remote, url: http://...}}"
    )
    max_missing: float = Field(ge=0, le=1, description="share of missing scores above which the run stops")
    overlap: bool = Field(
        description="score on a thread of its own while further images are decoded, a chunk at a time: for rewards "
        "that leave the model's device alone, on the CPU or a server; else all images in one call"
    )

    @field_validator("terms")
    @classmethod
    def _one_counts(cls, terms: dict[str, float]) -> dict[str, float]:
        if not any(terms.values()):
            raise ValueError("expected at least one weight other than 0")
        return terms

    @model_validator(mode="after")
    def _known_rewards(self) -> RewardOptions:
        check_names(self.terms, self.observed, self.options)
        return self


class CreditOptions(Section):
    """How rewards become advantages."""

    method: Text = Field(
        description=f"{', '.join(METHODS.names())}; or your own CreditMethod as module:NAME or path.py:NAME "
        "(densegrpo_fast/credit)"
    )
    normalize: Literal["step", "joint"] = Field(
        description="of dense, return_to_go and mixture: normalise for each step, or over all steps of a group together"
    )
    std: Literal["group", "global"] = Field(description="spread that advantages are divided by")
    spread_floor: float = Field(ge=0, description="a group whose rewards spread less gets advantage 0")
    smoothing: float = Field(
        ge=0,
        le=1000,
        description="of methods with a lookahead: variance of a completion's reward around its state's true value, in "
        "units of a step's true gain's, by which rewards along a trajectory are smoothed; 0 = not",
    )
    clip: float = Field(gt=0, description="largest absolute advantage")
    discount: float = Field(
        ge=0, le=1, description="of return_to_go, vgpo and mixture's return_to_go: what a step further ahead counts"
    )
    step_value: Literal["gain", "value", "return_to_go"] = Field(
        description="of mixture: what judges a step beside the end reward"
    )
    terminal_coef: float = Field(ge=0, description="of mixture: weight of the end reward's advantage")
    dense_coef: float = Field(ge=0, description="of mixture: weight of the step's advantage")
    consistent: bool = Field(description="of turning_point: the consistency constraint")
    balance: bool = Field(description="of turning_point: as many replacements above 0 as below")
    absolute_coef: float = Field(
        ge=0,
        description="of vgpo, whose rewards should be at least 0: weight of a step's value beside its comparison",
    )
    absolute_steps: int = Field(
        ge=0, description="of vgpo: sampling steps, from the first one, that get the absolute term if they are noisy"
    )
    window: PositiveInt = Field(description="of coca: steps whose similarity is averaged; a divisor of the steps")
    alpha: float = Field(ge=0, le=1, description="of coca: part of the image's advantage that every step gets alike")
    similarity_floor: float = Field(
        gt=0, description="of coca: a trajectory whose similarity rises by less credits its steps alike"
    )
    granularities: list[PositiveInt] = Field(
        min_length=1, description="of granular: step sizes of the completions of a branch, in steps of the grid"
    )
    arguments: dict[Text, JsonValue] = Field(
        description="further arguments of a method of your own, such as {sharpness: 2}; {} for the package's"
    )

    @field_validator("granularities")
    @classmethod
    def _granularities_increase(cls, granularities: list[int]) -> list[int]:
        if sorted(set(granularities)) != granularities:
            raise ValueError(f"expected increasing step sizes, got {granularities}")
        return granularities

    @field_validator("method")
    @classmethod
    def _known_method(cls, method: str) -> str:
        return check_name(METHODS, method)


class ObjectiveOptions(Section):
    """The policy loss."""

    policy: Text = Field(
        description="clip = PPO's clipped ratios; guard = GRPO-Guard's normalised ones; dppo = Flow-DPPO's mask; or "
        "your own PolicyLoss as module:NAME or path.py:NAME (densegrpo_fast/objective/registry.py)"
    )
    clip_range: float = Field(
        gt=0,
        lt=1,
        description="the ratio is clipped to 1 - clip_range .. 1 + clip_range; guard's (2e-6 at 512 px) are smaller by "
        "the step's injected noise; of no effect with dppo",
    )
    guard_weight: Literal["paper", "jacobian", "none"] = Field(
        description="of guard: weight of each step; paper = 1/|dt| (dynamics flow_sde and dance), jacobian = the same "
        "idea for any dynamics"
    )
    dppo_threshold: float = Field(
        ge=0, description="of dppo: KL of a step to the sampling policy from which samples that enlarge it are dropped"
    )
    step_weight: Text = Field(
        description="weight of each step's policy loss, on top of guard's; none = 1, noise_aware = its injected noise "
        "(TempFlow), flash = undoes the log-probability's gain (Flash-GRPO), proportionate = flash times |dt| (PCPO); "
        "or your own StepWeighting as module:NAME or path.py:NAME"
    )
    kl_coef: float = Field(ge=0, description="weight of the KL to the model without its adapter; 0 = off")
    kl_scale: Literal["flow_grpo", "paper"] = Field(
        description="flow_grpo = that code's, which leaves out the step's |dt|; paper = the true divergence of a step"
    )
    negative_factor: float = Field(
        ge=0,
        le=1,
        description="with sampler.branches: multiplies the negative advantages of branches whose noise points where "
        "that of good branches of the same state does (an experiment after NTHR); 1 = off",
    )
    negative_threshold: float = Field(
        ge=0,
        description="how much it does, as a share of what the least good branch has; 1 as in NTHR, which with D latent "
        "values holds next to nothing back, some 1/sqrt(D) does",
    )
    trained_steps: Literal["all_but_last"] | list[StepIndex] | PositiveInt = Field(
        description="all_but_last, a list of step indices (0..T-1), or how many are drawn per iteration; with windows "
        "only their steps"
    )
    arguments: dict[Text, JsonValue] = Field(
        description="further arguments of a policy or step_weight of your own, such as {margin: 0.1}; {} for the "
        "package's"
    )

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, policy: str) -> str:
        return check_name(POLICIES, policy)

    @field_validator("step_weight")
    @classmethod
    def _known_step_weight(cls, step_weight: str) -> str:
        return check_name(STEP_WEIGHTS, step_weight)


class OptimizerOptions(Section):
    """AdamW."""

    lr: float = Field(gt=0, le=1, description="learning rate")
    betas: list[Annotated[float, Field(ge=0, lt=1)]] = Field(
        min_length=2, max_length=2, description="decay of the two moments"
    )
    weight_decay: float = Field(ge=0, le=1, description="decoupled weight decay")
    eps: float = Field(gt=0, description="added to the denominator")
    max_grad_norm: float = Field(gt=0, description="gradients are scaled down to this norm")
    updates_per_iteration: PositiveInt = Field(description="updates that the samples of an iteration are split over")
    warmup: int = Field(ge=0, description="updates over which the learning rate rises linearly; 0 = none")


class EmaOptions(Section):
    """The running average of the adapter, which is what evaluation and export use."""

    decay: float = Field(ge=0, lt=1, description="share of the old average kept at an update of it")
    every: int = Field(ge=0, description="optimizer updates between two updates of the average; 0 = no average")


class EvaluationOptions(Section):
    """Held-out evaluation with the ODE sampler."""

    every: int = Field(ge=0, description="iterations between evaluations (and sample grids); 0 = only before and after")
    num_prompts: PositiveInt = Field(description="held-out prompts")
    samples_per_prompt: PositiveInt = Field(description="images per held-out prompt")
    num_steps: int = Field(ge=1, le=1000, description="Euler steps")
    guidance_scale: Annotated[float, Field(ge=1, le=100)] | None = Field(description="null = the sampler's")


class RunOptions(Section):
    """How long, where to, and how often."""

    output_dir: Text | None = Field(description="run directory; null = runs/PRESET-SEED")
    iterations: PositiveInt = Field(description="GRPO iterations in all")
    checkpoint_every: int = Field(ge=0, description="iterations between checkpoints; 0 = only at the end")
    keep_checkpoints: PositiveInt = Field(description="newest checkpoints kept")
    max_bad_steps: PositiveInt = Field(description="non-finite losses or gradients in a row before the run stops")
    overwrite: bool = Field(description="move a run that is already in output_dir aside (to NAME.old-K)")
    memory_check: Literal["refuse", "warn", "off"] = Field(
        description="what to do at the start if the estimated memory is clearly more than the device has free"
    )
    loggers: list[Literal["tensorboard", "trackio", "wandb"]] = Field(
        description="shown there too, beside metrics.jsonl; one that fails is left out with a warning"
    )

    @field_validator("loggers")
    @classmethod
    def _loggers_once(cls, loggers: list[str]) -> list[str]:
        if len(set(loggers)) != len(loggers):
            raise ValueError("expected every logger once")
        return loggers
