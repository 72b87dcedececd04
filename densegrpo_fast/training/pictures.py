"""Pictures outside of a run: drawn by a model for prompts and seeds, compared between models, or scored as files.

What `sample` and `evaluate` do, as functions.
"""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from densegrpo_fast.common.errors import NonFiniteError, UsageError
from densegrpo_fast.common.pictures import finite_pictures, still
from densegrpo_fast.common.progress import PhaseProgress
from densegrpo_fast.config import Config
from densegrpo_fast.flow.dynamics import Family, coefficients
from densegrpo_fast.flow.noise import Stream
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.rewards.registry import bounds
from densegrpo_fast.run_files.images import read_picture
from densegrpo_fast.run_files.model_refs import ModelRef, Weights, read_weights, with_adapter
from densegrpo_fast.run_files.statistics import compare
from densegrpo_fast.run_files.strip import Strip
from densegrpo_fast.sampling.oom_backoff import OomBackoff
from densegrpo_fast.sampling.rollout import Trajectory, initial_noise, rollout, sample_ode
from densegrpo_fast.training.distributed import World
from densegrpo_fast.training.evaluation import HeldOut
from densegrpo_fast.training.models import default_device, load_model
from densegrpo_fast.training.prompts import PromptSet
from densegrpo_fast.training.rewarding import build_observer, configured_reward
from densegrpo_fast.training.strips import strip_of

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_SCORED_TOGETHER = 32
"""Pictures of one size that a reward gets at a time."""


