"""Draw pictures with a base model or an adapter: `python -m densegrpo_fast.sample`.

    python -m densegrpo_fast.sample "a red circle" "two blue squares" --output pictures
    python -m densegrpo_fast.sample --prompts prompts.txt --adapter runs/embedded_branched-0 --output pictures
    python -m densegrpo_fast.sample "a cat" --model.path stabilityai/stable-diffusion-3.5-medium --output pictures
    python -m densegrpo_fast.sample "a red circle" --strip --seeds 0,1 --output steps

Writes `grid.png` (a row for each prompt, a column for each seed), every picture by itself under `images/`, and
`settings.json` with all that is needed to draw them again. A picture depends on its prompt and seed (to rounding), not
on what else is drawn. With `--strip`, `strips/NNNN.png` and `.webp` (an animation) are written instead, one for each
prompt: for each seed and step the latent, the picture that the noise-free sampler would reach from there, its reward
(`--reward.terms`) and the gain of the step. Settings are those of --config; by default those of the adapter's run, else
of the preset embedded_dense. Options of training may be overridden as there: `--model.path DIR`,
`--sampler.dynamics cps`.
"""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `user_errors_exit`: a Ctrl-C during imports is no traceback

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densegrpo_fast.common.command_line import command_parser, refuse_processes
from densegrpo_fast.common.errors import OutputError, UsageError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.common.files import output_errors, write_json
from densegrpo_fast.common.progress import announce
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments, split_overrides
from densegrpo_fast.run_files.model_refs import BASE, ModelRef, check_models, locate, settings_source
from densegrpo_fast.training.prompts import PromptSet, load_prompts

if TYPE_CHECKING:
    from densegrpo_fast.models.base import FlowModel
    from densegrpo_fast.run_files.model_refs import Weights
    from densegrpo_fast.training.pictures import PictureSampler

_SEEDS = re.compile(r"([0-9]{1,10})(?:-([0-9]{1,10}))?")
_MOST_SEEDS = 10_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with user_errors_exit():
        own, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
        options = _parser().parse_intermixed_args(own)
        if options.strip:
            refuse_processes("sample --strip")
        prompts, ref = _prompts(options), locate(options.adapter)
        config, _ = parse_arguments(["--config", settings_source([ref], options.config), *overrides])
        check_models([ref], config.model.path)
        _check_output(options.output, options.overwrite)
        announce(f"drawing with {ref.name}: loading torch and the model")
        return int((strips if options.strip else sample)(config, ref, prompts, options))


def sample(config: Config, ref: ModelRef, prompts: PromptSet, options: argparse.Namespace) -> ExitCode:
    """Draw all prompts with all seeds, shared out among the processes, and write the output directory.

    Raises:
        UserError: anything the user can act on.
    """
    from densegrpo_fast.run_files.images import save_pictures
    from densegrpo_fast.training.pictures import draw, picture_sampler, with_each
    from densegrpo_fast.training.processes import joined

    sampler = picture_sampler(config, options.sampler or "ode", options.steps, options.guidance)
    rows = [(prompt, seed) for prompt in prompts.prompts for seed in options.seeds]
    with joined(config) as world:
        ((weights, images),) = with_each(
            config, [ref], lambda model: draw(model, rows, sampler, config.sampler.micro_batch, world)
        )
    if not world.main:
        return ExitCode.OK
    with output_errors(f"cannot write in {options.output}"):
        files = save_pictures(images, options.output, rows, columns=len(options.seeds))
    settings = _settings(config, ref, weights, sampler, options) | {
        "images": [
            {"file": file, "prompt": prompt, "seed": seed} for file, (prompt, seed) in zip(files, rows, strict=True)
        ],
        "size": list(images.shape[-2:]),
    }
    write_json(options.output / "settings.json", settings)
    print(f"{len(rows)} pictures by {ref.name} ({weights.origin}): {options.output / 'grid.png'}")
    return ExitCode.OK


