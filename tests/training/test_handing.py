"""One process reads the network for all: each family's, in parts or whole, adapted or trained, is alike in all."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from densegrpo_fast import load_config
from densegrpo_fast.common.errors import SetupError
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.families import FAMILIES
from densegrpo_fast.models.loading import Weights, load_pipeline
from densegrpo_fast.models.lora import add_lora
from densegrpo_fast.models.tiny import tiny_model
from densegrpo_fast.models.whole_network import train_whole
from densegrpo_fast.training.distributed import World
from densegrpo_fast.training.handing import hand_out, whole_weights
from densegrpo_fast.training.sharding import shard

sys.path.insert(0, str(Path(__file__).parent))

from worlds import together  # noqa: E402

CPU = torch.device("cpu")


def loaded(directory: Path, weights: Weights, train: str, dtype: torch.dtype) -> FlowModel:
    size = {"max_sequence_length": 64, "height": 64, "width": 64}
    model = load_pipeline(str(directory), device=CPU, dtype=dtype, weights=weights, **size)
    if train == "full":
        train_whole(model, reference=True)
        return model
    add_lora(model.network, rank=2, alpha=4, targets=list(model.family.lora_targets), seed=0)
    # the others' adapter comes from the main process, too
    if weights != "awaited":
        for name, parameter in model.trainable_parameters().items():
            if ".lora_B." in name:
                parameter.data.fill_(0.1)
    return model


@torch.no_grad()
def velocities(model: FlowModel) -> Tensor:
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    arguments = noise, torch.tensor([0.9, 0.4]), model.encode(["a cat", "the moon"])
    with model.reference():
        reference = model.velocity(*arguments).cond
    return torch.stack([model.velocity(*arguments).cond, reference])


def received(
    world: World, directories: list[Path], train: str, mode: Any, dtype: torch.dtype
) -> dict[str, tuple[float, Tensor, Tensor]]:
    """Of each family which part of its values this process holds, and what it computes; and what it should compute."""
    found = {}
    config = load_config("embedded_dense", {"model.train": train})
    for directory in directories:
        own = loaded(directory / str(world.rank), "on_host" if world.main else "awaited", train, dtype)
        weights = whole_weights(own, world)
        shard(own, config, world, mode if own.blocks() else "none")
        hand_out(own, weights, world)
        held = sum(getattr(p, "_local_tensor", p).numel() for p in own.network.parameters()) / sum(
            p.numel() for p in own.network.parameters()
        )
        whole = loaded(directory / "0", "placed", train, dtype)
        shard(whole, config, World(), "none")
        found[directory.name] = held, velocities(own), velocities(whole)
    return found


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A pipeline of each family, as the first process finds it, and as the second does, with other weights."""
    made = []
    for pipeline_class, family in FAMILIES.items():
        made.append(tmp_path_factory.mktemp("pipelines") / pipeline_class)
        tiny_model(pipeline_class).pipeline.save_pretrained(made[-1] / "0")
        shutil.copytree(made[-1] / "0", made[-1] / "1")
        (file,) = (made[-1] / "1" / family.network_part).glob("*.safetensors")
        safetensors.torch.save_file({"nothing": torch.zeros(1)}, file)
    return made


@pytest.mark.ci
@pytest.mark.parametrize(
    ("train", "mode", "dtype"),
    [("lora", "none", torch.bfloat16), ("lora", "full", torch.float32), ("full", "full", torch.float32)],
)
def test_what_one_process_has_read_all_compute_with(
    directories: list[Path], train: str, mode: str, dtype: torch.dtype
) -> None:
    first, second = together(2, received, directories, train, mode, dtype)
    for directory in directories:
        sharded = mode == "full" and FAMILIES[directory.name].network_part == "transformer"
        for held, own, expected in (first[directory.name], second[directory.name]):
            assert torch.equal(own, expected), directory.name
            assert 0.3 < held < 0.7 if sharded else held == 1, directory.name


def another(world: World, directory: Path) -> str:
    model = loaded(directory / str(world.rank), "on_host" if world.main else "awaited", "lora", torch.float32)
    if world.rank:
        del model.network.proj_out
    try:
        whole_weights(model, world)
    except SetupError as error:
        return str(error)
    return ""


@pytest.mark.ci
def test_a_process_with_another_network_says_so(directories: list[Path]) -> None:
    assert together(2, another, directories[0]) == [
        "",
        "process 1 has another network than process 0: is model.path the same on every machine?",
    ]
