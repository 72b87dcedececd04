"""The Triton kernels: run in Triton's interpreter when TRITON_INTERPRET=1, else on a GPU.

The interpreter is chosen when Triton is imported, and interpreted kernels cannot be compiled, so these tests have a
pytest process of their own: `TRITON_INTERPRET=1 pytest tests/triton`, which .ci/check runs. Without the variable they
are collected only where there is a CUDA device, marked gpu.
"""

from __future__ import annotations

import os
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from densegrpo_fast.flow.dynamics import coefficients
from densegrpo_fast.flow.schedule import sd3_sigmas

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HAS_GPU = torch.cuda.is_available()

collect_ignore = [] if HAS_GPU and not INTERPRETED else ["test_capture.py"]
collect_ignore_glob = [] if HAS_GPU or INTERPRETED else ["test_*.py"]


@pytest.fixture(params=["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where the kernels run."""
    return torch.device(request.param)


@pytest.fixture
def storage_error(device: torch.device) -> dict[torch.dtype, float]:
    """Relative error of one rounding to a dtype; the interpreter truncates to bfloat16 instead of rounding."""
    bfloat16 = 2.0**-8 if device.type == "cuda" else 2.0**-7
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
