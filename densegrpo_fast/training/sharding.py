"""A network in parts, one in each process, where it does not fit whole: FSDP2 (arXiv 2304.11277).

Each process keeps a part of every block's weights, and gathers a block's for as long as it is evaluated. An adapter
stays whole and float32 in every process: it is trained exactly as with a base that is whole everywhere. Where all
weights are trained, each process keeps its part's gradients, moments and average, too.

Half precision with float32 masters is FSDP2's as well, then also for a network that is whole in a process by itself.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from densegrpo_fast.common.errors import SetupError, UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.training.distributed import World

ShardMode = Literal["none", "full", "hybrid"]


def shard(model: FlowModel, config: Config, world: World, mode: ShardMode) -> int:
    """Shard a model's network over the processes.

    Args:
        model: with its adapter, or with all its weights trained.
        mode: "full" = over all processes, "hybrid" = over those of each machine, "none".

    Returns:
        Over how many processes; 1 = it stays whole.

    Raises:
        UsageError: the model or another option does not allow it.
    """
    whole = world.size == 1 or mode == "none"
    if whole and model.computed_in is None:
        return 1
    for option, value in (
        ("lookahead.copy_dtype", config.lookahead.copy_dtype),
        ("lookahead.cache", config.lookahead.cache),
        ("model.compile", config.model.compile),
        ("lookahead.graphs", config.lookahead.graphs or None),
    ):
        if value is not None:
            why = "model.train full in half precision" if whole else f"distributed.shard {mode}"
            raise UsageError(f"{option}: expected {'false' if value is True else 'null'} with {why}, got {value}")
    if not model.blocks() and not whole:
        raise UsageError(
            f"distributed.shard: expected none, {type(model.network).__name__} has no list of blocks to shard"
        )
    mesh = _mesh_of_one(world) if whole else _mesh(world, "full" if mode == "full" else "hybrid")
    trained = config.model.train == "full"
    adapter = set() if trained else set(model.trainable_parameters().values())
    reduced = None if model.computed_in is None else torch.float32
    _shard_network(model, mesh, MixedPrecisionPolicy(model.computed_in, reduced, None, False), adapter)
    if model.reference_network is not None:
        with model.reference():
            _shard_network(model, mesh, MixedPrecisionPolicy(cast_forward_inputs=False), set())
    model.sharded = not whole
    return mesh.size(mesh.ndim - 1)


def _shard_network(
    model: FlowModel, mesh: DeviceMesh, precision: MixedPrecisionPolicy, left_out: set[torch.nn.Parameter]
) -> None:
    """Shard the network that a model has now."""
    for part in (*model.blocks(), model.network):
        if model.computed_in is not None and model.mode == "policy":
            for parameter in part.parameters():
                if not isinstance(parameter, DTensor):
                    parameter.data = parameter.data.float()
        # FSDP2 keeps the outermost weights gathered by default, as they were before the next change of them
        fully_shard(part, mesh=mesh, mp_policy=precision, ignored_params=left_out, reshard_after_forward=True)
        assert isinstance(part, FSDPModule)
        # gradients are added up, as they are normalised by the rows of all processes
        part.set_gradient_divide_factor(1.0)
        part.set_force_sum_reduction_for_comms(True)
    model.network.forward = _without_retry(model.network.forward)


def _mesh(world: World, mode: Literal["full", "hybrid"]) -> DeviceMesh:
    if mode == "full":
        return init_device_mesh(world.device.type, (world.size,))
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "0"))
    if here < 1 or world.size % here:
        raise UsageError(
            "distributed.shard: hybrid needs as many processes on each machine, as torchrun says in LOCAL_WORLD_SIZE; "
            f"it is {here or 'not set'}, with {world.size} in all"
        )
    return init_device_mesh(world.device.type, (world.size // here, here), mesh_dim_names=("replicated", "sharded"))


def _mesh_of_one(world: World) -> DeviceMesh:
    """This process by itself, which joins a group of its own if it belongs to none."""
    device = world.device
    if not dist.is_initialized():
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return init_device_mesh(device.type, (world.size, 1), mesh_dim_names=("replicated", "sharded"))["sharded"]


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; the tensor itself if it is whole."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local().detach().requires_grad_(tensor.requires_grad)


def like(part: Tensor, whole: Tensor) -> Tensor:
    """The tensor, spread like another one, of which this process has a part."""
    if not isinstance(whole, DTensor):
        return part
    return DTensor.from_local(
        part, whole.device_mesh, whole.placements, run_check=False, shape=whole.shape, stride=whole.stride()
    )


def gathered(tensors: Mapping[str, Tensor], world: World) -> dict[str, Tensor]:
    """Whole tensors on the CPU, in the process that writes files; empty elsewhere. All processes must call it."""
    found = {}
    for name, tensor in tensors.items():
        whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if world.main:
            found[name] = whole.detach().cpu()
    return found


def ends_the_run(error: torch.OutOfMemoryError) -> SetupError:
    """What a sharded model raises where its memory runs out: a second try would gather what no other process gives."""
    return SetupError(
        f"the memory ran out with a network that FSDP2 gathers ({str(error).partition(chr(10))[0]}): "
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
