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
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densegrpo_fast.config import Config
from densegrpo_fast.config_cli import load_config
from densegrpo_fast.exit_codes import ExitCode, UserError, user_errors_exit

if TYPE_CHECKING:
    from torch import Tensor

    from densegrpo_fast.models.base import FlowModel
    from densegrpo_fast.models.completion_head import CompletionHead
    from densegrpo_fast.sampling.lookahead import Lookahead

_HELD_OUT = 8
"""One batch of trajectories in so many is kept from training and judges the head."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = _parser()
    options, overrides = parser.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    with user_errors_exit():
        config, flags = load_config(overrides)
        if flags.resume or flags.dry_run:
            raise UserError("--resume and --dry-run are options of training", ExitCode.USAGE)
        if not options.output.resolve().parent.is_dir():
            raise UserError(f"--output: there is no directory {options.output.parent}", ExitCode.OUTPUT)
        return int(completion(config, options))


def completion(config: Config, options: argparse.Namespace) -> ExitCode:
    """Draw trajectories, train a head on their exact completions, and write it.

    Raises:
        UserError: anything the user can act on.
    """
    import torch

    from densegrpo_fast.models.completion_head import CompletionHead, HeadConfig, save_head
    from densegrpo_fast.runtime import build

    if not config.uses_lookahead:
        name = config.credit.method
        raise UserError(f"credit.method: {name} has no lookahead that a head could help", ExitCode.USAGE)
    if config.model.compile is not None:
        raise UserError("model.compile: a compiled network hides what a head sees; set it to null", ExitCode.USAGE)
    model = build.build_model(config, build.default_device())
    lookahead = build.build_lookahead(config, model)
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


@dataclass(frozen=True)
class Examples:
    """What the head sees and what it should say, N rows; all on the CPU.

    Attributes:
        hidden: [N, tokens, D] in the network's dtype or half precision.
        latents, estimate, target: [N, C, H, W] float32; target = exact completion - estimate.
        state: [N] int64.
    """

    hidden: Tensor
    latents: Tensor
    estimate: Tensor
    target: Tensor
    state: Tensor


def collect(
    config: Config, model: FlowModel, lookahead: Lookahead, head: CompletionHead, trajectories: int
) -> tuple[Examples, Examples]:
    """Examples of `trajectories` rollouts, rounded up to whole batches, for training; and some more, held out."""
    import torch
    from tqdm import tqdm

    from densegrpo_fast.runtime import build
    from densegrpo_fast.runtime.experience import sample
    from densegrpo_fast.sampling import plan as plans
    from densegrpo_fast.sampling.lookahead import Lookahead

    prompts, windows = build.build_prompts(config), build.build_windows(config).reached()
    exact = Lookahead(model, plans.exact(config.sampler.num_steps), chunk=config.lookahead.chunk)
    batch = config.data.num_prompts * config.sampler.group_size
    count = max(2, math.ceil(trajectories / batch * _HELD_OUT / (_HELD_OUT - 1)))
    parts: tuple[list[Examples], list[Examples]] = ([], [])
    for number in tqdm(range(count), desc="trajectories", disable=None):
        rows, _ = prompts.rows(number, config.sampler.group_size)
        # iterations of training count up from 0, these down from the largest epoch
        epoch = 2**31 - 1 - number
        # in both parts the windows take turns
        held_out = number // _HELD_OUT
        turn = held_out if number % _HELD_OUT == 0 else number - held_out - 1
        coefficients = build.build_coefficients(config, model, windows[turn % len(windows)])
        trajectory = sample(config, model, rows, coefficients, epoch, keep_hidden=True, cache=lookahead.cache)
        ends, standing = exact.complete(trajectory), lookahead.evaluate(trajectory)
        sigmas = coefficients.sigmas
        for state, last in standing.items():
            if not head.applies(state):
                continue
            estimate = last.latents - sigmas[last.index] * last.velocity
            hidden = last.hidden
            assert hidden is not None
            parts[number % _HELD_OUT == 0].append(
                Examples(
                    hidden.half().cpu() if hidden.dtype.itemsize == 4 else hidden.cpu(),
                    last.latents.cpu(),
                    estimate.cpu(),
                    (ends[state] - estimate).cpu(),
                    torch.full((len(estimate),), state),
                )
            )
    return _joined(parts[False]), _joined(parts[True])


def train_head(head: CompletionHead, examples: Examples, steps: int, seed: int, batch: int = 128) -> None:
    """Fit the head in place, every state's errors in units of their own size."""
    import torch
    from tqdm import tqdm

    device = head.scale.device
    for state in range(head.config.num_steps):
        own = examples.target[examples.state == state]
        if len(own):
            head.scale[state] = own.square().mean().sqrt().clamp(min=1e-6).to(device)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    head.train()
    for step in tqdm(range(steps), desc="head", disable=None):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * step / steps))
        index = torch.randint(len(examples.state), (batch,), generator=generator)
        predicted, target, scale = _predict(head, examples, index)
        loss = ((predicted - target) / scale).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    head.eval()


def explained(head: CompletionHead, examples: Examples) -> dict[int, tuple[int, float]]:
    """Per state: how many examples, and 1 - (squared error with the head) / (squared error of the estimate)."""
    import torch

    found = {}
    for state in examples.state.unique().tolist():
        rows = (examples.state == state).nonzero().flatten()
        with torch.no_grad():
            left = sum(
                (predicted - target).square().sum().item()
                for predicted, target, _ in (_predict(head, examples, index) for index in rows.split(128))
            )
        found[state] = (len(rows), 1 - left / examples.target[rows].square().sum().item())
    return found


def _predict(head: CompletionHead, examples: Examples, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    device, state = head.scale.device, examples.state[index]
    inputs = (examples.hidden[index], examples.latents[index], examples.estimate[index], state)
    predicted = head(*(tensor.to(device) for tensor in inputs))
    return predicted, examples.target[index].to(device), head.scale[state.to(device)].view(-1, 1, 1, 1)


def _joined(parts: list[Examples]) -> Examples:
    import torch

    names = ("hidden", "latents", "estimate", "target", "state")
    return Examples(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m densegrpo_fast.completion",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="FILE.safetensors", help="where the head is written")
    add("--trajectories", type=_positive, default=2048, help="to learn from; default: 2048")
    add("--steps", type=_positive, default=1500, help="optimiser steps; default: 1500")
    add("--width", type=_positive, default=128, help="of the head's blocks, a multiple of 4; default: 128")
    add("--depth", type=_positive, default=2, help="number of blocks; default: 2")
    return parser


def _positive(text: str) -> Any:
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