@dataclass(frozen=True)
class PictureSampler:
    """How pictures are drawn.

    Attributes:
        kind: "ode", noise-free Euler steps, or "sde", the dynamics of training with noise in every step.
        num_steps: denoising steps.
        guidance_scale: 1 = off.
        dynamics, noise_level: of the SDE, as `flow.dynamics.coefficients` takes them; None for the ODE.
    """

    kind: Literal["ode", "sde"]
    num_steps: int
    guidance_scale: float
    dynamics: Family | None = None
    noise_level: float | list[float] | None = None

    def settings(self) -> dict[str, Any]:
        """JSON data without what the kind does not have."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def picture_sampler(
    config: Config, kind: Literal["ode", "sde"], num_steps: int | None = None, guidance_scale: float | None = None
) -> PictureSampler:
    """The sampler of a configuration: "ode" is that of the held-out evaluation, "sde" that of training.

    Args:
        num_steps, guidance_scale: in place of the configuration's.

    Raises:
        UsageError: the noise levels do not fit the number of steps.
    """
    if kind == "ode":
        own_steps, own_scale = config.evaluation.num_steps, config.evaluation_guidance_scale
    else:
        own_steps, own_scale = config.sampler.num_steps, config.sampler.guidance_scale
    steps = own_steps if num_steps is None else num_steps
    scale = own_scale if guidance_scale is None else guidance_scale
    if kind == "ode":
        return PictureSampler(kind, steps, scale)
    levels = config.sampler.noise_level
    if isinstance(levels, list) and len(levels) != steps:
        raise UsageError(
            f"--steps: sampler.noise_level holds {len(levels)} levels, one for each step, so {steps} steps need "
            "another sampler.noise_level (one number serves any number of steps)",
        )
    return PictureSampler(kind, steps, scale, config.sampler.dynamics, levels)


def with_each(
    config: Config, refs: Sequence[ModelRef], work: Callable[[FlowModel], Result]
) -> list[tuple[Weights, Result]]:
    """Do some work with the configuration's model while it has the adapter of one reference after the other.

    All adapters are read before the model is loaded.

    Raises:
        UserError: an adapter or the model cannot be read, or they do not fit each other.
    """
    weights = [read_weights(ref) for ref in refs]
    model = load_model(config.model, default_device())
    results = []
    for ref, adapter in zip(refs, weights, strict=True):
        with with_adapter(model, ref, adapter):
            results.append((adapter, work(model)))
    return results


def draw(
    model: FlowModel,
    rows: Sequence[tuple[str, int]],
    sampler: PictureSampler,
    chunk: int,
    world: World | None = None,
) -> Tensor:
    """Draw a picture for each prompt and seed; it depends on these alone, to rounding.

    Args:
        model: as it stands.
        rows: N prompts and seeds.
        sampler: how.
        chunk: rows per forward; fewer where the memory runs out.
        world: the processes that share the pictures; each gets all. None = this one alone.

    Returns:
        [N, 3, H, W] float32 on the CPU; of videos the frame in the middle.

    Raises:
        UsageError: a noise level does not fit the dynamics; SetupError: one row is too many for the memory;
            NonFiniteError: a picture is not finite.
    """
    sigmas = model.sigmas(sampler.num_steps)
    share = (World() if world is None else world).share(len(rows))
    rows = [rows[index] for index in share.rows.tolist()]

    def drawn(part: slice) -> Tensor:
        prompts, seeds = zip(*rows[part], strict=True)
        if sampler.dynamics is not None:
            latents = _trajectory(model, prompts, seeds, sampler).latents[-1]
        else:
            start = model.start(_noise(model, seeds), sigmas)
            latents = sample_ode(
                model, start, model.encode(list(prompts)), sigmas, guidance_scale=sampler.guidance_scale
            )
        return still(model.decode(latents)).cpu()

    parts = []
    stream = None if share.world.main else io.StringIO()
    with PhaseProgress("drawing", len(rows), "pictures", stream) as progress:
        for images in OomBackoff(chunk, "sampler.micro_batch").each(slice(0, len(rows)), drawn):
            parts.append(images)
            progress(len(images))
    images = share.gather(torch.cat(parts))
    if not (finite := finite_pictures(images)).all():
        count = f"{int((~finite).sum())} of {len(images)} pictures hold numbers that are not finite"
        raise NonFiniteError(f"{count}: the model or its adapter is broken, or model.dtype is too narrow for it")
    return images


def draw_strip(
    model: FlowModel,
    prompt: str,
    metadata: dict[str, Any],
    seeds: Sequence[int],
    sampler: PictureSampler,
    reward: RewardMixture,
    chunk: int,
) -> Strip:
    """A prompt's trajectories by the sampler of training, step by step, each state completed exactly.

    Args:
        model: as it stands.
        prompt, metadata: what is drawn and scored.
        seeds: one for each trajectory, which `draw` draws alike.
        sampler: of kind "sde".
        reward: scores the completions.
        chunk: rows per forward and decode.

    Raises:
        UserError: a noise level does not fit the dynamics, or the reward failed.
    """
    prompts, labels = [prompt] * len(seeds), [f"seed {seed}" for seed in seeds]
    return strip_of(model, reward, _trajectory(model, prompts, seeds, sampler), prompt, metadata, labels, chunk)


def _noise(model: FlowModel, seeds: Sequence[int]) -> Tensor:
    """Initial latents; the seed takes the place of the sample's number, so rows of several seeds share a forward."""
    index = torch.tensor(seeds, device=model.device)
    return initial_noise(model, index, seed=0, iteration=0, stream=Stream.EVALUATION)


def _trajectory(model: FlowModel, prompts: Sequence[str], seeds: Sequence[int], sampler: PictureSampler) -> Trajectory:
    """Trajectories of a sampler of kind "sde", one for each prompt and seed."""
    assert sampler.dynamics is not None and sampler.noise_level is not None
    try:
        table = coefficients(model.sigmas(sampler.num_steps), sampler.noise_level, sampler.dynamics)
    except ValueError as error:
        raise UsageError(f"sampler: {error}") from None
    return rollout(
        model,
        _noise(model, seeds),
        model.encode(list(prompts)),
        table.to(model.device),
        sample_index=torch.tensor(seeds, device=model.device),
        seed=0,
        iteration=0,
        guidance_scale=sampler.guidance_scale,
    )


