"""The option groups: every option's type, range and meaning, and what the options of one group say about each other.

The models hold no default values: those live in the presets (`configs/*.yaml`), so that a number is written in one
place. What options of different groups say about each other is in `checks.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    field_validator,
    model_validator,
)

from densegrpo_fast.calibration.rules import Staircase
from densegrpo_fast.common.aliases import cache_problem
from densegrpo_fast.common.plugins import Registry, is_outside
from densegrpo_fast.common.suggest import did_you_mean
from densegrpo_fast.config.checks import reward_problem
from densegrpo_fast.credit.registry import METHODS, local_methods
from densegrpo_fast.objective.registry import POLICIES, STEP_WEIGHTS
from densegrpo_fast.sampling.windows import Schedule

Text = Annotated[str, StringConstraints(min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f]*$")]
PositiveInt = Annotated[int, Field(ge=1, lt=2**31)]
StepIndex = Annotated[int, Field(ge=0, lt=2**31)]
CHOSEN_BY_AUTO = (
    "lookahead.plan",
    "lookahead.nodes",
    "lookahead.n",
    "lookahead.paths",
    "lookahead.guidance",
    "lookahead.copy_dtype",
    "lookahead.decoder",
    "objective.trained_steps",
    "objective.step_sampling",
    "optimizer.update",
)
"""Dotted keys of the options that `lookahead.plan auto` chooses."""
_PROMPTS = '"scenes", "general", "ocr" or "geneval" (built in), or a .txt, .jsonl, .tsv or .csv file'


class Section(BaseModel):
    """Base of all option groups: unknown keys, NaN, infinities and silent conversions are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _once(what: str) -> AfterValidator:
    """The check that no entry of a list stands there twice."""

    def check(values: list[str]) -> list[str]:
        if len(set(values)) != len(values):
            raise ValueError(f"expected every {what} once")
        return values

    return AfterValidator(check)


def _named_in(registry: Registry[Any]) -> AfterValidator:
    """The check that a name is registered, or has the form of one from outside of the package."""

    def check(name: str) -> str:
        known = registry.names()
        if name not in known and not is_outside(name):
            raise ValueError(
                f'unknown {registry.what} "{name}"{did_you_mean(name, known)} '
                f"(known: {', '.join(known)}; your own {registry.kind.__name__}: module:NAME or path.py:NAME)"
            )
        return name

    return AfterValidator(check)


class ModelOptions(Section):
    """The flow model that is aligned."""

    path: Text = Field(description='"embedded", a Hugging Face hub id, or a local pipeline directory')
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        description="precision of the frozen base; auto = bfloat16 on a GPU, float32 on a CPU"
    )
    max_sequence_length: int = Field(ge=0, le=512, description="tokens in the T5 block; 0 leaves the block out")
    revision: Text | None = Field(description="hub revision (branch, tag or commit) to pin; null = the default one")
    height: int = Field(ge=0, le=4096, multiple_of=8, description="image height in pixels; 0 = the model's own")
    width: int = Field(ge=0, le=4096, multiple_of=8, description="image width in pixels; 0 = the model's own")
    compile: Literal["default", "max-autotune-no-cudagraphs"] | None = Field(
        description="torch.compile the network, in this mode; null = no. For CUDA graphs see lookahead.graphs"
    )
    attention: Literal["auto", "native", "xformers", "flash"] = Field(
        description="auto = PyTorch's as the model calls it; the others through diffusers' dispatcher: native = "
        "PyTorch's, xformers and flash (flash-attn) = those packages, which need a CUDA device"
    )
    gradient_checkpointing: bool = Field(
        description="compute the blocks' activations again in the backward instead of keeping them: the same "
        "gradients in a fraction of the memory, for one more forward of every trained row"
    )
    vae_dtype: Literal["float32", "bfloat16"] = Field(description="precision of the full decoder")
    vae_decode: Literal["whole", "sliced", "tiled"] = Field(
        description="how the full decoder decodes: all pictures of a chunk together, one by one, or one by one and "
        "pictures beyond the autoencoder's own size in overlapping tiles, whose seams are blended"
    )
    preview_decoder: Text | None = Field(
        description="directory of an AutoencoderTiny for the same latents; null = the folder preview_decoder of a "
        "pipeline directory, if it is there"
    )
    preview_dtype: Literal["float32", "bfloat16"] = Field(description="precision of the preview decoder")
    prompt_cache: Text | None = Field(
        description="directory that keeps encoded prompts; the text encoders are then only in memory while a prompt "
        "that is not in it is encoded. null = no cache, the encoders stay in memory"
    )


