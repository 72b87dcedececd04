"""Find the noise level of each step at which reward gains are balanced: `python -m densegrpo_fast.calibrate`.

    python -m densegrpo_fast.calibrate --output levels.json --plot levels.png --config embedded_paper
    python -m densegrpo_fast.calibrate --output printed.json --rule printed --rounds 20
    python -m densegrpo_fast.train --config embedded_paper --sampler.calibration levels.json

Trajectories are drawn from the starting policy, every step's reward gains are counted by their sign, and the step's
noise is raised while they are balanced and lowered where they are not (DenseGRPO, arXiv 2601.20218, Algorithm 1).
"staircase" looks for the highest balanced level of each step, with the same noise in all rounds until further samples
confirm what was found, and leaves steps alone that the least noise does not balance; "printed" is the paper's rule to
the letter. Samples that no round has seen tell the result. A level is a(t) with sigma_t = a(t) sqrt(t/(1-t)) for the
dynamics flow_sde, and sigma_t itself, Eq. 11's psi(t) as printed, with `--sampler.dynamics dance`; sigma_t is shown.
Steps start from `sampler.noise_level`, and have noise as in training: in the steps of one of the configuration's
windows, the samples being shared out among several windows (in all steps with `--window.schedule none --window.size
null`); with `sampler.branches` each step is taken from a noise-free trajectory.
Completions are exact, whatever `lookahead` says: the error of a cheap plan has a sign too. Options of the preset may be
overridden as in training; they are parsed before torch is imported. Exit codes are in `exit_codes.py`.
"""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `user_errors_exit`: a Ctrl-C during imports is no traceback

import argparse
import io
import math
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densegrpo_fast.calibration.rules import Limits, PrintedRule, Round, Rule, Staircase
from densegrpo_fast.common.command_line import check_outputs, command_parser
from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.common.progress import PhaseProgress, announce
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import configuration

if TYPE_CHECKING:
    from densegrpo_fast.training.distributed import World
    from densegrpo_fast.training.gain_meter import GainMeter

_OF_STAIRCASE = ("lowest", "highest", "share", "deviations", "first", "resolution")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    parser = _parser()
    options, overrides = parser.parse_known_args(sys.argv[1:] if arguments is None else list(arguments))
    with user_errors_exit():
        config = configuration(overrides)
        check_outputs(options, "output", "plot")
        announce("calibrating: loading torch and the model")
        return int(calibrate(config, options))


