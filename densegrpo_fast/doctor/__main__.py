"""Examine this machine, or the importance ratio of a configuration: `python -m densegrpo_fast.doctor`.

    python -m densegrpo_fast.doctor                                   packages, GPU, implementations, threads, disk
    python -m densegrpo_fast.doctor --json findings.json --run.output_dir /data/run
    python -m densegrpo_fast.doctor --ratio --config embedded_paper   one rollout and its replay, without an update
    python -m densegrpo_fast.doctor --ratio --dry-run --config sd35_medium_pickscore
    torchrun --nproc-per-node 2 -m densegrpo_fast.doctor --distributed        how processes talk, what they hold

Without --ratio every finding is ok, warn or problem, with what to do; the exit status is 1 if there is a problem.
With --ratio the unchanged policy replays its own steps, so every importance ratio must be 1. Where it is not, causes
(storage, timestep, batch shape, attention, adapter, dropout, autocast, ...) are switched off one at a time until the
cause is named, and the exit status is 8. A LoRA that is still zero gets small random values, because otherwise nothing
that is wrong with it would show. Options of the preset may be overridden as in training. Other exit codes are in
`exit_codes.py`. Options are parsed before torch is imported.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from densegrpo_fast.common.command_line import check_outputs, command_parser, refuse_processes
from densegrpo_fast.common.errors import SetupError, UsageError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.common.files import write_json


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = _parser()
    options, overrides = parser.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    if options.config is not None:
        overrides = ["--config", options.config, *overrides]
    if options.ratio and options.distributed:
        parser.error("--ratio and --distributed examine different things: choose one")
    if options.dry_run and not (options.ratio or options.distributed):
        parser.error("--dry-run is an option of --ratio and --distributed")
    if options.tolerance is not None and not options.ratio:
        parser.error("--tolerance is an option of --ratio")
    with user_errors_exit():
        if not options.distributed:
            refuse_processes("doctor without --distributed")
        check_outputs(options, "json")
        examination = processes if options.distributed else ratio if options.ratio else environment
        return int(examination(options, overrides))


def environment(options: argparse.Namespace, overrides: list[str]) -> ExitCode:
    """Examine the machine, and show and write the findings.

    Raises:
        UserError: the configuration is wrong, or the output cannot be written.
    """
    from dataclasses import asdict

    # read when torch is imported, which the examination does
    wait_policy = os.environ.get("OMP_WAIT_POLICY")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from densegrpo_fast.doctor.environment import examine
    from densegrpo_fast.doctor.findings import healthy, text

    findings = examine(overrides, wait_policy)
    print(text(findings))
    sound = healthy(findings)
    _write(options.json, {"healthy": sound, "findings": [asdict(finding) for finding in findings]})
    return ExitCode.OK if sound else ExitCode.PROBLEM


def ratio(options: argparse.Namespace, overrides: list[str]) -> ExitCode:
    """Examine the importance ratio of a configuration, and show and write the result.

    Raises:
        UserError: the configuration is wrong, something is missing, or the output cannot be written.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from densegrpo_fast.config.cli import parse_arguments

        config, flags = parse_arguments(overrides)
        if flags.resume:
            raise UsageError("--resume is an option of training")
        # advice about optional packages is none of this command's business
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        from densegrpo_fast.doctor.ratio import examine, text
    except ModuleNotFoundError as error:
        raise SetupError(f"--ratio needs {error.name}: pip install densegrpo-fast[train]") from None
    found = examine(config, options.tolerance, options.dry_run)
    print(text(found))
    _write(options.json, found)
    return ExitCode.OK if found["status"] == "ok" else ExitCode.RATIO


def processes(options: argparse.Namespace, overrides: list[str]) -> ExitCode:
    """Examine the processes that were started together, and show and write the findings.

    Raises:
        UserError: there is one alone, they cannot be joined, or the output cannot be written.
    """
    from dataclasses import asdict

    from densegrpo_fast.config.cli import parse_arguments

    config, _ = parse_arguments(overrides)
    from densegrpo_fast.doctor.findings import healthy, text
    from densegrpo_fast.doctor.processes import process_findings
    from densegrpo_fast.training.processes import joined

    with joined(config) as world:
        if world.size == 1:
            raise UsageError(
                "--distributed examines several processes: "
                "torchrun --nproc-per-node 2 -m densegrpo_fast.doctor --distributed"
            )
        findings = list(process_findings(config, world, options.dry_run))
    sound = healthy(findings)
    if world.main:
        print(text(findings))
        _write(options.json, {"healthy": sound, "findings": [asdict(finding) for finding in findings]})
    return ExitCode.OK if sound else ExitCode.PROBLEM


def _write(path: Path | None, document: dict[str, Any]) -> None:
    if path is None:
        return
    from densegrpo_fast.run_files.provenance import commit, versions

    write_json(path, document | {"commit": commit(), "versions": versions()})


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("doctor", __doc__)
    add = parser.add_argument
    add("--config", help="preset or configuration file; default: embedded_branched")
    add("--ratio", action="store_true", help="examine the importance ratio instead of the machine")
    add("--distributed", action="store_true", help="examine the processes that torchrun has started instead")
    add(
        "--dry-run",
        action="store_true",
        help="with --ratio and --distributed: a tiny random model for absent weights, and of --ratio two samples",
    )
    add(
        "--tolerance",
        type=_positive,
        metavar="X",
        help="with --ratio: allowed |ratio - 1|; default: 1%% of objective.clip_range, at least 1e-6",
    )
    add("--json", type=Path, metavar="FILE", help="write everything found")
    return parser


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
