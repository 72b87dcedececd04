"""Patching a host: miniature packages with a host's module names, imported in each style, before and after."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from densegrpo_fast.compat import flow_grpo
from densegrpo_fast.compat.patch import CompatError, Patch, Target

STEP = """
import torch


def sde_step_with_logprob(self, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None,
                          sde_type="sde"):
    rows = [self.index_for_timestep(t) for t in timestep]
    shape = (-1, *[1] * (sample.ndim - 1))
    s, r = self.sigmas[rows].view(shape), self.sigmas[[i + 1 for i in rows]].view(shape)
    if sde_type == "cps":
        std = injected = r * torch.sin(torch.tensor(noise_level * torch.pi / 2))
        mean = (sample - s * model_output) * (1 - r) + (sample + (1 - s) * model_output) * (r**2 - std**2).sqrt()
    else:
        std = noise_level * (s / (1 - torch.where(s == 1, self.sigmas[1], s))).sqrt()
        injected = std * (s - r).sqrt()
        drift = std**2 / (2 * s)
        mean = sample * (1 - drift * (s - r)) - model_output * (1 + drift * (1 - s)) * (s - r)
    if prev_sample is None:
        prev_sample = mean + injected * torch.randn(sample.shape, generator=generator)
    if sde_type == "cps":
        log_prob = -((prev_sample - mean) ** 2)
    else:
        log_prob = torch.distributions.Normal(mean, injected, validate_args=False).log_prob(prev_sample)
    return prev_sample, log_prob.flatten(1).mean(1), mean, std
"""
TRACKER = """
import numpy as np


class PerPromptStatTracker:
    def __init__(self, global_std=False):
        self.global_std = global_std

    def update(self, prompts, rewards, type="grpo"):
        rewards, prompts, out = np.array(rewards, dtype=float), np.array(prompts), np.zeros_like(np.array(rewards))
        for prompt in set(prompts.tolist()):
            rows = prompts == prompt
            mine = rewards[rows]
            spread = (rewards if self.global_std else mine).std(0) + 1e-4
            best_and_worst = np.zeros(len(mine))
            best_and_worst[[mine.argmax() % len(mine), mine.argmin() % len(mine)]] = 1, -1
            out[rows] = {"grpo": (mine - mine.mean(0)) / spread, "rwr": mine, "sft": mine == mine.max()}.get(
                type, best_and_worst
            )
        return out
"""
PIPELINE = """
from flow_grpo.diffusers_patch.sd3_sde_with_logprob import sde_step_with_logprob as step


def pipeline(*args):
    return step(*args)
"""


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the search path with a package flow_grpo that nobody has imported yet."""
    folder = tmp_path / "flow_grpo" / "diffusers_patch"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").touch()
    (folder / "__init__.py").touch()
    (folder / "sd3_sde_with_logprob.py").write_text(STEP)
    (folder / "pipeline.py").write_text(PIPELINE)
    (folder.parent / "stat_tracking.py").write_text(TRACKER)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    flow_grpo.uninstall()
    for name in [name for name in sys.modules if name.split(".")[0] == "flow_grpo" or name.startswith("user_")]:
        del sys.modules[name]


def step_module() -> ModuleType:
    return importlib.import_module("flow_grpo.diffusers_patch.sd3_sde_with_logprob")


def user(name: str, source: str) -> ModuleType:
    """Run a few lines as a module that is then among the imported ones."""
    module = ModuleType(name)
    sys.modules[name] = module
    exec(source, vars(module))
    return module


FROM = "from flow_grpo.diffusers_patch.sd3_sde_with_logprob import sde_step_with_logprob\n"
AS = "from flow_grpo.diffusers_patch.sd3_sde_with_logprob import sde_step_with_logprob as renamed\n"
WHOLE = "import flow_grpo.diffusers_patch.sd3_sde_with_logprob as module\n"


