"""Train a completion head for a configuration's lookahead: `python -m densegrpo_fast.completion`.

    python -m densegrpo_fast.completion --output head.safetensors --lookahead.plan nodes --lookahead.nodes '[2,4]'
    python -m densegrpo_fast.fidelity --plans nodes:2,4 --head head.safetensors
    python -m densegrpo_fast.train --config embedded_dense --lookahead.plan nodes --lookahead.nodes '[2,4]' \\
        --lookahead.head head.safetensors

and for branches, here those of the preset that training starts from:

    python -m densegrpo_fast.completion --config embedded_branched --lookahead.plan one_step --output head.safetensors
    python -m densegrpo_fast.fidelity --config embedded_branched --plans one_step --head head.safetensors
    python -m densegrpo_fast.train --lookahead.plan one_step --lookahead.head head.safetensors

The starting policy is sampled on training prompts; every state is completed exactly, and by the plan up to its last
evaluation; the head learns the difference. A head belongs to one model, grid and plan. What it took to make it is
printed, and kept in the file. Options are those of training, and are parsed before torch is imported. Exit codes are in
`exit_codes.py`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from densegrpo_fast.common.command_line import check_outputs, command_parser, positive
from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import configuration

if TYPE_CHECKING:
    from densegrpo_fast.models.completion_head import CompletionHead
    from densegrpo_fast.sampling.lookahead import Lookahead
    from densegrpo_fast.training.head_cost import HeadCounter
    from densegrpo_fast.training.head_examples import Examples


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = _parser()
    options, overrides = parser.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    with user_errors_exit():
        # what training refuses beside a head is refused here
        config = configuration([*overrides, f"lookahead.head={options.output}"])
        check_outputs(options, "output")
        return int(completion(config, options))


def completion(config: Config, options: argparse.Namespace) -> ExitCode:
    """Draw samples, train a head on their exact completions, and write it.

    Args:
        config: of the runs that the head is for, which is their `lookahead.head`.
        options: the command's own.

    Raises:
        UserError: anything the user can act on.
    """
    import torch

    from densegrpo_fast.models.completion_head import CompletionHead, HeadConfig, save_head, usual_width
    from densegrpo_fast.sampling import plan as plans
    from densegrpo_fast.sampling.lookahead import Lookahead
    from densegrpo_fast.training import builders
    from densegrpo_fast.training.head_cost import HeadCounter
    from densegrpo_fast.training.head_training import BATCH, explained, train_head

    if options.width and options.width % HeadConfig.heads:
        raise UsageError(f"--width: expected a multiple of {HeadConfig.heads}, got {options.width}")
    if not (config.uses_lookahead or config.uses_branches):
        name = config.credit.method
        raise UsageError(f"credit.method: {name} has no lookahead that a head could help")
    model = builders.build_model(config, builders.default_device())
    without = config.lookahead.model_copy(update={"head": None})
    lookahead = builders.build_lookahead(config.model_copy(update={"lookahead": without}), model)
    assert lookahead is not None
    steps, plan, network = config.sampler.num_steps, lookahead.plan, model.network
    torch.manual_seed(config.seed)
    head = CompletionHead(
        HeadConfig(
            num_steps=steps,
            paths=plan.paths,
            latent_shape=model.latent_shape,
            patch=network.config.patch_size,
            hidden=network.inner_dim,
            width=options.width or usual_width(network.inner_dim, network.config.num_layers, options.depth),
            depth=options.depth,
        )
    ).to(model.device)
    if not any(head.applies(state) for state in _completed(config)):
        raise UsageError(f"lookahead.plan: {plan.name} leaves no step out, so there is nothing to predict")
    lookahead.head = head
    exact = Lookahead(model, plans.exact(steps), chunk=lookahead.chunk)
    counter = HeadCounter(config, exact, lookahead)
    training, held_out = collect(config, exact, lookahead, head, options.trajectories, counter)
    train_head(head, training, options.steps, config.seed)
    shares = explained(head, held_out)
    head.cost = cost = counter.total(options.steps * BATCH, len(held_out))
    save_head(head, options.output)
    print(f"{'state':>5} {'examples':>9}  share of the completion error that is gone, on held-out samples")
    for state, (count, share) in shares.items():
        print(f"{state:5} {count:9}  {share:.3f}")
    operations = "" if cost.tflop is None else f", {cost.tflop:.3g} TFLOP"
    print(
        f"cost: {cost.forwards:,} forwards, {cost.decodes} decodes, {cost.head_rows:,} rows of the head{operations}, "
        f"{cost.seconds:.0f} s"
    )
    size = sum(parameter.numel() for parameter in head.parameters())
    print(f"wrote {options.output}: {size:,} parameters, width {head.config.width}, for {plan.name}")
    return ExitCode.OK


def collect(
    config: Config,
    exact: Lookahead,
    lookahead: Lookahead,
    head: CompletionHead,
    samples: int,
    counter: HeadCounter,
) -> tuple[Examples, Examples]:
    """Examples of `samples` trajectories, or branches, rounded up to whole batches, for training; and more, held out.

    Args:
        config: of training with the head.
        exact, lookahead: that completes by the policy itself, and that the head is for.
        head: that shall learn.
        samples: for training.
        counter: is told what was drawn.
    """
    from densegrpo_fast.training.drawing import drawn
    from densegrpo_fast.training.experience import draw
    from densegrpo_fast.training.head_examples import Examples, exactly_completed, examples_of

    parts: tuple[list[Examples], list[Examples]] = ([], [])
    for batch in drawn(config, exact.model, samples, partial(draw, cache=lookahead.cache)):
        trajectory, ends = exactly_completed(exact, lookahead, batch.samples)
        parts[batch.held_out].extend(examples_of(lookahead, head, trajectory, ends))
        counter.add(batch.samples)
    return Examples.joined(parts[False]), Examples.joined(parts[True])


def _completed(config: Config) -> set[int]:
    """The states that some iteration completes."""
    from densegrpo_fast.training.drawing import turns

    noisy = {step for steps in turns(config) for step in steps if config.noise_levels[step]}
    states = noisy if config.sampler.branches is None else {step + 1 for step in noisy}
    return states - {config.sampler.num_steps}


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("completion", __doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE.safetensors", help="where the head is written")
    add("--trajectories", type=positive, default=2048, help="or branches, to learn from; default: 2048")
    add("--steps", type=positive, default=1500, help="optimiser steps; default: 1500")
    add(
        "--width",
        type=positive,
        help="of the head's blocks, a multiple of 4; default: of a head that takes about a tenth of a forward",
    )
    add("--depth", type=positive, default=2, help="number of blocks; default: 2")
    return parser


if __name__ == "__main__":
    sys.exit(main())
