"""Scripts of many processes: under the launchers of torch and accelerate, and those that start processes themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from densegrpo_fast.compat.flow_grpo import philox_samples, step_function
from densegrpo_fast.compat.rng import ROWS_PER_RANK

pytestmark = pytest.mark.ci

ROOT = Path(__file__).resolve().parents[2]
HOSTS = Path(__file__).parents[1] / "hosts"
LAUNCH = ("-m", "densegrpo_fast.launch")

GRID = """
import torch


class Grid:
    sigmas = torch.tensor([1.0, 0.8, 0.5, 0.0])
    timesteps = sigmas[:-1] * 1000

    def index_for_timestep(self, t):
        return int((self.timesteps == t).nonzero()[0])


def one_step(step):
    x = torch.linspace(-1, 1, 32).reshape(2, 4, 2, 2)
    return step(Grid(), x.cos(), Grid.timesteps[1:2], x, noise_level=0.7)[0]
"""
RANKS = """
import torch
import torch.distributed as dist
from flow_grpo.diffusers_patch.sd3_sde_with_logprob import sde_step_with_logprob
from grid import one_step

if __name__ == "__main__":
    dist.init_process_group("gloo")
    mean = one_step(sde_step_with_logprob).mean().reshape(1)
    means = [torch.zeros(1) for _ in range(dist.get_world_size())]
    dist.all_gather(means, mean)
    if dist.get_rank() == 0:
        print("module", sde_step_with_logprob.__module__)
        print("means", *(mean.item() for mean in means))
    dist.destroy_process_group()
"""
SPAWNING = """
import multiprocessing, os, sys
from flow_grpo.diffusers_patch.sd3_sde_with_logprob import sde_step_with_logprob


def flux_step():
    pass


def report(depth, method):
    name = os.path.basename(sys.modules["__main__"].__file__)
    print(depth, sde_step_with_logprob.__module__, __name__, name, sys.argv[1:], flush=True)
    if depth < 2 and method != "none":
        os.chdir("..")
        child = multiprocessing.get_context(method).Process(target=report, args=(depth + 1, method))
        child.start()
        child.join()
        sys.exit(child.exitcode)


if __name__ == "__main__":
    report(0, sys.argv[1])
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A miniature host, and scripts in a folder of their own."""
    package, scripts = tmp_path / "flow_grpo" / "diffusers_patch", tmp_path / "scripts"
    for folder in (package, scripts):
        folder.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "sd3_sde_with_logprob.py").write_text((HOSTS / "host_sd3.py").read_text())
    (scripts / "grid.py").write_text(GRID)
    (scripts / "ranks.py").write_text(RANKS)
    (scripts / "spawning.py").write_text(SPAWNING)
    return tmp_path


def run(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(project)])
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


def expected_means() -> list[float]:
    """What each rank's first unnamed step gives, with counters of seed 3."""
    grid: dict[str, object] = {}
    exec(GRID, grid)
    means = []
    for rank in range(2):
        step = step_function("V3g", rng="philox", seed=3)
        with philox_samples(torch.arange(2) + rank * ROWS_PER_RANK, epoch=0):
            means.append(grid["one_step"](step).mean().item())  # type: ignore[operator]
    return means


def test_two_ranks_under_torchrun(project: Path) -> None:
    """Both are patched, they draw different noise, and one of them says what was replaced."""
    command = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    script = ("--rng", "philox", "--seed", "3", os.path.join("scripts", "ranks.py"))
    launched = run(project, "-m", *command, *LAUNCH, *script)
    assert launched.returncode == 0, launched.stderr
    module, means = launched.stdout.splitlines()
    assert module.startswith("module densegrpo_fast.compat.")
    assert [float(mean) for mean in means.split()[1:]] == pytest.approx(expected_means(), abs=1e-6)
    assert launched.stderr.count("densegrpo_fast: replaced flow_grpo.diffusers_patch.sd3_sde_with_logprob.") == 1


