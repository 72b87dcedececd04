"""Whether a host's SD3 pipeline function is one that ours stands for: by its arguments, then by what it returns.

The host's function runs once on a make-believe pipeline of a few numbers, and is replaced only if ours returns the
same there. A copy that was changed is left alone, and goes on calling the step that was replaced in it.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.compat.flow_grpo.pipelines import FAST, PLAIN, make_pipeline
from densegrpo_fast.compat.flow_grpo.sd3 import Step
from densegrpo_fast.compat.flow_grpo.step import step_function
from densegrpo_fast.flow import schedule

STEP = "sde_step_with_logprob"
"""The name under which the hosts' pipeline modules call the step."""


def pipeline_replacement(host: Callable[..., Any], *, float32: bool = False) -> tuple[Callable[..., Any], str]:
    """Our `pipeline_with_logprob` in place of a host's; the host's own, with the reason, if it is not known.

    Args:
        host: the host's own function.
        float32: keep the states in float32 even where the host rounds them after scoring.
    """
    names = tuple(inspect.signature(host).parameters)[1:]
    form = known_form(names, (PLAIN, FAST))
    if form is None:
        return host, "left as it is: its arguments are not known; it calls the replaced step"

    def make(keep: bool) -> Callable[..., Any]:
        return make_pipeline(form, step_of(host), float32=keep, signature=inspect.signature(host))

    kept, reason = states_of(host, make, form)
    if kept is None:
        return host, f"left as it is: {reason}; it calls the replaced step"
    note = "fast" if form is FAST else "plain"
    if kept:
        return make(True), f"{note}, float32 states"
    return make(float32), f"{note}, states {'kept in float32' if float32 else 'in the dtype of the prompts'}"


def known_form(names: Sequence[str], forms: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The form whose arguments these are; the last ones of a form may be missing, down to those that define it."""
    for form in forms:
        needed = [name for name in form if name not in ("return_prev_sample_mean", "sde_type")]
        if list(names) == list(form)[: len(names)] and len(names) >= len(needed):
            return form
    return None


def step_of(host: Callable[..., Any]) -> Callable[[], Step]:
    """Looks up the step that a host's function would call now."""
    module = inspect.unwrap(host).__globals__
    return lambda: module[STEP]


def states_of(
    host: Callable[..., Any],
    make: Callable[[bool], Callable[..., Any]],
    form: Mapping[str, Any],
    *,
    rounded_tolerance: float = 1e-5,
) -> tuple[bool | None, str]:
    """Whether a host keeps float32 states, by which of our two variants agrees with it; None and a reason if none.

    Args:
        host: the host's function.
        make: our function, given whether its states are float32.
        form: its arguments.
        rounded_tolerance: absolute, for the variant that rounds, where ours does not round all that the host does.
    """
    if STEP not in inspect.unwrap(host).__globals__:
        return None, f"its module has no {STEP}"
    windows = [{"sde_window_size": 2, "sde_window_range": (1, 4)}] if "sde_window_size" in form else []
    cases: list[dict[str, Any]] = [{}, {"guidance_scale": 1.0}, {"noise_level": 0.5}, *windows]
    with _common_step(host):
        agreeing, reason = [True, False], ""
        for case in cases:
            try:
                theirs = _call(host, case)
            except Exception as error:
                return None, f"it raised {error!r} when tried"
            for keep in list(agreeing):
                reason = _difference(theirs, _call(make(keep), case), 1e-5 if keep else rounded_tolerance)
                if reason:
                    agreeing.remove(keep)
            if not agreeing:
                return None, f"its results are others ({reason})"
    return agreeing[0], ""


@contextmanager
def _common_step(host: Callable[..., Any]) -> Iterator[None]:
    """Let a host's function and ours use one step, and leave the random numbers as they were."""
    module = inspect.unwrap(host).__globals__
    original, state, python = module[STEP], torch.get_rng_state(), random.getstate()
    module[STEP] = step_function("V3g")
    try:
        yield
    finally:
        module[STEP] = original
        torch.set_rng_state(state)
        random.setstate(python)


def _call(function: Callable[..., Any], case: Mapping[str, Any]) -> Any:
    torch.manual_seed(1)
    random.seed(1)
    embeds = torch.linspace(-1, 1, 12).reshape(2, 3, 2).bfloat16()
    prompts = {"prompt_embeds": embeds, "pooled_prompt_embeds": embeds[:, 0]}
    negative = {"negative_prompt_embeds": embeds.sin(), "negative_pooled_prompt_embeds": embeds[:, 1].cos()}
    with torch.device("cpu"):
        return function(_Pipeline(), **prompts, **negative, num_inference_steps=5, output_type="pt", **case)


def _difference(theirs: Any, ours: Any, atol: float, place: str = "results") -> str:
    """Where two nested results differ; empty when they agree."""
    if isinstance(ours, Tensor):
        if not isinstance(theirs, Tensor) or theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            return f"{place} of another shape or dtype"
        near = torch.allclose(theirs.float(), ours.float(), rtol=1e-4, atol=atol, equal_nan=True)
        return "" if near else f"{place} differ"
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
        if len(theirs) != len(ours):
            return f"{place}: {len(theirs)} entries, not {len(ours)}"
        pairs = [_difference(a, b, atol, f"{place}[{n}]") for n, (a, b) in enumerate(zip(theirs, ours, strict=True))]
        return next((reason for reason in pairs if reason), "")
    if isinstance(ours, Mapping) and isinstance(theirs, Mapping):
        if set(theirs) != set(ours):
            return f"{place} with other names"
        pairs = [_difference(theirs[name], ours[name], atol, f"{place}[{name!r}]") for name in ours]
        return next((reason for reason in pairs if reason), "")
    return "" if theirs == ours else f"{place} differ"


class _Scheduler:
    """The lookups that the hosts use, on a grid of SD3."""

    order = 1
    config: Mapping[str, Any] = {}

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        self.sigmas = schedule.sd3_sigmas(num_inference_steps)
        self.timesteps = self.sigmas[:-1] * 1000

    def index_for_timestep(self, timestep: Tensor) -> int:
        return int((self.timesteps == timestep).nonzero()[0])


class _Pipeline:
    """What the hosts ask of an SD3 pipeline, over a function of everything that a transformer sees."""

    default_sample_size, vae_scale_factor, _execution_device = 2, 1, torch.device("cpu")
    interrupt = False

    def __init__(self) -> None:
        self.scheduler, self.transformer = _Scheduler(), _Transformer()
        self.vae = SimpleNamespace(
            config=SimpleNamespace(scaling_factor=2.0, shift_factor=0.25),
            dtype=torch.float32,
            decode=lambda latents, return_dict=False: (latents,),
        )
        self.image_processor = SimpleNamespace(postprocess=lambda images, output_type="pil": images)
        self._guidance_scale, self._clip_skip, self._joint_attention_kwargs = 7.0, None, None

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def clip_skip(self) -> Any:
        return self._clip_skip

    @property
    def joint_attention_kwargs(self) -> Any:
        return self._joint_attention_kwargs

    def check_inputs(self, *arguments: Any, **options: Any) -> None: ...

    def maybe_free_model_hooks(self) -> None: ...

    def progress_bar(self, iterable: Any = None, total: int | None = None) -> Any:
        return nullcontext(SimpleNamespace(update=lambda *_: None))

    def encode_prompt(self, **options: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
        return tuple(options[name] for name in names)  # type: ignore[return-value]

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