def compare_models(config: Config, refs: Sequence[ModelRef], world: World | None = None) -> dict[str, Any]:
    """Score models on the configuration's held-out prompts, from the same noise, by all its rewards.

    Args:
        world: the processes that share the pictures; None = this one alone.

    Returns:
        JSON data (a missing score is NaN): what `statistics.compare` returns, and
        adapters: name -> {origin, sha256};
        settings: model, reward, evaluation, seed;
        prompts: N sentences;
        scores: name -> reward -> [N, S].

    Raises:
        UserError: anything the user can act on.
    """
    held_out, reward = HeldOut.of(config), build_observer(config)
    adapters, scores = {}, {}
    names = iter(refs)
    evaluated = with_each(
        config, refs, lambda model: held_out.evaluate(model, reward, world, f"evaluating {next(names).name}").scores
    )
    for ref, (weights, found) in zip(refs, evaluated, strict=True):
        adapters[ref.name] = weights.about()
        scores[ref.name] = {name: values.tolist() for name, values in found.items()}
    settings = {
        "model": config.model.model_dump(mode="json"),
        "reward": config.reward.model_dump(mode="json"),
        "evaluation": config.evaluation.model_dump(mode="json") | {"guidance_scale": held_out.guidance_scale},
        "seed": held_out.seed,
    }
    about = {"adapters": adapters, "settings": settings, "prompts": list(held_out.prompts), "scores": scores}
    rewards = config.reward
    return compare(scores, bounds(dict.fromkeys(rewards.observed, 0.0) | rewards.terms, rewards.options)) | about


def score_files(config: Config, files: Sequence[Path], prompts: PromptSet | None) -> dict[str, Any]:
    """Score picture files by the configuration's reward terms.

    Args:
        prompts: one for each file; None = the texts that `sample` wrote into them.

    Returns:
        JSON data (a missing score is NaN): means, as `statistics.compare` has them, files, prompts, and
        scores: reward -> [N].

    Raises:
        UsageError: a file is no picture; UserError: a reward cannot be built or fails.
    """
    pictures, written = [], []
    for file in files:
        try:
            image, fields = read_picture(file)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or f"it is no picture, or a damaged one ({error})"
            raise UsageError(f"{file} cannot be read: {reason}") from None
        pictures.append(image)
        written.append(fields.get("prompt", ""))
    rows = PromptSet(tuple(written), ({},) * len(files)) if prompts is None else prompts
    if not all(rows.prompts):
        words = "%d of %d pictures have no prompt, which most rewards need: give one with --prompt or --prompts"
        logger.warning(words, rows.prompts.count(""), len(files))
    reward = configured_reward(config)
    scores = score(reward, pictures, rows.prompts, rows.metadata)
    means = compare({"files": scores}, bounds(config.reward.terms, config.reward.options))["subjects"]["files"]
    return {"means": means, "files": [str(file) for file in files], "prompts": list(rows.prompts), "scores": scores}


def score(
    reward: RewardMixture, pictures: Sequence[Tensor], prompts: Sequence[str], metadata: Sequence[dict[str, Any]]
) -> dict[str, list[float]]:
    """Score pictures of any sizes; those of one size are scored together.

    Args:
        pictures: N of [3, H, W] float in [0, 1].
        prompts, metadata: N of each.

    Returns:
        Reward -> N scores, in the order of the pictures; NaN = missing.

    Raises:
        RewardError: a reward failed.
    """
    found = {name: [math.nan] * len(pictures) for name in reward.terms}
    sizes: dict[tuple[int, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        sizes.setdefault(tuple(picture.shape), []).append(index)
    for indices in sizes.values():
        for start in range(0, len(indices), _SCORED_TOGETHER):
            part = indices[start : start + _SCORED_TOGETHER]
            images = torch.stack([pictures[i] for i in part])
            scores = reward(images, [prompts[i] for i in part], [metadata[i] for i in part])
            for name, values in scores.per_reward.items():
                for index, value in zip(part, values.tolist(), strict=True):
                    found[name][index] = value
    return found
