"""Build: package list, mapping of kernels/, compiled CPU library. Metadata is in pyproject.toml."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError, PlatformError

NATIVE = "densegrpo_fast._native"


class BuildNative(build_ext):
    """Compile csrc/ into a plain shared object: no Python or torch headers, so no ABI but C."""

    def get_ext_filename(self, fullname: str) -> str:
        """Name the file after the platform alone, since it does not depend on the Python version."""
        if not fullname.endswith("_native"):
            return super().get_ext_filename(fullname)
        return str(Path(*fullname.split(".")[:-1], f"_native.{sys.platform}-{platform.machine()}.so"))

    def get_export_symbols(self, ext: Extension) -> list[str]:
        """None to add: there is no Python module initialiser."""
        return ext.export_symbols

    def build_extension(self, ext: Extension) -> None:
        """Compile, or go on without: every op also has a PyTorch implementation."""
        try:
            super().build_extension(ext)
        except (CCompilerError, ExecError, PlatformError) as error:
            print(
                f"note: the compiled CPU library was not built ({error}); PyTorch will serve instead. "
                "Install a C++ compiler and run pip install again to get it.",
                file=sys.stderr,
            )


class PlatformWheel(bdist_wheel):
    """Tag the wheel for any Python 3 on this platform."""

    def get_tag(self) -> tuple[str, str, str]:
        """(python, abi, platform) part of the file name."""
        return "py3", "none", super().get_tag()[2]


def native_extensions() -> list[Extension]:
    """The CPU library, unless DENSEGRPO_NO_NATIVE=1."""
    if os.environ.get("DENSEGRPO_NO_NATIVE") == "1" or sys.platform == "win32":
        return []
    return [
        Extension(
            NATIVE,
            sources=sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.h")),
            language="c++",
            # No contraction and no -march: every machine and every clone computes the same bits.
            extra_compile_args=[
                *("-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-pthread"),
                *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]


setup(
    packages=[*find_packages(include=["densegrpo_fast", "densegrpo_fast.*"]), "densegrpo_fast.kernels"],
    # kernels/ at the top level has no __init__.py and ships inside the package; see kernels/README.md.
    package_dir={"densegrpo_fast.kernels": "kernels"},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
)
