"""A GPU's power draw and clocks while something runs, read through nvidia-ml-py where it is installed."""

from __future__ import annotations

import threading
from statistics import mean
from types import TracebackType
from typing import Any

import torch


class Sensors:
    """Within the context, a thread reads a device's sensors several times a second.

    Args:
        device: the device; anything but a GPU has no sensors.
        seconds: between two readings.
    """

    def __init__(self, device: torch.device, seconds: float = 0.1):
        self.device, self.seconds = device, seconds
        self.readings: list[dict[str, float]] = []
        self.why_not: str | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def summary(self) -> dict[str, Any] | None:
        """Mean and largest watts and mean and lowest clock (MHz) of the readings; None without any, see `why_not`."""
        if not self.readings:
            return None
        watts, clocks = ([reading[key] for reading in self.readings] for key in ("watts", "sm_mhz"))
        return {
            "readings": len(self.readings),
            "watts": {"mean": mean(watts), "max": max(watts)},
            "sm_mhz": {"mean": mean(clocks), "min": min(clocks)},
        }

    def __enter__(self) -> Sensors:
        if self.device.type != "cuda":
            self.why_not = "no GPU"
            return self
        try:
            import pynvml

            pynvml.nvmlInit()
            # its own numbering may leave out what CUDA_VISIBLE_DEVICES hides, so not by index
            name = f"GPU-{torch.cuda.get_device_properties(self.device).uuid}"
            handle = pynvml.nvmlDeviceGetHandleByUUID(name)
            self.readings.append(_read(pynvml, handle))
        except Exception as error:  # missing package, library or permission: the measurement does without
            self.why_not = f"{type(error).__name__}: {error}"
            return self
        self._thread = threading.Thread(target=self._watch, args=(pynvml, handle), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _watch(self, library: Any, handle: Any) -> None:
        while not self._stop.wait(self.seconds):
            try:
                self.readings.append(_read(library, handle))
            except Exception as error:  # a driver that stops answering ends the readings, not the measurement
                self.why_not = f"after {len(self.readings)} readings: {type(error).__name__}: {error}"
                return


def _read(library: Any, handle: Any) -> dict[str, float]:
    return {
        "watts": library.nvmlDeviceGetPowerUsage(handle) / 1000,
        "sm_mhz": float(library.nvmlDeviceGetClockInfo(handle, library.NVML_CLOCK_SM)),
    }
