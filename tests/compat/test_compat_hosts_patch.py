"""Patching DanceGRPO, MixGRPO and Flow-Factory: miniature packages, imported in each style, before and after."""

from __future__ import annotations

import importlib
import logging
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from densegrpo_fast.compat import dance_grpo, flow_factory, mix_grpo
from densegrpo_fast.compat.patch import CompatError
from densegrpo_fast.flow.schedule import dance_sigmas

HOSTS = Path(__file__).parents[1] / "hosts"
SCRIPT, UTILITIES = "fastvideo.train_grpo_flux", "fastvideo.utils.sampling_utils"
SCHEDULER = "flow_factory.scheduler.flow_match_euler_discrete"
NAMES = ("flow_grpo_step", "dance_grpo_step", "dpm_step", "run_sample_step")
OURS = "densegrpo_fast."


@pytest.fixture
def hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder on the search path with packages fastvideo and flow_factory that nobody has imported yet."""
    for module, file in [
        (SCRIPT, "dance_script.py"),
        (UTILITIES, "mix_sampling_utils.py"),
        (SCHEDULER, "flow_factory_scheduler.py"),
    ]:
        path = tmp_path.joinpath(*module.split(".")).with_suffix(".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(HOSTS / file, path)
    for folder in ("fastvideo", "fastvideo/utils", "flow_factory", "flow_factory/scheduler"):
        (tmp_path / folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path
    for host in (dance_grpo, mix_grpo, flow_factory):
        host.uninstall()
    for name in list(sys.modules):
        if name.split(".")[0] in ("fastvideo", "flow_factory") or name.startswith("user_"):
            del sys.modules[name]


def change(hosts: Path, module: str, old: str, new: str) -> None:
    """Edit a host's file before it is imported."""
    path = hosts.joinpath(*module.split(".")).with_suffix(".py")
    source = path.read_text()
    assert old in source
    path.write_text(source.replace(old, new))


def user(name: str, source: str) -> ModuleType:
    """Run a few lines as a module that is then among the imported ones."""
    module = ModuleType(name)
    sys.modules[name] = module
    exec(source, vars(module))
    return module


def make_v1(hosts: Path) -> None:
    """MixGRPO before sde_type."""
    change(hosts, UTILITIES, '\n    sde_type="sde", noise_level=None\n', "\n")
    change(hosts, UTILITIES, "V2 = True", 'V2, sde_type, noise_level = False, "sde", None')


@pytest.mark.ci
@pytest.mark.parametrize("version", ["V1", "V2"])
@pytest.mark.parametrize("imported_before", [True, False])
def test_mix_grpo_in_every_import_style(hosts: Path, imported_before: bool, version: str) -> None:
    if version == "V1":
        make_v1(hosts)
    if not imported_before:
        mix_grpo.install()
    users = user("user_from", f"from {UTILITIES} import *"), user("user_whole", f"import {UTILITIES} as module")
    renamed = user("user_as", f"from {UTILITIES} import run_sample_step as run")
    module = sys.modules[UTILITIES]
    originals = {name: vars(module)[name] for name in NAMES}
    patch = mix_grpo.install()
    for name in NAMES:
        found = {vars(module)[name], vars(users[0])[name], getattr(users[1].module, name)}
        assert len(found) == 1 and found.pop().__module__.startswith(OURS)
    assert renamed.run is module.run_sample_step
    assert [line.split(" (")[0] for line in patch.messages] == [f"replaced {UTILITIES}.{name}" for name in NAMES]
    assert all(f"({version}, rng host)" in line for line in patch.messages if "dpm_step" not in line)
    assert ("also bound as user_from.flow_grpo_step" in patch.messages[0]) == imported_before
    mix_grpo.uninstall()
    for name in NAMES:
        assert vars(module)[name].__module__ == vars(users[0])[name].__module__ == UTILITIES
    assert imported_before == (originals["dpm_step"] is module.dpm_step)


def test_mix_grpo_computes_what_the_host_computed(hosts: Path) -> None:
    module = importlib.import_module(UTILITIES)
    args = SimpleNamespace(
        eta=0.5,
        shift=3.0,
        flow_grpo_sampling=True,
        drop_last_sample=False,
        sample_strategy="progressive",
        dpm_algorithm_type="dpmsolver++",
        dpm_solver_order=2,
        dpm_solver_type="midpoint",
        dpm_apply_strategy="post",
        dpm_post_compress_ratio=0.5,
    )
    model = SimpleNamespace(eval=lambda: None)

    class Model:
        eval = staticmethod(lambda: model)

        def __call__(self, *, hidden_states: torch.Tensor, **rest: Any) -> tuple[torch.Tensor]:
            return (hidden_states.sin(),)

    def run() -> tuple[torch.Tensor, ...]:
        torch.manual_seed(1)
        x, embeddings, ids = torch.randn(2, 8, 4), torch.zeros(2, 3, 4), torch.zeros(2, 3)
        flags = [False, False, *[True] * 6]
        return module.run_sample_step(
            args, x, range(8), dance_sigmas(8), Model(), embeddings, ids, ids, ids, True, flags
        )

    expected = run()
    with mix_grpo.install():
        found = run()
    for value, reference in zip(found, expected, strict=True):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("imported_before", [True, False])
