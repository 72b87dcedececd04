"""Tables of coefficients with the hosts' log-probabilities of noise-free steps, which are NaN or minus infinity.

The ops take finite coefficients. So a noise-free step is scored by its distance there, and the host's own factor of
that distance, NaN or infinity, is applied to the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from densegrpo_fast.flow import ops
from densegrpo_fast.flow.dynamics import LOG_PROB_CONST, LOG_PROB_SCALE

if TYPE_CHECKING:
    from densegrpo_fast.compat.flow_grpo.rng import PhiloxNoise


@dataclass(frozen=True, eq=False)
class HostTable:
    """Coefficients of steps on one device.

    Attributes:
        rows: [T, 6] float32, columns as in `flow.dynamics`, log-probability columns as the host has them.
        usable: the same for the ops, all finite.
        factor: [T] float32, of the ops' log-probabilities; None where all are 1.
    """

    rows: Tensor
    usable: Tensor
    factor: Tensor | None

    @classmethod
    def of(cls, rows: Tensor, device: torch.device, *, nowhere: bool = False) -> HostTable:
        """Make the table of rows [T, 6] float32 that lie on the CPU.

        Args:
            rows: coefficients; only the log-probability columns may have entries that are not finite.
            device: where the table is to lie.
            nowhere: add a row T of NaN; the ops take it on an accelerator only.
        """
        scale = rows[:, LOG_PROB_SCALE]
        silent = ~scale.isfinite()
        usable = rows.clone()
        usable[silent, LOG_PROB_SCALE], usable[silent, LOG_PROB_CONST] = 1.0, 0.0
        tensors = [rows, usable, scale.where(silent, 1.0)]
        if nowhere:
            tensors = [torch.cat([tensor, torch.full_like(tensor[:1], math.nan)]) for tensor in tensors]
        # without waiting for the device
        rows, usable, factor = (tensor.to(device, non_blocking=True) for tensor in tensors)
        return cls(rows, usable, factor if silent.any() else None)

    def log_prob(self, latents: Tensor, velocity: Tensor, next_latents: Tensor, index: int | Tensor) -> Tensor:
        """log_prob of a next state, [B], in the compute dtype; differentiable in `velocity`.

        Args:
            latents, velocity, next_latents: [B, ...].
            index: step of every row: one int, or [B] int64.
        """
        return self._as_host(ops.sde_log_prob(latents, velocity, next_latents.detach(), self.usable, index), index)

    def draw(
        self, philox: PhiloxNoise, latents: Tensor, velocity: Tensor, index: int | Tensor
    ) -> tuple[Tensor, Tensor]:
        """A next state with noise from counters, and its log_prob, without gradient; arguments as for `log_prob`."""
        next_latents, log_prob = philox.step(latents, velocity, self.usable, index)
        return next_latents, self._as_host(log_prob, index)

    def _as_host(self, log_prob: Tensor, index: int | Tensor) -> Tensor:
        return log_prob if self.factor is None else log_prob * self.factor[index]


@lru_cache(maxsize=256)
def host_table(rows: Sequence[Sequence[float]], device: torch.device) -> HostTable:
    """`HostTable.of` rows of numbers; kept, so that later steps copy nothing. Not to be changed in place."""
    # Later calls may need gradients even if this one may not.
    with torch.inference_mode(False):
        return HostTable.of(torch.tensor(rows, dtype=torch.float32), device)
