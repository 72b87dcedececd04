"""Fixtures shared by all tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

# Read once, when the OpenMP runtime starts: before torch.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same state of torch's generator."""
    torch.manual_seed(0)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Uninitialised tensors hold NaN, so an element that an op forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
