"""Builds the parts of a run from its configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from densegrpo_fast.calibration.store import read_calibration
from densegrpo_fast.config import Config
from densegrpo_fast.config_rewards import behind
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
from densegrpo_fast.objective.policy import ObjectiveSettings
from densegrpo_fast.rewards.base import Reward, RewardMixture, create
from densegrpo_fast.runtime.data import BUILT_IN, PromptSampler, PromptSet, built_in_prompts, load_prompts
from densegrpo_fast.runtime.evaluation import HeldOut
from densegrpo_fast.runtime.learner import LearnerOptions
from densegrpo_fast.runtime.lora import add_lora
from densegrpo_fast.sampling.graphs import GraphedVisits
from densegrpo_fast.sampling.lookahead import Lookahead
from densegrpo_fast.sampling.plan import Plan, make_plan
from densegrpo_fast.sampling.windows import Windows

_SENTENCES = 600
"""Built-in training (and at most held-out) sentences; the six categories take turns until each runs out."""


def default_device() -> torch.device:
    """The current GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def load_base(config: Config, device: torch.device) -> SD3:
    """The model as it comes, without an adapter.

    Raises:
        UserError: (environment) it cannot be loaded.
    """
    options = config.model
    return load_sd3(
        options.path,
        device=device,
        dtype=resolve_dtype(options.dtype, device),
        max_sequence_length=options.max_sequence_length,
        height=options.height,
        width=options.width,
        revision=options.revision,
    )


def build_model(config: Config, device: torch.device, dry_run: bool = False) -> FlowModel:
    """The model with its adapter; in a dry run of a model that is not in the package, a tiny random one."""
    options = config.model
    if dry_run and options.path != "embedded":
        from densegrpo_fast.models.tiny import tiny_sd3

        model = tiny_sd3()
    else:
        model = load_base(config, device)
    check_calibration(config, model)
    lora = config.lora
    try:
        add_lora(model.network, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=lora.init_seed)
    except ValueError as error:
        raise UserError(str(error), ExitCode.USAGE) from None
    if options.compile is not None:
        model.compile(options.compile)
    return model


def check_calibration(config: Config, model: FlowModel) -> None:
    """Refuse a calibration that was made for another schedule than the model's.

    Raises:
        UserError: (usage) the sigmas differ, or the file holds other levels than the configuration took from it.
    """
    if config.sampler.calibration is None:
        return
    made = read_calibration(Path(config.sampler.calibration))
    made.check_sampler(config.sampler.num_steps, config.sampler.dynamics)
    made.check_sigmas(model.sigmas(config.sampler.num_steps).tolist())
    if made.noise_level != config.noise_levels:
        raise UserError(
            f"sampler.calibration: {made.path} does not hold the levels of sampler.noise_level; has it just changed?",
            ExitCode.USAGE,
        )


def build_reward(
    terms: Mapping[str, float],
    options: Mapping[str, Mapping[str, Any]] | None = None,
    made: RewardMixture | None = None,
) -> RewardMixture:
    """The weighted mixture of the named rewards.

    Args:
        terms: reward name -> weight.
        options: reward name -> its options, as in `reward.options`.
        made: a mixture whose rewards are taken over where the names agree, so that no model is loaded twice.

    Raises:
        UserError: (usage) a name or an option is wrong; (reward) what a reward needs is not here.
    """
    ready = {} if made is None else made.terms
    try:
        rewards = {name: ready[name][0] if name in ready else _create(name, options or {}) for name in terms}
        return RewardMixture({name: (rewards[name], weight) for name, weight in terms.items()})
    except ValueError as error:
        raise UserError(f"reward.terms, reward.options: {error}", ExitCode.USAGE) from None
    except (ImportError, OSError) as error:
        raise UserError(f"reward.terms, reward.options: {error}", ExitCode.REWARD) from None


def _create(name: str, options: Mapping[str, Mapping[str, Any]]) -> Reward:
    kind, own = behind(name, options)
    return create(kind, **own)


