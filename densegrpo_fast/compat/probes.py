"""The few numbers on which each function of a host is compared with ours before it is replaced."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from itertools import product
from operator import attrgetter
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat.compare import Call
from densegrpo_fast.flow.schedule import dance_sigmas, sd3_sigmas


class Scheduler:
    """What the hosts ask of a scheduler, on a grid of a few steps."""

    order = 1
    config: Mapping[str, Any] = {}
    is_eval, noise_level, dynamics_type = False, 0.7, "Flow-SDE"

    def __init__(self, sigmas: Tensor | None = None) -> None:
        self.current_sde_steps = torch.tensor([0, 2])
        if sigmas is not None:
            self.sigmas, self.timesteps = sigmas, sigmas[:-1] * 1000

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        self.sigmas = sd3_sigmas(num_inference_steps)
        self.timesteps = self.sigmas[:-1] * 1000

    def index_for_timestep(self, timestep: float | Tensor) -> int:
        """As diffusers' schedulers have it."""
        return int((self.timesteps == timestep).nonzero()[0])

    def get_noise_level_for_sigma(self, sigma: Tensor) -> Tensor:
        """As Flow-Factory's newer versions have it."""
        steps = (sigma.reshape(-1, 1) == self.sigmas).int().argmax(1)
        return torch.where(torch.isin(steps, self.current_sde_steps), self.noise_level, 0.0)


def _ramp(*shape: int) -> Tensor:
    return torch.linspace(-1, 1, 12, dtype=torch.float32, device="cpu").reshape(shape)


def _words(scored: bool) -> str:
    return "scoring" if scored else "sampling"


def sde_calls(version: str) -> list[Call]:
    """Of Flow-GRPO's `sde_step_with_logprob` in one generation: rows at two steps of the grid."""
    cases: list[dict[str, Any]] = [{}]
    if version in ("V3", "V3g"):
        cases += [{"sde_type": "sde", "noise_level": 0.5}, {"sde_type": "cps", "noise_level": 0.5}]
    if version == "V3g":
        cases.append({"return_sqrt_dt": True})
    if version == "V2":
        cases.append({"noise_level": 0.5})
    if version in ("V1", "Wan"):
        cases.append({"determistic": True})
    if version == "Wan":
        cases.append({"return_dt_and_std_dev_t": True})
    state = _ramp(2, 3, 1, 1, 2) if version == "Wan" else _ramp(2, 3, 1, 2)

    def call(scored: bool, case: dict[str, Any]) -> Call:
        given = {"prev_sample": 0.3 * state + 0.1} if scored else {}

        def run(step: Callable[..., Any]) -> Any:
            scheduler = Scheduler(sd3_sigmas(3))
            return step(scheduler, state.cos(), scheduler.timesteps[[0, 2]], state, **given, **case)

        return f"{_words(scored)} with {case or 'its defaults'}", run

    return [call(scored, case) for case in cases for scored in (True, False)]


def _grid_call(index: int, scored: bool, level: float, *rest: Any, **options: Any) -> Callable[..., Any]:
    """A step of DanceGRPO or MixGRPO; one of the velocities has 16 bits, because products with it are rounded."""
    state = _ramp(2, 3, 2)
    velocity, given = state.cos(), 0.3 * state + 0.1 if scored else None
    velocity = velocity.bfloat16() if index == 2 else velocity
    return lambda step: step(velocity, state, level, dance_sigmas(4), index, given, *rest, **options)


def flux_calls() -> list[Call]:
    """Of DanceGRPO's `flux_step`."""
    calls: list[Call] = []
    for solver in (True, False):
        for index, scored in product((0, 2), (True, False)):
            calls.append((f"{_words(scored)} step {index}", _grid_call(index, scored, 0.3, True, solver)))
        calls.append(("without grpo", _grid_call(1, False, 0.3, False, solver)))
    return calls


def _formulas(version: str) -> list[dict[str, Any]]:
    """Options of a version of MixGRPO's steps: none, and those of V2."""
    if version == "V1":
        return [{}]
    return [{}, {"noise_level": 0.5}, {"sde_type": "cps"}, {"sde_type": "cps", "noise_level": 0.5}]


def flow_grpo_step_calls(version: str) -> list[Call]:
    """Of MixGRPO's `flow_grpo_step`."""
    calls: list[Call] = []
    for options in _formulas(version):
        for index, scored in product((0, 2), (True, False)):
            words = f"{_words(scored)} step {index} with {options}"
            calls.append((words, _grid_call(index, scored, 0.7, **options)))
        words = f"a deterministic step with {options}"
        calls.append((words, _grid_call(1, False, 0.7, determistic=True, **options)))
    return calls


