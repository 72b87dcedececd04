from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from densegrpo_fast.flow import native, native_probe, shared_library
from densegrpo_fast.flow.dynamics import C, coefficients
from densegrpo_fast.flow.noise import gaussian
from densegrpo_fast.flow.ops import sde_step
from densegrpo_fast.flow.schedule import sd3_sigmas

needs_native = pytest.mark.skipif(not native.available(), reason=native.why_not())
VARIANTS = native.variants() if native.available() else ("portable",)

TABLE = coefficients(sd3_sigmas(10), [0.7, 0.7, 0.0, 0.5, 0.7, 0.7, 0.9, 0.0, 0.7, 0.7], "flow_sde").table
BARE_NOISE = torch.tensor([[0.0, 0.0, 1.0, 1.0, 0.5, 0.0]])
"""A = B = 0 and C = 1: with these the step is the noise."""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder in which the library is looked for."""
    monkeypatch.setattr(shared_library, "PACKAGE", tmp_path)
    native._load.cache_clear()
    yield tmp_path
    native._load.cache_clear()


def everything(*shape: int) -> list[Tensor]:
    """The results of all ops on one batch that mixes stochastic and noise-free rows."""
    generator = torch.Generator().manual_seed(5)
    latents, velocity, uncond, reference, other, upstream = torch.randn(6, 5, *shape, generator=generator)
    steps, samples = torch.tensor([0, 2, 9, 4, 7]), torch.tensor([3, 0, 70000, 2**32 - 1, 9])
    seed, iteration = torch.tensor([(7 << 33) + 1]), torch.tensor([6])
    scale = torch.tensor([1.0, 4.5, 0.0, 7.0, 3.3])
    grad = upstream.flatten(1)[:, 0]
    results = [native.euler_jump(latents, velocity, torch.rand(5, generator=generator), torch.zeros(5))]
    for guidance in ((None, None), (uncond, scale)):
        words = (TABLE, steps, seed, samples, iteration, 1)
        for input_dtype, with_mean in ((None, False), (torch.float16, True), (torch.bfloat16, False)):
            step = native.sde_step(latents, velocity, *guidance, *words, input_dtype, with_mean)
            results += step
        guided = guidance[0] is not None
        for references in ((None, None), (reference, other if guided else None)):
            rest = (*guidance, *references, step[0], TABLE, steps, C)
            results += native.sde_log_prob(latents, velocity, *rest)
            grad_kl = None if references[0] is None else grad.flip(0)
            results += native.sde_log_prob_backward(grad, grad_kl, latents, velocity, *rest, guided)
    return results


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
    assert native_probe.philox4x32(counter, key) == expected


@needs_native
def test_normals_are_accurate_at_the_ends_of_their_range() -> None:
    # All-zero words are the largest radius; from there, and near u = 1, where the radius goes to 0, every value.
    words = torch.cat([torch.arange(4096), 2**24 - 1 - torch.arange(4096)]) << 8 | 0xA5
    turns = torch.arange(8192) * 2**19 + 0x5A
    cosine, sine = native_probe.box_muller(words, turns)
    radius = torch.sqrt(-2 * torch.log(((words >> 8) + 1).double() * 2.0**-24))
    angle = (turns >> 8).double() * (2.0**-24 * 2 * math.pi)
    error = torch.maximum((cosine - radius * angle.cos()).abs(), (sine - radius * angle.sin()).abs())
    assert (error <= 5e-7 * radius).all()
    assert cosine[4096] == sine[4096] == 0
    # Quarters of a turn are exact: one of the two is 0.
    quarters = torch.arange(4) << 30
    cosine, sine = native_probe.box_muller(torch.full((4,), 2**31 - 1), quarters)
    radius = math.sqrt(2 * math.log(2))
    expected = radius * torch.tensor([[1.0, 0, -1, 0], [0, 1, 0, -1]])
    torch.testing.assert_close(torch.stack([cosine, sine]), expected, rtol=3e-7, atol=0)


@needs_native
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_draws_the_noise_of_the_layout(variant: str) -> None:
    zeros, samples = torch.zeros(2, 2**18 + 7), torch.tensor([11, 2**32 - 1])
    with native.using_variant(variant):
        drawn, *_ = native.sde_step(
            zeros, zeros, None, None, BARE_NOISE, torch.zeros(2, dtype=torch.int64), torch.tensor([2**62 + 3]), samples,
            torch.tensor([2**32 - 1]), 0xFFFF,
        )  # fmt: skip
    expected = gaussian(
        zeros.shape[1:], seed=2**62 + 3, sample_index=samples, step=0, stream=0xFFFF, iteration=2**32 - 1
    )
    torch.testing.assert_close(drawn, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("poisoned_memory")
def test_what_is_not_written_would_be_seen() -> None:
    fresh = (torch.empty(300), torch.ones(4, 5).transpose(0, 1).new_empty(7), torch.empty_like(torch.ones(3, 3)))
    assert all(tensor.isnan().all() for tensor in fresh)


@needs_native
@pytest.mark.parametrize("shape", [(1,), (3,), (255,), (257,), (4097,), (3, 37, 53)], ids=str)
@pytest.mark.usefixtures("poisoned_memory")
def test_all_variants_compute_the_same_bits(shape: tuple[int, ...]) -> None:
    with native.using_variant("portable"):
        expected = everything(*shape)
    assert not any(result.isnan().any() for result in expected)
    for variant in VARIANTS[1:]:
        with native.using_variant(variant):
            assert all(torch.equal(*pair) for pair in zip(everything(*shape), expected, strict=True)), variant


@needs_native
def test_the_number_of_threads_changes_no_bit() -> None:
    # Enough elements that every op uses up to 5 threads.
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            results.append(everything(2**17 + 4097))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(*pair) for pair in zip(other, results[0], strict=True))


@needs_native
def test_variants_are_named_and_put_back() -> None:
    assert VARIANTS[0] == "portable"
    with pytest.raises(ValueError, match="variant must be one of portable.*, got 'avx1024'"):
        with native.using_variant("avx1024"):
            pass
    library = native.library()
    before = library.densegrpo_variant()
    assert library.densegrpo_variant_name(before).decode() == VARIANTS[-1]
    with pytest.raises(ZeroDivisionError), native.using_variant("portable"):
        assert library.densegrpo_variant_name(library.densegrpo_variant()) == b"portable"
        _ = 1 / 0
    assert library.densegrpo_variant() == before
    assert library.densegrpo_variant_name(99) is None
    assert library.densegrpo_variant_name(-1) is None


def test_a_missing_library_is_reported_not_raised(package: Path) -> None:
    assert not native.available()
    assert "was not built" in native.why_not()


def test_the_cuda_library_is_not_taken_for_this_one(package: Path) -> None:
    (package / "_native_cuda.linux-x86_64.so").write_bytes(b"another library")
    assert "was not built" in native.why_not()


def test_without_the_library_the_reference_serves_and_cpu_is_an_error(package: Path) -> None:
    table = coefficients(sd3_sigmas(4), 0.7, "flow_sde").table
    latents = torch.randn(2, 8)
    options = {"seed": 0, "sample_index": torch.arange(2), "iteration": 0}
    served = sde_step(latents, latents, table, 1, **options)
    expected = sde_step(latents, latents, table, 1, implementation="reference", **options)
    assert torch.equal(served[0], expected[0])
    with pytest.raises(RuntimeError, match="sde_step: implementation 'cpu' cannot serve this call: .* not built"):
        sde_step(latents, latents, table, 1, implementation="cpu", **options)
    with pytest.raises(RuntimeError, match="not available"):
        native_probe.philox4x32((0, 0, 0, 0), (0, 0))


def test_a_broken_library_is_named(package: Path) -> None:
    (package / "_native.broken.so").write_bytes(b"not a library")
    assert not native.available()
    assert "_native.broken.so cannot be loaded" in native.why_not()


@needs_native
def test_a_library_of_another_interface_is_refused(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = next((Path(native.__file__).parents[1]).glob("_native.*.so"))
    shutil.copy(built, package)
    assert native.available()
    native._load.cache_clear()
    monkeypatch.setattr(native, "ABI_VERSION", 99)
    assert "has interface 4, expected 99" in native.why_not()