class LoraOptions(Section):
    """The low-rank adapter, the only thing that is trained."""

    rank: int = Field(ge=1, le=1024, description="rank of the update of each projection")
    alpha: int = Field(ge=1, le=4096, description="the update is scaled by alpha / rank")
    targets: Annotated[list[Text], _once("projection")] = Field(
        min_length=1, description="attention projections that get an adapter"
    )
    init_seed: int = Field(ge=0, lt=2**63, description="seed of the adapter's initial weights")
    start: Text | None = Field(
        description="adapter file or directory that the adapter begins as (diffusers', PEFT's, ComfyUI's or kohya's), "
        "of the same rank; the KL term still holds it to the model without any. null = it begins as no change"
    )


class DataOptions(Section):
    """The prompts."""

    prompts: Text = Field(description=f"training prompts: {_PROMPTS}")
    eval_prompts: Text = Field(description=f"held-out prompts: {_PROMPTS}")
    num_prompts: int = Field(ge=1, le=65536, description="prompts per iteration (P)")


class SamplerOptions(Section):
    """How the policy draws its trajectories."""

    group_size: int = Field(ge=2, le=4096, description="samples per prompt (G)")
    num_steps: int = Field(ge=2, le=1000, description="denoising steps of a trajectory (T)")
    dynamics: Literal["flow_sde", "cps", "dance", "precise", "wan"] = Field(
        description="family of the stochastic step, which says what a noise level is"
    )
    noise_level: Annotated[float, Field(ge=0, le=3)] | list[Annotated[float, Field(ge=0, le=3)]] = Field(
        description="strength of the injected noise, one number or one per step: flow_sde a(t), sigma_t = a(t) "
        "sqrt(t/(1-t)); dance sigma_t itself, DenseGRPO's psi(t) as printed (Eq. 11); the others in flow/dynamics.py. "
        "0 makes a step an ODE step"
    )
    calibration: Text | None = Field(
        description="a file of densegrpo_fast.calibrate, whose noise level per step replaces noise_level and means the "
        "same: for these steps, dynamics and windows; null = none"
    )
    guidance_scale: float = Field(ge=1, le=100, description="classifier-free guidance; 1 = off")
    branches: Annotated[int, Field(ge=2, le=4096)] | None = Field(
        description="steps that are taken with noise from each state of group_size / branches noise-free trajectories, "
        "at every trained step (TempFlow-GRPO, Granular-GRPO; credit.method branch or granular); null = trajectories"
    )
    shared_noise: bool = Field(description="start all samples of a prompt from the same initial noise")
    micro_batch: PositiveInt = Field(
        description="rows per forward pass, the same in rollout and replay: a divisor of an update's samples (with "
        "branches trajectories); auto = the largest up to 64"
    )


class WindowOptions(Section):
    """Which steps of an iteration inject noise and are trained (Flow-GRPO-Fast, MixGRPO); the others are ODE steps."""

    schedule: Schedule = Field(
        description="none = all steps; a window for each iteration: always the first, drawn, or sliding on to the last"
    )
    size: PositiveInt | None = Field(description="steps of a window; null with schedule none")
    first: StepIndex = Field(description="lowest step that a window may hold")
    last: StepIndex | None = Field(description="highest step that a window may hold, at most T-2; null = T-2")
    stride: PositiveInt = Field(description="with schedule progressive: steps by which the window moves on")
    every: PositiveInt = Field(description="with schedule progressive: iterations between two moves")
    remainder: Literal["euler", "dpm_solver"] = Field(
        description="how the noise-free steps after the window are taken; dpm_solver = second-order DPM-Solver++ "
        "(MixGRPO-Flash)"
    )
    remainder_share: float = Field(
        gt=0, le=1, description="part of the steps after the window that is kept, spread evenly; 1 = all"
    )

    @model_validator(mode="after")
    def _schedule_and_its_size(self) -> WindowOptions:
        if (self.schedule == "none") != (self.size is None):
            expected = "null" if self.size is not None else "a number of steps"
            received = "null" if self.size is None else self.size
            raise ValueError(f'window.size: expected {expected} with schedule "{self.schedule}", got {received}')
        return self