def dance_grpo_step_calls(version: str) -> list[Call]:
    """Of MixGRPO's `dance_grpo_step`."""
    calls: list[Call] = []
    for options, noisy in product(_formulas(version), (True, False)):
        for index, scored in product((0, 2), (True, False)):
            words = f"{_words(scored)} step {index}, sde_solver {noisy}, with {options}"
            calls.append((words, _grid_call(index, scored, 0.3, True, noisy, **options)))
        words = f"without grpo, sde_solver {noisy}"
        calls.append((words, _grid_call(1, False, 0.3, False, noisy, **options)))
    return calls


_SOLVER = {"dpm_algorithm_type": "dpmsolver++", "dpm_solver_order": 2, "dpm_solver_type": "midpoint"}


def dpm_step_calls(version: str) -> list[Call]:
    """Of MixGRPO's `dpm_step`; it does not depend on the version."""
    from densegrpo_fast.compat.mix_grpo.dpm import DPMState

    state = _ramp(2, 3, 2)

    def call(index: int, noisy: bool, order: int, kind: str, remembers: bool) -> Call:
        args = SimpleNamespace(**{**_SOLVER, "dpm_solver_order": order, "dpm_solver_type": kind})

        def run(step: Callable[..., Any]) -> Any:
            grid, memory = dance_sigmas(5), DPMState(order) if remembers else None
            if memory is not None and index > 0:
                memory.update(0.3 * state + 0.1)
                memory.update_lower_order()
            options = {"dpm_state": memory, "generator": torch.Generator().manual_seed(1), "sde_solver": noisy}
            return step(args, state.cos(), state, index, grid[:-1], sigmas=grid, **options)

        return f"step {index} of order {order} ({kind}), sde_solver {noisy}", run

    kinds = [(1, "midpoint", True), (2, "midpoint", True), (2, "heun", True), (2, "heun", False)]
    return [call(index, noisy, *kind) for index in (0, 2, 4) for noisy in (False, True) for kind in kinds]


def run_sample_step_calls(version: str) -> list[Call]:
    """Of MixGRPO's `run_sample_step`."""
    steps, shift, state = 6, 3.0, _ramp(2, 3, 2)
    embeddings, ids = state.new_zeros(2, 4, 3), state.new_zeros(2, 3)
    flags = [True, False, False, True, True, True]

    class Transformer:
        """Stands for FLUX: a velocity that depends on state and time."""

        def eval(self) -> None: ...

        def __call__(self, *, hidden_states: Tensor, timestep: Tensor, **other: Any) -> tuple[Tensor]:
            return (hidden_states.float().sin() + timestep[:, None, None],)

    def call(**settings: Any) -> Callable[..., Any]:
        common = {"eta": 0.4, "shift": shift, "drop_last_sample": False, "dpm_post_compress_ratio": 0.6}
        args = SimpleNamespace(**{**common, **_SOLVER, "sample_strategy": "progressive", **settings})
        text = (embeddings, ids, ids, ids)
        return lambda run: run(
            args, state, range(steps), dance_sigmas(steps, shift), Transformer(), *text, True, determistic=flags
        )

    calls: list[Call] = []
    for flow in (True, False):
        words = "flow_grpo_step" if flow else "dance_grpo_step"
        off = {"flow_grpo_sampling": flow, "dpm_algorithm_type": "null"}
        # A V1 host knows no sde_type and does not look at it.
        calls.append((f"a trajectory of {words}", call(**off, sde_type="cps", noise_level=0.6)))
        calls.append((f"a trajectory of {words} to data", call(**off, drop_last_sample=True)))
        solver = call(flow_grpo_sampling=flow, dpm_apply_strategy="post")
        calls.append((f"{words} with a solver after the window", solver))
    calls.append(("a solver for all steps", call(flow_grpo_sampling=True, dpm_apply_strategy="all")))
    return calls


