"""The launcher with hosts other than Flow-GRPO, in processes of its own, compared with running the script directly."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from densegrpo_fast.launch import main

pytestmark = pytest.mark.ci

ROOT = Path(__file__).resolve().parents[2]
HOSTS = Path(__file__).parents[1] / "hosts"
MAIN = """

def main():
    import sys
    torch.manual_seed(0)
    latents, velocity = torch.randn(2, 1, 16, 8)
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.0])
    total = 0.0
    for index in range(3):
        latents, data, log_prob = flux_step(velocity, latents, 0.3, sigmas, index, None, True, True)
        total += log_prob.item()
    print(round(data.abs().mean().item(), 4), round(total, 3), flux_step.__name__, sys.argv[1:])
    print("module", flux_step.__module__)
    if "--fail" in sys.argv:
        flux_step(velocity, latents, 0.3, sigmas, 7, None, True, True)


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A host whose script defines its own step, and one whose utilities are imported."""
    (tmp_path / "fastvideo" / "utils").mkdir(parents=True)
    for folder in ("fastvideo", "fastvideo/utils"):
        (tmp_path / folder / "__init__.py").touch()
    shutil.copy(HOSTS / "mix_sampling_utils.py", tmp_path / "fastvideo" / "utils" / "sampling_utils.py")
    step = (HOSTS / "dance_script.py").read_text()
    (tmp_path / "fastvideo" / "train_grpo_flux.py").write_text(step + MAIN)
    return tmp_path


def run(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(project)])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


LAUNCH = ("-m", "densegrpo_fast.launch")


def test_a_step_that_the_script_defines_is_replaced_when_it_is_defined(project: Path) -> None:
    script = os.path.join("fastvideo", "train_grpo_flux.py")
    direct = run(project, script, "--fail")
    launched = run(project, *LAUNCH, "--host", "dance_grpo", script, "--fail")
    assert direct.returncode == launched.returncode == 1
    numbers, module = direct.stdout.splitlines()
    assert launched.stdout.splitlines()[0] == numbers and module == "module __main__"
    assert "module densegrpo_fast.compat.dance_grpo" in launched.stdout
    said, *trace = launched.stderr.splitlines()
    assert said == "densegrpo_fast: replaced __main__.flux_step (log_prob with constants, rng host)"
    # The script's own lines of the traceback are those of the direct run.
    own = [line for line in direct.stderr.splitlines() if script in line][:2]
    assert len(own) == 2 and all(line in trace for line in own)
    assert "IndexError" in direct.stderr and "IndexError" in launched.stderr


def test_an_unknown_step_stops_the_script_at_its_definition(project: Path) -> None:
    path = project / "fastvideo" / "train_grpo_flux.py"
    path.write_text(path.read_text().replace("0.5 * eta**2", "0.4 * eta**2"))
    launched = run(project, *LAUNCH, "--host", "dance_grpo", str(path))
    assert launched.returncode == 1 and launched.stdout == ""
    assert "flux_step of the host has known parameters but other results: scoring step 0" in launched.stderr


def test_imported_utilities_with_a_fix(project: Path) -> None:
    (project / "train.py").write_text(
        "from fastvideo.utils.sampling_utils import run_sample_step\nprint(run_sample_step.__module__)\n"
    )
    launched = run(project, *LAUNCH, "--host", "mix_grpo", "--fix", "reach_zero", "--fix", "upcast", "train.py")
    assert launched.returncode == 0 and launched.stdout == "densegrpo_fast.compat.mix_grpo.sampling\n"
    assert launched.stderr.count("rng host, fix reach_zero, fix upcast)") == 4


STYLES = """
import importlib, sys
import {module} as whole
from {module} import *
from {module} import {name} as renamed
import user
late = importlib.import_module("{module}").{name}

if __name__ == "__main__":
    found = whole.{name}, {name}, renamed, user.{name}, late, vars(sys.modules["__main__"])["renamed"]
    print(len(set(map(id, found))), (found[0].{attribute}).__module__)
"""


@pytest.mark.parametrize(
    ("host", "module", "name", "attribute"),
    [
        ("flow_grpo", "flow_grpo.diffusers_patch.sd3_sde_with_logprob", "sde_step_with_logprob", "__call__.__self__"),
        (
            "turning_point",
            "flow_grpo.diffusers_patch.sd3_pipeline_with_logprob_fast_my",
            "pipeline_mixed_sampling_with_intermediate_ode",
            "__call__.__self__",
        ),
        ("dance_grpo", "fastvideo.train_grpo_flux", "flux_step", "__call__.__self__"),
        ("mix_grpo", "fastvideo.utils.sampling_utils", "dpm_step", "__call__.__self__"),
        (
            "flow_factory",
            "flow_factory.scheduler.flow_match_euler_discrete",
            "FlowMatchEulerDiscreteSDEScheduler",
            "step",
        ),
    ],
)
def test_every_import_style_in_every_host(
    project: Path,
    host: str,
    module: str,
    name: str,
    attribute: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    for folder in ("flow_grpo/diffusers_patch", "flow_factory/scheduler"):
        (project / folder).mkdir(parents=True)
        for package in (folder, folder.split("/")[0]):
            (project / package / "__init__.py").touch()
    patched = project / "flow_grpo" / "diffusers_patch"
    source = (HOSTS / "host_sd3.py").read_text()
    (patched / "sd3_sde_with_logprob.py").write_text(source)
    pipelines = f"{source}\n\npipeline_with_logprob = fast_pipeline_with_logprob\n"
    (patched / "sd3_pipeline_with_logprob_fast_my.py").write_text(pipelines)
    scheduler = project / "flow_factory" / "scheduler" / "flow_match_euler_discrete.py"
    shutil.copy(HOSTS / "flow_factory_scheduler.py", scheduler)
    (project / "user.py").write_text(f"from {module} import {name}\n")
    script = STYLES.format(module=module, name=name, attribute=attribute)
    (project / "styles.py").write_text(script)
    monkeypatch.chdir(project)
    status, output, errors = forked(["--host", host, "styles.py"], project, capfd)
    assert status == 0, errors
    count, where = output.split()
    assert count == "1" and where.startswith("densegrpo_fast.compat.")
    assert f"replaced {module}.{name}" in errors


def forked(arguments: list[str], project: Path, capfd: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """The launcher in a child of this process, which has imported torch; its status and what it prints."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            sys.path.append(str(project))
            for name in [
                name for name in sys.modules if name.split(".")[0] in ("flow_grpo", "fastvideo", "flow_factory")
            ]:
                del sys.modules[name]
            main(arguments)
            status = 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, *capfd.readouterr()


def test_bad_input(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    script = str(project / "fastvideo" / "train_grpo_flux.py")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    for arguments, status, message in [
        (["--host", "dancegrpo"], 2, "unknown host 'dancegrpo', known are: flow_grpo, "),
        (["--host", "mix_grpo", "--tracker"], 2, "--tracker is no option of --host mix_grpo"),
        (["--host", "dance_grpo", "--signature", "V1"], 2, "--signature is no option of --host dance_grpo"),
        (["--fix", "speed"], 2, "unknown fix 'speed'; known are: "),
        (["--host", "dance_grpo", "--fix", "speed"], 2, "unknown fix 'speed'; known are: constants, upcast"),
        (["--host", "flow_factory", "--seed", "1"], 2, "seed is for rng"),
        (["--host", "dance_grpo"], 3, "the package fastvideo cannot be imported here"),
        (["--host", "flow_factory"], 3, "the package flow_factory cannot be imported here"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main([*arguments, script])
        assert stop.value.code == status
        assert message in capsys.readouterr().err
