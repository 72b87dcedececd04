"""Builds the parts of a run from its configuration."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from densegrpo_fast.config import Config
from densegrpo_fast.embedded import scenes
from densegrpo_fast.exit_codes import ExitCode, UserError
from densegrpo_fast.flow.dynamics import StepCoefficients, coefficients
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.cache_spec import CacheSpec
from densegrpo_fast.models.completion_head import CompletionHead, load_head
from densegrpo_fast.models.feature_cache import FeatureCache
from densegrpo_fast.models.load import load_sd3, resolve_dtype
from densegrpo_fast.models.lookahead_copy import LookaheadCopy
from densegrpo_fast.models.sd3 import SD3
from densegrpo_fast.rewards.base import RewardMixture, create
from densegrpo_fast.runtime.data import PromptSampler, PromptSet, load_prompts
from densegrpo_fast.runtime.evaluation import HeldOut
from densegrpo_fast.runtime.learner import LearnerOptions
from densegrpo_fast.runtime.lora import add_lora
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.plan import Plan, make_plan

_SENTENCES = 600
"""Built-in training (and at most held-out) sentences; the six categories take turns until each runs out."""


def default_device() -> torch.device:
    """The current GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def build_model(config: Config, device: torch.device, dry_run: bool = False) -> FlowModel:
    """The model with its adapter; in a dry run of a model that is not in the package, a tiny random one."""
    options = config.model
    if dry_run and options.path != "embedded":
        from densegrpo_fast.models.tiny import tiny_sd3

        model = tiny_sd3()
    else:
        model = load_sd3(
            options.path,
            device=device,
            dtype=resolve_dtype(options.dtype, device),
            max_sequence_length=options.max_sequence_length,
            height=options.height,
            width=options.width,
            revision=options.revision,
        )
    lora = config.lora
    try:
        add_lora(model.network, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=lora.init_seed)
    except ValueError as error:
        raise UserError(str(error), ExitCode.USAGE) from None
    return model


def build_reward(terms: dict[str, float]) -> RewardMixture:
    """The weighted mixture of the named rewards.

    Raises:
        UserError: (reward) one cannot be made.
    """
    try:
        return RewardMixture({name: (create(name), weight) for name, weight in terms.items()})
    except (ValueError, ImportError, OSError) as error:
        raise UserError(f"reward.terms: {error}", ExitCode.REWARD) from None


def build_observer(config: Config) -> RewardMixture:
    """The mixture for held-out evaluation: the training reward, and the observed ones beside it."""
    return build_reward(config.reward.terms | dict.fromkeys(config.reward.observed, 0.0))


def build_coefficients(config: Config, model: FlowModel) -> StepCoefficients:
    """The sampler's step coefficients on the model's device."""
    options = config.sampler
    try:
        table = coefficients(model.sigmas(options.num_steps), config.noise_levels, options.dynamics)
    except ValueError as error:
        raise UserError(f"sampler: {error}", ExitCode.USAGE) from None
    return table.to(model.device)


def build_lookahead(config: Config, model: FlowModel) -> Lookahead | None:
    """The lookahead of a dense run; None with sparse credit."""
    if config.credit.method == "sparse":
        return None
    options = config.lookahead
    plan = make_plan(options.plan, config.sampler.num_steps, options.nodes, options.n or 1)
    head = None if options.head is None else build_head(Path(options.head), plan, model)
    evaluated = model if options.copy_dtype is None else build_copy(model, options.copy_dtype)
    cache = None
    if options.cache is not None:
        guided = options.guidance == "full" and config.sampler.guidance_scale != 1.0
        rows = config.data.num_prompts * config.sampler.group_size
        cache = build_cache(options.cache, model, evaluated, plan, rows=rows, halves=2 if guided else 1)
    return Lookahead(evaluated, plan, guidance=options.guidance, chunk=options.chunk, head=head, cache=cache)


def build_copy(model: FlowModel, dtype: str) -> LookaheadCopy:
    """A copy of the model with the adapter merged, in another precision.

    Raises:
        UserError: (usage) the model cannot be copied so.
    """
    assert isinstance(model, SD3)
    try:
        return LookaheadCopy(model, resolve_dtype(dtype, model.device))
    except ValueError as error:
        raise UserError(str(error), ExitCode.USAGE) from None


def build_cache(text: str, model: FlowModel, reader: FlowModel, plan: Plan, *, rows: int, halves: int) -> FeatureCache:
    """The cache that a configuration's text asks for, between the policy and the model that the lookahead evaluates.

    Raises:
        UserError: (usage) the text is wrong, or does not fit the model.
    """
    try:
        return FeatureCache(
            model.network,
            CacheSpec.parse(text),
            nodes=plan.nodes(),
            rows=rows,
            halves=halves,
            reader=reader.network,
        )
    except ValueError as error:
        raise UserError(str(error), ExitCode.USAGE) from None


