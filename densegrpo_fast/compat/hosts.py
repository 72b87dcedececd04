"""The hosts as a table: what is replaced in each, its signatures, the flaws that are kept. Nothing here needs torch.

What shows that a copy of a host is the known one: its parameters, by `SIGNATURES`, then its results on a few numbers,
by the calls of `probes`.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from inspect import Parameter, Signature
from typing import Any


@dataclass(frozen=True)
class Replaced:
    """One name that is replaced.

    Attributes:
        module: full name of the host's module that defines it; `__main__` where the script defines it.
        name: the name there, or `Class.name` for a method.
        version: the only version that it may have there; None: any.
        required: whether a module without the name is an error.
    """

    module: str
    name: str
    version: str | None = None
    required: bool = True


@dataclass(frozen=True)
class Host:
    """One codebase.

    Attributes:
        package: its top-level package.
        replaced: what is replaced in it.
        fixes: its flaws by name, each kept unless `install(fixes=...)` names it.
        patch: hosts with the same entry carry one package; of those, the one installed last is in force.
    """

    package: str
    replaced: tuple[Replaced, ...]
    fixes: Mapping[str, str]
    patch: str


MIXED, ODE = "pipeline_mixed_sampling_with_intermediate_ode", "pipeline_ode_sampling"
FLUX_SCRIPTS = ("flux", "flux_lora", "hunyuan", "qwenimage", "qwenimage_edit", "skyreels_i2v", "wan_2_1")

_PATCHES = "flow_grpo.diffusers_patch"
_FLOW_GRPO = (
    Replaced(f"{_PATCHES}.sd3_sde_with_logprob", "sde_step_with_logprob"),
    Replaced(f"{_PATCHES}.wan_pipeline_with_logprob", "sde_step_with_logprob", version="Wan"),
    Replaced(f"{_PATCHES}.sd3_pipeline_with_logprob", "pipeline_with_logprob", required=False),
    Replaced(f"{_PATCHES}.sd3_pipeline_with_logprob_fast", "pipeline_with_logprob", required=False),
    Replaced("flow_grpo.stat_tracking", "PerPromptStatTracker"),
)
_FLOW_GRPO_FIXES = {
    "float32_states": "the states of SD3's trajectories stay float32 in a copy of the host that rounds each of them to "
    "the prompts' dtype after scoring it; the importance ratio of an unchanged policy is then 1",
}
_UPCAST = {"upcast": "products with a 16-bit velocity are not rounded to 16 bits"}

HOSTS: Mapping[str, Host] = {
    "flow_grpo": Host("flow_grpo", _FLOW_GRPO, _FLOW_GRPO_FIXES, "flow_grpo"),
    "turning_point": Host(
        "flow_grpo",
        (
            *_FLOW_GRPO,
            Replaced(f"{_PATCHES}.sd3_pipeline_with_logprob_fast_my", MIXED),
            Replaced(f"{_PATCHES}.sd3_pipeline_with_logprob_fast_my", ODE),
        ),
        {
            **_FLOW_GRPO_FIXES,
            "shared_noise": "noise-free sampling starts from the initial noise of the mixed sampling before it, as the "
            "paper says, and costs its completion only",
        },
        "flow_grpo",
    ),
    "dance_grpo": Host(
        "fastvideo",
        (
            Replaced("__main__", "flux_step", required=False),
            *(Replaced(f"fastvideo.train_grpo_{script}", "flux_step") for script in FLUX_SCRIPTS),
        ),
        {"constants": "log_prob keeps its constants where the host's script loses them", **_UPCAST},
        "dance_grpo",
    ),
    "mix_grpo": Host(
        "fastvideo",
        tuple(
            Replaced("fastvideo.utils.sampling_utils", name)
            for name in ("flow_grpo_step", "dance_grpo_step", "dpm_step", "run_sample_step")
        ),
        {
            "constants": "log_prob of dance_grpo_step has the constants that the host loses",
            "independent_noise": 'dpm_apply_strategy "all" draws new noise at every step, not the same numbers each '
            "time",
            "reach_zero": 'dpm_apply_strategy "post" ends at sigma 0 also when the compressed part has one point',
            **_UPCAST,
        },
        "mix_grpo",
    ),
    "flow_factory": Host(
        "flow_factory",
        (Replaced("flow_factory.scheduler.flow_match_euler_discrete", "FlowMatchEulerDiscreteSDEScheduler.step"),),
        {
            "round_trip": "a drawn state is rounded to the dtype of the latents before it is scored, also in earlier "
            "versions",
        },
        "flow_factory",
    ),
}

_SDE = "self, model_output, timestep, sample"
_SDE_V1 = f"{_SDE}, prev_sample=None, generator=None, determistic=False"
_SDE_V2 = f"{_SDE}, noise_level=0.7, prev_sample=None, generator=None"
_GRID = "model_output, latents, eta, sigmas, index, prev_sample"
_GRID_V2 = "sde_type='sde', noise_level=None"
_SD3 = (
    "self, prompt=None, prompt_2=None, prompt_3=None, height=None, width=None, num_inference_steps=28, sigmas=None, "
    "guidance_scale=7.0, negative_prompt=None, negative_prompt_2=None, negative_prompt_3=None, "
    "num_images_per_prompt=1, generator=None, latents=None, prompt_embeds=None, negative_prompt_embeds=None, "
    "pooled_prompt_embeds=None, negative_pooled_prompt_embeds=None, output_type='pil', joint_attention_kwargs=None, "
    "clip_skip=None, callback_on_step_end_tensor_inputs=['latents'], max_sequence_length=256, "
    "skip_layer_guidance_scale=2.8, noise_level=0.7"
)

SIGNATURES: Mapping[str, Mapping[str, str]] = {
    "sde_step_with_logprob": {
        "V1": _SDE_V1,
        "V1 with noise_level": f"{_SDE_V1}, noise_level=0.7",
        "V2": _SDE_V2,
        "V3": f"{_SDE_V2}, sde_type='sde'",
        "V3g": f"{_SDE_V2}, sde_type='sde', return_sqrt_dt=False",
        "Wan": f"{_SDE_V1}, return_pixel_log_prob=False, return_dt_and_std_dev_t=False",
    },
    "pipeline_with_logprob": {
        "plain": f"{_SD3}, return_prev_sample_mean=False",
        "fast": f"{_SD3}, sde_window_size=0, sde_window_range=(0, 5), sde_type='sde'",
    },
    MIXED: {"": f"{_SD3.replace('self', 'pipeline', 1)}, sde_window_size=0, sde_window_range=(0, 5), sde_type='sde'"},
    ODE: {
        "": "pipeline, prompt_embeds, pooled_prompt_embeds, negative_prompt_embeds, negative_pooled_prompt_embeds, "
        "num_inference_steps, guidance_scale, output_type, height, width, generator, sde_type"
    },
    "flux_step": {"": f"{_GRID}, grpo, sde_solver"},
    "flow_grpo_step": {
        "V1": f"{_GRID}, generator=None, determistic=False",
        "V2": f"{_GRID}, generator=None, determistic=False, {_GRID_V2}",
    },
    "dance_grpo_step": {"V1": f"{_GRID}, grpo, sde_solver", "V2": f"{_GRID}, grpo, sde_solver, {_GRID_V2}"},
    "dpm_step": {
        "": "args, model_output, sample, step_index, timesteps, sigmas, dpm_state=None, generator=None, "
        "variance_noise=None, sde_solver=False"
    },
    "run_sample_step": {
        "": "args, z, progress_bar, sigma_schedule, transformer, encoder_hidden_states, pooled_prompt_embeds, "
        "text_ids, image_ids, grpo_sample, determistic"
    },
    "FlowMatchEulerDiscreteSDEScheduler.step": {
        "": "self, noise_pred, timestep, latents, next_latents=None, timestep_next=None, generator=None, "
        "noise_level=None, compute_log_prob=True, return_dict=True, return_kwargs=('next_latents', "
        "'next_latents_mean', 'std_dev_t', 'dt', 'log_prob', 'noise_pred'), dynamics_type=None, sigma_max=None"
    },
}
"""Function -> version -> its signature as in Python; all arguments by place or name. The hosts spell "determistic"."""


@cache
def signature_of(name: str, version: str = "") -> Signature:
    """An entry of `SIGNATURES`."""
    function = ast.parse(f"lambda {SIGNATURES[name][version]}: 0", mode="eval").body
    assert isinstance(function, ast.Lambda)
    names = [argument.arg for argument in function.args.args]
    defaults: list[Any] = [ast.literal_eval(default) for default in function.args.defaults]
    defaults = [Parameter.empty] * (len(names) - len(defaults)) + defaults
    kind = Parameter.POSITIONAL_OR_KEYWORD
    return Signature([Parameter(name, kind, default=value) for name, value in zip(names, defaults, strict=True)])