@pytest.mark.parametrize("imported_before", [True, False])
def test_every_import_style_gets_ours_and_then_the_original(host: Path, imported_before: bool) -> None:
    if not imported_before:
        flow_grpo.install()
    users = user("user_from", FROM), user("user_as", AS), user("user_whole", WHOLE)
    pipeline = importlib.import_module("flow_grpo.diffusers_patch.pipeline")
    original = None if not imported_before else step_module().sde_step_with_logprob
    patch = flow_grpo.install()
    found = [users[0].sde_step_with_logprob, users[1].renamed, users[2].module.sde_step_with_logprob, pipeline.step]
    assert len(set(map(id, found))) == 1
    assert found[0] is not original and found[0].__module__.startswith("densegrpo_fast.")
    assert len(patch.messages) == 1
    assert "replaced flow_grpo.diffusers_patch.sd3_sde_with_logprob.sde_step_with_logprob (V3" in patch.messages[0]
    also = "also bound as flow_grpo.diffusers_patch.pipeline.step, user_as.renamed, user_from.sde_step_with_logprob"
    assert patch.messages[0].endswith(also) == imported_before

    flow_grpo.uninstall()
    found = [users[0].sde_step_with_logprob, users[1].renamed, users[2].module.sde_step_with_logprob, pipeline.step]
    assert len(set(map(id, found))) == 1
    assert found[0].__module__ == "flow_grpo.diffusers_patch.sd3_sde_with_logprob"
    assert original in (None, found[0])


def test_names_in_main_are_replaced(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "__main__", user("user_main", FROM))
    main = sys.modules["__main__"]
    original = main.sde_step_with_logprob
    with flow_grpo.install() as patch:
        assert main.sde_step_with_logprob is not original
        assert "__main__.sde_step_with_logprob" in patch.messages[0]
    assert main.sde_step_with_logprob is original


def test_the_context_manager_ends_the_patch_also_after_an_error(host: Path) -> None:
    finders = list(sys.meta_path)
    original = step_module().sde_step_with_logprob
    with pytest.raises(KeyError), flow_grpo.install() as patch:
        assert patch.installed and step_module().sde_step_with_logprob is not original
        raise KeyError
    assert not patch.installed and step_module().sde_step_with_logprob is original
    assert sys.meta_path == finders


def test_installing_twice_is_installing_once(host: Path) -> None:
    original = step_module().sde_step_with_logprob
    patch = flow_grpo.install()
    first = step_module().sde_step_with_logprob
    assert flow_grpo.install() is patch and step_module().sde_step_with_logprob is first
    assert len(patch.messages) == 1
    other = flow_grpo.install(rng="philox", seed=4)
    assert other is not patch and "rng philox" in other.messages[0]
    assert step_module().sde_step_with_logprob not in (first, original)
    flow_grpo.uninstall()
    flow_grpo.uninstall()
    assert step_module().sde_step_with_logprob is original


def test_a_reloaded_module_is_patched_again(host: Path) -> None:
    flow_grpo.install()
    importlib.reload(step_module())
    assert step_module().sde_step_with_logprob.__module__.startswith("densegrpo_fast.")
    flow_grpo.uninstall()
    importlib.reload(step_module())
    assert not step_module().sde_step_with_logprob.__module__.startswith("densegrpo_fast.")


def test_a_module_found_before_but_run_after_uninstall_is_left_alone(host: Path) -> None:
    name = "flow_grpo.diffusers_patch.sd3_sde_with_logprob"
    with flow_grpo.install() as patch:
        spec = importlib.util.find_spec(name)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.sde_step_with_logprob.__module__ == name and patch.messages == []


def test_the_replaced_pipeline_gives_the_same_numbers(host: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(5)
    pipeline = importlib.import_module("flow_grpo.diffusers_patch.pipeline").pipeline
    latents, velocity = torch.randn(2, 2, 16, 16, 16)

    def run() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(8)
        return pipeline(scheduler, velocity, scheduler.timesteps[[1, 3]], latents)

    expected = run()
    with flow_grpo.install() as patch:
        assert "pipeline.step" in patch.messages[0]
        found = run()
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=2e-6, atol=2e-6)