def test_flow_factory_also_where_schedulers_exist(hosts: Path, imported_before: bool) -> None:
    if not imported_before:
        flow_factory.install()
    user("user_from", f"from {SCHEDULER} import FlowMatchEulerDiscreteSDEScheduler as Scheduler")
    scheduler_class = sys.modules["user_from"].Scheduler
    scheduler = scheduler_class(dance_sigmas(6))
    derived = type("Derived", (scheduler_class,), {})(dance_sigmas(6))
    patch = flow_factory.install()
    assert scheduler.step.__func__ is derived.step.__func__ and scheduler.step.__func__.__module__.startswith(OURS)
    assert patch.messages[0].startswith(
        f"replaced {SCHEDULER}.FlowMatchEulerDiscreteSDEScheduler.step (with round trip"
    )
    x, v = torch.randn(2, 2, 8, 4)
    results = []
    for _ in range(2):
        torch.manual_seed(2)
        results.append(scheduler.step(v, scheduler.timesteps[1], x))
        assert type(results[-1]) is sys.modules[SCHEDULER].SDESchedulerOutput
        flow_factory.uninstall()
    assert scheduler.step.__func__.__module__ == SCHEDULER
    torch.testing.assert_close(results[0].next_latents, results[1].next_latents, rtol=1e-6, atol=1e-6)


def test_versions_of_flow_factory(hosts: Path) -> None:
    change(
        hosts,
        SCHEDULER,
        "ROUND_TRIP = True\nDANCE_STD_INJECTED = False",
        "ROUND_TRIP, DANCE_STD_INJECTED = False, True",
    )
    module = importlib.import_module(SCHEDULER)
    scheduler = module.FlowMatchEulerDiscreteSDEScheduler(dance_sigmas(6))
    x = torch.randn(2, 8, 4).bfloat16()
    with flow_factory.install() as patch:
        assert "without round trip, Dance-SDE's std injected, rng host" in patch.messages[0]
        plain = scheduler.step(x, scheduler.timesteps[1], x).next_latents
    with flow_factory.install(fixes=["round_trip"]) as patch:
        assert patch.messages[0].endswith("rng host, fix round_trip)")
        fixed = scheduler.step(x, scheduler.timesteps[1], x).next_latents
    assert torch.equal(fixed, fixed.bfloat16().float()) and not torch.equal(plain, plain.bfloat16().float())


def test_the_nearest_form_says_how_a_changed_host_differs(hosts: Path) -> None:
    """An earlier version with one edit: the message is about the edit, not about what versions differ in."""
    change(
        hosts,
        SCHEDULER,
        "ROUND_TRIP = True\nDANCE_STD_INJECTED = False",
        "ROUND_TRIP, DANCE_STD_INJECTED = False, True",
    )
    change(hosts, SCHEDULER, "density = -((next_latents.detach() - mean) ** 2)\n", "density = 0 * mean\n")
    flow_factory.install(say=lambda line: None)
    with pytest.raises(CompatError, match=r"scoring CPS at one step value 4 .*without round trip, Dance-SDE's std inj"):
        importlib.import_module(SCHEDULER)


@pytest.mark.parametrize("constants", [True, False])
def test_dance_grpo_in_modules_and_in_the_script(
    hosts: Path, monkeypatch: pytest.MonkeyPatch, constants: bool, caplog: pytest.LogCaptureFixture
) -> None:
    if not constants:
        change(hosts, SCRIPT, "CONSTANTS = True", "CONSTANTS = False")
    monkeypatch.setitem(sys.modules, "__main__", ModuleType("__main__"))
    main = sys.modules["__main__"]
    with caplog.at_level(logging.WARNING):
        patch = dance_grpo.install()
    assert "the script has defined no flux_step so far" in caplog.text and patch.messages == []
    # A script's own definition is not an import: it is replaced by a call below it.
    source = (hosts / "fastvideo" / "train_grpo_flux.py").read_text()
    exec(source, vars(main))
    original = main.flux_step
    assert original.__module__ == "__main__" and dance_grpo.install() is patch
    assert main.flux_step is not original and main.flux_step.__module__.startswith(OURS)
    words = "with" if constants else "without"
    assert patch.messages == [f"replaced __main__.flux_step (log_prob {words} constants, rng host)"]
    assert dance_grpo.install() is patch and len(patch.messages) == 1
    imported = user("user_from", f"from {SCRIPT} import flux_step")
    assert imported.flux_step is sys.modules[SCRIPT].flux_step is not main.flux_step
    assert patch.messages[1].startswith(f"replaced {SCRIPT}.flux_step")
    x, v = torch.randn(2, 2, 8, 4)
    own, theirs = (step(v, x, 0.3, dance_sigmas(5), 2, x, True, True)[2] for step in (main.flux_step, original))
    torch.testing.assert_close(own, theirs, rtol=1e-5, atol=1e-5)
    dance_grpo.uninstall()
    assert main.flux_step is original and imported.flux_step.__module__ == SCRIPT
    with dance_grpo.install(fixes={"constants"}) as again:
        assert again.messages[0].endswith("rng host, fix constants)")
        assert "also bound as user_from.flux_step" in again.messages[1]
    assert main.flux_step is original


