"""Build: package list, mapping of kernels/, compiled CPU and CUDA libraries. Metadata is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

NATIVE, CUDA = "densegrpo_fast._native", "densegrpo_fast._native_cuda"

# No contraction and no -march: every machine and every variant computes the same bits.
CPU_FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-pthread"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-Wno-uninitialized"),
]
# -v reports registers and spills.
CUDA_FLAGS = ["-std=c++17", "-O3", "-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xptxas", "-v"]
# Those of them that nvcc knows, and the last one's PTX besides, which GPUs to come compile when it is first used.
CUDA_CAPABILITIES = (80, 86, 89, 90, 100, 120)


class BuildNative(build_ext):
    """Compile csrc/ into plain shared objects: no Python or torch headers, so no ABI but C."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the file after the platform alone, since it does not depend on the Python version."""
        *folders, stem = fullname.split(".")
        if stem not in ("_native", "_native_cuda"):
            return super().get_ext_filename(fullname)
        return str(Path(*folders, f"{stem}.{sys.platform}-{platform.machine()}.so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None to add: there is no Python module initialiser."""
        return ext.export_symbols

    def build_extension(self, ext: Extension) -> None:
        """Compile, or go on without: every op also has a PyTorch implementation."""
        try:
            if ext.name == CUDA:
                output = Path(self.get_ext_fullpath(ext.name))
                output.parent.mkdir(parents=True, exist_ok=True)
                nvcc = find_nvcc() or "nvcc"
                self.spawn([nvcc, *CUDA_FLAGS, *cuda_targets(nvcc), "-o", str(output), *ext.sources])
            else:
                super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError) as error:
            library, compiler = ("CUDA", "CUDA compiler") if ext.name == CUDA else ("CPU", "C++ compiler")
            print(
                f"note: the compiled {library} library was not built ({error}); PyTorch will serve instead. "
                f"Install a {compiler} and run pip install again to get it.",
                file=sys.stderr,
            )


class PlatformWheel(bdist_wheel):
    """Tag the wheel for any Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """(python, abi, platform) part of the file name."""
        return "py3", "none", super().get_tag()[2]


def find_nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, on the path, or of the package nvidia-cuda-nvcc; None if there is none."""
    packages = [str(Path(folder, "nvidia", "cu13", "bin")) for folder in sys.path]
    homes = [str(Path(os.environ["CUDA_HOME"], "bin"))] if "CUDA_HOME" in os.environ else []
    return shutil.which("nvcc", path=os.pathsep.join([*homes, os.environ.get("PATH", ""), *packages]))


def cuda_targets(nvcc: str) -> list[str]:
    """Options of nvcc for the GPUs that it can compile for; none without it, where compiling says what is wrong."""
    try:
        listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    except (OSError, subprocess.CalledProcessError):
        return []
    known = [number for number in CUDA_CAPABILITIES if f"sm_{number}" in listed]
    pairs = [f"arch=compute_{number},code=sm_{number}" for number in known]
    pairs += [f"arch=compute_{known[-1]},code=compute_{known[-1]}"] if known else []
    return [option for pair in pairs for option in ("-gencode", pair)]


def wants_cuda() -> bool:
    """What DENSEGRPO_CUDA says (1 or 0); unset, whether nvcc and a PyTorch with CUDA are here."""
    asked = os.environ.get("DENSEGRPO_CUDA", "")
    if asked in ("0", "1"):
        return asked == "1"
    if find_nvcc() is None:
        return False
    try:
        from torch.version import cuda
    except ImportError:
        return False
    return cuda is not None


def native_extensions() -> list[Extension]:
    """The CPU library, and the CUDA library where it is wanted; none if DENSEGRPO_NO_NATIVE=1."""
    if os.environ.get("DENSEGRPO_NO_NATIVE") == "1" or sys.platform == "win32":
        return []

    def sources(*patterns: str) -> list[str]:
        return sorted(str(path) for pattern in patterns for path in Path("csrc").glob(pattern))

    cpu = Extension(
        NATIVE,
        sources=sources("*.cpp"),
        depends=sources("*.h"),
        language="c++",
        extra_compile_args=CPU_FLAGS,
        extra_link_args=["-pthread"],
        optional=True,
    )
    cuda = Extension(CUDA, sources=sources("*.cu"), depends=sources("*.h", "*.cuh"), optional=True)
    return [cpu, cuda] if wants_cuda() else [cpu]


setup(
    packages=[*find_packages(include=["densegrpo_fast", "densegrpo_fast.*"]), "densegrpo_fast.kernels"],
    # kernels/ at the top level has no __init__.py and ships inside the package; see kernels/README.md.
    package_dir={"densegrpo_fast.kernels": "kernels"},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
