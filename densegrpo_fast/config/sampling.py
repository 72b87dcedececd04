"""Option groups of what is sampled: model, adapter, prompts, sampler, window and lookahead.

What one option says about another group's is checked by `schema.Config`, which holds them all.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from densegrpo_fast.config.base import PositiveInt, Section, StepIndex, Text


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
    targets: list[Text] = Field(min_length=1, description="attention projections that get an adapter")
    init_seed: int = Field(ge=0, lt=2**63, description="seed of the adapter's initial weights")

    @field_validator("targets")
    @classmethod
    def _targets_once(cls, targets: list[str]) -> list[str]:
        if len(set(targets)) != len(targets):
            raise ValueError("expected every projection once")
        return targets


class DataOptions(Section):
    """The prompts."""

    prompts: Text = Field(
        description='training prompts: "scenes", "general", "ocr" or "geneval" (built in), or a .txt or .jsonl file'
    )
    eval_prompts: Text = Field(
        description='held-out prompts: "scenes", "general", "ocr" or "geneval" (built in), or a .txt or .jsonl file'
    )
    num_prompts: int = Field(ge=1, le=65536, description="prompts per iteration (P)")


class SamplerOptions(Section):
    """How the policy draws its trajectories."""

    group_size: int = Field(ge=2, le=4096, description="samples per prompt (G)")
    num_steps: int = Field(ge=2, le=1000, description="denoising steps of a trajectory (T)")
    dynamics: Literal["flow_sde", "cps", "dance", "precise", "wan"] = Field(description="family of the stochastic step")
    noise_level: Annotated[float, Field(ge=0, le=3)] | list[Annotated[float, Field(ge=0, le=3)]] = Field(
        description="strength of the injected noise: one number, or one per step; 0 makes a step an ODE step"
    )
    calibration: Text | None = Field(
        description="a file of densegrpo_fast.calibrate, whose noise level per step replaces noise_level: for these "
        "steps, dynamics and windows; null = none"
    )
    guidance_scale: float = Field(ge=1, le=100, description="classifier-free guidance; 1 = off")
    branches: Annotated[int, Field(ge=2, le=4096)] | None = Field(
        description="steps that are taken with noise from each state of group_size / branches noise-free trunks, at "
        "every trained step (TempFlow-GRPO, Granular-GRPO; credit.method branch or granular); null = trajectories"
    )
    shared_noise: bool = Field(description="start all samples of a prompt from the same initial noise")
    micro_batch: PositiveInt = Field(description="rows per forward pass, the same in rollout and replay")


class WindowOptions(Section):
    """Which steps of an iteration inject noise and are trained (Flow-GRPO-Fast, MixGRPO); the others are ODE steps."""

    schedule: Literal["none", "fixed", "random", "progressive"] = Field(
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


class LookaheadOptions(Section):
    """How each intermediate state is completed to an image. Not run for credit methods without (sparse, coca)."""

    plan: Literal["exact", "exact_but_last", "nodes", "n_step", "one_step", "paths"] = Field(
        description="later steps at which the velocity is evaluated; exact = all of them"
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
    head: Text | None = Field(
        description="completion head for this plan (a file of densegrpo_fast.completion); null = plain last jumps"
    )
    copy_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        description="evaluate a copy of the model with the adapter merged, in this precision; null = the policy itself"
    )
    cache: Text | None = Field(
        description="features taken over from the rollout at the same step: text (of the prompt's first sample) or "
        "text:own (of each sample), reuse:2-5, skip:0,6, joined by +; approximate; null = none"
    )
    graphs: bool = Field(description="replay the lookahead's forwards as CUDA graphs; needs a CUDA device")
    decoder: Literal["preview", "full"] = Field(
        description="decoder of all images that a gain is computed from; a trajectory's final reward is always that of "
        "the full one"
    )
    chunk: PositiveInt = Field(description="rows per forward of the lookahead and per decode, at most")
    memory_gb: Annotated[float, Field(gt=0)] | None = Field(
        description="memory (1e9 bytes) that one forward of the lookahead, or one decode, may take: lowers chunk as "
        "far as needed. Not in it: weights, trajectories, completions, and what cache and head keep of the rollout, "
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
    head_refresh: int = Field(
        ge=0,
        le=10000,
        description="optimiser steps by which each such re-scoring trains the completion head further, so that it "
        "follows the policy; 0 = the head stays as it is",
    )

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
