"""The option groups that say what is learned: rewards, credit, objective, optimizer and average."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, JsonValue, field_validator, model_validator

from densegrpo_fast.config.checks import reward_problem
from densegrpo_fast.config.fields import PositiveInt, Section, StepIndex, Text, named_in
from densegrpo_fast.credit.registry import METHODS, local_methods
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
    frames: int = Field(
        ge=1,
        le=1025,
        description="frames of a video that a reward of pictures scores, evenly spread, for their mean; 1 = the one in "
        "the middle. A reward with the attribute takes_videos gets all",
    )
    max_missing: float = Field(ge=0, le=1, description="share of missing scores above which the run stops")
    timeout: Annotated[float, Field(gt=0)] | None = Field(
        description="seconds that one call of the rewards may take where one of them is your own; null = no limit. The "
        "package's have limits of their own"
    )
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
        if problem := reward_problem(self.terms, self.observed, self.options):
            raise ValueError(problem)
        return self


class CreditOptions(Section):
    """How rewards become advantages."""

    method: Annotated[Text, named_in(METHODS)] = Field(
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
    closeness: float = Field(
        ge=0,
        le=100,
        description="of trajectories: weight, falling to 0 over the run, by which a step is rewarded for leading near "
        "the state of its group's best sample (an experiment after POSG); 0 = off",
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

    def method_options(self) -> dict[str, Any]:
        """Every option that a credit method may take, by its name: the section's own, and `arguments`."""
        return self.model_dump(exclude={"method", "arguments"}) | self.arguments


class ObjectiveOptions(Section):
    """The policy loss."""

    policy: Annotated[Text, named_in(POLICIES)] = Field(
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
    step_weight: Annotated[Text, named_in(STEP_WEIGHTS)] = Field(
        description="weight of each step's policy loss, on top of guard's; none = 1, noise_aware = its injected noise "
        "(TempFlow), flash = undoes the log-probability's gain (Flash-GRPO), proportionate = flash times |dt| (PCPO); "
        "or your own StepWeighting as module:NAME or path.py:NAME"
    )
    kl_coef: float = Field(ge=0, description="weight of the KL to the model without its adapter; 0 = off")
    kl_scale: Literal["flow_grpo", "paper"] = Field(
        description="flow_grpo = that code's, which leaves out the step's |dt|; paper = the true divergence of a step"
    )
    guidance_gradient: Literal["full", "conditional"] = Field(
        description="halves of a guided velocity that the gradient goes through; full = both; conditional = the one "
        "with the prompt alone: cheaper, another gradient, and what a configuration or checkpoint from before this "
        "option means"
    )
    negative_factor: float = Field(
        ge=0,
        le=1,
        description="with sampler.branches: multiplies the negative advantages of branches whose noise points where "
        "that of good branches of the same state does (an experiment after NTHR); 1 = off",
    )
    negative_threshold: Annotated[float, Field(ge=0)] | None = Field(
        description="how much it does, as a share of what the least good branch has; null = 1/sqrt(D) with D latent "
        "values, the size of independent noises' cosines. NTHR's 1 holds next to nothing back",
    )
    trained_steps: Literal["all_but_last"] | list[StepIndex] | PositiveInt = Field(
        description="all_but_last, a list of step indices (0..T-1), or how many are drawn per iteration; with windows "
        "only their steps. With a credit that is local to a step "
        f"({local_methods()}), only the states at both ends of a trained step are completed"
    )
    step_sampling: Literal["uniform", "importance"] = Field(
        description="how trained_steps draws a number of steps: uniform = each alike; importance = in proportion to "
        "the size that each step's gradient is expected to have, by which its loss is then divided: the same gradient "
        "on average, with less noise from the draw"
    )
    arguments: dict[Text, JsonValue] = Field(
        description="further arguments of a policy or step_weight of your own, such as {margin: 0.1}; {} for the "
        "package's"
    )


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
    update: Literal["replayed", "streamed"] = Field(
        description="replayed = each trained step's forward runs again, once all are rewarded; streamed = it keeps its "
        "graph from the rollout until the states around it are scored: the same gradient without a repeated forward, "
        "in the memory of two steps' graphs of all samples (where that runs out, it is replayed). For trajectories, "
        f"one update per iteration and a credit that is local to a step ({local_methods()})"
    )
    warmup: int = Field(ge=0, description="updates over which the learning rate rises linearly; 0 = none")


class EmaOptions(Section):
    """The running average of the adapter, which is what evaluation and export use."""

    decay: float = Field(ge=0, lt=1, description="share of the old average kept at an update of it")
    every: int = Field(ge=0, description="optimizer updates between two updates of the average; 0 = no average")