def flow_factory_calls() -> list[Call]:
    """Of Flow-Factory's `step`: each dynamics, at one step or one per row; with a step that is left to the schedule."""

    def call(steps: list[int], latents: Tensor, scored: bool, *, next_given: bool = False, **options: Any) -> Any:
        def run(step: Callable[..., Any]) -> Any:
            scheduler = Scheduler(dance_sigmas(4))
            times = torch.cat([scheduler.timesteps, torch.zeros(1)])
            after = {"timestep_next": times[[index + 1 for index in steps]]} if next_given else {}
            timestep = scheduler.timesteps[steps if len(steps) > 1 else steps[0]]
            given = 0.3 * latents + 0.1 if scored else None
            velocity = ramp.cos()[: len(latents)]
            return step(
                scheduler, velocity, timestep, latents, next_latents=given, return_dict=False, **after, **options
            )

        return run

    ramp = _ramp(2, 3, 2)
    calls: list[Call] = []
    for dynamics in ("Flow-SDE", "Dance-SDE", "CPS", "ODE"):
        options: dict[str, Any] = {"dynamics_type": dynamics, "noise_level": 0.5}
        # Earlier versions take the logarithm of Dance-SDE's deviation as a number, so of one row.
        rows = 1 if dynamics == "Dance-SDE" else 2
        for scored in (True, False):
            words = f"{_words(scored)} {dynamics}"
            calls.append((f"{words} at one step", call([1], ramp[:rows].bfloat16(), scored, **options)))
            steps = [0, 3][:rows]
            calls.append((f"{words} with timestep_next", call(steps, ramp[:rows], scored, next_given=True, **options)))
        calls.append((f"{dynamics} unscored", call([0], ramp, False, compute_log_prob=False, **options)))
    inner = call([0], ramp, True, dynamics_type="Flow-SDE", noise_level=0.5, sigma_max=0.9)
    calls.append(("Flow-SDE with sigma_max", inner))
    return calls


class Pipeline:
    """What the hosts ask of an SD3 pipeline, over a function of everything that a transformer sees."""

    default_sample_size, vae_scale_factor, _execution_device = 2, 1, torch.device("cpu")
    interrupt = False
    guidance_scale, clip_skip = property(attrgetter("_guidance_scale")), property(attrgetter("_clip_skip"))
    joint_attention_kwargs = property(attrgetter("_joint_attention_kwargs"))
    do_classifier_free_guidance = property(lambda self: self._guidance_scale > 1)
    vae = SimpleNamespace(
        config=SimpleNamespace(scaling_factor=2.0, shift_factor=0.25),
        dtype=torch.float32,
        decode=lambda latents, return_dict=False: (latents,),
    )
    image_processor = SimpleNamespace(postprocess=lambda images, output_type="pil": images)

    def __init__(self) -> None:
        self.scheduler, self.transformer = Scheduler(), _Transformer()
        self._guidance_scale, self._clip_skip, self._joint_attention_kwargs = 7.0, None, None

    def check_inputs(self, *arguments: Any, **options: Any) -> None: ...

    def maybe_free_model_hooks(self) -> None: ...

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        return nullcontext(SimpleNamespace(update=lambda *_: None))

    def encode_prompt(self, **options: Any) -> tuple[Tensor, ...]:
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return tuple(options[name] for name in names)

    def prepare_latents(
        self,
        batch: int,
        channels: int,
        height: int,
        width: int,
        dtype: torch.dtype,
        device: Any,
        generator: Any,
        latents: Tensor | None = None,
    ) -> Tensor:
        drawn = torch.randn(batch, channels, height, width, generator=generator)
        return (drawn if latents is None else latents).to(dtype)


class _Transformer:
    config = SimpleNamespace(in_channels=3)
    dtype = torch.float32

    def __call__(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        encoder_hidden_states: Tensor,
        pooled_projections: Tensor,
        **_: Any,
    ) -> tuple[Tensor]:
        time = timestep.float().reshape(-1, 1, 1, 1) / 1000
        text = encoder_hidden_states.float().mean(dim=(1, 2)) + pooled_projections.float().mean(dim=1)
        return (hidden_states.float() * time.cos() + text.reshape(-1, 1, 1, 1).sin(),)


def sd3_call(function: Callable[..., Any], case: Mapping[str, Any]) -> Any:
    """Results of an SD3 sampler on the stand-in pipeline, from one state of the random generators."""
    torch.manual_seed(1)
    random.seed(1)
    embeds = _ramp(2, 3, 2).bfloat16()
    prompts = {"prompt_embeds": embeds, "pooled_prompt_embeds": embeds[:, 0]}
    negative = {"negative_prompt_embeds": embeds.sin(), "negative_pooled_prompt_embeds": embeds[:, 1].cos()}
    with torch.device("cpu"):
        return function(Pipeline(), **prompts, **negative, num_inference_steps=5, output_type="pt", **case)
