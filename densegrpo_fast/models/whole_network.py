"""Full fine-tuning: all weights of a network trained, the policy that it began as, and the trained network's files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from densegrpo_fast.common.files import replace_bytes
from densegrpo_fast.common.pretrained import check_finite
from densegrpo_fast.models.base import FlowModel, network_class


def train_whole(model: FlowModel, *, reference: bool) -> None:
    """Make all parameters of a model's network trainable.

    A network in half precision goes on computing in it: `training/sharding.py` makes float32 masters of its weights,
    block by block, and casts them for each forward.

    Args:
        model: without an adapter.
        reference: whether to keep the network as it is now, frozen, for `FlowModel.reference`.

    Raises:
        ValueError: the network computes a part in float32 and the others in half precision, which casting all masters
            would not.
    """
    network, dtype = model.network, next(model.network.parameters()).dtype
    half = dtype.itemsize < 4
    if half and (exact := getattr(network, "_keep_in_fp32_modules", None)):
        raise ValueError(
            f"model.dtype: expected float32 with model.train full, {type(network).__name__} in half precision keeps "
            f"{', '.join(exact)} in float32"
        )
    network.requires_grad_(False)
    if reference:
        model.reference_network = deepcopy(network)
    if half:
        model.computed_in = dtype
    network.requires_grad_(True)


def save_network(network: Any, weights: Mapping[str, Tensor], directory: Path, dtype: torch.dtype) -> Path:
    """Write a trained network as diffusers does, for its class's `from_pretrained`, and return the directory.

    Args:
        network: a diffusers model, of which class and configuration count.
        weights: all its parameters, by name.
        directory: of the files.
        dtype: in which they are written: the one that the network computes in, so that nothing of it is lost.
    """
    check_finite("the trained network", weights)
    # where the network lies on this machine is nobody else's business
    config = {key: value for key, value in network.config.items() if key != "_name_or_path"}
    with torch.device("meta"):
        made = network_class(network).from_config(config)
    buffers = {name: tensor for name, tensor in network.state_dict().items() if name not in weights}
    values = {
        name: t.to("cpu", dtype) if t.is_floating_point() else t.cpu() for name, t in {**buffers, **weights}.items()
    }
    made.load_state_dict(values, assign=True)
    directory.mkdir(parents=True, exist_ok=True)
    # diffusers writes in place
    with TemporaryDirectory(dir=directory) as staged:
        made.save_pretrained(staged, max_shard_size="4GB")
        for file in sorted(Path(staged).iterdir()):
            replace_bytes(directory / file.name, file.read_bytes(), digest=True)
    return directory


@contextmanager
def with_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the context the network has other parameters.

    Args:
        weights: of all parameters, by name, in any precision; buffers may be among them.

    Raises:
        ValueError: they belong to another network; nothing was changed.
    """
    parameters = dict(network.named_parameters())
    shapes = {name: tensor.shape for name, tensor in parameters.items()}
    if {name: weights[name].shape for name in shapes if name in weights} != shapes:
        raise ValueError(f"the trained weights do not belong to this {type(network).__name__}")
    before = {name: parameter.detach().cpu().clone() for name, parameter in parameters.items()}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    try:
        yield
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(before[name])
