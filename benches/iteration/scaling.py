"""Weak scaling: what several connected processes do in a second, against as many that know nothing of each other.

    torchrun --nproc-per-node 2 -m benches.iteration.scaling --config embedded_dense --json scaling.json

All processes run an iteration together, then each one by itself with its share of the prompts, in turns, so that a
change of the machine's speed reaches both alike. One is as fast as the slowest process of a round, the other as fast as
they are on average.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import time
from collections.abc import Sequence
from typing import Any

import torch

from benches.common.record import load_average, provenance, write_json
from densegrpo_fast.common.command_line import positive
from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.training.distributed import World
from densegrpo_fast.training.processes import joined
from densegrpo_fast.training.trainer import Trainer


def measure(config: Config, world: World, rounds: int) -> dict[str, Any]:
    """Seconds of an iteration, connected and not, by process and round, and what follows from them.

    Raises:
        UsageError: the prompts do not divide.
    """
    if config.data.num_prompts % world.size or world.size == 1:
        raise UsageError(
            f"data.num_prompts: expected a multiple of the processes, of which there have to be several: "
            f"{config.data.num_prompts} prompts, {world.size} processes"
        )
    data = config.data.model_copy(update={"num_prompts": config.data.num_prompts // world.size})
    sampler = config.sampler.model_copy(update={"micro_batch": connected_rows(config, world)})
    config = config.model_copy(update={"sampler": sampler})
    trainers = {
        "connected": Trainer(config, world=world),
        "unconnected": Trainer(config.model_copy(update={"data": data})),
    }
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(rounds + 1):
        for name in sorted(trainers, reverse=bool(number % 2)):
            world.largest(0)  # all begin together
            start = time.perf_counter()
            trainers[name].step(number)
            if number:
                seconds[name].append(time.perf_counter() - start)
    table = {name: world.gather(torch.tensor(values, dtype=torch.float64)) for name, values in seconds.items()}
    ratios = table["unconnected"].mean(0) / table["connected"].amax(0)
    low, middle, high = ratios.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)).tolist()
    return {
        "processes": world.size,
        "samples_per_process": config.data.num_prompts * config.sampler.group_size // world.size,
        "efficiency": middle,
        "quartiles": [low, high],
        "seconds": {name: values.tolist() for name, values in table.items()},
    }


def connected_rows(config: Config, world: World) -> int:
    """Rows per forward with which the forwards of both have one shape."""
    states = config.data.num_prompts * config.sampler.group_size // (config.sampler.branches or 1)
    return world.share(states, micro_batch=config.sampler.micro_batch).micro_batch


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=10, help="iterations of each kind; default: 10")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured")
    options, overrides = parser.parse_known_args(arguments)
    with user_errors_exit():
        config, _ = parse_arguments(overrides)
        before = load_average()
        with joined(config) as world:
            found = measure(config, world, options.rounds)
        if world.main:
            low, high = found["quartiles"]
            print(
                f"{found['processes']} connected processes do {found['efficiency']:.2f} of what unconnected ones do "
                f"(quartiles {low:.2f} to {high:.2f}; load average {before[0]})"
            )
            if options.json is not None:
                write_json(options.json, found | {"load_average": before} | provenance())
    return ExitCode.OK


if __name__ == "__main__":
    sys.exit(main())
