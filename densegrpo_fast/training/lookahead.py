"""The lookahead of a run: its plan, how its forwards are run, what they may evaluate in the place of the model, and how
many rows it evaluates and decodes at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.credit import registry
from densegrpo_fast.models.base import Decoder, FlowModel
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.feature_cache import FeatureCache
from densegrpo_fast.models.loading import resolve_dtype
from densegrpo_fast.models.lookahead_copy import LookaheadCopy
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.graphs import GraphedStepRunner
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.oom_backoff import OomBackoff
from densegrpo_fast.sampling.plan import Plan, make_plan
from densegrpo_fast.sampling.step_runner import StepRunner
from densegrpo_fast.training.distributed import Share
from densegrpo_fast.training.meter import underlying

GB = 1e9
"""Bytes of one unit of `lookahead.memory_gb`."""


def build_lookahead(config: Config, model: FlowModel, share: Share | None = None) -> Lookahead | None:
    """The lookahead that the credit method needs; None if it needs none.

    Args:
        share: the rows of an iteration that this process completes; None = all.

    Raises:
        UsageError: an option does not fit the model, or the share.
    """
    if not (config.uses_lookahead or config.uses_branches):
        return None
    options, replan = config.lookahead, partial(build_plan, config)
    plan = replan(config.sampler.num_steps)
    step_runner = build_step_runner(config, model)
    evaluated = model if options.copy_dtype is None else build_copy(model, options.copy_dtype)
    if evaluated is not model and config.model.compile is not None:
        evaluated.compile(config.model.compile)
    cache = None
    if options.cache is not None:
        guided = options.guidance == "full" and config.sampler.guidance_scale != 1.0
        rows = config.data.num_prompts * config.sampler.group_size if share is None else len(share.rows)
        cache = build_cache(model, evaluated, plan, rows=rows, halves=2 if guided else 1)
    chunks = lookahead_chunks(config, evaluated, options.decoder)
    return Lookahead(
        evaluated,
        plan,
        guidance=options.guidance,
        chunk=OomBackoff(chunks.forward, "lookahead.chunk"),
        decode_chunk=OomBackoff(chunks.decode, "lookahead.chunk, of decodes", "set model.vae_decode to tiled"),
        cache=cache,
        step_runner=step_runner,
        replan=replan,
    )


def completion_ways(config: Config, lookahead: Lookahead) -> list[Lookahead]:
    """The ways in which the credit method wants every branch completed, the finest last: one, but for Granular-GRPO."""
    if "granularities" not in registry.find(config.credit.method).options:
        return [lookahead]
    strides = sorted(config.credit.granularities, reverse=True)
    return [lookahead.by(plans.strided(lookahead.plan.num_steps, stride)) for stride in strides]


def build_plan(config: Config, num_steps: int) -> Plan:
    """The configured plan, for so many steps.

    Raises:
        UsageError: it is auto, which is not chosen yet.
    """
    options = config.lookahead
    if options.plan == "auto":
        raise UsageError(
            "lookahead.plan: auto is chosen by python -m densegrpo_fast.train, and in Python by "
            "densegrpo_fast.fidelity.auto.choose(config); the config.yaml of such a run has what was chosen"
        )
    return make_plan(options.plan, num_steps, options.nodes, options.n or 1, options.paths)


def build_step_runner(config: Config, model: FlowModel) -> StepRunner:
    """How the lookahead's forwards are run.

    Raises:
        UsageError: as graphs, and the model is on no CUDA device.
    """
    if config.lookahead.graphs and model.device.type != "cuda":
        raise UsageError(
            f"lookahead.graphs: CUDA graphs need a CUDA device, the model is on {model.device}; set it to false",
        )
    return GraphedStepRunner() if config.lookahead.graphs else StepRunner()


def build_copy(model: FlowModel, dtype: str) -> LookaheadCopy:
    """A copy of the model with the adapter merged, in another precision.

    Raises:
        UsageError: the model cannot be copied so.
    """
    assert isinstance(model, DiffusersModel)
    try:
        return LookaheadCopy(model, resolve_dtype(dtype, model.device))
    except ValueError as error:
        raise UsageError(str(error)) from None


def build_cache(model: FlowModel, reader: FlowModel, plan: Plan, *, rows: int, halves: int) -> FeatureCache:
    """The cache between the policy and the model that the lookahead evaluates.

    Raises:
        UsageError: it does not fit the model.
    """
    try:
        return FeatureCache(model.network, nodes=plan.nodes(), rows=rows, halves=halves, reader=reader.network)
    except ValueError as error:
        raise UsageError(str(error)) from None


@dataclass(frozen=True)
class Chunks:
    """Rows at a time.

    Attributes:
        forward: of a network forward.
        decode: of a decode.
    """

    forward: int
    decode: int


def lookahead_chunks(config: Config, model: FlowModel, decoder: Decoder) -> Chunks:
    """`lookahead.chunk`, or as many rows less as the memory budget demands.

    What rows need is counted on the model's own architecture (`models/memory.py`): the tensors of a forward or decode
    that are alive at the same time, without the workspaces of kernels. What is kept between forwards is not in the
    budget: trajectories, where completions stand, and the features of `lookahead.cache`; it is in the estimate that a
    run begins with (`training/memory.py`).

    Args:
        config: the run's.
        model: that the lookahead evaluates.
        decoder: of its images.

    Raises:
        UsageError: the budget is too small for one row, or the model's memory cannot be counted.
    """
    most, budget = config.lookahead.chunk, config.lookahead.memory_gb
    if budget is None:
        return Chunks(most, most)
    model = underlying(model)
    if not isinstance(model, DiffusersModel):
        raise UsageError("lookahead.memory_gb: expected null, this model's memory cannot be counted")
    # peft and diffusers: not before they are needed
    from densegrpo_fast.models.flops import architecture_of
    from densegrpo_fast.models.memory import ModelMemory, tensor_bytes

    memory = ModelMemory(
        architecture_of(model),
        dtype=model.dtype,
        vae_dtype=model.pipeline.vae.dtype,
        preview_dtype=model.preview_dtype,
        lora_rank=config.adapter_rank,
        lora_targets=tuple(config.lora.targets),
    )
    how, prompt = config.model.vae_decode, model.encode([""])
    # the prompt's embeddings are copied for every row
    row = tensor_bytes([t[0].to(model.dtype) for t in prompt.prompts.values() if t.is_floating_point()])
    parts = {
        "a forward": Linear.through(lambda rows: memory.forward(rows) + rows * row),
        "a decode": Linear.through(lambda rows: memory.decode(rows, decoder, how)),
    }
    if any(part.at(1) > budget * GB for part in parts.values()):
        single = " and ".join(f"{name} {part.at(1) / GB:.3g} GB" for name, part in parts.items())
        enough = 1.01 * max(part.at(1) for part in parts.values()) / GB
        raise UsageError(
            f"lookahead.memory_gb: {budget:g} is too small for one row, for which {single} are needed; "
            f"expected at least {enough:.3g}, or null and lookahead.chunk 1",
        )
    forward, decode = (min(most, part.largest(budget * GB)) for part in parts.values())
    return Chunks(forward, decode)


@dataclass(frozen=True)
class Linear:
    """Bytes as a function of the number of rows: `fixed + rows * slope`."""

    fixed: float
    slope: float

    @classmethod
    def through(cls, measure: Callable[[int], int]) -> Linear:
        """The line through the measured bytes of one and of two rows."""
        one, two = measure(1), measure(2)
        return cls(2 * one - two, two - one)

    def at(self, rows: int) -> float:
        """Bytes of so many rows."""
        return self.fixed + rows * self.slope

    def largest(self, limit: float) -> int:
        """Most rows within `limit` bytes, at least 1."""
        return max(1, int((limit - self.fixed) // self.slope)) if self.slope > 0 else 2**31 - 1
