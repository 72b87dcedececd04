"""Findings about the processes of a run: how fast they talk, whether they hold one model, and compute the same."""

from __future__ import annotations

import time
from collections.abc import Iterator
from statistics import median

import torch

from densegrpo_fast.common.errors import SetupError
from densegrpo_fast.config import Config
from densegrpo_fast.doctor.findings import Finding
from densegrpo_fast.sampling.rollout import initial_noise
from densegrpo_fast.training.distributed import World, equal_weights
from densegrpo_fast.training.models import build_model, default_device, synchronizer

_GROUP = "processes"
_LARGE = 2**22
"""Values of the large reduction: 16 MiB, about what an adapter of rank 8 on SD3.5-Medium has."""


def process_findings(config: Config, world: World, dry_run: bool) -> Iterator[Finding]:
    """What can be said of several processes that have found each other, with one settings and versions.

    Args:
        config: whose model they load.
        world: the processes; each must ask for all findings.
        dry_run: whether a model that is not in the package is replaced by a tiny random one.
    """
    yield Finding(_GROUP, "joined", "ok", f"{world.size}, with the same settings and versions, by {world.device.type}")
    small, large = _seconds(world, 1), _seconds(world, _LARGE)
    speed = f"{1e3 * small:.2f} ms for one number, {4 * _LARGE / large / 1e9:.2f} GB/s for 16 MiB"
    yield Finding(_GROUP, "adding up", "ok", speed)
    model = build_model(config, default_device(), dry_run)
    try:
        equal_weights(world, model)
    except SetupError as error:
        yield Finding(_GROUP, "weights", "problem", "they differ", str(error))
        return
    yield Finding(_GROUP, "weights", "ok", "the same in all")
    noise = initial_noise(model, torch.arange(2), seed=0, iteration=0)
    with torch.no_grad():
        velocity = model.velocity(noise, torch.full((2,), 0.5, device=model.device), model.encode(["", ""])).cond
    found = world.gather(velocity.cpu())
    apart = (found - found[0]).abs().flatten(1).amax(1)
    worst = int(apart.argmax())
    if apart[worst] == 0:
        yield Finding(_GROUP, "forward", "ok", "the same in all, bit for bit")
    else:
        yield Finding(
            _GROUP,
            "forward",
            "warn",
            f"process {worst} differs from process 0 by {apart[worst]:.1e}",
            "other devices or libraries round otherwise; training goes on, and repeats itself only on the same ones",
        )


def _seconds(world: World, count: int) -> float:
    """Of adding up so many numbers, the median of some times."""
    values, synchronize = torch.ones(count, device=world.device), synchronizer(world.device)
    times = []
    for _ in range(6):
        world.largest(0)  # all begin together
        synchronize()
        start = time.perf_counter()
        world.sum(values)
        synchronize()
        times.append(time.perf_counter() - start)
    return median(times[1:])
