"""Tensors of a checkpoint that all processes of a run write and read together, each its own parts: PyTorch's DCP.

They are safetensors files, one of each process, with the places of the parts in their headers, so that any number of
processes can read what any other has written. Where several machines take part, they must share the file system.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densegrpo_fast.common.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

SHARED = "shared"
"""Folder of a checkpoint that holds these files."""


def copies(tensors: Mapping[str, Mapping[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """Copies on the CPU of tensors, of DTensors of this process's parts, which no later change reaches."""
    from torch.distributed.checkpoint.staging import BlockingAsyncStager

    # without their gradients
    values = {group: {name: tensor.detach() for name, tensor in own.items()} for group, own in tensors.items()}
    return BlockingAsyncStager().stage(values)


def save_shared(tensors: Mapping[str, Mapping[str, Tensor]], directory: Path, process_group: Any = None) -> None:
    """Write tensors, DTensors or the same in every process; all processes must call it.

    Args:
        tensors: group name -> tensor name -> tensor.
        directory: that is there and empty, and is the same in every process.
        process_group: of all processes; None = the default one.

    Raises:
        OutputError: in every process, if one of them cannot write.
    """
    import torch.distributed.checkpoint as dcp

    with _quiet():
        try:
            dcp.save(
                {f"{group}/{name}": tensor.detach() for group, own in tensors.items() for name, tensor in own.items()},
                storage_writer=dcp.HuggingFaceStorageWriter(str(directory), save_distributed=True),
                process_group=process_group,
            )
        except dcp.api.CheckpointException as error:
            raise OutputError(f"cannot save checkpoint {directory.parent}: {_first_of(error)}") from None


def shared_names(directory: Path) -> list[tuple[str, str]]:
    """Groups and names of the tensors that were written."""
    return [tuple(name.split("/", 1)) for name in _shapes(directory)]  # type: ignore[misc]


def load_shared(tensors: Mapping[str, Mapping[str, Tensor]], directory: Path) -> None:
    """Read what `save_shared` has written into tensors of the same shapes, however they are spread; all processes must
    call it.

    Raises:
        CheckpointError: in every process, if one of them cannot read, or a shape differs.
    """
    import torch.distributed.checkpoint as dcp

    flat = {f"{group}/{name}": tensor for group, own in tensors.items() for name, tensor in own.items()}
    shapes = _shapes(directory)
    for name, tensor in flat.items():
        if tuple(tensor.shape) != shapes.get(name):
            found = "absent" if name not in shapes else list(shapes[name])
            raise CheckpointError(f"{directory.parent}: {name} is {found}, expected {list(tensor.shape)}")
    with _quiet():
        try:
            dcp.load(flat, storage_reader=dcp.HuggingFaceStorageReader(str(directory)))
        except dcp.api.CheckpointException as error:
            raise CheckpointError(f"cannot read checkpoint {directory.parent}: {_first_of(error)}") from None


def read_shared(directory: Path, group: str) -> dict[str, Tensor]:
    """The tensors of one group, whole, by a process by itself."""
    import torch

    shapes, start = _shapes(directory), f"{group}/"
    tensors = {name[len(start) :]: torch.zeros(shape) for name, shape in shapes.items() if name.startswith(start)}
    load_shared({group: tensors}, directory)
    return tensors


def finite_parts(tensors: Mapping[str, Mapping[str, Tensor]]) -> str | None:
    """The first tensor of which this process's part is not finite; None if there is none."""
    for group, own in tensors.items():
        for name, tensor in own.items():
            if not getattr(tensor, "_local_tensor", tensor).isfinite().all():
                return f"{group} tensor {name}"
    return None


def _shapes(directory: Path) -> dict[str, tuple[int, ...]]:
    import torch.distributed.checkpoint as dcp

    with _quiet():
        metadata = dcp.HuggingFaceStorageReader(str(directory)).read_metadata().state_dict_metadata
    return {name: tuple(found.size) for name, found in metadata.items()}  # type: ignore[union-attr]


def _first_of(error: BaseException) -> str:
    failures = getattr(error, "failures", {})
    first = next(iter(failures.values()), error)
    first = first[0] if isinstance(first, tuple) else first
    return f"{getattr(first, 'strerror', None) or str(first).partition(chr(10))[0]}"


@contextmanager
def _quiet() -> Iterator[None]:
    """A process by itself is one on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