def build_head(path: Path, plan: Plan, model: FlowModel) -> CompletionHead:
    """A completion head from its file, if it was made for this plan and model.

    Raises:
        UserError: (usage) it cannot be read, or was made for another plan or model.
    """
    head = read_head(path, model)
    if head.config.paths != plan.paths:
        raise UserError(
            f"lookahead.head: {path} was made for another plan than {plan.name}; "
            "make one with python -m densegrpo_fast.completion",
            ExitCode.USAGE,
        )
    return head


def read_head(path: Path, model: FlowModel) -> CompletionHead:
    """A completion head from its file, on the model's device.

    Raises:
        UserError: (usage) it cannot be read, or was made for a model of another shape.
    """
    try:
        head = load_head(path)
    except ValueError as error:
        raise UserError(f"completion head: {error}", ExitCode.USAGE) from None
    made, own = (head.config.latent_shape, head.config.hidden), (model.latent_shape, model.network.inner_dim)
    if made != own:
        raise UserError(
            f"completion head: {path} was made for latents and hidden width {made}, this model has {own}",
            ExitCode.USAGE,
        )
    return head.to(model.device)


def synchronizer(device: torch.device) -> Callable[[], object]:
    """What a timer must call for the device to have finished."""
    return torch.cuda.synchronize if device.type == "cuda" else lambda: None


def shrink(config: Config) -> Config:
    """The configuration of a dry run: two samples of one prompt, and a reward that needs no weights."""
    settings = config.model_dump()
    settings["data"] |= {"num_prompts": 1}
    settings["sampler"] |= {"group_size": 2, "micro_batch": 2}
    settings["optimizer"] |= {"updates_per_iteration": 1}
    if config.model.path != "embedded":
        settings["model"] |= {"height": 0, "width": 0}
        settings["reward"] |= {"terms": {"jpeg_compressibility": 1.0}, "observed": []}
        settings["data"] |= {"prompts": "scenes", "eval_prompts": "scenes"}
    return Config.model_validate(settings)


@dataclass(frozen=True)
class TrainingPrompts:
    """The training prompts and the order in which iterations use them."""

    prompts: PromptSet
    sampler: PromptSampler

    def rows(self, iteration: int, group_size: int) -> tuple[list[str], list[dict[str, Any]]]:
        """Prompts and metadata of the B = P*G samples of an iteration; row p*G + g is sample g of prompt p."""
        chosen = [index for index in self.sampler.batch(iteration) for _ in range(group_size)]
        return [self.prompts.prompts[i] for i in chosen], [self.prompts.metadata[i] for i in chosen]


def build_prompts(config: Config) -> TrainingPrompts:
    """Training prompts: the embedded model's sentences, or a file."""
    prompts = _prompt_set(config.data.prompts, held_out=False)
    return TrainingPrompts(prompts, PromptSampler(len(prompts), config.data.num_prompts, config.seed))


def build_held_out(config: Config) -> HeldOut:
    """The held-out evaluation; its prompts and noise do not depend on the run's seed, so runs can be compared."""
    options = config.evaluation
    prompts = _prompt_set(config.data.eval_prompts, held_out=True)
    return HeldOut(
        list(prompts.prompts[: options.num_prompts]),
        list(prompts.metadata[: options.num_prompts]),
        samples_per_prompt=options.samples_per_prompt,
        num_steps=options.num_steps,
        guidance_scale=config.evaluation_guidance_scale,
        seed=0,
        chunk=config.sampler.micro_batch,
    )


def _prompt_set(source: str, held_out: bool) -> PromptSet:
    if source == "scenes":
        prompts = scenes.prompts(held_out=held_out, count=_SENTENCES)
        return PromptSet(tuple(prompts), tuple({} for _ in prompts))
    return load_prompts(source)


def learner_options(config: Config) -> LearnerOptions:
    """The part of the configuration that the learner needs."""
    optimizer = config.optimizer
    return LearnerOptions(
        lr=optimizer.lr,
        betas=(optimizer.betas[0], optimizer.betas[1]),
        weight_decay=optimizer.weight_decay,
        eps=optimizer.eps,
        max_grad_norm=optimizer.max_grad_norm,
        updates_per_iteration=optimizer.updates_per_iteration,
        warmup=optimizer.warmup,
        ema_decay=config.ema.decay,
        ema_every=config.ema.every,
        clip_range=config.objective.clip_range,
        step_weight=config.objective.step_weight,
        kl_coef=config.objective.kl_coef,
        micro_batch=config.sampler.micro_batch,
        max_bad_steps=config.run.max_bad_steps,
    )


def trained_steps(config: Config, iteration: int) -> list[int]:
    """The steps that an iteration trains, increasing; drawn afresh (from the seed) when a number is configured."""
    wanted, steps = config.objective.trained_steps, config.sampler.num_steps
    if wanted == "all_but_last":
        return list(range(steps - 1))
    if isinstance(wanted, list):
        return list(wanted)
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + iteration) % 2**63)
    return sorted(torch.randperm(steps - 1, generator=generator)[:wanted].tolist())