def calibrate(config: Config, options: argparse.Namespace) -> ExitCode:
    """Calibrate, judge the result on other samples, show and write it.

    Raises:
        UserError: anything the user can act on.
    """
    rule = make_rule(config, options)
    from densegrpo_fast.calibration import report
    from densegrpo_fast.calibration.rules import calibrate as run
    from densegrpo_fast.flow.dynamics import C, coefficients
    from densegrpo_fast.run_files.provenance import provenance
    from densegrpo_fast.training.gain_meter import HELD_OUT_DRAW
    from densegrpo_fast.training.processes import joined

    if options.plot is not None:
        report.figure_class()
    with joined(config) as world:
        meter = _meter(config, options.samples, world)
        start, seen = rule.result, options.samples
        judging = 2 * (seen + (max(2, seen // options.branches) if options.branches else 0))
        total, stream = options.rounds * seen + judging, None if world.main else io.StringIO()
        with PhaseProgress("calibrating", total, "samples at most", stream) as progress:

            def measure(levels: tuple[float, ...], draw: int) -> list[list[float]]:
                return meter.gains(levels, draw, progress).T.tolist()

            def judged(levels: tuple[float, ...]) -> dict[str, Any]:
                consistency = None
                if options.branches:
                    consistency = meter.consistency(levels, HELD_OUT_DRAW, options.branches, progress)
                std = coefficients(meter.sigmas, levels, config.sampler.dynamics).table[:, C].tolist()
                held_out = Round(levels, measure(levels, HELD_OUT_DRAW))
                return report.state_record(held_out, consistency, std, meter.sigmas.tolist())

            before = judged(start)
            rounds = run(rule, measure, options.rounds)
            after = judged(rule.result)
    if not world.main:
        return ExitCode.OK
    sampler = {
        "dynamics": config.sampler.dynamics,
        "num_steps": config.sampler.num_steps,
        "steps": config.calibrated_steps(),
        "sigmas": meter.sigmas.tolist(),
    }
    content = report.document(rule, sampler, rounds, before, after, _settings(config, options))
    report.write_document(options.output, content | provenance())
    print(f"{report.table(content)}\n\n{report.legend(content)}\n\n{report.summary(content)}")
    if options.plot is not None:
        report.save_plot(options.plot, content)
    print(f"wrote {options.output}; train with --sampler.calibration {options.output}")
    return ExitCode.OK


def make_rule(config: Config, options: argparse.Namespace) -> Rule:
    """The rule that the command line asks for, at the levels that the configuration starts from.

    Raises:
        UsageError: its parameters do not agree, or belong to another rule.
    """
    given = {name: getattr(options, name) for name in _OF_STAIRCASE if getattr(options, name) is not None}
    # the samplers' own range, as in the configuration
    range_ = Limits(0.0, 1.0 if config.sampler.dynamics == "cps" else 3.0)
    if options.rule == "printed":
        if given:
            raise UsageError(f"--{next(iter(given))}: not an option of the printed rule")
        return PrintedRule(config.calibration_start(), range_)
    try:
        limits = Limits(given.pop("lowest", 0.1), given.pop("highest", 1.0))
        if limits.highest > range_.highest:
            raise ValueError(f"--highest must be at most {range_.highest:g} with dynamics {config.sampler.dynamics}")
        if options.samples < Staircase.enough:
            raise ValueError(f"--samples must be at least {Staircase.enough}, fewer signs move no level")
        return Staircase(config.calibration_start(), limits, **given)
    except ValueError as error:
        raise UsageError(f"--rule staircase: {error}") from None


def _meter(config: Config, samples: int, world: World) -> GainMeter:
    from densegrpo_fast.training.gain_meter import GainMeter
    from densegrpo_fast.training.models import build_model, default_device
    from densegrpo_fast.training.prompts import TrainingPrompts
    from densegrpo_fast.training.rewarding import configured_reward

    prompts = TrainingPrompts.of(config).prompts
    reward = configured_reward(config)
    model = build_model(config, default_device())
    return GainMeter.of(config, model, reward, prompts, samples, world)


def _settings(config: Config, options: argparse.Namespace) -> dict[str, Any]:
    return {
        "preset": config.preset,
        **config.calibration_settings(),
        "samples": options.samples,
        "rounds": options.rounds,
        "branches": options.branches,
        "seed": config.seed,
    }


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("calibrate", __doc__)
    add, count, number = parser.add_argument, partial(_integer, 1), _number
    add("--output", type=Path, required=True, metavar="FILE.json", help="where the levels and their evidence go")
    add("--plot", type=Path, metavar="FILE.png", help="draw the gains of each step before and after")
    add("--rule", choices=("staircase", "printed"), default="staircase", help="default: staircase")
    add("--samples", type=partial(_integer, 2), default=64, help="trajectories of a round; default: 64")
    add("--rounds", type=count, default=30, help="at most; default: 30")
    add(
        "--branches",
        type=_branches,
        default=4,
        help="noises per state, to find what a step's own noise makes of its gains; 0 = not measured; default: 4",
    )
    staircase = parser.add_argument_group("of the staircase")
    add = staircase.add_argument
    add("--lowest", type=number, help="of all levels; default: 0.1")
    add("--highest", type=number, help="of all levels; default: 1")
    add("--share", type=number, help="imbalance that does not matter, as a share of the signs; default: 0.1")
    add("--deviations", type=number, help="standard deviations of fair signs that do not matter; default: 2")
    add("--first", type=number, help="size of the first move of a level; default: 0.16")
    add("--resolution", type=number, help="size of the last moves; default: 0.02")
    return parser


def _integer(lowest: int, text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or not lowest <= int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {lowest}, got {text!r}")
    return int(text)


def _branches(text: str) -> int:
    number = _integer(0, text)
    if number == 1:
        raise argparse.ArgumentTypeError("expected 0 or at least 2, got 1")
    return number


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
