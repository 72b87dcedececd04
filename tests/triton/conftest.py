"""The Triton kernels: compiled for a GPU and run on one, or, where there is none, in the emulator of tests/gpu.

With TRITON_INTERPRET=1 they run in Triton's interpreter instead, which is chosen when Triton is imported.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from densegrpo_fast.flow import backends
from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.flow.schedule import sd3_sigmas

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()

collect_ignore = [] if HAS_GPU and not INTERPRETED else ["test_capture.py"]
collect_ignore_glob = [] if find_spec("triton") else ["test_*.py"]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Where a test runs. Emulated: as compiled for sm_90, and for the others that its mark `capabilities` names."""
    if "device" not in metafunc.fixturenames:
        return
    if INTERPRETED:
        places = ["cpu"]
    elif HAS_GPU:
        places = [pytest.param("cuda", marks=pytest.mark.gpu)]
    else:
        mark = metafunc.definition.get_closest_marker("capabilities")
        places = [f"sm_{number}" for number in (90, *(mark.args if mark else ()))]
    metafunc.parametrize("device", places, indirect=True)


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """Where the kernels run."""
    if not request.param.startswith("sm_"):
        yield torch.device(request.param)
        return
    from emulator.on_triton import on_cpu

    monkeypatch.setattr(backends, "interpreted", lambda: True)
    with on_cpu(int(request.param.removeprefix("sm_"))):
        yield torch.device("cpu")


@pytest.fixture
def storage_error() -> dict[torch.dtype, float]:
    """Relative error of one rounding to a dtype; the interpreter truncates to bfloat16 instead of rounding."""
    bfloat16 = 2.0**-7 if INTERPRETED else 2.0**-8
    return {torch.float32: 1e-6, torch.float16: 2.0**-11, torch.bfloat16: bfloat16}


class Batch(NamedTuple):
    """Five rows at different steps of a ten-step sampler; rows 1 and 4 are at noise-free steps."""

    sigmas: Tensor
    table: Tensor
    steps: Tensor
    samples: Tensor


@pytest.fixture
def batch(device: torch.device) -> Batch:
    """Schedule, coefficients and indices of five rows."""
    sigmas = sd3_sigmas(10)
    levels = [0.7, 0.7, 0.0, 0.5, 0.7, 0.7, 0.9, 0.0, 0.7, 0.7]
    table = coefficients(sigmas, levels, "flow_sde").table
    values = (sigmas, table, torch.tensor([0, 2, 8, 4, 7]), torch.tensor([3, 0, 2**32 - 1, 5, 9]))
    return Batch(*(value.to(device) for value in values))
