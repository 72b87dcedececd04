"""The command line of `python -m densegrpo_fast.fidelity`, parsed before torch is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from densegrpo_fast.common.aliases import cache_problem
from densegrpo_fast.common.command_line import command_parser
from densegrpo_fast.sampling.plan import Plan, make_plan

MakePlan = Callable[[int], Plan]
"""From the number of steps to a plan."""

_EXCLUDED = {
    "cost": ("analytic", "search", "adapter", "vae_dtype", "plot"),
    "analytic": ("config", "adapter", "copy_dtype", "vae_dtype", "cache"),
}
_DEFAULT_PLANS = ("exact_but_last", "n_step:2", "one_step")


def parse(arguments: Sequence[str], docstring: str | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and the overrides of the preset that are left.

    Args:
        arguments: the command line.
        docstring: of the command, for its help.

    Raises:
        SystemExit: with status 2 and a message, if an option is wrong; with 0 after --help.
    """
    parser = _parser(docstring)
    options, overrides = parser.parse_known_args(list(arguments))
    for mode, excluded in _EXCLUDED.items():
        if not getattr(options, mode):
            continue
        for name in excluded:
            if getattr(options, name):
                parser.error(f"--{mode} and --{name.replace('_', '-')} exclude each other")
    if options.analytic and overrides:
        parser.error(f"--analytic takes no configuration, got {' '.join(overrides)}")
    if options.cost and (options.config or overrides):
        for name in ("plans", "guidance", "decoder", "copy_dtype", "cache"):
            if getattr(options, name):
                parser.error(
                    f"--cost prices a configuration as it is: not with --{name.replace('_', '-')}, but with options "
                    "such as --lookahead.plan one_step"
                )
    if options.search and options.groups < 2:
        parser.error(
            f"--search needs --groups of at least 2, one half to search and one to judge, got {options.groups}"
        )
    return options, overrides


def plans_of(options: argparse.Namespace) -> list[MakePlan]:
    """The plans to measure: those given, or the default ones, which the configuration's own is put beside."""
    return options.plans or [_plan(text) for text in _DEFAULT_PLANS]


def _plan(text: str) -> MakePlan:
    """A plan as it is written on the command line.

    It is exact, exact_but_last, one_step, nodes:3,6, n_step:2, or the path of every state, as in paths:2,3:3:-:- for
    four steps.
    """
    kind, colon, value = text.partition(":")
    numbers = _numbers(value)
    if kind == "nodes" and numbers is not None:
        return partial(make_plan, kind, points=numbers)
    if kind == "n_step" and numbers is not None and len(numbers) == 1 and numbers[0] >= 1:
        return partial(make_plan, kind, n=numbers[0])
    parts = value.split(":")
    paths = [found for part in parts if (found := [] if part == "-" else _numbers(part)) is not None]
    if kind == "paths" and len(paths) == len(parts):
        return partial(make_plan, kind, paths=paths)
    if kind in ("exact", "exact_but_last", "one_step") and not colon:
        return partial(make_plan, kind)
    raise argparse.ArgumentTypeError(
        "expected exact, exact_but_last, one_step, nodes:3,6, n_step:2 or paths:2,3:3:-:- (with your numbers, and a "
        f"path for each state), got {text!r}"
    )


def _numbers(text: str) -> list[int] | None:
    """Whole numbers with commas between them; None if that is not what the text is."""
    words = text.split(",")
    return [int(word) for word in words] if all(word.isascii() and word.isdecimal() for word in words) else None


def _cache(text: str) -> str:
    if problem := cache_problem(text):
        raise argparse.ArgumentTypeError(problem)
    return text


def _integer(lowest: int, text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < lowest or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {lowest}, got {text!r}")
    return int(text)


def _correlation(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 2.0
    if not -1 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [-1, 1], got {text!r}")
    return value


def _parser(docstring: str | None) -> argparse.ArgumentParser:
    parser = command_parser("fidelity", docstring)
    add = parser.add_argument
    add("--config", help="preset or configuration file; default: embedded_dense")
    add("--adapter", type=Path, metavar="DIR", help="a run's adapter directory; default: the model as it comes")
    add(
        "--copy-dtype",
        nargs="+",
        choices=("float32", "bfloat16", "float16"),
        help="measure every plan also on a copy of the model with the adapter merged, in each of these precisions",
    )
    add(
        "--vae-dtype",
        nargs="+",
        choices=("float32", "bfloat16"),
        help="measure every plan that decodes in full also with the full decoder in each of these precisions",
    )
    add(
        "--cache",
        nargs="+",
        type=_cache,
        metavar="CACHE",
        help="measure every plan also with features of the rollout, text:own; with --copy-dtype it is the copies that "
        "reuse them",
    )
    add("--analytic", action="store_true", help="a Gaussian-mixture flow with exact velocities instead of a pipeline")
    add(
        "--cost",
        action="store_true",
        help="print what an iteration costs and stop: of --config, or of the embedded model, SD3.5-Medium and "
        "FLUX.1-dev with the plans that are named",
    )
    add(
        "--plans",
        nargs="+",
        type=_plan,
        metavar="PLAN",
        help="exact, exact_but_last, one_step, nodes:3,6, n_step:2, or the later steps of every state, as in "
        f"paths:2,3:3:-:-; default: the configuration's own, and {' '.join(_DEFAULT_PLANS)}",
    )
    add(
        "--guidance",
        nargs="+",
        choices=("full", "cond_only", "reuse"),
        help="after the first velocity; default: the preset's",
    )
    add("--decoder", nargs="+", choices=("preview", "full"), help="of all images; default: the preset's")
    add("--groups", type=partial(_integer, 1), default=64, help="held-out prompts; default: 64")
    add("--group-size", type=partial(_integer, 2), default=16, help="trajectories per prompt; default: 16")
    add("--seed", type=partial(_integer, 0), default=0, help="of all noise; default: 0")
    add("--json", type=Path, metavar="FILE", help="write everything measured")
    add(
        "--plot",
        type=Path,
        metavar="FILE.png",
        help="draw fidelity against cost, with the Pareto front and the thresholds",
    )
    add(
        "--search",
        action="store_true",
        help="find the cheapest plan above the thresholds on one half of the prompts, a node set or paths of each "
        "state's own, with every decoder and guidance that the other options name; judge all plans on the other",
    )
    add("--max-nodes", type=partial(_integer, 0), default=3, help="longest path that is searched; default: 3")
    for name, default in (("rewards", 0.95), ("gains", 0.90), ("worst", 0.75)):
        add(f"--threshold-{name}", type=_correlation, default=default, help=f"correlation to reach; default: {default}")
    return parser
