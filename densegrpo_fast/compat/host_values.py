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
        base = _whole(tensor)
        if not _can_follow(base, tensor):
            self.reads += 1
            return tensor.detach().cpu()
        known = self._find(base)
        if known is None:
            self.reads += 1
            known = self._remember(base, base.detach().to("cpu", copy=True))
        offset = tensor.storage_offset() - base.storage_offset()
        return known.values.reshape(-1).as_strided(tensor.shape, tensor.stride(), offset)

    def read_ahead(self, *tensors: Tensor) -> None:
        """Read what is not known of several tensors of one device in a single copy; reading them then costs nothing.

        Numbers go through float64, which holds all of the hosts' (integers up to 2^53).
        """
        bases = [_whole(tensor) for tensor in tensors if _can_follow(_whole(tensor), tensor)]
        unknown = list({base.untyped_storage()._cdata: base for base in bases if self._find(base) is None}.values())
        if len(unknown) < 2:
            return
        self.reads += 1
        flat = torch.cat([base.detach().reshape(-1).double() for base in unknown]).to("cpu", copy=True)
        for base, values in zip(unknown, flat.split([base.numel() for base in unknown]), strict=True):
            self._remember(base, values.reshape(base.shape).to(base.dtype))

    def _find(self, base: Tensor) -> _Known | None:
        key = base.untyped_storage()._cdata
        known = self._known.get(key)
        if known is None or not known.is_of(base):
            return None
        self._known.move_to_end(key)
        return known

    def _remember(self, base: Tensor, values: Tensor) -> _Known:
        # Without its graph, but with its storage, so that no other tensor can take the key.
        known = _Known(base.detach(), base._version, values)
        key = base.untyped_storage()._cdata
        self._known[key] = known
        self._known.move_to_end(key)
        while len(self._known) > self._capacity:
            self._known.popitem(last=False)
        return known


def _whole(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base


def _can_follow(base: Tensor, tensor: Tensor) -> bool:
    """Whether changes of a tensor show, and it is worth being read whole."""
    small = not base.is_inference() and base.numel() <= _LARGEST
    return small and base.is_contiguous() and base.dtype == tensor.dtype


_reader = HostReader()


def host_tensor(value: Tensor) -> Tensor:
    """The same values on the CPU; a tensor of an accelerator, and all its views, are waited for once."""
    return value.detach() if value.device.type == "cpu" else _reader.read(value)


def read_ahead(*values: Tensor) -> None:
    """Wait once for several tensors that will be read, where they lie on an accelerator."""
    devices = {value.device for value in values if value.device.type not in ("cpu", "mps")}
    for device in devices:
        _reader.read_ahead(*(value for value in values if value.device == device))


def host_values(value: Tensor) -> tuple[float, ...]:
    """The values of a tensor of any shape as numbers, in row-major order."""
    return tuple(host_tensor(value).to(torch.float64).reshape(-1).tolist())
