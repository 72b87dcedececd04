"""The frozen base model in parts, one in each process, where it does not fit whole: FSDP2 (arXiv 2304.11277).

Each process keeps a part of every block's weights, and gathers a block's for as long as it is evaluated. The adapter
stays whole and float32 in every process: it is trained exactly as with a base that is whole everywhere.
"""

from __future__ import annotations

import functools
import os
from typing import Any, Literal

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from densegrpo_fast.common.errors import SetupError, UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.training.distributed import World

ShardMode = Literal["none", "full", "hybrid"]


def shard(model: FlowModel, config: Config, world: World, mode: ShardMode) -> int:
    """Shard a model's base over the processes.

    Args:
        model: with its adapter.
        mode: "full" = over all processes, "hybrid" = over those of each machine, "none".

    Returns:
        Over how many processes; 1 = it stays whole.

    Raises:
        UsageError: the model or another option does not allow it.
    """
    if world.size == 1 or mode == "none":
        return 1
    blocks = model.blocks()
    for option, value in (
        ("lookahead.copy_dtype", config.lookahead.copy_dtype),
        ("lookahead.cache", config.lookahead.cache),
        ("model.compile", config.model.compile),
    ):
        if value is not None:
            raise UsageError(f"{option}: expected null with distributed.shard {mode}, got {value}")
    if not blocks:
        raise UsageError(
            f"distributed.shard: expected none, {type(model.network).__name__} has no list of blocks to shard"
        )
    mesh = _mesh(world, mode)
    adapter = set(model.trainable_parameters().values())
    for part in (*blocks, model.network):
        fully_shard(part, mesh=mesh, ignored_params=adapter)
    model.network.forward = _without_retry(model.network.forward)
    model.sharded = True
    return mesh.size(mesh.ndim - 1)


def _mesh(world: World, mode: str) -> DeviceMesh:
    if mode == "full":
        return init_device_mesh(world.device.type, (world.size,))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if here < 1 or world.size % here:
        raise UsageError(
            "distributed.shard: hybrid needs as many processes on each machine, as torchrun says in LOCAL_WORLD_SIZE; "
            f"it is {here or 'not set'}, with {world.size} in all"
        )
    return init_device_mesh(world.device.type, (world.size // here, here), mesh_dim_names=("replicated", "sharded"))


def ends_the_run(error: torch.OutOfMemoryError) -> SetupError:
    """What a sharded model raises where its memory runs out: a second try would gather what no other process gives."""
    return SetupError(
        f"the memory ran out in one of the processes that share the base model ({str(error).partition(chr(10))[0]}): "
        "lower sampler.micro_batch or lookahead.chunk, or set model.gradient_checkpointing true"
    )


def _without_retry(forward: Any) -> Any:
    @functools.wraps(forward)
    def checked(*arguments: Any, **options: Any) -> Any:
        try:
            return forward(*arguments, **options)
        except torch.OutOfMemoryError as error:
            raise ends_the_run(error) from None

    return checked
