"""The environment doctor: each finding against made-up machines, and the whole command on this one."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from densegrpo_fast.doctor import __main__ as doctor
from densegrpo_fast.doctor import environment, implementations, machine, packages
from densegrpo_fast.doctor.findings import Finding, healthy, text
from densegrpo_fast.flow import native

ROOT = Path(__file__).resolve().parents[2]


def by_name(findings: object) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}  # type: ignore[attr-defined]


STATED = [
    "torch<2.14,>=2.6",
    'diffusers<1,>=0.42; extra == "train"',
    'numpy; extra == "train"',
    "peft >=0.18 ; extra == 'train'",
    'wandb; extra == "log"',
    'densegrpo-fast[train]; extra == "test"',
    'triton<3.8,>=3.6; platform_system == "Linux" and extra == "test"',
    'types-PyYAML; extra == "test"',
]
"""As different versions of setuptools write it into the metadata."""


def test_supported_versions_are_those_that_the_metadata_states(monkeypatch: pytest.MonkeyPatch) -> None:
    train = 'pip install "densegrpo-fast[train]"'
    assert packages.requirements(STATED) == [
        ("torch", ">=2.6,<2.14", "pip install 'torch>=2.6,<2.14'"),
        ("diffusers", ">=0.42,<1", train),
        ("numpy", "", train),
        ("peft", ">=0.18", train),
        ("triton", ">=3.6,<3.8", ""),
    ]
    monkeypatch.setattr(packages.importlib.metadata, "requires", lambda name: STATED)
    monkeypatch.setattr(packages, "installed_version", lambda name: None)
    found = by_name(packages.package_findings())
    assert [*found] == ["python", "torch", "diffusers", "numpy", "peft", "triton"]


def test_every_requirement_of_training_is_understood() -> None:
    if sys.version_info < (3, 11):
        pytest.skip("tomllib came with Python 3.11")
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    stated = [f"{line}; extra == 'train'" for line in extras["train"]]
    stated += [f"{line}{' and ' if ';' in line else '; '}extra == 'test'" for line in extras["test"]]
    found = packages.requirements(project["dependencies"] + stated)
    written = {requirement.name + requirement.wanted for requirement in found}
    assert {*project["dependencies"], *extras["train"]} <= written
    assert {requirement.name for requirement in found} >= {*packages.OPTIONAL}


def test_a_checkout_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(packages.importlib.metadata, "requires", absent)
    found = by_name(packages.package_findings())
    assert (found["densegrpo-fast"].status, "torch" in found) == ("warn", False)


@pytest.mark.parametrize(
    ("version", "wanted", "expected"),
    [
        ("2.13.0+cpu", ">=2.6,<2.14", True),
        ("2.14.0", ">=2.6,<2.14", False),
        ("2.14", "<2.14.0", False),
        ("2.14.0a0+git1", "<2.14", False),
        ("2.5.1", ">=2.6", False),
        ("5", ">=5,<6", True),
        ("10.1", ">=9.9", True),
        ("0.1", "", True),
    ],
)
def test_versions_are_compared_by_number(version: str, wanted: str, expected: bool) -> None:
    assert packages.satisfies(version, wanted) is expected


def test_other_conditions_are_refused() -> None:
    with pytest.raises(ValueError, match="got '~=2.6'"):
        packages.satisfies("2.6", "~=2.6")


def test_package_verdicts() -> None:
    stated = {requirement.name: requirement for requirement in packages.requirements(STATED)}

    def status(name: str, found: str | None) -> tuple[str, str]:
        finding = packages.version_finding(stated[name], found)
        return finding.status, finding.advice

    assert status("torch", "2.7") == ("ok", "")
    assert status("torch", "2.5") == ("warn", "pip install 'torch>=2.6,<2.14'")
    assert status("torch", None) == ("problem", "pip install 'torch>=2.6,<2.14'")
    assert status("peft", None) == ("problem", 'pip install "densegrpo-fast[train]"')
    assert status("triton", None) == ("ok", "")


def test_whole_weights_have_no_fault(pipeline_directory: Path) -> None:
    assert packages.weight_faults(pipeline_directory) == []


def test_broken_weights_are_named(pipeline_directory: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(pipeline_directory, tmp_path / "pipeline")
    weights = broken / "transformer" / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    name = "transformer/diffusion_pytorch_model.safetensors"
    for content, fault in (
        (whole[:-1], f"{name} has {len(whole) - 1} bytes, expected {len(whole)}"),
        (whole + b"x", f"{name} has {len(whole) + 1} bytes, expected {len(whole)}"),
        (whole[:100], f"{name} is no safetensors file"),
        (b"", f"{name} is no safetensors file"),
        (whole[:8] + b"[" + whole[9:], f"{name} has a damaged header"),
        (b"version https://git-lfs.github.com/spec/v1\n", f"{name} is a git LFS pointer"),
    ):
        weights.write_bytes(content)
        assert packages.weight_faults(broken) == [fault]
    (finding,) = [f for f in packages.data_findings(str, ["a"], {"embedded": broken}) if f.status == "problem"]
    assert finding.advice == "git lfs pull"
    weights.unlink()
    assert packages.weight_faults(broken) == ["transformer has no weights"]
    shutil.rmtree(broken / "vae")
    assert packages.weight_faults(broken) == ["vae is missing", "transformer has no weights"]
    (broken / "model_index.json").unlink()
    (fault,) = packages.weight_faults(broken)
    assert fault.startswith("model_index.json")


def test_a_broken_preset_is_named(pipeline_directory: Path) -> None:
    def load(name: str) -> None:
        if name == "bad":
            raise ValueError("seed: expected a number")

    found = by_name(packages.data_findings(load, ["good", "bad"], {"embedded": pipeline_directory}))["presets"]
    assert (found.status, found.value) == ("problem", "bad: seed: expected a number")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, None),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu.max": "250000 100000\n"}, 2.5),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 0.5),
        ({"cpu.max": "nonsense"}, None),
    ],
)
def test_the_container_s_quota(tmp_path: Path, files: dict[str, str], expected: float | None) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert machine.cpu_quota(tmp_path) == expected
    assert machine.usable_cores(tmp_path) == min(machine.usable_cores(tmp_path / "none"), expected or float("inf"))


def test_thread_verdicts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    found = by_name(machine.thread_findings("ACTIVE", 4.0, 8, 9.0))
    assert found["OMP_WAIT_POLICY"].status == "warn" and "PASSIVE" in found["OMP_WAIT_POLICY"].advice
    assert found["torch threads"].advice == "more than there are cores: set OMP_NUM_THREADS=4"
    assert found["torch threads"].value == "8 (OMP_NUM_THREADS 8)"
    assert found["load average"].status == "warn"
    monkeypatch.delenv("OMP_NUM_THREADS")
    found = by_name(machine.thread_findings(None, 4.0, 1, 0.1))
    assert found["torch threads"].advice == "one of 4 cores is used: set OMP_NUM_THREADS=4"
    assert found["OMP_WAIT_POLICY"].status == found["load average"].status == "ok"
    # half a core cannot do with less than one thread
    found = by_name(machine.thread_findings("passive", 0.5, 1, None))
    assert {finding.status for finding in found.values()} == {"ok"}


def test_a_gpu_that_pytorch_cannot_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "_GPU_SIGNS", (tmp_path,))
    (found,) = machine.gpu_findings((8, 0))
    assert found.status == "warn" and "install a PyTorch with CUDA" in found.advice
    monkeypatch.setattr(machine, "_GPU_SIGNS", (tmp_path / "none",))
    (found,) = machine.gpu_findings((8, 0))
    assert found.status == "ok"


def test_missing_compilers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CXX", "CC", "CUDA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = by_name(machine.compiler_findings(triton_serves=True))
    assert (found["C++"].status, found["C (for Triton)"].status, found["CUDA"].status) == ("warn", "problem", "ok")
    for name in ("g++", "gcc", "nvcc"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    found = by_name(machine.compiler_findings(triton_serves=True))
    assert {finding.status for finding in found.values()} == {"ok"}
    assert found["CUDA"].value == str(tmp_path / "nvcc")
    assert "C (for Triton)" not in by_name(machine.compiler_findings(triton_serves=False))


def test_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def with_free(free: float) -> Finding:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1e12, 1e12 - free, free))
        return machine.disk_finding(tmp_path / "runs" / "mine")

    assert with_free(5e10).status == "ok"
    assert with_free(5e8).status == "warn"
    assert with_free(5e7).status == "problem"
    (tmp_path / "file").write_text("")
    found = machine.disk_finding(tmp_path / "file" / "runs")
    assert (found.status, found.value) == ("problem", f"{tmp_path / 'file'} is no directory")


def test_the_implementation_in_use_and_why_no_faster_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("DENSEGRPO_IMPLEMENTATION", raising=False)
    monkeypatch.setattr(native, "_load", lambda: (None, "it was not built"))
    found = by_name(implementations.op_findings())
    assert found["sde_step"].value == "reference on cpu (cpu: it was not built)"
    assert found["grpo_loss"].value == "reference on cpu (cpu: it was not built)"
    assert (found["compiled CPU library"].status, found["compiled CPU library"].value) == ("warn", "it was not built")

    monkeypatch.setenv("DENSEGRPO_IMPLEMENTATION", "cpu")
    found = by_name(implementations.op_findings())
    assert found["sde_step"].status == "problem"
    assert found["sde_step"].advice == "unset DENSEGRPO_IMPLEMENTATION, which asks for cpu"
    monkeypatch.setenv("DENSEGRPO_IMPLEMENTATION", "reference")
    assert by_name(implementations.op_findings())["sde_step"].value.endswith("(DENSEGRPO_IMPLEMENTATION=reference)")
    monkeypatch.setenv("DENSEGRPO_IMPLEMENTATION", "fastest")
    (found_one,) = implementations.op_findings()
    assert (found_one.status, found_one.value) == ("problem", "fastest")


def test_switched_off_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = torch.backends.cuda.flash_sdp_enabled()
    try:
        torch.backends.cuda.enable_flash_sdp(False)
        assert by_name(implementations.attention_findings())["in use"].status == "warn"
        torch.backends.cuda.enable_flash_sdp(True)
        assert "flash" in by_name(implementations.attention_findings())["in use"].value
    finally:
        torch.backends.cuda.enable_flash_sdp(before)


def test_the_table() -> None:
    findings = [
        Finding("first", "short", "ok", "1"),
        Finding("first", "longer name", "warn", "2", "do this"),
        Finding("second", "last", "problem", "3", "do that"),
    ]
    assert text(findings).splitlines() == [
        "first",
        "  ok      short        1",
        "  warn    longer name  2",
        "                       -> do this",
        "",
        "second",
        "  problem last         3",
        "                       -> do that",
        "",
        "1 problem, 1 warn",
    ]
    assert text(findings[:1]).endswith("all is well")
    assert healthy(findings[:2]) and not healthy(findings)
    with pytest.raises(ValueError, match="advice"):
        Finding("group", "name", "warn", "value")


def test_the_command_on_this_machine(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = doctor.main(["--json", str(tmp_path / "found.json"), f"--run.output_dir={tmp_path / 'mine'}"])
    written = json.loads((tmp_path / "found.json").read_text())
    names = {finding["name"]: finding for finding in written["findings"]}
    assert {"python", "torch", "sde_step", "C++", "torch threads", "run directory", "presets"} <= names.keys()
    assert names["torch"]["value"] == importlib.metadata.version("torch")
    assert names["run directory"]["value"].endswith(f"free for {tmp_path / 'mine'}")
    assert names["embedded model"]["status"] == "ok"
    problems = [finding for finding in written["findings"] if finding["status"] == "problem"]
    assert status == (1 if problems else 0)
    assert written["healthy"] is not bool(problems)
    assert "run directory" in capsys.readouterr().out


def test_without_the_configuration_s_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(arguments: object) -> list[Finding]:
        raise ModuleNotFoundError("No module named 'pydantic'", name="pydantic")

    monkeypatch.setattr(environment, "_configured", missing)
    monkeypatch.chdir(tmp_path)
    assert by_name(environment.examine([], None))["run directory"].value.endswith("free for runs")
    monkeypatch.setattr(packages, "installed_version", lambda name: None)
    found = by_name(environment.examine([], None))
    assert found["torch"].status == "problem" and "sde_step" not in found


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        doctor.main(arguments)
    assert isinstance(stop.value.code, int)
    return stop.value.code, capsys.readouterr().err


def test_bad_options(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, code, message in (
        (["--dry-run"], 2, "--dry-run is an option of --ratio"),
        (["--tolerance", "1e-3"], 2, "--tolerance is an option of --ratio"),
        (["--ratio", "--tolerance", "0"], 2, "expected a positive number, got '0'"),
        (["--ratio", "--resume"], 2, "--resume is an option of training"),
        (["--ratio", "--sampler.num_step", "4"], 2, 'did you mean "sampler.num_steps"?'),
        (["--config", "embeded_dense"], 2, "embeded_dense"),
        (["--json", str(tmp_path / "no" / "found.json")], 7, f"--json: there is no directory {tmp_path / 'no'}"),
        (["--ratio", "--model.path", str(tmp_path)], 3, "has no model_index.json"),
    ):
        status, err = refused(arguments, capsys)
        assert (status, message in err) == (code, True), (arguments, err)


def test_help_needs_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from densegrpo_fast.doctor.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "assert not {'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--ratio" in done.stdout
