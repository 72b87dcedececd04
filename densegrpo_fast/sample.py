"""Draw pictures with a base model or an adapter: `python -m densegrpo_fast.sample`.

    python -m densegrpo_fast.sample "a red circle" "two blue squares" --output pictures
    python -m densegrpo_fast.sample --prompts prompts.txt --adapter runs/embedded_branched-0 --output pictures
    python -m densegrpo_fast.sample "a cat" --model.path stabilityai/stable-diffusion-3.5-medium --output pictures

Writes `grid.png` (a row for each prompt, a column for each seed), every picture by itself under `images/`, and
`settings.json` with all that is needed to draw them again. A picture depends on its prompt and seed (to rounding), not
on what else is drawn. Settings are those of --config; by default those of the adapter's run, else of the preset
embedded_dense. Options of training may be overridden as there: `--model.path DIR`, `--sampler.dynamics cps`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densegrpo_fast.common.errors import OutputError, UsageError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import load_config, split_overrides
from densegrpo_fast.config.command_line import command_parser
from densegrpo_fast.run_files.model_refs import BASE, ModelRef, check_models, locate, settings_source
from densegrpo_fast.training.prompts import PromptSet, load_prompts

if TYPE_CHECKING:
    from torch import Tensor

    from densegrpo_fast.models.base import FlowModel

_SEEDS = re.compile(r"([0-9]{1,10})(?:-([0-9]{1,10}))?")
_MOST_SEEDS = 10_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with user_errors_exit():
        own, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
        options = _parser().parse_intermixed_args(own)
        prompts, subject = _prompts(options), locate(options.adapter)
        source = settings_source([subject], options.config)
        config, _ = load_config(["--config", source, *overrides])
        check_models([subject], config.model.path)
        _check_output(options.output, options.overwrite)
        return int(sample(config, subject, prompts, options))


def sample(config: Config, subject: ModelRef, prompts: PromptSet, options: argparse.Namespace) -> ExitCode:
    """Draw all prompts with all seeds and write the output directory.

    Raises:
        UserError: anything the user can act on.
    """
    from densegrpo_fast.common.files import output_errors, replace_text
    from densegrpo_fast.flow.noise import LAYOUT_VERSION
    from densegrpo_fast.run_files.images import save_grid, save_picture
    from densegrpo_fast.run_files.model_refs import read_weights, with_adapter
    from densegrpo_fast.run_files.provenance import provenance
    from densegrpo_fast.training.models import default_device, load_model

    sampler = sampler_settings(config, options)
    weights = read_weights(subject)
    model = load_model(config.model, default_device())
    rows = [(prompt, seed) for prompt in prompts.prompts for seed in options.seeds]
    with with_adapter(model, subject, weights):
        images = draw(model, rows, sampler, chunk=config.sampler.micro_batch)

    written = []
    with output_errors(f"cannot write in {options.output}"):
        (options.output / "images").mkdir(parents=True, exist_ok=True)
        for index, ((prompt, seed), image) in enumerate(zip(rows, images, strict=True)):
            name = f"images/{index // len(options.seeds):04d}-seed{seed}.png"
            save_picture(image, options.output / name, {"prompt": prompt, "seed": str(seed)})
            written.append({"file": name, "prompt": prompt, "seed": seed})
        columns, scale = len(options.seeds), max(1, 128 // images.shape[-1])
        captions = [prompt for prompt, _ in rows]
        grid = save_grid(images, options.output / "grid.png", columns=columns, scale=scale, captions=captions)
    settings = {
        "model": config.model.model_dump(mode="json"),
        "adapter": {"name": subject.name, "origin": weights.origin, "sha256": weights.fingerprint()},
        "sampler": sampler,
        "seeds": options.seeds,
        "images": written,
        "size": list(images.shape[-2:]),
        "noise_layout": LAYOUT_VERSION,
        **provenance(),
    }
    replace_text(options.output / "settings.json", json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
    print(f"{len(rows)} pictures by {subject.name} ({weights.origin}): {grid}")
    return ExitCode.OK


def sampler_settings(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """The sampler that is asked for, as JSON data: kind, num_steps, guidance_scale; of the SDE dynamics, noise_level.

    The ODE sampler is that of the held-out evaluation, the SDE sampler that of training with noise in every step.

    Raises:
        UsageError: if the noise levels do not fit the number of steps.
    """
    sde = options.sampler == "sde"
    steps = options.steps or (config.sampler if sde else config.evaluation).num_steps
    own = config.sampler.guidance_scale if sde else config.evaluation_guidance_scale
    settings = {
        "kind": options.sampler,
        "num_steps": steps,
        "guidance_scale": own if options.guidance is None else options.guidance,
    }
    if sde:
        levels = config.sampler.noise_level
        if isinstance(levels, list) and len(levels) != steps:
            raise UsageError(
                f"--steps: sampler.noise_level holds {len(levels)} levels, one for each step, so {steps} steps need "
                "another sampler.noise_level (one number serves any number of steps)",
            )
        settings |= {"dynamics": config.sampler.dynamics, "noise_level": levels}
    return settings


def draw(model: FlowModel, rows: Sequence[tuple[str, int]], sampler: dict[str, Any], chunk: int) -> Tensor:
    """Pictures [N, 3, H, W] float32 on the CPU of N (prompt, seed).

    Args:
        sampler: as `sampler_settings` returns it.
        chunk: rows per forward; fewer where the memory runs out.

    Raises:
        UsageError: if a noise level does not fit the dynamics; 3, if one row is too many for the memory.
    """
    import torch

    from densegrpo_fast.flow.dynamics import coefficients
    from densegrpo_fast.flow.noise import Stream
    from densegrpo_fast.sampling.oom_backoff import OomBackoff
    from densegrpo_fast.sampling.rollout import initial_noise, rollout, sample_ode

    sigmas, guidance_scale = model.sigmas(sampler["num_steps"]), sampler["guidance_scale"]
    table = None
    if sampler["kind"] == "sde":
        try:
            table = coefficients(sigmas, sampler["noise_level"], sampler["dynamics"]).to(model.device)
        except ValueError as error:
            raise UsageError(f"sampler: {error}") from None

    def drawn(part: slice) -> Tensor:
        prompts, seeds = zip(*rows[part], strict=True)
        # the seed takes the place of the sample's number, so rows of different seeds can share a forward
        index = torch.tensor(seeds, device=model.device)
        noise = initial_noise(model, index, seed=0, iteration=0, stream=Stream.EVALUATION)
        conditioning = model.encode(list(prompts))
        if table is None:
            latents = sample_ode(model, noise, conditioning, sigmas, guidance_scale=guidance_scale)
        else:
            trajectory = rollout(
                model,
                noise,
                conditioning,
                table,
                sample_index=index,
                seed=0,
                iteration=0,
                guidance_scale=guidance_scale,
            )
            latents = trajectory.latents[-1]
        return model.decode(latents).cpu()

    return torch.cat(list(OomBackoff(chunk, "sampler.micro_batch").each(slice(0, len(rows)), drawn)))


def _prompts(options: argparse.Namespace) -> PromptSet:
    if bool(options.prompt) == (options.prompts is not None):
        raise UsageError("expected prompts: either as arguments, or in a file with --prompts")
    if options.prompts is not None:
        return load_prompts(options.prompts)
    if not all(text.strip() for text in options.prompt):
        raise UsageError("expected prompts that are not empty")
    return PromptSet(tuple(options.prompt), ({},) * len(options.prompt))


def _check_output(path: Path, overwrite: bool) -> None:
    if path.exists() and not path.is_dir():
        raise OutputError(f"--output: {path} is not a directory")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
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
        default="ode",
        help="noise-free or with the noise of training; default: ode",
    )
    add("--steps", type=partial(_number, int, 1, 1000), help="denoising steps; default: the configuration's")
    add("--guidance", type=partial(_number, float, 1, 100), help="guidance scale; default: the configuration's")
    return parser


if __name__ == "__main__":
    sys.exit(main())
