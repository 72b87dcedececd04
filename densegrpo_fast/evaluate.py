"""Score a base model, adapters and runs on held-out prompts, or picture files: `python -m densegrpo_fast.evaluate`.

    python -m densegrpo_fast.evaluate base runs/embedded_sparse-0 runs/embedded_branched-0 --json evaluation.json
    python -m densegrpo_fast.evaluate base runs/mine --reward.observed "[jpeg_compressibility]"
    python -m densegrpo_fast.evaluate --reward scenes --prompt "a red circle" one.png two.png
    python -m densegrpo_fast.evaluate --reward pickscore --reward.options "{pickscore: {model: DIR}}" pictures/*.png

A subject is "base", a run directory or an adapter directory. All draw the same prompts from the same noise as a run's
own evaluation, and every two are compared prompt by prompt, the later minus the earlier, with 95% intervals. The
rewards are reward.terms and reward.observed. Settings are those of --config; by default those of the first run, else of
the preset embedded_dense. Options of training may be overridden as there: `--evaluation.num_prompts 256`,
`--data.eval_prompts FILE`.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import load_config, split_overrides
from densegrpo_fast.config.command_line import check_outputs, command_parser
from densegrpo_fast.run_files.model_refs import BASE, ModelRef, check_models, locate, settings_source
from densegrpo_fast.training.prompts import PromptSet, load_prompts

logger = logging.getLogger(__name__)

_CHUNK = 32
"""Pictures of one size that a reward gets at a time."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with user_errors_exit():
        own, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
        options = _parser().parse_intermixed_args(own)
        check_outputs(options, "json")
        if options.reward:
            return int(score_files(_file_config(options, overrides), options))
        if options.prompt is not None or options.prompts is not None:
            raise UsageError(
                "--prompt and --prompts belong to picture files (--reward NAME FILE...); held-out prompts are set with "
                "--data.eval_prompts",
            )
        names = options.subject or [BASE]
        if len(set(names)) != len(names):
            raise UsageError("expected every subject once")
        subjects = [locate(name) for name in names]
        config, _ = load_config(["--config", settings_source(subjects, options.config), *overrides])
        check_models(subjects, config.model.path)
        return int(evaluate(config, subjects, options.json))


def evaluate(config: Config, subjects: list[ModelRef], output: Path | None) -> ExitCode:
    """Evaluate all subjects on the configuration's held-out prompts, print the comparison and write it.

    Raises:
        UserError: anything the user can act on.
    """
    from densegrpo_fast.run_files.comparison import compare, tables
    from densegrpo_fast.run_files.model_refs import read_weights, with_adapter
    from densegrpo_fast.training.evaluation import HeldOut
    from densegrpo_fast.training.models import default_device, load_model
    from densegrpo_fast.training.rewarding import build_observer

    held_out, reward = HeldOut.of(config), build_observer(config)
    weights = [read_weights(subject) for subject in subjects]
    model = load_model(config.model, default_device())
    scores: dict[str, dict[str, Any]] = {}
    for subject, worn in zip(subjects, weights, strict=True):
        with with_adapter(model, subject, worn):
            found = held_out.evaluate(model, reward)
        scores[subject.name] = {name: values.numpy() for name, values in found.scores.items()}
    comparison = compare(scores)
    print(
        f"{len(held_out.prompts)} held-out prompts x {held_out.samples} pictures, {held_out.num_steps} steps, "
        f"guidance {held_out.guidance_scale:g}\n"
    )
    print(tables(comparison))
    if output is not None:
        settings = {
            "model": config.model.model_dump(mode="json"),
            "reward": config.reward.model_dump(mode="json"),
            "evaluation": config.evaluation.model_dump(mode="json") | {"guidance_scale": held_out.guidance_scale},
            "seed": held_out.seed,
        }
        about = {
            subject.name: {"origin": worn.origin, "sha256": worn.fingerprint()}
            for subject, worn in zip(subjects, weights, strict=True)
        }
        everything = {
            name: {reward: values.tolist() for reward, values in rewards.items()} for name, rewards in scores.items()
        }
        _write(output, {**comparison, "adapters": about, "settings": settings}, held_out.prompts, everything)
    return ExitCode.OK


