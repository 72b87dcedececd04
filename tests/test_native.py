from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from densegrpo_fast.flow import native
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.flow.ops import sde_step
from densegrpo_fast.flow.schedule import sd3_sigmas

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not())


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in which the library is looked for."""
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    native._load.cache_clear()
    yield tmp_path
    native._load.cache_clear()


@needs_native
@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected) -> None:
    assert native.philox4x32(counter, key) == expected


def test_a_missing_library_is_reported_not_raised(package: Path) -> None:
    assert not native.available()
    assert "was not built" in native.why_not()


def test_without_the_library_the_reference_serves_and_cpu_is_an_error(package: Path) -> None:
    table = coefficients(sd3_sigmas(4), 0.7, "flow_sde").table
    latents = torch.randn(2, 8)
    options = {"seed": 0, "sample_index": torch.arange(2), "epoch": 0}
    served = sde_step(latents, latents, table, 1, **options)
    expected = sde_step(latents, latents, table, 1, implementation="reference", **options)
    assert torch.equal(served[0], expected[0])
    with pytest.raises(RuntimeError, match="sde_step: implementation 'cpu' cannot serve this call: .* not built"):
        sde_step(latents, latents, table, 1, implementation="cpu", **options)
    with pytest.raises(RuntimeError, match="not available"):
        native.philox4x32((0, 0, 0, 0), (0, 0))


def test_a_broken_library_is_named(package: Path) -> None:
    (package / "_native.broken.so").write_bytes(b"not a library")
    assert not native.available()
    assert "_native.broken.so cannot be loaded" in native.why_not()


@needs_native
def test_a_library_of_another_interface_is_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = next((Path(native.__file__).parents[1]).glob("_native*.so"))
    shutil.copy(built, package)
    assert native.available()
    native._load.cache_clear()
    monkeypatch.setattr(native, "ABI_VERSION", 99)
    assert "has interface 1, expected 99" in native.why_not()
