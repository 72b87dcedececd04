"""How well the gain of several steps together stands for the gains of its steps: a lookahead of fewer states.

    python -m benches.iteration.chunk_gains    writes results/chunk_gains.json

If only every k-th state is completed, the steps between two of them share one gain, and a k-th of the completions is
left.
Measured on exact completions under the paper's settings (`embedded_paper`): the mean in-group Spearman correlation of
a chunk's gain with the exact gain of each of its steps, by chunk size, with the evaluations per trajectory that its
states need.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from benches.common.record import RESULTS, provenance, write_json
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.fidelity.measure import measure
from densegrpo_fast.fidelity.target import pipeline_target
from densegrpo_fast.fidelity.variants import reference
from densegrpo_fast.sampling import plan as plans
from densegrpo_fast.training.agreement import compare


def shared_gains(rewards: Tensor, size: int) -> Tensor:
    """Rewards of which every `size`-th and the last are exact and those between rise in a straight line, so that all
    steps of a chunk have the same gain.

    Args:
        rewards: [..., T+1].
        size: steps of a chunk, at least 1; the last chunk may be shorter.

    Returns:
        [..., T+1].
    """
    steps = rewards.shape[-1] - 1
    index = torch.arange(steps + 1)
    start = index - index % size
    end = (start + size).clamp(max=steps)
    share = (index - start) / (end - start).clamp(min=1)
    return rewards[..., start] + share * (rewards[..., end] - rewards[..., start])


def evaluations(steps: int, size: int) -> int:
    """Evaluations per trajectory by which every `size`-th state is completed exactly but for the last step."""
    return sum(len(plans.exact_but_last(steps).paths[state]) for state in range(0, steps, size))


def study(rewards: Tensor, sizes: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Agreement of shared gains with the exact ones by chunk size.

    Args:
        rewards: [P, G, T+1], exact.
        sizes: of the chunks.
    """
    steps, found = rewards.shape[-1] - 1, {}
    for size in sizes:
        agreement = compare(rewards, shared_gains(rewards.double(), size))
        found[str(size)] = {
            "evaluations": evaluations(steps, size),
            "spearman_gains_mean": agreement.spearman_gains_mean,
            "spearman_gains_worst_step": agreement.spearman_gains_worst_step,
            "spearman_gains": list(agreement.spearman_gains),
        }
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", default="embedded_paper", help="default: embedded_paper")
    add("--sizes", type=int, nargs="+", default=[1, 2, 3, 5], help="steps of a chunk; default: 1 2 3 5")
    add("--groups", type=int, default=64, help="held-out groups; default: 64")
    add("--group-size", type=int, default=16, help="trajectories of a group; default: 16")
    add("--output", type=Path, default=RESULTS / "chunk_gains.json", metavar="FILE")
    options = parser.parse_args(arguments)
    with user_errors_exit():
        target = pipeline_target(parse_arguments(["--config", options.config])[0], None, options.groups)
        variant = reference(target.coefficients.num_steps)
        sampling = {"group_size": options.group_size, "seed": 0}
        rewards = measure(target, [variant], range(options.groups), **sampling)[variant]
        settings = target.settings | sampling | {"groups_measured": options.groups}
        document = provenance() | {"settings": settings, "chunks": study(rewards, options.sizes)}
        write_json(options.output, document)
    for size, found in document["chunks"].items():
        print(
            f"chunks of {size}: {found['evaluations']} evaluations, gains {found['spearman_gains_mean']:.2f}, "
            f"worst step {found['spearman_gains_worst_step']:.2f}"
        )
    return int(ExitCode.OK)


if __name__ == "__main__":
    sys.exit(main())