def strips(config: Config, ref: ModelRef, prompts: PromptSet, options: argparse.Namespace) -> ExitCode:
    """Write a strip for each prompt, with a row for each seed, into the output directory.

    Raises:
        UserError: anything the user can act on.
    """
    from densegrpo_fast.run_files.strip import save_strip
    from densegrpo_fast.training.pictures import draw_strip, picture_sampler, with_each
    from densegrpo_fast.training.rewarding import configured_reward

    if options.sampler == "ode":
        raise UsageError("--strip shows what each noisy step gains, so it goes with --sampler sde")
    sampler = picture_sampler(config, "sde", options.steps, options.guidance)
    reward = configured_reward(config)
    chunk = min(config.sampler.micro_batch, config.lookahead.chunk)
    names = [f"strips/{number:04d}.png" for number in range(len(prompts))]

    def draw_all(model: FlowModel) -> None:
        for name, prompt, metadata in zip(names, prompts.prompts, prompts.metadata, strict=True):
            save_strip(
                draw_strip(model, prompt, metadata, options.seeds, sampler, reward, chunk), options.output / name
            )

    ((weights, _),) = with_each(config, [ref], draw_all)
    written = [{"file": name, "prompt": prompt} for name, prompt in zip(names, prompts.prompts, strict=True)]
    settings = _settings(config, ref, weights, sampler, options) | {"strips": written}
    write_json(options.output / "settings.json", settings | {"reward": config.reward.model_dump(mode="json")})
    print(f"{len(names)} strip{'s' * (len(names) != 1)} by {ref.name} ({weights.origin}): {options.output / 'strips'}")
    return ExitCode.OK


def _settings(
    config: Config, ref: ModelRef, weights: Weights, sampler: PictureSampler, options: argparse.Namespace
) -> dict[str, Any]:
    """What is needed to draw the same again."""
    from densegrpo_fast.flow.noise import LAYOUT_VERSION
    from densegrpo_fast.run_files.provenance import provenance

    return provenance() | {
        "model": config.model.model_dump(mode="json"),
        "adapter": {"name": ref.name, **weights.about()},
        "sampler": sampler.settings(),
        "seeds": options.seeds,
        "noise_layout": LAYOUT_VERSION,
    }


def _prompts(options: argparse.Namespace) -> PromptSet:
    if bool(options.prompt) == (options.prompts is not None):
        raise UsageError("expected prompts: either as arguments, or in a file with --prompts")
    if options.prompts is not None:
        return load_prompts(options.prompts)
    if not all(text.strip() for text in options.prompt):
        raise UsageError("expected prompts that are not empty")
    for text in options.prompt:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise UsageError(f"expected prompts in UTF-8, got {text.encode('utf-8', 'surrogateescape')!r}") from None
    return PromptSet(tuple(options.prompt), ({},) * len(options.prompt))


def _check_output(path: Path, overwrite: bool) -> None:
    with output_errors(f"--output: cannot write in {path}"):
        if path.exists() and not path.is_dir():
            raise OutputError(f"--output: {path} is not a directory")
        used = path.is_dir() and any(path.iterdir())
    if used and not overwrite:
        raise OutputError(
            f"--output: {path} is not empty; choose another directory, or replace pictures of the same name with "
            "--overwrite",
        )


def _seeds(text: str) -> list[int]:
    """Seeds as they are written on the command line: 0-3,7."""
    found: list[int] = []
    for part in text.split(","):
        match = _SEEDS.fullmatch(part.strip())
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < 2**32 or last - first >= _MOST_SEEDS:
            raise argparse.ArgumentTypeError(f"expected seeds below 2^32 such as 0-3,7, got {text!r}")
        found += range(first, last + 1)
    return list(dict.fromkeys(found))


def _number(kind: type, low: float, high: float, text: str) -> Any:
    try:
        value = kind(text)
    except ValueError:
        value = low - 1
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(f"expected a number in {low}..{high}, got {text!r}")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("sample", __doc__)
    add = parser.add_argument
    add("prompt", nargs="*", metavar="PROMPT", help="what to draw")
    add("--prompts", type=Path, metavar="FILE", help="a .txt or .jsonl file of prompts instead")
    add("--output", type=Path, required=True, metavar="DIR", help="where the pictures are written")
    add("--overwrite", action="store_true", help="write into an output directory that is not empty")
    add("--adapter", default=BASE, metavar="DIR", help=f"a run or adapter directory, or {BASE}; default: {BASE}")
    add("--config", help="preset or configuration file; default: the adapter's run's, else embedded_dense")
    add("--seeds", type=_seeds, default=[0, 1, 2, 3], metavar="LIST", help="such as 0-3,7; default: 0-3")
    add(
        "--sampler",
        choices=("ode", "sde"),
        help="noise-free or with the noise of training; default: ode, with --strip sde",
    )
    add("--strip", action="store_true", help="show each step: latent, predicted picture, its reward, the step's gain")
    add("--steps", type=partial(_number, int, 1, 1000), help="denoising steps; default: the configuration's")
    add("--guidance", type=partial(_number, float, 1, 100), help="guidance scale; default: the configuration's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
