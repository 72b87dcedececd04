"""The lookahead of a run, and what it may evaluate in the place of the model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.cache_spec import CacheSpec
from densegrpo_fast.models.completion_head import CompletionHead, load_head
from densegrpo_fast.models.feature_cache import FeatureCache
from densegrpo_fast.models.loading import resolve_dtype
from densegrpo_fast.models.lookahead_copy import LookaheadCopy
from densegrpo_fast.models.sd3 import SD3
from densegrpo_fast.sampling.graphs import GraphedStepRunner
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.plan import Plan, make_plan
from densegrpo_fast.sampling.step_runner import StepRunner
from densegrpo_fast.training.chunks import lookahead_chunks


def build_lookahead(config: Config, model: FlowModel) -> Lookahead | None:
    """The lookahead that the credit method needs; None if it needs none."""
    if not (config.uses_lookahead or config.uses_branches):
        return None
    options, replan = config.lookahead, partial(build_plan, config)
    plan = replan(config.sampler.num_steps)
    head = None if options.head is None else build_head(Path(options.head), plan, model)
    visits = build_step_runner(config, model)
    evaluated = model if options.copy_dtype is None else build_copy(model, options.copy_dtype)
    if evaluated is not model and config.model.compile is not None:
        evaluated.compile(config.model.compile)
    cache = None
    if options.cache is not None:
        guided = options.guidance == "full" and config.sampler.guidance_scale != 1.0
        group = config.sampler.group_size
        shape = {"rows": config.data.num_prompts * group, "group": group, "halves": 2 if guided else 1}
        cache = build_cache(options.cache, model, evaluated, plan, **shape)
    chunks = lookahead_chunks(config, evaluated, options.decoder)
    return Lookahead(
        evaluated,
        plan,
        guidance=options.guidance,
        chunk=chunks.forward,
        decode_chunk=chunks.decode,
        head=head,
        cache=cache,
        visits=visits,
        replan=replan,
    )


def build_plan(config: Config, num_steps: int) -> Plan:
    """The configured plan, for so many steps."""
    options = config.lookahead
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
    assert isinstance(model, SD3)
    try:
        return LookaheadCopy(model, resolve_dtype(dtype, model.device))
    except ValueError as error:
        raise UsageError(str(error)) from None


def build_cache(
    text: str, model: FlowModel, reader: FlowModel, plan: Plan, *, rows: int, group: int, halves: int
) -> FeatureCache:
    """The cache that a configuration's text asks for, between the policy and the model that the lookahead evaluates.

    Raises:
        UsageError: the text is wrong, or does not fit the model.
    """
    try:
        return FeatureCache(
            model.network,
            CacheSpec.parse(text),
            nodes=plan.nodes(),
            rows=rows,
            group=group,
            halves=halves,
            reader=reader.network,
        )
    except ValueError as error:
        raise UsageError(str(error)) from None


def build_head(path: Path, plan: Plan, model: FlowModel) -> CompletionHead:
    """A completion head from its file, if it was made for this plan and model.

    Raises:
        UsageError: it cannot be read, or was made for another plan or model.
    """
    head = read_head(path, model, "lookahead.head")
    if head.config.paths != plan.paths:
        raise UsageError(
            f"lookahead.head: {path} was made for another plan than {plan.name}; "
            "make one with python -m densegrpo_fast.completion",
        )
    return head


def read_head(path: Path, model: FlowModel, option: str = "--head") -> CompletionHead:
    """A completion head from its file, on the model's device.

    Args:
        path: the file.
        model: whose rollouts it corrects.
        option: that named the file, for the message.

    Raises:
        UsageError: it cannot be read, or was made for a model of another shape.
    """
    try:
        head = load_head(path)
    except ValueError as error:
        raise UsageError(f"{option}: {error}") from None
    made, own = (head.config.latent_shape, head.config.hidden), (model.latent_shape, model.network.inner_dim)
    if made != own:
        raise UsageError(
            f"{option}: {path} was made for latents and hidden width {made}, this model has {own}",
        )
    return head.to(model.device)
