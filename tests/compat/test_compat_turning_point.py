"""TurningPoint-GRPO's samplers against the host's serial completions, stated plainly in `host_sd3`."""

from __future__ import annotations

import inspect
import random
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))

import host_sd3  # noqa: E402

from densegrpo_fast.compat import flow_grpo, turning_point  # noqa: E402
from densegrpo_fast.compat.hosts import MIXED, ODE  # noqa: E402
from densegrpo_fast.compat.turning_point import (  # noqa: E402
    make_samplers,
    pipeline_mixed_sampling_with_intermediate_ode,
    pipeline_ode_sampling,
)
from densegrpo_fast.models.tiny import tiny_sd3  # noqa: E402

N = 5
WINDOW = {"sde_window_size": 3, "sde_window_range": (1, 5), "sde_type": "cps"}


def tiny_pipeline(dtype: torch.dtype = torch.float32) -> Any:
    pipeline = tiny_sd3().pipeline
    pipeline.transformer.to(dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return tiny_pipeline()


@pytest.fixture
def arguments() -> dict[str, Any]:
    return {
        "prompt_embeds": torch.randn(2, 24, 128),
        "pooled_prompt_embeds": torch.randn(2, 128),
        "negative_prompt_embeds": torch.randn(2, 24, 128),
        "negative_pooled_prompt_embeds": torch.randn(2, 128),
        "num_inference_steps": N,
        "guidance_scale": 3.0,
        "output_type": "pt",
        "height": 64,
        "width": 64,
    }


def seeded(function: Any, *args: Any, **kwargs: Any) -> tuple[Any, Tensor, Any]:
    torch.manual_seed(3)
    random.seed(3)
    return function(*args, **kwargs), torch.get_rng_state(), random.getstate()


def close(actual: Any, expected: Any, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


def forwards_of(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every forward from now on."""
    rows: list[int] = []
    forward = pipeline.transformer.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        rows.append(len(kwargs["hidden_states"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(pipeline.transformer, "forward", counting)
    return rows


def test_signatures_are_the_hosts() -> None:
    for ours, host in (
        (pipeline_mixed_sampling_with_intermediate_ode, host_sd3.pipeline_mixed_sampling_with_intermediate_ode),
        (pipeline_ode_sampling, host_sd3.pipeline_ode_sampling),
    ):
        assert inspect.signature(ours) == inspect.signature(host)


@pytest.mark.parametrize("window", [WINDOW, {}], ids=["window", "all"])
def test_mixed_sampling_is_the_hosts(pipeline: Any, arguments: dict[str, Any], window: dict[str, Any]) -> None:
    options = {**arguments, **window}
    theirs, state, python = seeded(host_sd3.pipeline_mixed_sampling_with_intermediate_ode, pipeline, **options)
    ours, our_state, our_python = seeded(pipeline_mixed_sampling_with_intermediate_ode, pipeline, **options)
    assert torch.equal(our_state, state) and our_python == python
    main, later = ours
    assert list(main) == list(theirs[0])
    for name, value in main.items():
        close(value, theirs[0][name])
    assert len(later) == len(theirs[1]) == (3 if window else N - 1)
    for completion, expected in zip(later, theirs[1], strict=True):
        assert list(completion) == list(expected)
        assert completion["sde_steps_count"] == expected["sde_steps_count"]
        assert completion["specific_sde_start"] == expected["specific_sde_start"]
        close(completion["images"], expected["images"])
    assert later[-1]["images"] is main["images"]
    # completions differ from the main image, by more than the tolerance
    assert (later[0]["images"] - main["images"]).abs().max() > 1e-2


def test_the_first_velocity_is_the_rollouts(
    pipeline: Any, arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = forwards_of(pipeline, monkeypatch)
    pipeline_mixed_sampling_with_intermediate_ode(pipeline, **arguments)
    # 2 rows of 2 halves: 5 steps, then states 1..3 meet at steps 2, 3, 4 as 1, 2 and 3 batches
    assert sum(rows) == 4 * (N + 1 + 2 + 3)
    rows.clear()
    make_samplers(chunk=6)[0](pipeline, **arguments)
    # the batches of 2 and 6 rows that meet are one forward each
    assert rows == [4] * N + [4, 8, 12]


def test_noise_free_sampling_draws_noise_of_its_own(pipeline: Any, arguments: dict[str, Any]) -> None:
    options = {**arguments, "generator": None, "sde_type": "cps"}
    theirs, state, _ = seeded(host_sd3.pipeline_ode_sampling, pipeline, **options)
    ours, our_state, _ = seeded(pipeline_ode_sampling, pipeline, **options)
    assert torch.equal(our_state, state)
    close(ours, theirs)


@pytest.mark.parametrize("window", [WINDOW, {}], ids=["window", "all"])
def test_shared_noise_is_the_noise_free_image_of_the_same_start(
    pipeline: Any, arguments: dict[str, Any], window: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    noise = torch.randn(2, 16, 8, 8)
    expected = pipeline(**arguments, latents=noise).images
    mixed, ode = make_samplers(shared_noise=True)
    main, _ = mixed(pipeline, **arguments, **window, latents=noise)
    rows = forwards_of(pipeline, monkeypatch)
    same = {**arguments, "prompt_embeds": arguments["prompt_embeds"].clone()}
    images = ode(pipeline, **same, generator=None, sde_type="cps")
    assert rows == []
    close(images, expected)
    assert (images - main["images"]).abs().max() > 1e-2
    with pytest.raises(ValueError, match="completes the initial noise of the pipeline_mixed_sampling.* once"):
        ode(pipeline, **same, generator=None, sde_type="cps")
    mixed(pipeline, **arguments, **window)
    with pytest.raises(ValueError, match="needs the same prompt_embeds"):
        ode(pipeline, **{**same, "guidance_scale": 2.0}, generator=None, sde_type="cps")


def test_without_noise_every_completion_is_the_image(pipeline: Any, arguments: dict[str, Any]) -> None:
    main, later = pipeline_mixed_sampling_with_intermediate_ode(pipeline, **arguments, noise_level=0)
    assert len(later) == N - 1
    for completion in later:
        close(completion["images"], main["images"])


def test_states_are_rounded_as_in_the_host_unless_asked(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    low = tiny_pipeline(torch.bfloat16)
    options = {
        name: value.bfloat16() if isinstance(value, Tensor) else value for name, value in (arguments | WINDOW).items()
    }
    monkeypatch.setattr(host_sd3, "ROUNDED", True)
    (main, later), state, _ = seeded(host_sd3.pipeline_mixed_sampling_with_intermediate_ode, low, **options)
    (ours, completions), our_state, _ = seeded(pipeline_mixed_sampling_with_intermediate_ode, low, **options)
    assert torch.equal(our_state, state)
    assert {latents.dtype for latents in ours["latents"]} == {torch.bfloat16}
    for name in ("latents", "log_probs", "images"):
        close(ours[name], main[name], 5e-2)
    for completion, expected in zip(completions, later, strict=True):
        close(completion["images"], expected["images"], 5e-2)

    # rounding after scoring changes what training scores; float32 states do not
    def surprise(results: dict[str, Any]) -> float:
        scored = []
        for x, after, log_prob, t in zip(*(results[name] for name in list(results)[1:]), strict=True):
            with torch.no_grad():
                prompts = tuple(options[name] for name in list(arguments)[:4])
                velocity = host_sd3.guided(low, x.to(torch.bfloat16), t, prompts, 3.0)
            kind = {"prev_sample": after, "sde_type": "cps"}
            again = flow_grpo.sde_step_with_logprob(low.scheduler, velocity, t.repeat(2), x, 0.7, **kind)
            scored.append((again[1] - log_prob).abs().max().item())
        return max(scored)

    assert surprise(ours) > 1e-5


def test_float32_states_score_again_to_the_bit(pipeline: Any, arguments: dict[str, Any]) -> None:
    main, _ = make_samplers(float32=True)[0](pipeline, **arguments)
    prompts = tuple(arguments[name] for name in list(arguments)[:4])
    for x, after, log_prob, t in zip(*(main[name] for name in list(main)[1:]), strict=True):
        assert x.dtype == torch.float32
        with torch.no_grad():
            velocity = host_sd3.guided(pipeline, x, t, prompts, 3.0)
        again = flow_grpo.sde_step_with_logprob(pipeline.scheduler, velocity, t.repeat(2), x, 0.7, after)
        assert torch.equal(again[1], log_prob)


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a miniature TurningPoint-GRPO."""

    def make(**bindings: Any) -> ModuleType:
        folder = "flow_grpo.diffusers_patch"
        names = ("sd3_sde_with_logprob", "sd3_pipeline_with_logprob_fast", "sd3_pipeline_with_logprob_fast_my")
        for name in ("flow_grpo", folder, *(f"{folder}.{name}" for name in names)):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        step = host_sd3.load(f"{folder}.{names[0]}").sde_step_with_logprob
        bindings = {"ROUNDED": True, "sde_step_with_logprob": step, **bindings}
        fast = host_sd3.load(f"{folder}.{names[1]}", **bindings)
        fast.pipeline_with_logprob = fast.fast_pipeline_with_logprob
        return host_sd3.load(f"{folder}.{names[2]}", **bindings, pipeline_with_logprob=fast.pipeline_with_logprob)

    yield make
    turning_point.uninstall()


def test_install(host: Any, pipeline: Any, arguments: dict[str, Any]) -> None:
    module = host()
    originals = [getattr(module, name) for name in (MIXED, ODE, "pipeline_with_logprob")]
    (expected, _), _, _ = seeded(originals[0], pipeline, **arguments)
    patch = turning_point.install(fixes=["shared_noise"], chunk=4)
    assert turning_point.install(fixes=["shared_noise"], chunk=4) is patch
    replaced = [getattr(module, name) for name in (MIXED, ODE, "pipeline_with_logprob")]
    assert all(function.__module__.startswith("densegrpo_fast.") for function in replaced)
    text = "\n".join(patch.messages)
    assert f"{MIXED} (lookahead, rng host, shared noise)" in text
    assert "pipeline_with_logprob (fast, states in the dtype of the prompts)" in text
    (main, _), _, _ = seeded(module.pipeline_mixed_sampling_with_intermediate_ode, pipeline, **arguments)
    close(main["latents"], expected["latents"])
    images = module.pipeline_ode_sampling(pipeline, **arguments, generator=None, sde_type="sde")
    assert images.shape == (2, 3, 64, 64)
    turning_point.uninstall()
    assert [getattr(module, name) for name in (MIXED, ODE, "pipeline_with_logprob")] == originals


def test_a_changed_copy_is_left(host: Any) -> None:
    module = host(images_of=lambda pipeline, latents, kind: 2 * latents)
    original = module.pipeline_mixed_sampling_with_intermediate_ode
    patch = turning_point.install()
    assert module.pipeline_mixed_sampling_with_intermediate_ode is original
    assert any(f"{MIXED} is left as it is: its results are others" in line for line in patch.messages)
    assert any(f"{ODE} is left as it is" in line for line in patch.messages)


def test_wrong_options() -> None:
    with pytest.raises(ValueError, match="chunk must be at least 1 row, got 0"):
        make_samplers(chunk=0)
    with pytest.raises(ValueError, match="rng must be one of host, philox"):
        turning_point.install(rng="torch")
    with pytest.raises(ValueError, match="unknown fix 'noise'; known are: float32_states, shared_noise"):
        turning_point.install(fixes=["noise"])
