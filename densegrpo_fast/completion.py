"""Train a completion head for a configuration's lookahead: `python -m densegrpo_fast.completion`.

    python -m densegrpo_fast.completion --output head.safetensors --lookahead.plan nodes --lookahead.nodes '[3,6]'
    python -m densegrpo_fast.fidelity --plans nodes:3,6 --head head.safetensors
    python -m densegrpo_fast.train --lookahead.plan nodes --lookahead.nodes '[3,6]' --lookahead.head head.safetensors

The starting policy is rolled out on training prompts; every state is completed exactly, and by the plan up to its last
evaluation; the head learns the difference. A head belongs to one model, grid and plan. Options are those of training,
and are parsed before torch is imported. Exit codes are in `exit_codes.py`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from densegrpo_fast.command_line import check_outputs, command_parser, configuration, positive
from densegrpo_fast.config import Config
from densegrpo_fast.exit_codes import ExitCode, UserError, user_errors_exit

if TYPE_CHECKING:
    from densegrpo_fast.models.base import FlowModel
    from densegrpo_fast.models.completion_head import CompletionHead
    from densegrpo_fast.runtime.head_training import Examples
    from densegrpo_fast.sampling.lookahead import Lookahead


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = _parser()
    options, overrides = parser.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    with user_errors_exit():
        config = configuration(overrides)
        check_outputs(options, "output")
        return int(completion(config, options))


def completion(config: Config, options: argparse.Namespace) -> ExitCode:
    """Draw trajectories, train a head on their exact completions, and write it.

    Raises:
        UserError: anything the user can act on.
    """
    import torch

    from densegrpo_fast.models.completion_head import CompletionHead, HeadConfig, save_head
    from densegrpo_fast.runtime import builders
    from densegrpo_fast.runtime.head_training import explained, train_head

    if not config.uses_lookahead:
        name = config.credit.method
        raise UserError(f"credit.method: {name} has no lookahead that a head could help", ExitCode.USAGE)
    if config.model.compile is not None:
        raise UserError("model.compile: a compiled network hides what a head sees; set it to null", ExitCode.USAGE)
    if config.window.remainder_share < 1:
        raise UserError("window.remainder_share: a head is made for all of the grid; set it to 1", ExitCode.USAGE)
    model = builders.build_model(config, builders.default_device())
    lookahead = builders.build_lookahead(config, model)
    assert lookahead is not None
    steps, plan = config.sampler.num_steps, lookahead.plan
    torch.manual_seed(config.seed)
    head = CompletionHead(
        HeadConfig(
            num_steps=steps,
            paths=plan.paths,
            latent_shape=model.latent_shape,
            patch=model.network.config.patch_size,
            hidden=model.network.inner_dim,
            width=options.width,
            depth=options.depth,
        )
    ).to(model.device)
    if not any(head.applies(state) for state in range(steps)):
        raise UserError(
            f"lookahead.plan: {plan.name} leaves no step out, so there is nothing to predict", ExitCode.USAGE
        )
    lookahead.head = head
    training, held_out = collect(config, model, lookahead, head, options.trajectories)
    train_head(head, training, options.steps, config.seed)
    save_head(head, options.output)
    print(f"{'state':>5} {'examples':>9}  share of the completion error that is gone, on held-out trajectories")
    for state, (count, share) in explained(head, held_out).items():
        print(f"{state:5} {count:9}  {share:.3f}")
    print(f"wrote {options.output}: {sum(p.numel() for p in head.parameters()):,} parameters for {plan.name}")
    return ExitCode.OK


def collect(
    config: Config, model: FlowModel, lookahead: Lookahead, head: CompletionHead, trajectories: int
) -> tuple[Examples, Examples]:
    """Examples of `trajectories` rollouts, rounded up to whole batches, for training; and some more, held out."""
    from densegrpo_fast.runtime.drawing import drawn
    from densegrpo_fast.runtime.head_training import Examples, examples_of
    from densegrpo_fast.sampling import plan as plans
    from densegrpo_fast.sampling.lookahead import Lookahead

    exact = Lookahead(model, plans.exact(config.sampler.num_steps), chunk=lookahead.chunk)
    parts: tuple[list[Examples], list[Examples]] = ([], [])
    for batch in drawn(config, model, trajectories, keep_hidden=True, cache=lookahead.cache):
        trajectory = batch.trajectory
        parts[batch.held_out].extend(examples_of(lookahead, head, trajectory, exact.complete(trajectory)))
    return Examples.joined(parts[False]), Examples.joined(parts[True])


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("completion", __doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE.safetensors", help="where the head is written")
    add("--trajectories", type=positive, default=2048, help="to learn from; default: 2048")
    add("--steps", type=positive, default=1500, help="optimiser steps; default: 1500")
    add("--width", type=positive, default=128, help="of the head's blocks, a multiple of 4; default: 128")
    add("--depth", type=positive, default=2, help="number of blocks; default: 2")
    return parser


if __name__ == "__main__":
    sys.exit(main())
