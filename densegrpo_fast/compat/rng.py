"""Where the noise of a drop-in step comes from: the host's own generators, or Philox counters."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

import torch
from torch import Tensor

from densegrpo_fast.flow import ops

Rng = Literal["host", "philox"]

ROWS_PER_RANK = 1 << 20
"""Distance between the sample indices of two ranks where `philox_samples` names none."""

_samples: ContextVar[tuple[Tensor, int] | None] = ContextVar("densegrpo_fast_samples", default=None)


def host_noise(like: Tensor, generator: torch.Generator | Sequence[torch.Generator] | None) -> Tensor:
    """Draw one standard normal tensor as diffusers' `randn_tensor` does, from the same stream.

    Args:
        like: gives shape, dtype and device.
        generator: None is the device's global generator; a sequence has one per row, or one for all; a generator on
            the CPU draws there, whatever the device.

    Raises:
        ValueError: a sequence of another length.
    """
    if generator is None:
        return torch.randn(like.shape, dtype=like.dtype, device=like.device)
    generators = [generator] if isinstance(generator, torch.Generator) else list(generator)
    if len(generators) == 1:
        return _draw(like.shape, like, generators[0])
    if len(generators) != len(like):
        raise ValueError(f"generator must be one, or one per row ({len(like)}), got {len(generators)}")
    return torch.cat([_draw((1, *like.shape[1:]), like, one) for one in generators])


def _draw(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)


@contextmanager
def philox_samples(sample_index: Tensor, epoch: int) -> Iterator[None]:
    """Name the samples whose steps are drawn inside the block, for steps built with rng="philox".

    Their noise then depends on (seed, sample, epoch, step) alone: not on batch split, order, rank or device.

    Args:
        sample_index: global index of every row of the batch, [B] int64.
        epoch: iteration of the training loop.
    """
    token = _samples.set((sample_index, epoch))
    try:
        yield
    finally:
        _samples.reset(token)


class PhiloxNoise:
    """Noise by counters (`flow/noise.py`); the state is the number of steps drawn outside `philox_samples`.

    There a host names no samples, so the rows of rank r are r * `ROWS_PER_RANK` + row and every call takes a new epoch:
    reproducible from run to run, independent of torch's generators, but tied to the order of calls.
    """

    def __init__(self, seed: int | None = None) -> None:
        """Args: seed in [0, 2^63); None takes `torch.initial_seed()` at the first draw."""
        self._seed = seed
        self._calls = 0

    def step(self, sample: Tensor, velocity: Tensor, table: Tensor, index: int | Tensor) -> tuple[Tensor, Tensor]:
        """The fused `ops.sde_step`: next state and its log_prob, without gradient."""
        if self._seed is None:
            self._seed = torch.initial_seed() % (1 << 63)
        named = _samples.get()
        if named is None:
            first = _rank() * ROWS_PER_RANK
            sample_index = torch.arange(first, first + len(sample), device=sample.device)
            epoch = self._calls % (1 << 32)
            self._calls += 1
        else:
            sample_index, epoch = named
        with torch.no_grad():
            return ops.sde_step(
                sample, velocity, table, index, seed=self._seed, sample_index=sample_index, iteration=epoch
            )


def _rank() -> int:
    """This process's place among those of the run; launchers give it in RANK before the processes know each other."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0"))


def make_noise(rng: str, seed: int | None) -> PhiloxNoise | None:
    """`PhiloxNoise` for "philox", None for "host".

    Raises:
        ValueError: another name, or a seed for "host", whose stream is seeded by the host.
    """
    if rng not in get_args(Rng):
        raise ValueError(f"rng must be one of {', '.join(get_args(Rng))}, got {rng!r}")
    if rng == "host":
        if seed is not None:
            raise ValueError('seed is for rng="philox"; with rng="host" the host seeds torch\'s generators')
        return None
    return PhiloxNoise(seed)
