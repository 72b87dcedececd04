"""What CUDA refuses while a graph is recorded, found without a GPU: the networks run on the meta device in its place.

A meta tensor has no values, so whatever reads one on the host raises by itself. The rest is told by each operation:
whether its output's shape depends on values, whether it draws random numbers, and whether it copies from the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from densegrpo_fast.models.base import Conditioning
from densegrpo_fast.models.diffusers_model import DiffusersModel
from densegrpo_fast.models.families import FAMILIES
from densegrpo_fast.models.tiny import tiny_model

META = torch.device("meta")


class CaptureLint(TorchDispatchMode):
    """Collects operations that a capture refuses, or that a replay would repeat with what the capture saw."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        inputs, outputs = ([leaf for leaf in tree_leaves(part) if isinstance(leaf, Tensor)] for part in (args, found))
        self.refused += [f"{operation}: {problem}" for problem in _problems(operation, inputs, outputs)]
        return found


def _problems(operation: Any, inputs: list[Tensor], outputs: list[Tensor]) -> Iterator[str]:
    by_mask = any(tensor.dtype in (torch.bool, torch.uint8) for tensor in inputs[1:])
    indexes = operation is torch.ops.aten.index.Tensor
    if torch.Tag.dynamic_output_shape in operation.tags and (by_mask or not indexes):
        yield "its shape depends on values"
    if torch.Tag.data_dependent_output in operation.tags:
        yield "its value is read"
    # attention draws its dropout, which is 0 here
    if torch.Tag.nondeterministic_seeded in operation.tags and "dot_product" not in str(operation):
        yield "it draws random numbers"
    places = {tensor.device.type for tensor in (*inputs, *outputs)}
    # a single number travels as an argument of the kernel
    if len(places) > 1 and any(tensor.ndim and tensor.device.type == "cpu" for tensor in inputs):
        yield "it copies from the host"


def on_meta(model: DiffusersModel) -> Conditioning:
    """Move a model to the meta device; two encoded prompts, there too."""
    found = model.encode(["a cat", "the moon"])
    model.network.to(META)
    model.device = META
    prompts, negative = (
        {name: tensor.to(META) for name, tensor in part.items()} for part in (found.prompts, found.negative)
    )
    return replace(found, prompts=prompts, negative=negative, rows=found.rows.to(META))


@pytest.mark.ci
@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_can_be_captured(kind: str, scale: float) -> None:
    model = tiny_model(kind)
    conditioning, latents = on_meta(model), torch.empty(2, *model.latent_shape, device=META)
    sigma = torch.empty(2, device=META)
    with torch.no_grad():
        # as before a capture: tables are made, and buffers
        model.velocity(latents, sigma, conditioning, scale)
        with CaptureLint() as lint:
            model.velocity(latents, sigma, conditioning, scale)
    assert lint.refused == []


@pytest.mark.parametrize(
    ("evaluate", "problem"),
    [
        (lambda x: x[x > 0], "its shape depends on values"),
        (lambda x: x.nonzero(), "its shape depends on values"),
        (lambda x: x + torch.randn_like(x), "it draws random numbers"),
        (lambda x: x + torch.tensor([1.0, 2.0]).to(x.device), "it copies from the host"),
    ],
)
def test_what_a_capture_refuses_is_told(evaluate: Any, problem: str) -> None:
    x = torch.empty(2, device=META)
    with CaptureLint() as lint:
        try:
            evaluate(x)
        except (NotImplementedError, RuntimeError):
            # nothing has a shape that depends on values which are not there
            assert problem == "its shape depends on values"
            return
    assert any(problem in found for found in lint.refused)


@pytest.mark.parametrize("read", [lambda x: x.sum().item(), lambda x: x.tolist(), lambda x: bool(x[0] > 0)])
def test_a_value_cannot_be_read(read: Any) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.empty(2, device=META))
