"""Values of small tensors, read from their device once and not at every step.

Hosts keep noise levels and timesteps in tensors that may lie on an accelerator, and hand out views of them. Here the
whole tensor behind a view is read the first time; its other views then cost nothing until it is changed in place.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST = 1 << 14
"""Elements of a tensor that is still read whole."""


@dataclass(frozen=True, eq=False)
class _Known:
    tensor: Tensor
    version: int
    values: Tensor

    def is_of(self, base: Tensor) -> bool:
        """Whether the values are still those of a tensor with this storage."""
        same_place = self.tensor.shape == base.shape and self.tensor.storage_offset() == base.storage_offset()
        return same_place and self.tensor.dtype == base.dtype and self.version == base._version


class HostReader:
    """Remembers the values of the tensors that were read last.

    Attributes:
        reads: how often a tensor had to be copied to the host.
    """

    def __init__(self, capacity: int = 16) -> None:
        """Args: how many tensors to remember; they are kept alive meanwhile."""
        self.reads = 0
        self._capacity = capacity
        self._known: OrderedDict[int, _Known] = OrderedDict()

    def read(self, tensor: Tensor) -> Tensor:
        """A copy on the CPU of a tensor of any shape and dtype, not differentiable."""
        base = tensor if tensor._base is None else tensor._base
        if base.is_inference() or base.numel() > _LARGEST or not base.is_contiguous() or base.dtype != tensor.dtype:
            self.reads += 1
            return tensor.detach().cpu()
        key = base.untyped_storage()._cdata
        known = self._known.get(key)
        if known is None or not known.is_of(base):
            self.reads += 1
            # Without its graph, but with its storage, so that no other tensor can take the key.
            known = self._known[key] = _Known(base.detach(), base._version, base.detach().to("cpu", copy=True))
            while len(self._known) > self._capacity:
                self._known.popitem(last=False)
        self._known.move_to_end(key)
        offset = tensor.storage_offset() - base.storage_offset()
        return known.values.reshape(-1).as_strided(tensor.shape, tensor.stride(), offset)


_reader = HostReader()


def host_tensor(value: Tensor) -> Tensor:
    """The same values on the CPU; a tensor of an accelerator, and all its views, are waited for once."""
    return value.detach() if value.device.type == "cpu" else _reader.read(value)


def host_values(value: Tensor) -> tuple[float, ...]:
    """The values of a tensor of any shape as numbers, in row-major order."""
    return tuple(host_tensor(value).to(torch.float64).reshape(-1).tolist())