def test_all_or_nothing(hosts: Path) -> None:
    finders = list(sys.meta_path)
    change(hosts, UTILITIES, "* sample + alpha * (1 - torch.exp(-h)) * clean", "* sample + alpha * 1.1 * clean")
    module = importlib.import_module(UTILITIES)
    with pytest.raises(
        CompatError, match="dpm_step of the host has known parameters but other results: step 0 of order"
    ):
        mix_grpo.install()
    assert all(vars(module)[name].__module__ == UTILITIES for name in NAMES)
    assert sys.meta_path == finders
    del sys.modules[UTILITIES]
    mix_grpo.install()
    with pytest.raises(CompatError, match="It was changed in this copy"):
        importlib.import_module(UTILITIES)
    assert UTILITIES not in sys.modules


@pytest.mark.parametrize(
    ("host", "module", "old", "new", "message"),
    [
        (dance_grpo, SCRIPT, "grpo, sde_solver):", "grpo, sde_solver, splits=1):", "flux_step of the host takes"),
        (dance_grpo, SCRIPT, "0.5 * eta**2", "0.4 * eta**2", "flux_step of the host has known parameters but other"),
        (dance_grpo, SCRIPT, "def flux_step", "def step", "has no flux_step: this is no version of fastvideo"),
        (mix_grpo, UTILITIES, "grpo_sample,\n", "grpo_sample, more,\n", "run_sample_step of the host takes"),
        (mix_grpo, UTILITIES, "drift * (1 - here)", "drift", "flow_grpo_step of the host has known parameters"),
        (flow_factory, SCHEDULER, "sigma_max=None,", "", "step of the host takes"),
        (flow_factory, SCHEDULER, "0.5 * std**2 * dt", "0.5 * std * dt", "step of the host has known parameters"),
        (flow_factory, SCHEDULER, "DiscreteSDEScheduler", "SDEScheduler", "has no FlowMatchEulerDiscreteSDE"),
        (flow_factory, SCHEDULER, "def from_dict", "def of", "has no SDESchedulerOutput to return results in"),
    ],
)
def test_changed_hosts_are_refused(hosts: Path, host: Any, module: str, old: str, new: str, message: str) -> None:
    change(hosts, module, old, new)
    host.install(say=lambda line: None)
    with pytest.raises(CompatError, match=message):
        importlib.import_module(module)


@pytest.mark.parametrize(
    ("host", "package", "known"),
    [
        (dance_grpo, "fastvideo", "constants, upcast"),
        (mix_grpo, "fastvideo", "constants, independent_noise, reach_zero, upcast"),
        (flow_factory, "flow_factory", "round_trip"),
    ],
)
def test_missing_hosts_and_wrong_options(host: Any, package: str, known: str) -> None:
    with pytest.raises(CompatError, match=f"the package {package} cannot be imported here; install it"):
        host.install()
    with pytest.raises(ValueError, match=f"unknown fix 'speed'; known are: {known}$"):
        host.install(fixes=["speed"])
    with pytest.raises(ValueError, match="fixes must be a collection of names, got the string"):
        host.install(fixes="upcast")
    with pytest.raises(ValueError, match="rng must be one of host, philox"):
        host.install(rng="dice")


@pytest.mark.ci
def test_philox_and_other_options_replace_anew(hosts: Path) -> None:
    for host, module in ((mix_grpo, UTILITIES), (dance_grpo, SCRIPT), (flow_factory, SCHEDULER)):
        importlib.import_module(module)
        said: list[str] = []
        patch = host.install(say=said.append)
        other = host.install(rng="philox", seed=4, say=said.append)
        assert other is not patch and not patch.installed and other.installed
        assert all("rng philox" in line for line in other.messages) and said[len(said) // 2 :] == other.messages
        host.uninstall()
        host.uninstall()
