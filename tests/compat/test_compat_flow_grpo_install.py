"""`install` on a miniature host: SD3 pipelines that are known are replaced, others are left as they are."""

from __future__ import annotations

import inspect
import random
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "hosts"))

import host_sd3  # noqa: E402

from densegrpo_fast.compat import flow_grpo  # noqa: E402
from densegrpo_fast.compat.flow_grpo.pipelines import pipeline_replacement  # noqa: E402

FOLDER = "flow_grpo.diffusers_patch"
Host = Callable[..., dict[str, ModuleType]]


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Imports a miniature Flow-GRPO whose pipeline modules have some names bound anew."""

    def make(**bindings: Any) -> dict[str, ModuleType]:
        names = ("sd3_sde_with_logprob", "sd3_pipeline_with_logprob", "sd3_pipeline_with_logprob_fast")
        for name in ("flow_grpo", FOLDER, *(f"{FOLDER}.{name}" for name in names)):
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        step = host_sd3.load(f"{FOLDER}.{names[0]}")
        bindings["sde_step_with_logprob"] = step.sde_step_with_logprob
        plain = host_sd3.load(f"{FOLDER}.{names[1]}", **bindings)
        fast = host_sd3.load(f"{FOLDER}.{names[2]}", **bindings)
        fast.pipeline_with_logprob = bindings.get("fast", fast.fast_pipeline_with_logprob)
        script = ModuleType("script")
        script.sample = fast.pipeline_with_logprob  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "script", script)
        return {"step": step, "plain": plain, "fast": fast, "script": script}

    yield make
    flow_grpo.uninstall()


def test_pipelines_are_replaced_everywhere_and_put_back(host: Host) -> None:
    modules = host()
    originals = [modules["plain"].pipeline_with_logprob, modules["fast"].pipeline_with_logprob]
    torch_state, python_state = torch.get_rng_state(), random.getstate()
    patch = flow_grpo.install()
    assert torch.equal(torch.get_rng_state(), torch_state) and random.getstate() == python_state
    plain, fast = modules["plain"].pipeline_with_logprob, modules["fast"].pipeline_with_logprob
    assert plain.__module__ == fast.__module__ == "densegrpo_fast.compat.flow_grpo.pipelines"
    assert modules["script"].sample is fast
    assert inspect.signature(fast) == inspect.signature(originals[1])
    assert any("sd3_pipeline_with_logprob.pipeline_with_logprob (plain, float32 states)" in m for m in patch.messages)
    assert any("(fast, float32 states); also bound as" in m and "script.sample" in m for m in patch.messages)
    assert flow_grpo.install() is patch
    flow_grpo.uninstall()
    assert [modules["plain"].pipeline_with_logprob, modules["fast"].pipeline_with_logprob] == originals
    assert modules["script"].sample is originals[1]


def test_pipelines_can_be_left_out(host: Host) -> None:
    modules = host()
    original = modules["fast"].pipeline_with_logprob
    flow_grpo.install(pipelines=False)
    assert modules["fast"].pipeline_with_logprob is original
    assert modules["fast"].sde_step_with_logprob.__module__.startswith("densegrpo_fast.")


def test_an_unknown_pipeline_is_left_and_calls_our_step(host: Host) -> None:
    modules = host()
    modules["fast"].pipeline_with_logprob = modules["fast"].signed("self", "prompt=None solver='flow'")(lambda *_: None)
    original = modules["fast"].pipeline_with_logprob
    patch = flow_grpo.install()
    assert modules["fast"].pipeline_with_logprob is original
    (line,) = [line for line in patch.messages if "sd3_pipeline_with_logprob_fast" in line and "left" in line]
    assert "is left as it is: its arguments are not known; it calls the replaced step" in line
    assert modules["fast"].sde_step_with_logprob is modules["step"].sde_step_with_logprob
    assert modules["step"].sde_step_with_logprob.__module__.startswith("densegrpo_fast.")
    assert patch.replaces


def test_a_fork_with_a_step_of_its_own_hears_that_its_pipeline_does_not_call_ours(host: Host) -> None:
    modules = host()
    sampler = modules["fast"].signed("self", "prompt=None solver='flow'")(lambda *_: None)
    assert pipeline_replacement(sampler)[1].endswith("it calls the replaced step")
    modules["fast"].sde_step_with_logprob = lambda *_: None
    assert pipeline_replacement(sampler)[1].endswith("it calls no replaced step")


def test_a_changed_copy_is_left(host: Host) -> None:
    """Same arguments, another result: guidance the other way round."""
    correct = host_sd3.guided

    def swapped(pipeline: Any, latents: Any, t: Any, prompts: Any, scale: float) -> Any:
        return correct(pipeline, latents, t, (*prompts[2:], *prompts[:2]) if scale > 1 else prompts, scale)

    modules = host(guided=swapped)
    replacement, note = pipeline_replacement(modules["fast"].pipeline_with_logprob)
    assert replacement is modules["fast"].pipeline_with_logprob
    assert "its results are others (results[0] differ by " in note and "with states in float32" in note

    modules = host(images_of=lambda *_: 1 / 0)
    assert "it raised ZeroDivisionError" in pipeline_replacement(modules["plain"].pipeline_with_logprob)[1]


def test_whether_states_are_rounded_is_found_by_running(host: Host) -> None:
    modules = host(ROUNDED=True)
    assert (
        pipeline_replacement(modules["plain"].pipeline_with_logprob)[1] == "plain, states in the dtype of the prompts"
    )
    note = pipeline_replacement(modules["fast"].pipeline_with_logprob, float32=True)[1]
    assert note == "fast, states kept in float32"


def test_older_pipelines_lack_the_last_arguments(host: Host) -> None:
    modules = host()
    old = host_sd3.signed("self", host_sd3.COMMON)
    plain = modules["plain"]
    function = old(lambda self, *arguments: plain.pipeline_with_logprob(self, *arguments))
    inspect.unwrap(function).__globals__["sde_step_with_logprob"] = plain.sde_step_with_logprob
    replacement, note = pipeline_replacement(function)
    assert note == "plain, float32 states"
    assert list(inspect.signature(replacement).parameters)[-1] == "noise_level"
    with pytest.raises(TypeError, match="return_prev_sample_mean"):
        replacement(None, return_prev_sample_mean=True)


def test_the_replacement_uses_the_hosts_patched_step(host: Host) -> None:
    """With counters, the pipelines' noise comes from them, too."""
    pytest.importorskip("diffusers")
    from densegrpo_fast.models.tiny import tiny_sd3

    modules = host()
    flow_grpo.install(rng="philox", seed=4)
    pipeline = tiny_sd3().pipeline
    pipeline.set_progress_bar_config(disable=True)
    options = {
        "prompt_embeds": torch.randn(1, 24, 128),
        "pooled_prompt_embeds": torch.randn(1, 128),
        "guidance_scale": 1.0,
        "num_inference_steps": 2,
        "latents": torch.randn(1, 16, 8, 8),
    }

    def states(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        with flow_grpo.philox_samples(torch.tensor([0]), epoch=0):
            return modules["plain"].pipeline_with_logprob(pipeline, **options)[1][-1]

    assert torch.equal(states(1), states(2))
    flow_grpo.uninstall()
    assert not torch.equal(states(1), states(2))
