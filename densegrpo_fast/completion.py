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
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from densegrpo_fast.common.command_line import check_outputs, command_parser, positive
from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import configuration

if TYPE_CHECKING:
    from densegrpo_fast.sampling.lookahead import Lookahead
    from densegrpo_fast.training.head_training import Examples
    from densegrpo_fast.training.trainer import Trainer


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

    from densegrpo_fast.models.completion_head import CompletionHead, HeadConfig, HeadCost, save_head, usual_width
    from densegrpo_fast.sampling import plan as plans
    from densegrpo_fast.sampling.lookahead import Lookahead
    from densegrpo_fast.training.head_training import BATCH, explained, train_head
    from densegrpo_fast.training.lookahead import build_plan
    from densegrpo_fast.training.meter import Counts
    from densegrpo_fast.training.models import build_model, default_device
    from densegrpo_fast.training.policy_samples import no_reward
    from densegrpo_fast.training.trainer import Trainer

    if options.width and options.width % HeadConfig.heads:
        raise UsageError(f"--width: expected a multiple of {HeadConfig.heads}, got {options.width}")
    if not (config.uses_lookahead or config.uses_branches):
        name = config.credit.method
        raise UsageError(f"credit.method: {name} has no lookahead that a head could help")
    model = build_model(config, default_device())
    steps, network = config.sampler.num_steps, model.network
    plan = build_plan(config, steps)
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
    trainer = Trainer(config, model=model, head=head, reward=no_reward())
    if not any(head.applies(state) for state in _completed(trainer)):
        raise UsageError(f"lookahead.plan: {plan.name} leaves no step out, so there is nothing to predict")
    assert trainer.lookahead is not None
    start = perf_counter()
    exact = Lookahead(trainer.policy, plans.exact(steps), chunk=trainer.lookahead.rows.rows)
    training, held_out = collect(trainer, exact, options.trajectories)
    train_head(head, training, options.steps, config.seed)
    shares = explained(head, held_out)
    learned, judged = options.steps * BATCH, len(held_out)
    counts = trainer.meter.total(*trainer.meter.counts) + Counts(learned=learned, corrected=judged)
    prices = trainer.costs.prices
    tflop = None if prices is None else prices.flops(counts) / 1e12
    head.cost = cost = HeadCost(counts.forwards, 0, learned + judged, tflop, perf_counter() - start)
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


def collect(trainer: Trainer, exact: Lookahead, samples: int) -> tuple[Examples, Examples]:
    """Examples of `samples` trajectories, or branches, rounded up to whole batches, for training; and more, held out.

    Args:
        trainer: of a run whose lookahead has the head.
        exact: completes by the policy itself.
        samples: for training.
    """
    from densegrpo_fast.training.head_training import Examples, exactly_completed, examples_of
    from densegrpo_fast.training.policy_samples import policy_samples

    lookahead, parts = trainer.lookahead, (list[Examples](), list[Examples]())
    assert lookahead is not None and lookahead.head is not None
    for sampled in policy_samples(trainer, samples):
        rollout, ends = exactly_completed(exact, lookahead, sampled.rollout)
        parts[sampled.held_out].extend(examples_of(lookahead, lookahead.head, rollout, ends))
    return Examples.joined(parts[False]), Examples.joined(parts[True])


def _completed(trainer: Trainer) -> set[int]:
    """The states that some iteration completes."""
    config = trainer.config
    noisy = {step for steps in trainer.schedule.turns() for step in steps if config.noise_levels[step]}
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
