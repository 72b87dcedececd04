"""Where Python waits for the GPU: the lines that torch's synchronisation warnings name."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from types import TracebackType

import torch

_WORDS = "called a synchronizing CUDA operation"


class HostSyncs:
    """Within the context, counts the operations that make Python wait for a device, by the line that calls them.

    Copies to the host and explicit waits for a stream are such operations; `torch.cuda.synchronize` is not counted.

    Attributes:
        where: "FILE:LINE" -> count, most first; None on anything but a GPU.

    Args:
        device: the device.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.where: dict[str, int] | None = None
        self._caught = warnings.catch_warnings(record=True)

    def __enter__(self) -> HostSyncs:
        if self.device.type == "cuda":
            self._log = self._caught.__enter__()
            warnings.simplefilter("always")
            self._before = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("warn")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.device.type != "cuda":
            return
        torch.cuda.set_sync_debug_mode(self._before)
        self._caught.__exit__(kind, error, trace)
        found = Counter(f"{Path(one.filename).name}:{one.lineno}" for one in self._log if _WORDS in str(one.message))
        self.where = dict(found.most_common())
        for other in self._log:
            if _WORDS not in str(other.message):
                warnings.warn_explicit(other.message, other.category, other.filename, other.lineno)
