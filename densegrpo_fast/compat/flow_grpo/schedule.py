"""A host scheduler's grid, read once: which step a timestep is, and that step's coefficients.

The hosts look every row's timestep up on the device and wait for the answer, twice per row. Here the grid is read to
the host once per `set_timesteps`; afterwards

    a view of one entry of `scheduler.timesteps`             is found by its place in memory
    numbers and tensors on the CPU                           are looked up on the host
    other tensors                                            are compared with the grid on their device

and nothing waits for the device. As in diffusers, a timestep that occurs twice means its second place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from densegrpo_fast.compat.steps import HostTable, second_places
from densegrpo_fast.flow.dynamics import LOG_PROB_SCALE, C, Family, coefficients

_read: WeakKeyDictionary[Any, Schedule] = WeakKeyDictionary()


def schedule_of(scheduler: Any) -> Schedule:
    """The grid of a scheduler, read again only after its tensors have changed.

    Args:
        scheduler: anything with `timesteps` [T] and `sigmas` [T+1], such as diffusers' flow-matching schedulers after
            `set_timesteps`.

    Raises:
        TypeError: it has no such tensors.
        ValueError: their lengths do not belong together.
    """
    known = _read.get(scheduler)
    if known is None or not known.is_of(scheduler):
        known = _read[scheduler] = Schedule(scheduler)
    return known


class Schedule:
    """One grid.

    Attributes:
        num_steps: T.
        sigmas: the T+1 noise levels, as numbers.
        timesteps: the scheduler's own tensor, [T].
    """

    def __init__(self, scheduler: Any) -> None:
        sigmas, timesteps = getattr(scheduler, "sigmas", None), getattr(scheduler, "timesteps", None)
        if not isinstance(sigmas, Tensor) or not isinstance(timesteps, Tensor):
            raise TypeError(f"the scheduler must hold tensors sigmas and timesteps, got a {type(scheduler).__name__}")
        if timesteps.ndim != 1 or sigmas.shape != (len(timesteps) + 1,):
            raise ValueError(
                f"the scheduler must hold timesteps [T] and sigmas [T+1], got {list(timesteps.shape)} and "
                f"{list(sigmas.shape)}; call its set_timesteps first"
            )
        self.num_steps = len(timesteps)
        self.timesteps = timesteps
        self._sigmas = sigmas
        self._versions = _version(sigmas), _version(timesteps)
        # one wait for the device, not two
        device, wide = sigmas.device, torch.promote_types(torch.float32, timesteps.dtype)
        beside = timesteps.to(device, wide, non_blocking=device.type != "cpu")
        read = torch.cat([sigmas.detach().float().to(wide), beside]).tolist()
        self.sigmas, self._values = tuple(read[: len(sigmas)]), tuple(read[len(sigmas) :])
        self._step = second_places(self._values)
        self._step_at = [self._step[value] for value in self._values]
        self._tables: dict[tuple[str, float | tuple[float, ...], torch.device], HostTable] = {}
        self._on_device: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def is_of(self, scheduler: Any) -> bool:
        """Whether the scheduler still holds the very tensors that were read, unchanged."""
        return (
            scheduler.sigmas is self._sigmas
            and scheduler.timesteps is self.timesteps
            and self._versions == (_version(self._sigmas), _version(self.timesteps))
        )

    def find(self, timestep: float | Sequence[float] | Tensor) -> tuple[int | Tensor, int]:
        """Steps at some timesteps.

        Args:
            timestep: entries of the scheduler's `timesteps`: a number, a sequence, or a tensor of at most 1 dimension.

        Returns:
            the step, as an int where all are known on the host to be one, else [L] int64; the number L of timesteps.
            A timestep on another device that is not in the grid gives step T, whose coefficients are NaN.

        Raises:
            ValueError: a timestep on the host is not in the grid.
        """
        if not isinstance(timestep, Tensor):
            timestep = torch.as_tensor(timestep)
        if timestep.ndim > 1 or timestep.numel() == 0:
            raise ValueError(f"timestep must be one value or have shape [L] with L >= 1, got {list(timestep.shape)}")
        length = timestep.numel()
        place = self._place_in_memory(timestep) if length == 1 or timestep.stride() == (0,) else None
        if place is not None:
            return self._step_at[place], length
        if self.timesteps.is_floating_point():
            timestep = timestep.to(self.timesteps.dtype)
        if timestep.device.type != "cpu":
            return self._find_on_device(timestep.reshape(-1)), length
        values = timestep.reshape(-1).tolist()
        missing = [value for value in values if value not in self._step]
        if missing:
            raise ValueError(
                f"timestep {missing[0]} is not in the scheduler's timesteps {list(self._step)}; score a transition "
                "under the schedule that it was sampled with"
            )
        steps = [self._step[value] for value in values]
        return (steps[0] if len(set(steps)) == 1 else torch.tensor(steps)), length

    def table(self, family: Family, noise_level: float | tuple[float, ...], device: torch.device) -> HostTable:
        """Coefficients of all steps, with the host's log-probabilities in noise-free rows, on a device.

        Flow-GRPO's 'sde' divides by the noise and returns NaN where there is none; 'cps' has no division and scores a
        noise-free step like any other.

        Args:
            family: name of the sampler.
            noise_level: strength of the noise, one or T, as in `dynamics.coefficients`.

        Returns:
            T rows; on an accelerator T+1, of which the last is NaN, for timesteps that are not in the grid.

        Raises:
            ValueError: the grid or the noise level is not usable.
        """
        key = (family, noise_level, device)
        if key not in self._tables:
            # Kept for later calls, which may need gradients even if this one may not.
            with torch.inference_mode(False):
                table = coefficients(torch.tensor(self.sigmas, dtype=torch.float32), noise_level, family).table
                silent = table[:, C] == 0
                table[silent, LOG_PROB_SCALE] = 1.0 if family == "cps" else math.nan
                self._tables[key] = HostTable.of(table, device, nowhere=device.type != "cpu")
        return self._tables[key]

    def dt(self, device: torch.device) -> Tensor:
        """sigma' - sigma of every step, [T+1] float32, negative; the last entry is NaN."""
        return self._device_tensors(device)[2]

    def _place_in_memory(self, timestep: Tensor) -> int | None:
        grid = self.timesteps
        if timestep.dtype != grid.dtype or timestep.untyped_storage()._cdata != grid.untyped_storage()._cdata:
            return None
        place, rest = divmod(int(timestep.storage_offset() - grid.storage_offset()), grid.stride(0))
        return place if rest == 0 and 0 <= place < self.num_steps else None

    def _find_on_device(self, timestep: Tensor) -> Tensor:
        grid, step_at, _ = self._device_tensors(timestep.device)
        match = timestep[:, None] == grid[None, :]
        return torch.where(match.any(1), step_at[match.int().argmax(1)], self.num_steps)

    def _device_tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        if device not in self._on_device:
            with torch.inference_mode(False):
                grid = torch.tensor([*self.sigmas, math.nan], dtype=torch.float32)
                dt = grid[1:] - grid[:-1]
                values = torch.tensor(self._values, dtype=self.timesteps.dtype)
                tensors = (values, torch.tensor(self._step_at), dt)
                on_device = [tensor.to(device, non_blocking=True) for tensor in tensors]
                self._on_device[device] = on_device[0], on_device[1], on_device[2]
        return self._on_device[device]


def _version(tensor: Tensor) -> int:
    """Counts changes in place; tensors made in inference mode do not count theirs."""
    return 0 if tensor.is_inference() else tensor._version
