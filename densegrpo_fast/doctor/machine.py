"""Findings about the machine: GPUs, cores and threads, compilers, disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from densegrpo_fast.doctor.findings import Finding, Status

ROOMY, SCARCE = 1e9, 1e8
"""Free bytes below which a run directory's disk is worth a warning, and a problem."""

_GPU_SIGNS = (Path("/dev/nvidiactl"), Path("/dev/nvidia0"), Path("/dev/dxg"))


def gpu_findings(minimum: tuple[int, int]) -> Iterator[Finding]:
    """Every GPU that PyTorch sees, or why there is none.

    Args:
        minimum: oldest compute capability that the kernels are made for.
    """
    import torch

    group = "GPU"
    if not torch.cuda.is_available():
        if any(path.exists() for path in _GPU_SIGNS):
            build = (
                f"PyTorch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "PyTorch is a CPU build"
            )
            yield Finding(
                group,
                "GPU",
                "warn",
                f"there is one, but PyTorch cannot use it ({build})",
                "install a PyTorch with CUDA that the driver supports (pytorch.org/get-started)",
            )
        else:
            yield Finding(group, "GPU", "ok", "none; everything runs on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = (properties.major, properties.minor)
        value = (
            f"{properties.name}, capability {'.'.join(map(str, capability))}, {properties.total_memory / 2**30:.0f} GiB"
        )
        if capability < minimum:
            needed = ".".join(map(str, minimum))
            advice = f"kernels need capability {needed}; PyTorch's own operations serve instead, slower"
            yield Finding(group, f"cuda:{index}", "warn", value, advice)
        else:
            yield Finding(group, f"cuda:{index}", "ok", value)


def thread_findings(wait_policy: str | None, cores: float, threads: int, load: float | None) -> Iterator[Finding]:
    """Thread settings against the cores that this process may use.

    Args:
        wait_policy: OMP_WAIT_POLICY as the user has it; None = unset.
        cores: as from `usable_cores`.
        threads: of PyTorch.
        load: load average of the last minute; None = unknown.
    """
    group = "threads"
    yield Finding(group, "cores", "ok", f"{cores:g} usable")
    if wait_policy is None:
        yield Finding(group, "OMP_WAIT_POLICY", "ok", "unset; the commands of this package set PASSIVE")
    elif wait_policy.upper() == "PASSIVE":
        yield Finding(group, "OMP_WAIT_POLICY", "ok", wait_policy)
    else:
        advice = "set it to PASSIVE: threads that wait busily on shared cores can slow a forward down many times"
        yield Finding(group, "OMP_WAIT_POLICY", "warn", wait_policy, advice)
    asked = os.environ.get("OMP_NUM_THREADS")
    value = f"{threads} (OMP_NUM_THREADS {'unset' if asked is None else asked})"
    whole = max(1, int(cores))
    if threads > max(1.0, cores):
        yield Finding(group, "torch threads", "warn", value, f"more than there are cores: set OMP_NUM_THREADS={whole}")
    elif threads == 1 and whole >= 4:
        yield Finding(
            group, "torch threads", "warn", value, f"one of {whole} cores is used: set OMP_NUM_THREADS={whole}"
        )
    else:
        yield Finding(group, "torch threads", "ok", value)
    if load is not None and load > cores + 0.5:
        yield Finding(group, "load average", "warn", f"{load:.1f}", "other work runs here: expect slow, uneven timings")
    elif load is not None:
        yield Finding(group, "load average", "ok", f"{load:.1f}")


def usable_cores(cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores that this process may keep busy: its affinity, within the container's CPU quota."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    quota = cpu_quota(cgroup)
    return cores if quota is None else min(cores, quota)


def cpu_quota(cgroup: Path) -> float | None:
    """The container's CPU quota in cores, from control groups of version 2 or 1; None = no limit."""
    for quota_file, period_file in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (cgroup / quota_file).read_text(encoding="ascii").split()
            if period_file is not None:
                words += (cgroup / period_file).read_text(encoding="ascii").split()
            quota, period = words
            # "max" and -1 mean no limit
            return int(quota) / int(period) if quota != "max" and int(quota) > 0 else None
        except (OSError, ValueError, ZeroDivisionError):
            continue
    return None


def compiler_findings(triton_serves: bool) -> Iterator[Finding]:
    """The compilers that installation and Triton look for.

    Args:
        triton_serves: whether Triton kernels would be compiled here.
    """
    group = "compilers"

    def compiler(name: str, variable: str, known: Sequence[str], status: Status, advice: str) -> Finding:
        own = os.environ.get(variable, "").split()[:1]
        found = next((path for path in map(shutil.which, [*own, *known]) if path), None)
        return Finding(group, name, "ok", found) if found else Finding(group, name, status, "none found", advice)

    advice = "without one, installing leaves out the compiled CPU library; install g++ or clang++"
    yield compiler("C++", "CXX", ("c++", "g++", "clang++"), "warn", advice)
    if triton_serves:
        # Triton compiles a small launcher for every kernel when it is first used
        advice = "Triton needs one when a kernel first runs: install gcc, or set DENSEGRPO_IMPLEMENTATION=reference"
        yield compiler("C (for Triton)", "CC", ("clang", "gcc", "cc"), "problem", advice)
    home = os.environ.get("CUDA_HOME")
    nvcc = (home and shutil.which("nvcc", path=str(Path(home, "bin")))) or shutil.which("nvcc")
    yield Finding(group, "CUDA", "ok", nvcc or "no nvcc; it only builds the CUDA library, which Triton replaces")


def disk_finding(directory: Path) -> Finding:
    """Whether the run directory can be written, and how much room its disk has."""
    existing = directory.absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    group, name = "disk", "run directory"
    if not existing.is_dir():
        return Finding(group, name, "problem", f"{existing} is no directory", "choose another with --run.output_dir")
    if not os.access(existing, os.W_OK | os.X_OK):
        return Finding(group, name, "problem", f"{existing} cannot be written", "choose another with --run.output_dir")
    free = shutil.disk_usage(existing).free
    value = f"{free / 1e9:.1f} GB free for {directory}"
    if free < ROOMY:
        advice = "checkpoints may not fit; make room, or choose another disk with --run.output_dir"
        return Finding(group, name, "problem" if free < SCARCE else "warn", value, advice)
    return Finding(group, name, "ok", value)
