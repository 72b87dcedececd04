"""The weights of a network that one process reads and all receive, tensor by tensor.

So the disk is read once, and no process needs more memory than its part of the network and one whole tensor; only the
process that reads holds all of it, in the machine's memory, until it is handed out.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import chain

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from densegrpo_fast.common.errors import SetupError
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.training.distributed import World


def whole_weights(model: FlowModel, world: World) -> dict[str, Tensor]:
    """All parameters and buffers of a network whose weights are to be handed out, before it is sharded.

    Returns:
        They as the main process has read them; in the others the same without data, to whose precision the network's
        own are brought.

    Raises:
        SetupError: another process has made another network.
    """
    own = {name: tensor.detach() for name, tensor in _tensors(model.network)}
    expected = world.from_main(lambda: {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in own.items()})
    if {name: tuple(tensor.shape) for name, tensor in own.items()} != {name: s for name, (s, _) in expected.items()}:
        raise SetupError(
            f"process {world.rank} has another network than process 0: is model.path the same on every machine?"
        )
    if world.main:
        return own
    for name, tensor in _tensors(model.network):
        tensor.data = tensor.data.to(expected[name][1])
    return {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype) in expected.items()}


def hand_out(model: FlowModel, weights: Mapping[str, Tensor], world: World) -> None:
    """Give every process its part of `whole_weights`, on the model's device: of what is sharded a part, else all.

    The reference network, where there is one, is given the same.
    """
    networks = [network for network in (model.network, model.reference_network) if network is not None]
    if not world.main:
        for network in networks:
            network.to_empty(device=model.device)
    places = [dict(_tensors(network)) for network in networks]
    with torch.no_grad():
        for name, values in weights.items():
            whole = world.broadcast(values).to(model.device)
            for tensor in (tensors[name] for tensors in places):
                if isinstance(tensor, DTensor):
                    cast = whole.to(tensor.dtype)
                    part = distribute_tensor(cast, tensor.device_mesh, tensor.placements, src_data_rank=None)
                    tensor.to_local().copy_(part.to_local())
                else:
                    tensor.data = whole.to(tensor.dtype, copy=len(places) > 1)
    model.awaits_weights = False


def _tensors(network: nn.Module) -> chain[tuple[str, Tensor]]:
    return chain(network.named_parameters(), network.named_buffers())
