from __future__ import annotations

import ast
import ctypes
import importlib
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from densegrpo_fast.flow.native import ABI_VERSION

pytestmark = pytest.mark.ci

ROOT = Path(__file__).resolve().parents[2]
HAS_COMPILER = any(shutil.which(name) for name in ("c++", "g++", "clang++"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution; it has no symlink, so no wheel depends on that of kernels/."""
    folder = tmp_path_factory.mktemp("sdist")
    ignored = shutil.ignore_patterns(".*", "__pycache__", "*.so", "*.egg-info", "build", "runs", "shared")
    shutil.copytree(ROOT, folder / "checkout", ignore=ignored, symlinks=True)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=folder / "checkout", capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder / "unpacked", filter="data")
    (unpacked,) = (folder / "unpacked").iterdir()
    return unpacked


def build_wheel(source: Path, folder: Path, **environment: str) -> tuple[Path, str]:
    """Build a wheel; return it and the build output."""
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-build-isolation", "--no-deps"]
    result = subprocess.run(
        [*command, "--wheel-dir", str(folder), str(source)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return next(folder.glob("*.whl")), result.stdout + result.stderr


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))[0]


def contents(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    outside = [
        name
        for name in contents(wheel)
        if not name.startswith("densegrpo_fast/") and not name.split("/")[0].endswith(".dist-info")
    ]
    assert not outside
    assert wheel.name.startswith("densegrpo_fast-")
    assert "-py3-none-" in wheel.name


def test_the_wheel_holds_every_source_file(wheel: Path) -> None:
    expected = {
        f"densegrpo_fast/{path.relative_to(ROOT / 'densegrpo_fast').as_posix()}"
        for pattern in ("*.py", "py.typed", "*.yaml", "templates/*")
        for path in (ROOT / "densegrpo_fast").rglob(pattern)
        if "kernels" not in path.parts[len(ROOT.parts) :]
    }
    expected |= {f"densegrpo_fast/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert expected <= set(contents(wheel))


def test_the_wheel_holds_the_embedded_weights(wheel: Path) -> None:
    weights = ROOT / "densegrpo_fast" / "embedded" / "weights"
    expected = {
        f"densegrpo_fast/embedded/weights/{path.relative_to(weights).as_posix()}"
        for path in weights.rglob("*")
        if path.is_file()
    }
    assert expected <= set(contents(wheel))


@pytest.mark.skipif(not HAS_COMPILER, reason="no C++ compiler")
def test_the_wheel_holds_a_library_that_loads(wheel: Path, tmp_path: Path) -> None:
    (library,) = [name for name in contents(wheel) if name.startswith("densegrpo_fast/_native.")]
    with zipfile.ZipFile(wheel) as archive:
        path = archive.extract(library, tmp_path)
    assert ctypes.CDLL(path).densegrpo_abi_version() == ABI_VERSION


def test_the_core_needs_torch_alone(wheel: Path) -> None:
    (metadata,) = [name for name in contents(wheel) if name.endswith(".dist-info/METADATA")]
    with zipfile.ZipFile(wheel) as archive:
        lines = archive.read(metadata).decode().splitlines()
    required = [line for line in lines if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert len(required) == 1
    assert required[0].startswith("Requires-Dist: torch")


def test_the_install_succeeds_without_a_compiler(source: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / "build", ignore_errors=True)
    built, output = build_wheel(source, tmp_path, CC="/nonexistent/cc", CXX="/nonexistent/c++")
    assert not [name for name in contents(built) if name.endswith(".so")]
    assert "the compiled CPU library was not built" in output


def test_the_source_distribution_can_test_itself(source: Path) -> None:
    for name in ("csrc", "kernels", "tests", "benches", "docs"):
        ours = {path.relative_to(ROOT) for path in (ROOT / name).rglob("*.py")}
        assert ours <= {path.relative_to(source) for path in source.rglob("*.py")}


def test_an_installed_wheel_has_one_command(wheel: Path, tmp_path: Path) -> None:
    """It tells of its commands without any other package."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", str(tmp_path)]
    subprocess.run([*install, str(wheel)], check=True, timeout=120)
    code = (
        "import sys; from importlib.metadata import entry_points\n"
        "(entry,) = entry_points(group='console_scripts', name='densegrpo')\n"
        "status = entry.load()(['--help'])\n"
        "assert not {'torch', 'pydantic', 'argparse'} & set(sys.modules)\n"
        "sys.exit(status)"
    )
    # -S: without site-packages
    result = subprocess.run(
        [sys.executable, "-S", "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 0, result.stderr
    assert "densegrpo COMMAND" in result.stdout and "evaluate" in result.stdout


def test_kernels_is_not_a_regular_package() -> None:
    # With an __init__.py it would shadow Hugging Face's `kernels` from the repository root.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_the_symlink_points_at_kernels() -> None:
    link = ROOT / "densegrpo_fast" / "kernels"
    assert os.readlink(link) == "../kernels"
    assert link.resolve() == ROOT / "kernels"


def test_importing_the_package_imports_nothing_heavy() -> None:
    code = (
        "import sys, os; os.environ.pop('OMP_WAIT_POLICY', None); import densegrpo_fast as d; "
        "assert not {'torch', 'numpy', 'pydantic', 'yaml'} & set(sys.modules), 'heavy import'; "
        "assert os.environ['OMP_WAIT_POLICY'] == 'PASSIVE'; print(d.__version__)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip()


def test_public_names_resolve() -> None:
    import densegrpo_fast

    tree = ast.parse(Path(densegrpo_fast.__file__).read_text())
    (typed,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [(node.module, alias) for node in typed.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    for module, alias in imports:
        assert getattr(importlib.import_module(str(module)), alias.name) is getattr(densegrpo_fast, str(alias.asname))
    assert {"__version__", *(alias.asname for _, alias in imports)} == set(densegrpo_fast.__all__)
    with pytest.raises(AttributeError, match="no attribute 'missing'"):
        _ = densegrpo_fast.missing