def test_accelerate_launch(project: Path) -> None:
    pytest.importorskip("accelerate")
    script = os.path.join("scripts", "spawning.py")
    options = ("--cpu", "--num_processes", "1", "--num_machines", "1", "--mixed_precision", "no")
    command = ("accelerate.commands.launch", *options, "--dynamo_backend", "no")
    launched = run(project, "-m", *command, *LAUNCH, "--host", "flow_grpo", script, "none", "--x")
    assert launched.returncode == 0, launched.stderr
    assert launched.stdout.splitlines()[-1] == (
        "0 densegrpo_fast.compat.flow_grpo.step __main__ spawning.py ['none', '--x']"
    )


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_processes_of_the_script_are_patched_like_it(project: Path, method: str) -> None:
    """Also those that they start in turn, from another directory."""
    script = os.path.join("scripts", "spawning.py")
    launched = run(project, *LAUNCH, script, method, "--x")
    # names alone are compared, so the host that is run directly does without torch
    (project / "flow_grpo" / "diffusers_patch" / "sd3_sde_with_logprob.py").write_text(
        "def sde_step_with_logprob():\n    pass\n"
    )
    direct = run(project, script, method, "--x")
    assert direct.returncode == launched.returncode == 0, launched.stderr
    ours, theirs = (output.stdout.splitlines() for output in (launched, direct))
    assert len(ours) == len(theirs) == 3
    for own, other in zip(ours, theirs, strict=True):
        depth, module, *rest = own.split(" ")
        assert module == "densegrpo_fast.compat.flow_grpo.step"
        assert [depth, "flow_grpo.diffusers_patch.sd3_sde_with_logprob", *rest] == other.split(" ")
    assert launched.stderr.count("densegrpo_fast: replaced") == 1


def test_a_step_that_the_script_defines_is_replaced_in_its_children(project: Path) -> None:
    package = project / "fastvideo"
    package.mkdir()
    (package / "__init__.py").touch()
    step = (HOSTS / "dance_script.py").read_text()
    script = SPAWNING.replace("sde_step_with_logprob.__module__", "flux_step.__module__")
    script = script.replace("def flux_step():\n    pass\n", step)
    script = "\n".join(line for line in script.splitlines() if not line.startswith("from flow_grpo"))
    (project / "scripts" / "dance.py").write_text(script)
    launched = run(project, *LAUNCH, "--host", "dance_grpo", os.path.join("scripts", "dance.py"), "spawn")
    assert launched.returncode == 0, launched.stderr
    modules = [line.split(" ")[1] for line in launched.stdout.splitlines()]
    assert modules == ["densegrpo_fast.compat.dance_grpo"] * 3


TRAIN = """
import os, sys
from .scheduler.flow_match_euler_discrete import FlowMatchEulerDiscreteSDEScheduler as Scheduler

if __name__ == "__main__":
    step = Scheduler.step.__module__
    print(os.environ.get("RANK"), step, __name__, __package__, os.path.basename(sys.argv[0]), sys.argv[1:], flush=True)
"""
CLI = """
import subprocess, sys

command = [sys.executable, "-m", "flow_factory.train"]
if sys.argv[1] == "accelerate":
    options = ["--cpu", "--num_processes", "1", "--num_machines", "1", "--machine_rank", "0", "--mixed_precision", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, "--main_process_port", "0"]
    command += ["--dynamo_backend", "no", "-m", "flow_factory.train"]
if sys.argv[1] == "torchrun":  # as accelerate does for several GPUs
    options = ["--standalone", "--nproc-per-node", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", *options, "-m", "flow_factory.train"]

if __name__ == "__main__":
    subprocess.run([*command, *sys.argv[1:]], check=True)
"""


@pytest.fixture
def flow_factory(project: Path) -> Path:
    """A miniature Flow-Factory: its command starts `python -m`, or `accelerate launch -m`, of a module in a child."""
    package = project / "flow_factory"
    (package / "scheduler").mkdir(parents=True)
    for folder in (package, package / "scheduler"):
        (folder / "__init__.py").touch()
    scheduler = (HOSTS / "flow_factory_scheduler.py").read_text()
    (package / "scheduler" / "flow_match_euler_discrete.py").write_text(scheduler)
    (package / "train.py").write_text(TRAIN)
    (package / "cli.py").write_text(CLI)
    return project


FACTORY = (*LAUNCH, "--host", "flow_factory", "-m")
OURS = "densegrpo_fast.compat.flow_factory"


