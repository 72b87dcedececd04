"""What the fidelity of lookahead plans is measured on: a model with its sampler, held-out prompts and a reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from densegrpo_fast.common.errors import SetupError, UsageError
from densegrpo_fast.flow.analytic import GaussianMixtureFlow
from densegrpo_fast.flow.dynamics import StepCoefficients, coefficients
from densegrpo_fast.models.analytic import AnalyticModel
from densegrpo_fast.models.base import Cache, Decoder, FlowModel, GuidanceGradient
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.sampling.cost import UnitFlops
from densegrpo_fast.sampling.step_runner import StepRunner
from densegrpo_fast.training.prompts import PromptSet, prompt_set

if TYPE_CHECKING:
    from densegrpo_fast.config import Config
    from densegrpo_fast.models.diffusers_model import DiffusersModel

_STEPS, _GUIDANCE, _NOISE = 10, 4.5, 0.7
_COMPONENTS, _ALLOWED, _SHAPE = 48, 12, (3, 4, 4)


@dataclass(frozen=True)
class FidelityTarget:
    """What is measured.

    Attributes:
        model: the policy.
        coefficients: of the sampler's T steps, on the model's device.
        prompts: held-out prompts, one per group.
        reward: graded, so that ranks mean something.
        guidance_scale: of the rollout; 1 = off.
        decoders: those the model has.
        chunk: rows per forward and decode.
        trained_steps: steps that a training iteration replays.
        kl: whether its loss has a KL term.
        flops: of each part of the model; None where that means nothing.
        branched: whether the samples of a group are branches of one noise-free trajectory instead of trajectories.
        copies: of the model by their dtype, for the variants that evaluate one.
        vaes: the model with its full decoder in another precision, by that.
        caches: by (dtype of the copy that reads it, or None, and cache) what makes a feature cache for so many rows,
            for the variants that reuse features of the rollout.
        cheap_flops: of one lookahead forward of those variants, by (dtype of the copy, cache), either or None.
        guidance_gradient: halves of guided velocities that training goes through.
        shared_noise: whether the trajectories of a group start from one noise.
        step_runner: how the lookaheads' forwards are run; None = operation by operation.
        settings: what a reader must know to repeat the measurement; plain JSON data.
    """

    model: FlowModel
    coefficients: StepCoefficients
    prompts: PromptSet
    reward: RewardMixture
    guidance_scale: float
    decoders: tuple[Decoder, ...]
    chunk: int
    trained_steps: int
    kl: bool
    flops: UnitFlops | None
    settings: dict[str, Any]
    copies: Mapping[str, FlowModel] = field(default_factory=dict)
    vaes: Mapping[str, FlowModel] = field(default_factory=dict)
    caches: Mapping[tuple[str | None, str], Callable[[int], Cache]] = field(default_factory=dict)
    cheap_flops: Mapping[tuple[str | None, str | None], float] = field(default_factory=dict)
    branched: bool = False
    guidance_gradient: GuidanceGradient = "full"
    shared_noise: bool = False
    step_runner: StepRunner | None = None

    @property
    def guided(self) -> bool:
        """Whether the rollout has classifier-free guidance."""
        return self.guidance_scale != 1.0


def pipeline_target(
    config: Config,
    adapter: Path | None,
    groups: int,
    *,
    copy_dtypes: Sequence[str] = (),
    vae_dtypes: Sequence[str] = (),
    caches: Sequence[tuple[str | None, str]] = (),
    made: tuple[DiffusersModel, RewardMixture, PromptSet] | None = None,
) -> FidelityTarget:
    """The model, sampler, held-out prompts and reward of a configuration.

    Args:
        config: a run's, in whose every iteration the same steps are noisy; its batch sizes are not used.
        adapter: adapter directory of a run, or None for the model as it comes.
        groups: how many held-out prompts to use.
        copy_dtypes: precisions of copies with the adapter merged.
        vae_dtypes: further precisions of the full decoder.
        caches: specs of features to take over from the rollout, as in the configuration, each with the precision of the
            copy that reads them; None = the model itself does.
        made: model, reward and prompts that are there already and are measured instead, the model with its adapter.

    Raises:
        UserError: something cannot be loaded, or there are too few prompts.
    """
    from densegrpo_fast.models.diffusers_model import DiffusersModel
    from densegrpo_fast.models.flops import architecture_of, cached_forward, clip_h_image, count
    from densegrpo_fast.models.loading import resolve_dtype
    from densegrpo_fast.training.lookahead import build_cache, build_copy, build_step_runner, lookahead_chunks
    from densegrpo_fast.training.models import check_calibration, default_device, load_model
    from densegrpo_fast.training.rewarding import configured_reward
    from densegrpo_fast.training.schedule import Schedule

    if made is None:
        prompts = _held_out(config, groups)
        reward = configured_reward(config)
        loaded = load_model(config.model, default_device())
        if not isinstance(loaded, DiffusersModel):
            raise UsageError(f"model.path: the fidelity of a pipeline is measured, {config.model.path} is none")
        model = loaded
        check_calibration(config, model)
    else:
        model, reward, prompts = made
    step_runner = build_step_runner(config, model)
    if adapter is not None:
        _load_adapter(model.network, adapter)
    scored = clip_h_image() if "pickscore" in config.reward.terms else 0.0
    lora = config.lora
    unit = count(architecture_of(model), lora_rank=lora.rank, lora_targets=tuple(lora.targets), reward=scored)
    if config.model.gradient_checkpointing:
        unit = replace(unit, backward=unit.backward + unit.forward)
    copies: dict[str, FlowModel] = {dtype: build_copy(model, dtype) for dtype in copy_dtypes}
    chunks, schedule = lookahead_chunks(config, model, "full"), Schedule(config, model)
    costs: dict[tuple[str | None, str | None], float] = {(dtype, None): unit.reference_forward for dtype in copies}
    features: dict[tuple[str | None, str], Callable[[int], Cache]] = {}
    everywhere, halves = plans.exact(config.sampler.num_steps), model.forwards(config.sampler.guidance_scale)
    for dtype, spec in caches:
        reader = model if dtype is None else copies[dtype]
        make = partial(build_cache, model, reader, everywhere, halves=halves)
        # a model that it does not fit is refused before it is counted
        make(rows=1)
        costs[dtype, spec] = cached_forward(
            architecture_of(model),
            lora_rank=lora.rank if dtype is None else 0,
            lora_targets=tuple(lora.targets),
        )
        features[dtype, spec] = lru_cache(maxsize=2)(lambda rows, make=make: make(rows=rows))
    return FidelityTarget(
        model=model,
        coefficients=schedule.coefficients(),
        prompts=prompts,
        reward=reward,
        guidance_scale=config.sampler.guidance_scale,
        decoders=("full",) if model.preview_decoder is None else ("full", "preview"),
        chunk=min(chunks.forward, chunks.decode),
        trained_steps=len(schedule.trained_steps(0)),
        kl=config.objective.kl_coef > 0,
        flops=unit,
        copies=copies,
        vaes={dtype: model.decoding_in(resolve_dtype(dtype, model.device)) for dtype in vae_dtypes},
        caches=features,
        cheap_flops=costs,
        branched=config.sampler.branches is not None,
        guidance_gradient=config.objective.guidance_gradient,
        shared_noise=config.sampler.shared_noise,
        step_runner=step_runner,
        settings={
            "target": config.preset,
            # the directory of this machine is nobody else's business
            "model": Path(config.model.path).name if Path(config.model.path).is_dir() else config.model.path,
            "adapter": None if adapter is None else adapter.name,
            "copy_dtypes": list(copy_dtypes),
            "vae_dtypes": [config.model.vae_dtype, *vae_dtypes],
            "vae_decode": config.model.vae_decode,
            "preview_dtype": config.model.preview_dtype,
            "caches": list(dict.fromkeys(spec for _, spec in caches)),
            "graphs": config.lookahead.graphs,
            "branched": config.sampler.branches is not None,
            "guidance_gradient": config.objective.guidance_gradient,
            "sampler": config.sampler.model_dump(
                mode="json", exclude={"group_size", "micro_batch", "calibration", "branches"}
            ),
            "reward": config.reward.terms,
        },
    )


def analytic_target(groups: int) -> FidelityTarget:
    """A guided Gaussian-mixture flow with a smooth reward: exact velocities, and nothing to install but torch.

    48 components in 48 dimensions; each prompt allows 12 of them. SD3's 10-step grid, flow_sde at noise level 0.7.

    Args:
        groups: how many prompts, at least 1.
    """
    generator = torch.Generator().manual_seed(0)
    dimension = torch.Size(_SHAPE).numel()
    means = torch.randn(_COMPONENTS, dimension, generator=generator, dtype=torch.float64)
    model = AnalyticModel(GaussianMixtureFlow(means, std=0.3), _SHAPE)
    chosen = [torch.randperm(_COMPONENTS, generator=generator)[:_ALLOWED].sort().values for _ in range(groups)]
    prompts = tuple(" ".join(map(str, numbers.tolist())) for numbers in chosen)
    return FidelityTarget(
        model=model,
        coefficients=coefficients(model.sigmas(_STEPS), _NOISE, "flow_sde"),
        prompts=PromptSet(prompts, ({},) * groups),
        reward=RewardMixture({"smooth": (SmoothReward(dimension), 1.0)}),
        guidance_scale=_GUIDANCE,
        decoders=("full", "preview"),
        chunk=512,
        trained_steps=_STEPS - 1,
        kl=True,
        flops=None,
        settings={
            "target": "analytic",
            "sampler": {
                "num_steps": _STEPS,
                "dynamics": "flow_sde",
                "noise_level": _NOISE,
                "guidance_scale": _GUIDANCE,
            },
            "reward": {"smooth": 1.0},
        },
    )


class SmoothReward:
    """A fixed random feature network on the pixels: smooth, nonlinear, and blind to the prompt.

    Args:
        pixels: values per image.
        features: sines whose mean is the score.
    """

    def __init__(self, pixels: int, features: int = 24):
        generator = torch.Generator().manual_seed(1)
        self.weight = 6.0 * torch.randn(features, pixels, generator=generator) / pixels**0.5
        self.phase = 2 * torch.pi * torch.rand(features, generator=generator)

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        pixels = images.flatten(1).float().cpu()
        return (pixels @ self.weight.T + self.phase).sin().mean(1)


def _held_out(config: Config, groups: int) -> PromptSet:
    prompts = prompt_set(config.data.eval_prompts, held_out=True)
    if len(prompts) < groups:
        raise UsageError(f"--groups: expected at most the {len(prompts)} held-out prompts, got {groups}")
    return PromptSet(prompts.prompts[:groups], prompts.metadata[:groups])


def _load_adapter(network: Any, directory: Path) -> None:
    from densegrpo_fast.common.files import ADAPTER_FILE
    from densegrpo_fast.models.adapter_formats import read_lora
    from densegrpo_fast.models.lora import attach_lora

    if not (directory / ADAPTER_FILE).is_file():
        raise SetupError(f"--adapter: {directory} holds no {ADAPTER_FILE}")
    try:
        attach_lora(network, read_lora(directory / ADAPTER_FILE))
    except ValueError as error:
        raise SetupError(f"--adapter: {error}") from None
