"""The option groups: every option's type, range and meaning, and what the options of one group say about each other.

Those that say what is learned (rewards to optimizer) are in `learning_sections.py`. No group holds default values:
those live in the presets (`configs/*.yaml`), so that a number is written in one place. What options of different groups
say about each other is in `checks.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from densegrpo_fast.calibration.rules import Staircase
from densegrpo_fast.common.aliases import cache_problem
from densegrpo_fast.config.fields import PositiveInt, Section, StepIndex, Text, once
from densegrpo_fast.sampling.windows import Schedule

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
_PROMPTS = '"scenes", "words", "general", "ocr" or "geneval" (built in), or a .txt, .jsonl, .tsv or .csv file'


class ModelOptions(Section):
    """The flow model that is aligned."""

    path: Text = Field(
        description='"embedded" or "embedded_words" (in the package), a Hugging Face hub id, or a pipeline directory'
    )
    train: Literal["lora", "full"] = Field(
        description="what is trained: lora = an adapter on the frozen network; full = all weights of the network, kept "
        "in float32 and computed in model.dtype"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        description="precision of the network; auto = bfloat16 on a GPU, float32 on a CPU"
    )
    max_sequence_length: int = Field(ge=0, le=512, description="tokens in the T5 block; 0 leaves the block out")
    revision: Text | None = Field(description="hub revision (branch, tag or commit) to pin; null = the default one")
    height: int = Field(ge=0, le=4096, multiple_of=8, description="image height in pixels; 0 = the model's own")
    width: int = Field(ge=0, le=4096, multiple_of=8, description="image width in pixels; 0 = the model's own")
    frames: int = Field(ge=1, le=1025, description="frames of a video model's videos; 1 = a picture")
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
    """The low-rank adapter; without effect where `model.train` is full."""

    rank: int = Field(ge=1, le=1024, description="rank of the update of each projection")
    alpha: int = Field(ge=1, le=4096, description="the update is scaled by alpha / rank")
    targets: Annotated[list[Text], once("projection")] = Field(
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
    loggers: Annotated[list[Literal["tensorboard", "trackio", "wandb"]], once("logger")] = Field(
        description="shown there too, beside metrics.jsonl; one that fails is left out with a warning"
    )


class DistributedOptions(Section):
    """A run on several processes (torchrun); of no effect on one. Sizes elsewhere are totals over all processes."""

    split: Literal["rows", "groups"] = Field(
        description="what is shared out among the processes: rows = samples (with branches: trajectories), so that "
        "several may share the group of a prompt; groups = whole groups"
    )
    shard: Literal["auto", "none", "full", "hybrid"] = Field(
        description="the network's weights, without an adapter's: none = whole in every process; full = spread over "
        "all of them, hybrid = over those of each machine, gathered block by block; auto = full where the estimated "
        "memory does not allow none"
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
