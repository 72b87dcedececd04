"""Fit a preview decoder to the policy's own pictures: `python -m densegrpo_fast.preview`.

    python -m densegrpo_fast.preview --output preview
    python -m densegrpo_fast.fidelity --decoder preview full --model.preview_decoder preview
    python -m densegrpo_fast.train --model.preview_decoder preview

Gains are small differences between similar pictures, so a preview decoder has to agree with the full one on what the
policy makes, not on pictures at large. The starting policy is rolled out on training prompts, the full decoder decodes
the results, and the preview decoder that the configuration has is fitted to them, in float32 whatever
`model.preview_dtype` says. Held-out groups tell how far both decoders' rewards agree, before and after. The result is
an AutoencoderTiny directory for `model.preview_decoder`.
Options are those of training, and are parsed before torch is imported. Exit codes are in `exit_codes.py`.
"""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `user_errors_exit`: a Ctrl-C during imports is no traceback

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from densegrpo_fast.common.command_line import check_outputs, command_parser, positive, refuse_processes
from densegrpo_fast.common.errors import OutputError, UsageError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.common.progress import announce
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import configuration

if TYPE_CHECKING:
    from densegrpo_fast.training.preview_training import Pictures
    from densegrpo_fast.training.trainer import Trainer


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = _parser()
    options, overrides = parser.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    with user_errors_exit():
        refuse_processes("preview")
        config = configuration(overrides)
        if os.path.lexists(options.output):
            raise OutputError(f"--output: {options.output} is there already; give another directory")
        check_outputs(options, "output")
        announce("fitting a preview decoder: loading torch and the model")
        return int(preview(config, options))


def preview(config: Config, options: argparse.Namespace) -> ExitCode:
    """Draw pictures, fit the preview decoder to them, and write it.

    Raises:
        UserError: anything the user can act on.
    """
    from densegrpo_fast.common.files import STAGE_SUFFIX, output_errors, replace_bytes
    from densegrpo_fast.models.diffusers_model import DiffusersModel
    from densegrpo_fast.training.policy_samples import policy_alone
    from densegrpo_fast.training.preview_training import agreement, train_preview
    from densegrpo_fast.training.rewarding import configured_reward
    from densegrpo_fast.training.schedule import Schedule

    # whole trajectories are drawn whatever the run draws, as only those end in a picture
    sampler = config.sampler.model_copy(update={"branches": None})
    exact = config.model.model_copy(update={"preview_dtype": "float32"})
    reward = configured_reward(config)
    trainer = policy_alone(config.model_copy(update={"model": exact, "sampler": sampler}), reward=reward)
    model = trainer.model
    if not isinstance(model, DiffusersModel) or model.preview_decoder is None:
        raise UsageError(
            "model.preview_decoder: this pipeline brings no preview decoder to start from; name the directory of an "
            "AutoencoderTiny for its latents (for SD3: TAESD3)",
        )
    size, chunk = config.sampler.group_size, trainer.rewards.full_decodes.rows
    training, held_out = collect(trainer, options.pictures, Schedule(config, model).turns(), chunk)
    before = agreement(model, held_out, reward, size, chunk)
    train_preview(model, training, options.steps, options.batch, config.seed)
    after = agreement(model, held_out, reward, size, chunk)
    staged = options.output.with_name(f".{options.output.name}{STAGE_SUFFIX}")
    with output_errors(f"cannot write {options.output}"):
        model.preview_decoder.save_pretrained(staged, safe_serialization=True)
        for file in sorted(staged.iterdir()):
            replace_bytes(file, file.read_bytes(), digest=True)
        staged.rename(options.output)
    print(f"{len(held_out)} held-out pictures, preview decoder against full decoder:")
    print(f"  mean absolute pixel error               {before.pixel_error:.4f} -> {after.pixel_error:.4f}")
    print(f"  rank correlation of rewards in a group  {before.spearman_rewards:.3f} -> {after.spearman_rewards:.3f}")
    print(f"wrote {options.output}; use it with --model.preview_decoder {options.output}")
    return ExitCode.OK


def collect(trainer: Trainer, pictures: int, turns: Sequence[Sequence[int]], chunk: int) -> tuple[Pictures, Pictures]:
    """Pictures of `pictures` rollouts, rounded up to whole batches, for training; and some more, held out.

    Args:
        trainer: whose policy is rolled out.
        pictures: for training.
        turns: noisy steps that the batches take turns with.
        chunk: most pictures that are decoded at a time.
    """
    import torch

    from densegrpo_fast.training.policy_samples import policy_samples
    from densegrpo_fast.training.preview_training import Pictures, decoded

    parts: tuple[list[Pictures], list[Pictures]] = ([], [])
    for sampled in policy_samples(trainer, pictures, turns):
        latents, batch = sampled.rollout.latents[-1], sampled.batch
        images = decoded(trainer.model, latents, "full", chunk)
        parts[sampled.held_out].append(Pictures(latents.cpu(), images, batch.prompts, batch.metadata))
    training, held_out = (
        Pictures(
            torch.cat([part.latents for part in chosen]),
            torch.cat([part.images for part in chosen]),
            [prompt for part in chosen for prompt in part.prompts],
            [item for part in chosen for item in part.metadata],
        )
        for chosen in (parts[False], parts[True])
    )
    return training, held_out


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("preview", __doc__)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="where the decoder is written; must not exist")
    add("--pictures", type=positive, default=3072, help="to learn from; default: 3072")
    add("--steps", type=positive, default=4500, help="optimiser steps; default: 4500")
    add("--batch", type=positive, default=32, help="pictures in a step; default: 32")
    return parser


if __name__ == "__main__":
    sys.exit(main())