class CalibrationOptions(Section):
    """Finding the noise level of each step again during training (DenseGRPO's calibration; see also calibrate)."""

    every: int = Field(
        ge=0,
        description="iterations between two calibrations of the noisy steps' levels on the policy as it is then, the "
        "first before the first iteration; 0 = never",
    )
    samples: int = Field(ge=Staircase.enough, le=65536, description="trajectories of a calibration round")
    rounds: int = Field(ge=1, le=1000, description="rounds of a calibration, at most")
    lowest: float = Field(ge=0.01, le=3, description="lowest noise level that a calibration may choose")
    highest: float = Field(ge=0.01, le=3, description="highest noise level that a calibration may choose")

    @model_validator(mode="after")
    def _a_range(self) -> CalibrationOptions:
        if self.lowest > self.highest:
            raise ValueError(f"calibration.lowest: expected at most calibration.highest, {self.highest}")
        return self


class LookaheadOptions(Section):
    """How each intermediate state is completed to an image. Not run for credit methods without (sparse, coca)."""

    plan: Literal["exact", "exact_but_last", "nodes", "n_step", "one_step", "paths", "auto"] = Field(
        description="later steps at which the velocity is evaluated; exact = all of them; auto = training first "
        f"measures what is cheap and good enough, and chooses {', '.join(CHOSEN_BY_AUTO)}"
    )
    nodes: list[PositiveInt] = Field(description="with plan nodes: increasing step indices in 1..T-1; else []")
    n: PositiveInt | None = Field(description="with plan n_step: Euler steps of a completion (1..T); else null")
    paths: list[list[PositiveInt]] = Field(
        description="with plan paths: for each state 0..T-1 its own increasing step indices, in state+1..T-1, as "
        "densegrpo_fast.fidelity --search finds them; else []"
    )
    guidance: Literal["full", "cond_only", "reuse"] = Field(
        description="guidance after a completion's first velocity; reuse = the rollout's at the same step"
    )
    copy_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        description="evaluate a copy of the model with the adapter merged, in this precision; null = the policy itself"
    )
    cache: Text | None = Field(
        description="features reused from the rollout at the same step: text:own = each sample's own text keys and "
        "values, of SD3's transformers; approximate; null = none"
    )
    graphs: bool = Field(description="replay the lookahead's forwards as CUDA graphs; needs a CUDA device")
    decoder: Literal["preview", "full"] = Field(
        description="decoder of all images that a gain is computed from; a trajectory's final reward is always that of "
        "the full one"
    )
    chunk: PositiveInt = Field(description="rows per forward of the lookahead and per decode, at most")
    memory_gb: Annotated[float, Field(gt=0)] | None = Field(
        description="memory (1e9 bytes) that one forward of the lookahead, or one decode, may take: lowers chunk as "
        "far as needed. Not in it: weights, trajectories, completions, and what cache keeps of the rollout, "
        "which run.memory_check counts; null = no limit"
    )
    monitor_every: int = Field(
        ge=0,
        description="iterations between exact re-scorings of one prompt's trajectories or branches, logged as "
        "monitor/*; 0 = never",
    )
    monitor_alarm: float = Field(
        ge=-1, le=1, description="rank correlation of the gains in such a re-scoring below which an alarm is on"
    )
    budget: Annotated[float, Field(gt=0)] | None = Field(
        description="with plan auto: what an iteration may cost, in operations of one with one reward per picture that "
        "trains all steps, each with its forward repeated; null = whatever has the least variance of the gradient for "
        "its operations"
    )
    fidelity: list[Annotated[float, Field(ge=-1, le=1)]] = Field(
        min_length=3,
        max_length=3,
        description="with plan auto: rank correlations inside a group with exact completions that the lookahead must "
        "reach: of the rewards, of the gains, and of the gains in the worst step",
    )

    @field_validator("cache")
    @classmethod
    def _known_cache(cls, cache: str | None) -> str | None:
        if cache is not None and (problem := cache_problem(cache)):
            raise ValueError(problem)
        return cache

    @model_validator(mode="after")
    def _plan_and_its_arguments(self) -> LookaheadOptions:
        if (self.plan == "nodes") != bool(self.nodes):
            expected = "at least one step" if self.plan == "nodes" else "[]"
            raise ValueError(f'lookahead.nodes: expected {expected} with plan "{self.plan}", got {self.nodes}')
        if (self.plan == "n_step") != (self.n is not None):
            expected = "a number of steps" if self.plan == "n_step" else "null"
            received = "null" if self.n is None else self.n
            raise ValueError(f'lookahead.n: expected {expected} with plan "{self.plan}", got {received}')
        if (self.plan == "paths") != bool(self.paths):
            expected = "a list of steps for every state" if self.plan == "paths" else "[]"
            raise ValueError(f'lookahead.paths: expected {expected} with plan "{self.plan}", got {self.paths}')
        if any(later <= earlier for earlier, later in zip(self.nodes, self.nodes[1:], strict=False)):
            raise ValueError(f"lookahead.nodes: expected increasing steps, got {self.nodes}")
        return self


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

    method: Annotated[Text, _named_in(METHODS)] = Field(
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

    policy: Annotated[Text, _named_in(POLICIES)] = Field(
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
    step_weight: Annotated[Text, _named_in(STEP_WEIGHTS)] = Field(
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


class EvaluationOptions(Section):
    """Held-out evaluation with the ODE sampler."""

    every: int = Field(ge=0, description="iterations between evaluations (and sample grids); 0 = only before and after")
    num_prompts: PositiveInt = Field(description="held-out prompts")
    samples_per_prompt: int = Field(ge=1, le=4096, description="images per held-out prompt")
    num_steps: int = Field(ge=1, le=1000, description="Euler steps")
    guidance_scale: Annotated[float, Field(ge=1, le=100)] | None = Field(description="null = the sampler's")


class RunOptions(Section):
    """How long, where to, and how often."""

    output_dir: Text | None = Field(description="run directory; null = runs/PRESET-SEED")
    iterations: PositiveInt = Field(description="GRPO iterations in all")
    checkpoint_every: int = Field(ge=0, description="iterations between checkpoints; 0 = only at the end")
    keep_checkpoints: PositiveInt = Field(description="newest checkpoints kept")
    early_stopping_patience: int = Field(
        ge=0,
        description="evaluations in a row without a better held-out reward after which the run ends, with its adapter "
        "and report as they are then; 0 = off",
    )
    early_stopping_threshold: float = Field(ge=0, description="by how much a better held-out reward must be better")
    max_kl: Annotated[float, Field(gt=0)] | None = Field(
        description="kl of an iteration beyond which the run ends likewise; null = any"
    )
    max_bad_steps: PositiveInt = Field(description="non-finite losses or gradients in a row before the run stops")
    overwrite: bool = Field(description="move a run that is already in output_dir aside (to NAME.old-K)")
    memory_check: Literal["refuse", "warn", "off"] = Field(
        description="what to do at the start if the estimated memory is clearly more than the device has free"
    )
    loggers: Annotated[list[Literal["tensorboard", "trackio", "wandb"]], _once("logger")] = Field(
        description="shown there too, beside metrics.jsonl; one that fails is left out with a warning"
    )


class DistributedOptions(Section):
    """A run on several processes (torchrun); of no effect on one. Sizes elsewhere are totals over all processes."""

    split: Literal["rows", "groups"] = Field(
        description="what is shared out among the processes: rows = samples (with branches: trajectories), so that "
        "several may share the group of a prompt; groups = whole groups"
    )
    shard: Literal["auto", "none", "full", "hybrid"] = Field(
        description="the frozen base: none = whole in every process; full = spread over all of them, hybrid = over "
        "those of each machine, gathered block by block; auto = full where the estimated memory does not allow none"
    )
    backend: Literal["auto", "nccl", "gloo"] = Field(
        description="what the processes talk by; auto = NCCL on GPUs, gloo on CPUs"
    )
    timeout: int = Field(
        ge=1,
        le=86400,
        description="seconds that a process waits for the others, after which it is an error: longer than the slowest "
        "reward may take",
    )
