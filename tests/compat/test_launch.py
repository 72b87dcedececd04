"""The launcher, in processes of its own, compared with running the script directly."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

STEP = '''
import torch


def sde_step_with_logprob(self, model_output, timestep, sample, noise_level=0.7, prev_sample=None, generator=None):
    """The sde step of a host, in a few lines."""
    rows = [self.index_for_timestep(t) for t in timestep]
    s, r = (self.sigmas[[i + k for i in rows]].view(-1, *[1] * (sample.ndim - 1)) for k in (0, 1))
    std = noise_level * (s / (1 - torch.where(s == 1, self.sigmas[1], s))).sqrt()
    injected, drift = std * (s - r).sqrt(), std**2 / (2 * s)
    mean = sample * (1 - drift * (s - r)) - model_output * (1 + drift * (1 - s)) * (s - r)
    if prev_sample is None:
        prev_sample = mean + injected * torch.randn(sample.shape, generator=generator)
    density = torch.distributions.Normal(mean, injected, validate_args=False).log_prob(prev_sample)
    return prev_sample, density.flatten(1).mean(1), mean, std
'''
SCRIPT = """
import os, sys
import helper
from flow_grpo.diffusers_patch.sd3_sde_with_logprob import sde_step_with_logprob


class Scheduler:
    def __init__(self):
        import torch
        self.sigmas = torch.tensor([1.0, 0.8, 0.5, 0.0])
        self.timesteps = self.sigmas[:-1] * 1000

    def index_for_timestep(self, t):
        return int((self.timesteps == t).nonzero()[0])


def main():
    import torch
    torch.manual_seed(0)
    latents, velocity = torch.randn(2, 1, 4, 8, 8)
    scheduler = Scheduler()
    total = 0.0
    for t in scheduler.timesteps:
        latents, log_prob, *_ = sde_step_with_logprob(scheduler, velocity, t.unsqueeze(0), latents)
        total += log_prob.item()
    print(round(latents.abs().mean().item(), 4), round(total, 3))
    print(sys.argv, __file__, __name__, __spec__, helper.__file__, sys.path[0])
    print(sys.modules["__main__"].main is main, __builtins__ is sys.modules["builtins"])
    print("module", sde_step_with_logprob.__module__)


if __name__ == "__main__":
    main()
    if "--fail" in sys.argv:
        raise KeyError("as told")
    sys.exit(int(os.environ.get("EXIT", "0")))
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A miniature host with a script beside a module that it imports."""
    package = tmp_path / "flow_grpo" / "diffusers_patch"
    scripts = tmp_path / "scripts"
    for folder in (package, scripts):
        folder.mkdir(parents=True)
    (package.parent / "__init__.py").touch()
    (package / "__init__.py").touch()
    (package / "sd3_sde_with_logprob.py").write_text(STEP)
    (scripts / "helper.py").touch()
    (scripts / "train.py").write_text(SCRIPT)
    return tmp_path


def run(project: Path, *arguments: str, host: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), *([str(project)] if host else [])])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


LAUNCH = ("-m", "densegrpo_fast.launch")
ARGUMENTS = ("--config", "a.py", "--host=x", "--", "-m", "--fail")


@pytest.mark.ci
def test_a_script_runs_as_if_run_directly(project: Path) -> None:
    script = os.path.join("scripts", "train.py")
    direct = run(project, script, *ARGUMENTS)
    launched = run(project, *LAUNCH, "--host", "flow_grpo", script, *ARGUMENTS)
    assert direct.returncode == launched.returncode == 1
    assert "module flow_grpo." in direct.stdout and "module densegrpo_fast.compat." in launched.stdout
    lines = [output.splitlines()[:-1] for output in (direct.stdout, launched.stdout)]
    assert len(lines[0]) == 3 and lines[0] == lines[1]
    said, *trace = launched.stderr.splitlines()
    assert said.startswith("densegrpo_fast: replaced flow_grpo.diffusers_patch.sd3_sde_with_logprob.")
    assert "(V2, sde_type sde, rng host)" in said
    assert trace == direct.stderr.splitlines() and "KeyError: 'as told'" in trace


@pytest.mark.ci
def test_exit_status_and_options_pass_through(project: Path) -> None:
    script = str(project / "scripts" / "train.py")
    launched = run(project, *LAUNCH, "--rng", "philox", "--seed", "5", script, EXIT="9", RANK="1")
    assert launched.returncode == 9
    assert launched.stderr == ""  # only the first rank reports
    again = run(project, *LAUNCH, "--rng", "philox", "--seed", "6", script, RANK="0")
    assert again.returncode == 0 and "rng philox" in again.stderr
    assert again.stdout.splitlines()[0] != launched.stdout.splitlines()[0]


@pytest.mark.ci
def test_a_script_that_does_not_compile_is_reported_like_python(project: Path) -> None:
    (project / "bad.py").write_text("print('a')\ndef f(:\n")
    direct, launched = run(project, "bad.py"), run(project, *LAUNCH, "bad.py")
    assert direct.returncode == launched.returncode == 1
    assert "SyntaxError" in direct.stderr and launched.stderr.endswith(direct.stderr)


@pytest.mark.ci
def test_a_script_without_the_host_hears_that_nothing_was_replaced(project: Path) -> None:
    (project / "plain.py").write_text("print('done')\n")
    launched = run(project, *LAUNCH, "plain.py")
    assert launched.returncode == 0 and launched.stdout == "done\n"
    assert (
        "nothing was replaced in this process: the script imported none of the functions of flow_grpo"
        in launched.stderr
    )


@pytest.mark.ci
def test_an_unknown_step_stops_the_script(project: Path) -> None:
    path = project / "flow_grpo" / "diffusers_patch" / "sd3_sde_with_logprob.py"
    path.write_text(STEP.replace("generator=None", "eta=0.0"))
    launched = run(project, *LAUNCH, "scripts/train.py")
    assert launched.returncode == 1
    (line,) = launched.stderr.splitlines()
    assert line.startswith("densegrpo_fast: error: ") and "which is no known generation" in line
    assert launched.stdout == ""


def test_bad_input(project: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from densegrpo_fast.launch import main

    script = str(project / "scripts" / "train.py")
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    for arguments, status, message in [
        ([str(project / "no.py")], 2, "no.py': there is no such file"),
        ([str(project)], 2, "is not a file; name the Python file to run"),
        (["--host", "flowgrpo", script], 2, "unknown host 'flowgrpo', known are: flow_grpo, turning_point, "),
        (["--signature", "V9", script], 2, "version must be one of V1, V2, V3, V3g"),
        (["--rng", "dice", script], 2, "rng must be one of host, philox, got 'dice'"),
        (["--seed", "3", script], 2, "seed is for rng"),
        ([script], 3, "the package flow_grpo cannot be imported here"),
        ([], 2, "the following arguments are required"),
        (["--host", "flow_grpo", "-m", "no_such.module"], 3, "the package flow_grpo cannot be imported here"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == status
        assert message in capsys.readouterr().err


def test_help_needs_no_torch(project: Path) -> None:
    code = "import sys; sys.argv[1:] = ['--help']\ntry:\n    from densegrpo_fast.launch import main; main()\n"
    code += "finally: print('torch' in sys.modules)"
    result = run(project, "-c", code)
    assert result.returncode == 0 and "--rng" in result.stdout and result.stdout.endswith("False\n")
