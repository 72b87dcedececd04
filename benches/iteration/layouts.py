"""What a run would take on 1, 8 and 64 GPUs: memory of each, what is sent, where it waits. Simulated, not measured.

    python -m benches.iteration.layouts --json benches/results/layouts.json

Operations and memory are counted on the real configurations (`densegrpo_fast.fidelity`, `training/memory.py`), bytes
by the closed forms of docs/scaling.md. Seconds follow from speeds that are assumed (`Machine`): a phase takes what its
slowest process takes, FSDP2 sends while a phase computes and is waited for where that takes longer, and an adapter's
gradients are waited for.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

from benches.common.record import provenance, write_json
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.fidelity.costs import own_record
from densegrpo_fast.models.flops import known
from densegrpo_fast.models.memory import ModelMemory
from densegrpo_fast.models.published import MODELS
from densegrpo_fast.training.distributed import World, iteration_share
from densegrpo_fast.training.memory import estimate


@dataclass(frozen=True)
class Machine:
    """Speeds that the simulation assumes.

    Attributes:
        flops: of a GPU in bfloat16, per second: .4 of the 989 tera that an H100's data sheet gives.
        inside: bytes per second between the GPUs of a machine, for each: two thirds of NVLink's 450 giga a direction.
        between: bytes per second between machines, for each GPU: .8 of 400 Gb/s.
        gpus: of a machine.
    """

    flops: float = 0.4 * 989e12
    inside: float = 300e9
    between: float = 40e9
    gpus: int = 8


PRESETS = ("sd35_medium_pickscore", "flux1_dev_pickscore", "qwen_image_pickscore")
LAYOUTS = (
    (1, "lora", "none"),
    (8, "lora", "none"),
    (8, "lora", "full"),
    (8, "full", "full"),
    (64, "lora", "none"),
    (64, "lora", "hybrid"),
    (64, "full", "hybrid"),
)
"""GPUs, what is trained, and how the network is spread."""
GIB = 2**30


@dataclass(frozen=True)
class Counted:
    """What a configuration takes: operations and forwards of a sample by phase, and the memory of its model."""

    config: Config
    operations: dict[str, float]
    forwards: dict[str, float]
    memory: ModelMemory

    @classmethod
    def of(cls, config: Config) -> Counted:
        """Count; some seconds for a large network."""
        record = own_record(config)
        return cls(config, record["operations"], record["nfe"], memory_of(config))


def memory_of(config: Config) -> ModelMemory:
    """Memory of a configuration's published model, in bfloat16."""
    name = next(name for name, model in MODELS.items() if model.hub == config.model.path)
    return ModelMemory(
        known(name, config.model.height, frames=config.model.frames),
        dtype=torch.bfloat16,
        vae_dtype=getattr(torch, config.model.vae_dtype),
        lora_rank=config.adapter_rank,
        lora_targets=tuple(config.lora.targets),
    )


def layout(counted: Counted, machine: Machine, processes: int, shard: str) -> dict[str, Any]:
    """An iteration of a configuration on so many GPUs.

    Returns:
        memory_gib: of a process, by the tensors alone.
        gathered_gb, reduced_gb: given by a process to gathers and sums.
        seconds: by phase, and those waited for what is sent and for processes with more rows.
        efficiency: seconds of one GPU for all rows, without waiting, over GPUs times seconds.
    """
    config, memory = counted.config, counted.memory
    share = iteration_share(World(0, processes), config)
    rows, size = len(share.rows) * (config.sampler.branches or 1), share.micro_batch
    shards = {"none": 1, "full": processes, "hybrid": min(processes, machine.gpus)}[shard]
    speed = machine.inside if shards <= machine.gpus else machine.between
    whole = config.model.train == "full"
    gathered = reduced = waiting = 0.0
    seconds = {}
    for phase in ("rollout", "lookahead", "update", "pictures"):
        computing = counted.operations[phase] * rows / machine.flops
        seconds[phase] = computing
        if shards == 1 or phase == "pictures":
            continue
        rows_together = config.lookahead.chunk if phase == "lookahead" else size
        calls = counted.forwards[phase] * rows / rows_together
        backwards = calls if phase == "update" else 0.0
        bytes_of = memory.transformer * (calls + backwards) / shards
        gathered += bytes_of
        sending = bytes_of * (shards - 1) / speed
        if whole and backwards:
            given = memory.trained * backwards
            reduced += given
            sending += given * (shards - 1) / shards / speed
        waiting += max(0.0, sending - computing)
    if not (whole and shards == processes) and processes > 1:
        # a ring sends each value twice
        link = machine.inside if processes <= machine.gpus else machine.between
        own = memory.trained / (shards if whole else 1)
        reduced += own * config.optimizer.updates_per_iteration
        waiting += config.optimizer.updates_per_iteration * 2 * own * (processes - 1) / processes / link
    samples = config.data.num_prompts * config.sampler.group_size
    needed = estimate(config, memory, processes=processes, shards=shards)
    computing = sum(seconds.values())
    return {
        "gpus": processes,
        "train": config.model.train,
        "shard": shard,
        "rows": rows,
        "padding": len(share.rows) * processes / share.total - 1,
        "memory_gib": needed.total / GIB,
        "memory_parts_gib": {name: size / GIB for name, size in {**needed.weights, **needed.state}.items() if size},
        "gathered_gb": gathered / 1e9,
        "reduced_gb": reduced / 1e9,
        "seconds": seconds | {"waiting": waiting},
        "efficiency": computing * samples / rows / processes / (computing + waiting),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="where the record goes")
    options = parser.parse_args(arguments)
    machine, found = Machine(), {}
    with user_errors_exit():
        for preset in PRESETS:
            found[preset] = []
            for train in ("lora", "full"):
                config, _ = parse_arguments(["--config", preset, "--model.train", train])
                counted = Counted.of(config)
                for processes, kind, shard in LAYOUTS:
                    if kind == train:
                        found[preset].append(layout(counted, machine, processes, shard))
        write_json(options.json, provenance() | {"assumed": asdict(machine), "layouts": found})
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