def score_files(config: Config, options: argparse.Namespace) -> ExitCode:
    """Score picture files with the configuration's reward terms, print the scores and write them.

    A picture's prompt is, in this order: --prompt, its line of --prompts, the text that `sample` wrote into it.

    Raises:
        UserError: anything the user can act on.
    """
    from densegrpo_fast.run_files.comparison import compare, tables
    from densegrpo_fast.run_files.images import read_picture
    from densegrpo_fast.training.rewarding import build_reward

    files = [Path(name) for name in options.subject]
    prompts = _file_prompts(options, len(files))
    pictures, texts = [], []
    for file in files:
        try:
            image, fields = read_picture(file)
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or "it is no picture, or a damaged one"
            raise UsageError(f"{file} cannot be read: {reason}") from None
        pictures.append(image)
        texts.append(fields.get("prompt", ""))
    rows = texts if prompts is None else list(prompts.prompts)
    if not all(rows):
        words = "%d of %d pictures have no prompt, which most rewards need: give one with --prompt or --prompts"
        logger.warning(words, rows.count(""), len(rows))
    metadata = [{} for _ in files] if prompts is None else list(prompts.metadata)
    reward = build_reward(config.reward.terms, config.reward.options)
    found = _scores(reward, pictures, rows, metadata)

    width = max(len(str(file)) for file in files)
    print("  ".join([" " * width, *(name.rjust(10) for name in found)]))
    for index, file in enumerate(files):
        cells = (f"{values[index]:.4f}".rjust(max(10, len(name))) for name, values in found.items())
        print("  ".join([str(file).ljust(width), *cells]))
    comparison = compare({"files": found})
    if len(files) > 1:
        print("\n" + tables(comparison))
    if options.json is not None:
        document = {"means": comparison["subjects"]["files"], "files": [str(file) for file in files]}
        _write(options.json, document, rows, found)
    return ExitCode.OK


def _scores(reward: Any, pictures: list[Any], prompts: list[str], metadata: list[Any]) -> dict[str, list[float]]:
    """Scores by reward, in the order of the pictures, which are scored in batches of one size."""
    import torch

    found = {name: [float("nan")] * len(pictures) for name in reward.terms}
    sizes: dict[tuple[int, ...], list[int]] = {}
    for index, picture in enumerate(pictures):
        sizes.setdefault(tuple(picture.shape), []).append(index)
    for indices in sizes.values():
        for start in range(0, len(indices), _CHUNK):
            part = indices[start : start + _CHUNK]
            images = torch.stack([pictures[i] for i in part])
            scores = reward(images, [prompts[i] for i in part], [metadata[i] for i in part])
            for name, values in scores.per_reward.items():
                for index, value in zip(part, values.tolist(), strict=True):
                    found[name][index] = value
    return found


def _file_config(options: argparse.Namespace, overrides: list[str]) -> Config:
    """The configuration with the rewards of --reward; of its other options only theirs mean anything here."""
    if not options.subject:
        raise UsageError("--reward: expected picture files to score")
    others = [word.partition("=")[0] for word in overrides if not word.startswith("reward.options=")]
    if others or options.config is not None:
        given = ", ".join([*others, *(["--config"] if options.config is not None else [])])
        raise UsageError(f"--reward goes with no option of training but reward.options, got {given}")
    terms = json.dumps(dict.fromkeys(options.reward, 1.0))
    config, _ = load_config([f"reward.terms={terms}", "reward.observed=[]", *overrides])
    return config


def _file_prompts(options: argparse.Namespace, count: int) -> PromptSet | None:
    if options.prompt is not None and options.prompts is not None:
        raise UsageError("--prompt and --prompts exclude each other")
    if options.prompt is not None:
        return PromptSet((options.prompt,) * count, ({},) * count)
    if options.prompts is None:
        return None
    prompts = load_prompts(options.prompts)
    if len(prompts) != count:
        raise UsageError(
            f"--prompts: expected one prompt for each of the {count} pictures, {options.prompts} holds {len(prompts)}",
        )
    return prompts


def _write(path: Path, document: dict[str, Any], prompts: Sequence[str], scores: dict[str, Any]) -> None:
    from densegrpo_fast.common.files import replace_text
    from densegrpo_fast.run_files.provenance import provenance

    document = {**document, "prompts": list(prompts), "scores": _present(scores), **provenance()}
    replace_text(path, json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def _present(value: Any) -> Any:
    """The value with None in place of NaN, which JSON has not."""
    if isinstance(value, dict):
        return {name: _present(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_present(item) for item in value]
    return None if value != value else value


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("evaluate", __doc__)
    add = parser.add_argument
    add("subject", nargs="*", metavar="SUBJECT", help=f"{BASE}, a run or an adapter; with --reward, picture files")
    add("--config", help="preset or configuration file; default: the first run's, else embedded_dense")
    add("--json", type=Path, metavar="FILE", help="write means, differences and all scores")
    add("--reward", action="append", metavar="NAME", help="score picture files with this reward; may be repeated")
    add("--prompt", help="with --reward: the prompt of all pictures")
    add("--prompts", type=Path, metavar="FILE", help="with --reward: a .txt or .jsonl file with a prompt per picture")
    return parser


if __name__ == "__main__":
    sys.exit(main())
