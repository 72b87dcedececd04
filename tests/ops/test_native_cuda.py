"""The binding of the CUDA library. What its kernels compute: tests/gpu/test_cuda_kernels.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from densegrpo_fast.flow import backends, native_cuda, shared_library

FLOAT, HALF, BFLOAT = torch.float32, torch.float16, torch.bfloat16
PAIRS = [(FLOAT, FLOAT), (FLOAT, HALF), (FLOAT, BFLOAT), (HALF, HALF), (BFLOAT, BFLOAT)]


def test_a_missing_library_is_an_error_that_names_the_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_library, "PACKAGE", tmp_path)
    native_cuda._load.cache_clear()
    assert "was not built; install the CUDA toolkit" in native_cuda.why_not()
    (tmp_path / "_native_cuda.broken.so").write_bytes(b"not a library")
    native_cuda._load.cache_clear()
    assert "_native_cuda.broken.so cannot be loaded" in native_cuda.why_not()
    native_cuda._load.cache_clear()


def test_what_the_library_cannot_serve_is_said_before_it_is_looked_for() -> None:
    assert native_cuda.why_not(torch.zeros(1)) == "it needs tensors on a CUDA device, got cpu"
    with pytest.raises(
        RuntimeError, match="sde_step: implementation 'cuda' cannot serve this call: it needs tensors on"
    ):
        backends.choose("sde_step", "cuda", torch.zeros(1, 1), torch.zeros(1, 1))
    for latents, velocity in PAIRS:
        assert native_cuda._served(latents, velocity)
    for latents, velocity in ((HALF, FLOAT), (HALF, BFLOAT), (FLOAT, torch.float64), (torch.float64, torch.float64)):
        assert not native_cuda._served(latents, velocity)