def build_observer(config: Config, training: RewardMixture | None = None) -> RewardMixture:
    """The mixture for held-out evaluation: the training reward, and the observed ones beside it.

    Args:
        training: the mixture that the run trains with, whose rewards are shared; None = make all of them.
    """
    terms = config.reward.terms
    # a reward that is both trained and observed keeps its weight
    observed = {name: 0.0 for name in config.reward.observed if name not in terms}
    return build_reward(terms | observed, config.reward.options, training)


def build_windows(config: Config) -> Windows:
    """Which steps of each iteration are stochastic."""
    options, steps = config.window, config.sampler.num_steps
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
        seed=config.seed,
    )


def build_coefficients(config: Config, model: FlowModel, window: range | None = None) -> StepCoefficients:
    """The sampler's step coefficients on the model's device, noise-free outside of a window.

    Args:
        window: stochastic steps; None = those of the first iteration, which without windows are all.

    Raises:
        UserError: (usage) a noise level does not fit the dynamics, whether or not it is in the window.
    """
    options = config.sampler
    try:
        table = coefficients(model.sigmas(options.num_steps), config.noise_levels, options.dynamics)
    except ValueError as error:
        raise UserError(f"sampler: {error}", ExitCode.USAGE) from None
    return table.only(build_windows(config).steps(0) if window is None else window).to(model.device)


def build_lookahead(config: Config, model: FlowModel) -> Lookahead | None:
    """The lookahead that the credit method needs; None if it needs none."""
    if not config.uses_lookahead:
        return None
    options = config.lookahead
    plan = make_plan(options.plan, config.sampler.num_steps, options.nodes, options.n or 1)
    head = None if options.head is None else build_head(Path(options.head), plan, model)
    if options.graphs and model.device.type != "cuda":
        raise UserError(
            f"lookahead.graphs: CUDA graphs need a CUDA device, the model is on {model.device}; set it to false",
            ExitCode.USAGE,
        )
    evaluated = model if options.copy_dtype is None else build_copy(model, options.copy_dtype)
    if evaluated is not model and config.model.compile is not None:
        evaluated.compile(config.model.compile)
    cache = None
    if options.cache is not None:
        guided = options.guidance == "full" and config.sampler.guidance_scale != 1.0
        rows = config.data.num_prompts * config.sampler.group_size
        cache = build_cache(options.cache, model, evaluated, plan, rows=rows, halves=2 if guided else 1)
    return Lookahead(
        evaluated,
        plan,
        guidance=options.guidance,
        chunk=options.chunk,
        head=head,
        cache=cache,
        visits=GraphedVisits() if options.graphs else None,
    )


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
        # the levels stay; the tiny model that takes the place of this one has a schedule of its own
        settings["sampler"] |= {"calibration": None}
        settings["reward"] |= {"terms": {"jpeg_compressibility": 1.0}, "observed": [], "options": {}}
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
    """Training prompts: the embedded model's sentences, a set of the package, or a file."""
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
    return built_in_prompts(source, held_out) if source in BUILT_IN else load_prompts(source)


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
        objective=ObjectiveSettings(**config.objective.model_dump(exclude={"trained_steps"})),
        micro_batch=config.sampler.micro_batch,
        max_bad_steps=config.run.max_bad_steps,
    )


def trained_steps(config: Config, iteration: int) -> list[int]:
    """The steps that an iteration trains, increasing: of its window, if there are windows.

    Drawn afresh (from the seed) when a number is configured.
    """
    wanted = config.objective.trained_steps
    if isinstance(wanted, list):
        return list(wanted)
    # without windows all but the last step, which no window holds either
    candidates = build_windows(config).steps(iteration)[: config.window.size or config.sampler.num_steps - 1]
    if wanted == "all_but_last":
        return list(candidates)
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + iteration) % 2**63)
    return sorted(candidates[i] for i in torch.randperm(len(candidates), generator=generator)[:wanted].tolist())
