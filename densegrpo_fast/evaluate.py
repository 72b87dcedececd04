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
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `user_errors_exit`: a Ctrl-C during imports is no traceback

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from densegrpo_fast.common.command_line import check_outputs, command_parser, refuse_processes
from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.common.files import write_json
from densegrpo_fast.common.progress import announce
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments, split_overrides
from densegrpo_fast.run_files.model_refs import BASE, ModelRef, check_models, locate, settings_source
from densegrpo_fast.training.prompts import PromptSet, load_prompts


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    with user_errors_exit():
        own, overrides = split_overrides(sys.argv[1:] if arguments is None else arguments)
        options = _parser().parse_intermixed_args(own)
        check_outputs(options, "json")
        if options.reward:
            refuse_processes("evaluate --reward")
            return int(score(_file_config(options, overrides), options))
        if options.prompt is not None or options.prompts is not None:
            raise UsageError(
                "--prompt and --prompts belong to picture files (--reward NAME FILE...); held-out prompts are set with "
                "--data.eval_prompts",
            )
        names = options.subject or [BASE]
        if len(set(names)) != len(names):
            raise UsageError("expected every subject once")
        refs = [locate(name) for name in names]
        config, _ = parse_arguments(["--config", settings_source(refs, options.config), *overrides])
        check_models(refs, config.model.path)
        announce(f"evaluating {', '.join(names)}: loading torch and the model")
        return int(evaluate(config, refs, options.json))


def evaluate(config: Config, refs: Sequence[ModelRef], output: Path | None) -> ExitCode:
    """Compare models on the configuration's held-out prompts, print what is found and write it.

    Raises:
        UserError: anything the user can act on.
    """
    from densegrpo_fast.run_files.provenance import provenance
    from densegrpo_fast.run_files.statistics import tables
    from densegrpo_fast.training.pictures import compare_models
    from densegrpo_fast.training.processes import joined

    with joined(config) as world:
        found = compare_models(config, refs, world)
    if not world.main:
        return ExitCode.OK
    print(
        "{prompts} held-out prompts x {samples_per_prompt} pictures, {num_steps} steps, "
        "guidance {guidance_scale:g}\n".format(prompts=len(found["prompts"]), **found["settings"]["evaluation"])
    )
    print(tables(found))
    if output is not None:
        write_json(output, found | provenance())
    return ExitCode.OK


def score(config: Config, options: argparse.Namespace) -> ExitCode:
    """Score picture files with the configuration's reward terms, print the scores and write them.

    A picture's prompt is, in this order: --prompt, its line of --prompts, the text that `sample` wrote into it.

    Raises:
        UserError: anything the user can act on.
    """
    from densegrpo_fast.run_files.provenance import provenance
    from densegrpo_fast.run_files.statistics import tables
    from densegrpo_fast.training.pictures import score_files

    files = [Path(name) for name in options.subject]
    found = score_files(config, files, _file_prompts(options, len(files)))
    width = max(len(name) for name in found["files"])
    print("  ".join([" " * width, *(name.rjust(10) for name in found["scores"])]))
    for index, name in enumerate(found["files"]):
        cells = (f"{values[index]:.4f}".rjust(max(10, len(reward))) for reward, values in found["scores"].items())
        print("  ".join([name.ljust(width), *cells]))
    if len(files) > 1:
        print("\n" + tables({"subjects": {"files": found["means"]}, "differences": []}))
    if options.json is not None:
        write_json(options.json, found | provenance())
    return ExitCode.OK


def _file_config(options: argparse.Namespace, overrides: list[str]) -> Config:
    """The configuration with the rewards of --reward; of its other options only theirs mean anything here."""
    if not options.subject:
        raise UsageError("--reward: expected picture files to score")
    others = [word.partition("=")[0] for word in overrides if not word.startswith("reward.options=")]
    if others or options.config is not None:
        given = ", ".join([*others, *(["--config"] if options.config is not None else [])])
        raise UsageError(f"--reward goes with no option of training but reward.options, got {given}")
    terms = json.dumps(dict.fromkeys(options.reward, 1.0))
    config, _ = parse_arguments([f"reward.terms={terms}", "reward.observed=[]", *overrides])
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