def test_a_module_runs_as_if_run_directly(flow_factory: Path) -> None:
    """With relative imports; the launcher's own words are all that differs."""
    arguments = ("flow_factory.train", "config.yaml", "-m", "--x")
    direct, launched = run(flow_factory, "-m", *arguments), run(flow_factory, *FACTORY, *arguments)
    assert direct.returncode == launched.returncode == 0, launched.stderr
    assert "train.py ['config.yaml', '-m', '--x']" in direct.stdout
    assert launched.stdout.replace(OURS, "flow_factory.scheduler.flow_match_euler_discrete") == direct.stdout
    assert launched.stderr.count("densegrpo_fast: replaced") == 1
    missing = run(flow_factory, *FACTORY, "flow_factory.no")
    assert missing.returncode == 2 and "-m flow_factory.no: no module named flow_factory.no" in missing.stderr


@pytest.mark.parametrize("way", ["python", "accelerate", "torchrun"])
def test_commands_of_a_module_are_patched(flow_factory: Path, way: str) -> None:
    if way == "accelerate":
        pytest.importorskip("accelerate")
    hidden = flow_factory / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text("import builtins\nbuiltins.hidden = True\n")
    (flow_factory / "flow_factory" / "train.py").write_text(f"assert hidden\n{TRAIN}")
    path = os.pathsep.join([str(ROOT), str(flow_factory), str(hidden)])
    launched = run(flow_factory, *FACTORY, "flow_factory.cli", way, PYTHONPATH=path)
    assert launched.returncode == 0, launched.stderr
    ranks = ["0", "1"] if way == "torchrun" else ["None"]
    rest = f"{OURS} __main__ flow_factory train.py ['{way}']"
    assert sorted(launched.stdout.splitlines()) == [f"{rank} {rest}" for rank in ranks]
    assert launched.stderr.count("densegrpo_fast: replaced flow_factory.scheduler") == 1


def test_a_command_with_a_changed_host_stops(flow_factory: Path) -> None:
    path = flow_factory / "flow_factory" / "scheduler" / "flow_match_euler_discrete.py"
    path.write_text(path.read_text().replace("0.5 * std**2 * dt", "0.5 * std * dt"))
    launched = run(flow_factory, *FACTORY, "flow_factory.cli", "python")
    assert launched.returncode == 1 and launched.stdout == ""
    (line,) = [line for line in launched.stderr.splitlines() if line.startswith("densegrpo_fast: error:")]
    assert "It was changed in this copy of the host" in line


def test_spawned_processes_of_a_module_are_patched_like_it(project: Path) -> None:
    """Those of a module that defines the step itself, too."""
    package = project / "fastvideo"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "helper.py").write_text("import multiprocessing, os, sys\n")
    script = SPAWNING.replace("sde_step_with_logprob.__module__", "flux_step.__module__")
    script = script.replace("def flux_step():\n    pass\n", (HOSTS / "dance_script.py").read_text())
    script = script.replace("import multiprocessing, os, sys", "from .helper import multiprocessing, os, sys")
    script = "\n".join(line for line in script.splitlines() if not line.startswith("from flow_grpo"))
    (package / "train.py").write_text(script)
    launched = run(project, *LAUNCH, "--host", "dance_grpo", "-m", "fastvideo.train", "spawn")
    assert launched.returncode == 0, launched.stderr
    modules = [line.split(" ")[1] for line in launched.stdout.splitlines()]
    assert modules == ["densegrpo_fast.compat.dance_grpo"] * 3


def test_a_host_that_cannot_be_patched_stops_the_child(project: Path) -> None:
    changed = 'os.environ["DENSEGRPO_FAST_LAUNCHED"].replace("flow_grpo", "flow_factory")'
    before = f'    os.environ["DENSEGRPO_FAST_LAUNCHED"] = {changed}\n    report(0, sys.argv[1])\n'
    script = SPAWNING.replace("    report(0, sys.argv[1])\n", before)
    (project / "scripts" / "spawning.py").write_text(script)
    launched = run(project, *LAUNCH, os.path.join("scripts", "spawning.py"), "spawn")
    assert launched.returncode == 1 and len(launched.stdout.splitlines()) == 1
    assert "the package flow_factory cannot be imported here" in launched.stderr
