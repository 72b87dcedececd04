"""The tensors of a launch as regions of memory, and which of their bytes hold a value yet."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from emulator.memory import Region
from emulator.values import Array


class FreshTensors:
    """Which bytes of tensors that launchers made by `empty` hold no value yet, by the address of their storage."""

    def __init__(self) -> None:
        self._defined: dict[int, Array] = {}

    def note(self, tensor: Tensor) -> Tensor:
        """Count a tensor's bytes as unwritten, until a kernel writes them; returns it."""
        storage = tensor.untyped_storage()
        if storage.nbytes():
            self._defined[storage.data_ptr()] = np.zeros(storage.nbytes(), np.bool_)
            weakref.finalize(storage, self._defined.pop, storage.data_ptr(), None)
        return tensor

    def region(self, tensor: Tensor, name: str) -> Region:
        """The bytes from a tensor's first element to its last."""
        span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
        size = span * tensor.element_size() if tensor.numel() else 0
        defined = self._defined.get(tensor.untyped_storage().data_ptr())
        if defined is not None:
            start = tensor.storage_offset() * tensor.element_size()
            defined = defined[start : start + size]
        return Region(tensor.data_ptr(), size, name, defined)


@contextmanager
def watched(*modules: str) -> Iterator[FreshTensors]:
    """Notes what modules whose names start so allocate on the CPU with `empty`, `empty_like` and `new_empty`."""
    fresh = FreshTensors()

    def noting(make: Any) -> Any:
        def empty(*arguments: Any, **options: Any) -> Tensor:
            tensor = make(*arguments, **options)
            ours = sys._getframe(1).f_globals["__name__"].startswith(modules)
            return fresh.note(tensor) if ours and tensor.device.type == "cpu" else tensor

        return empty

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ((Tensor, "new_empty"), (torch, "empty_like"), (torch, "empty")):
            patch.setattr(owner, name, noting(getattr(owner, name)))
        yield fresh
