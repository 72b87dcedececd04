"""The simulation of layouts: what it must say of one process, and of links that are slow."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from benches.iteration.layouts import Counted, Machine, layout
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.models.flops import embedded
from densegrpo_fast.models.memory import ModelMemory


@pytest.mark.ci
@pytest.mark.parametrize("train", ["lora", "full"])
def test_waiting_comes_from_links_and_padding_alone(train: str) -> None:
    config, _ = parse_arguments(["--config=embedded_dense", f"model.train={train}", "data.num_prompts=3"])
    memory = ModelMemory(embedded(), dtype=torch.bfloat16, lora_rank=config.adapter_rank)
    operations = {"rollout": 1e9, "lookahead": 2e9, "update": 3e9, "pictures": 1e9}
    counted = Counted(config, operations, {"rollout": 6.0, "lookahead": 15.0, "update": 3.0}, memory)
    one = layout(counted, Machine(), 1, "none")
    assert (
        one["efficiency"] == pytest.approx(1)
        and one["seconds"]["waiting"] == one["gathered_gb"] == one["reduced_gb"] == 0
    )
    samples = config.data.num_prompts * config.sampler.group_size
    assert sum(one["seconds"].values()) == pytest.approx(samples * 7e9 / Machine().flops)
    # at infinite speed only what is computed twice is lost
    endless = replace(Machine(), inside=float("inf"), between=float("inf"))
    uneven = layout(counted, endless, 5, "full")
    assert uneven["padding"] > 0 and uneven["efficiency"] == pytest.approx(1 / (1 + uneven["padding"]))
    four, slow = (layout(counted, machine, 4, "full") for machine in (Machine(), replace(Machine(), inside=1e6)))
    assert slow["efficiency"] < four["efficiency"] < 1 and slow["gathered_gb"] == four["gathered_gb"] > 0
    assert four["memory_gib"] < one["memory_gib"]
    # an adapter's gradients once, all weights' after each of three backwards of its one micro-batch
    assert four["reduced_gb"] == pytest.approx(memory.trained * (1 if train == "lora" else 3) / 1e9)