def test_the_tracker_is_replaced_when_asked_for(host: Path) -> None:
    module = importlib.import_module("flow_grpo.stat_tracking")
    original = module.PerPromptStatTracker
    with flow_grpo.install():
        assert module.PerPromptStatTracker is original
    with flow_grpo.install(tracker=True) as patch:
        assert issubclass(module.PerPromptStatTracker, flow_grpo.PerPromptStatTracker)
        assert "replaced flow_grpo.stat_tracking.PerPromptStatTracker" in patch.messages[-1]
    assert module.PerPromptStatTracker is original
    assert flow_grpo.PerPromptStatTracker is not original


def test_an_unknown_step_stops_its_import(host: Path) -> None:
    path = host / "flow_grpo" / "diffusers_patch" / "sd3_sde_with_logprob.py"
    path.write_text(STEP.replace('sde_type="sde"', "eta=1"))
    flow_grpo.install()
    with pytest.raises(CompatError, match="which is no known generation"):
        step_module()
    assert "flow_grpo.diffusers_patch.sd3_sde_with_logprob" not in sys.modules


def test_nothing_is_replaced_when_one_original_is_unknown(host: Path) -> None:
    finders = list(sys.meta_path)
    tracker = importlib.import_module("flow_grpo.stat_tracking")
    original, original_step = tracker.PerPromptStatTracker, step_module().sde_step_with_logprob
    tracker.PerPromptStatTracker = dict
    with pytest.raises(CompatError, match="PerPromptStatTracker"):
        flow_grpo.install(tracker=True)
    assert tracker.PerPromptStatTracker is dict and step_module().sde_step_with_logprob is original_step
    assert sys.meta_path == finders
    tracker.PerPromptStatTracker = original
    del vars(step_module())["sde_step_with_logprob"]
    with pytest.raises(CompatError, match="has no sde_step_with_logprob: this is no version of flow_grpo"):
        flow_grpo.install()


def test_a_missing_host_is_named() -> None:
    with pytest.raises(CompatError, match="the package flow_grpo cannot be imported here; install it"):
        flow_grpo.install()


def test_another_project_of_the_same_name_is_told_from_the_host(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finders = list(sys.meta_path)
    (tmp_path / "flow_grpo").mkdir()
    (tmp_path / "flow_grpo" / "__init__.py").write_text("raise AssertionError('imported')")
    (tmp_path / "flow_grpo" / "rewards.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CompatError, match=r"the package flow_grpo \(.*\) has none of the modules .*another project"):
        flow_grpo.install()
    assert sys.meta_path == finders


def test_wrong_options_are_refused_before_anything_happens(host: Path) -> None:
    for options, message in [
        ({"version": "Wan"}, "version must be one of V1, V2, V3, V3g, or None"),
        ({"rng": "mine"}, "rng must be one of host, philox"),
        ({"seed": 3}, 'seed is for rng="philox"'),
    ]:
        with pytest.raises(ValueError, match=message):
            flow_grpo.install(**options)
    with pytest.raises(CompatError, match="version V1 was asked for"):
        step_module()
        flow_grpo.install(version="V1")


def test_what_was_replaced_is_said(host: Path, caplog: pytest.LogCaptureFixture) -> None:
    said: list[str] = []
    with flow_grpo.install(say=said.append) as patch:
        assert said == []
        step_module()
        assert said == patch.messages and len(said) == 1
    with caplog.at_level(logging.INFO, logger="densegrpo_fast"), flow_grpo.install():
        assert "replaced flow_grpo.diffusers_patch" in caplog.text


def test_lazy_modules_are_not_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Lazy(ModuleType):
        def __getattr__(self, name: str) -> object:
            raise AssertionError(f"asked for {name}")

    monkeypatch.setitem(sys.modules, "user_lazy", Lazy("user_lazy"))
    monkeypatch.setitem(sys.modules, "user_none", None)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "user_host", user("user_host", "def function(): return 1"))
    with Patch("user_host", [Target("user_host", "function", lambda original: (lambda: original() + 1, "plus 1"))]):
        assert sys.modules["user_host"].function() == 2
    assert sys.modules["user_host"].function() == 1
