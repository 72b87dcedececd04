"""How far cheap lookaheads can be trusted, and what they cost: `python -m densegrpo_fast.fidelity`.

    python -m densegrpo_fast.fidelity                                   the embedded model, held-out prompts
    python -m densegrpo_fast.fidelity --plans nodes:3,6 n_step:2 --json fidelity.json --plot fidelity.png
    python -m densegrpo_fast.fidelity --search --groups 128             the cheapest node set above the thresholds
    python -m densegrpo_fast.fidelity --analytic                        an exact flow; needs torch alone
    python -m densegrpo_fast.fidelity --cost                            costs for known models, without weights

The reference is the exact plan with full guidance and the full decoder. All plans complete the same trajectories, and
agreement is rank correlation inside each group, over states 0..T-2 and their gains. Options of the preset may be
overridden as in training: `--sampler.num_steps 10`. Exit codes are in `exit_codes.py`. Options are parsed before torch
is imported.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densegrpo_fast.exit_codes import ExitCode, UserError, user_errors_exit
from densegrpo_fast.sampling.plan import Plan, make_plan

if TYPE_CHECKING:
    from densegrpo_fast.fidelity.measure import Variant
    from densegrpo_fast.fidelity.search import Candidate, Thresholds
    from densegrpo_fast.fidelity.subject import Subject

MakePlan = Callable[[int], Plan]
"""From the number of steps to a plan."""

_EXCLUDED = {
    "cost": ("analytic", "search", "config", "adapter", "head", "copy_dtype", "cache", "plot"),
    "analytic": ("config", "adapter", "head", "copy_dtype", "cache"),
}
_DEFAULT_PLANS = ("exact_but_last", "n_step:2", "one_step")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    options, overrides = parse(sys.argv[1:] if arguments is None else arguments)
    with user_errors_exit():
        _check_outputs(options)
        return int(costs(options) if options.cost else fidelity(options, overrides))


def parse(arguments: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """The command's own options, and the overrides of the preset that are left.

    Raises:
        SystemExit: with status 2 and a message, if an option is wrong; with 0 after --help.
    """
    parser = _parser()
    options, overrides = parser.parse_known_args(list(arguments))
    for mode, excluded in _EXCLUDED.items():
        if not getattr(options, mode):
            continue
        for name in excluded:
            if getattr(options, name):
                parser.error(f"--{mode} and --{name.replace('_', '-')} exclude each other")
        if overrides:
            parser.error(f"--{mode} takes no configuration, got {' '.join(overrides)}")
    if options.search and options.groups < 2:
        parser.error(
            f"--search needs --groups of at least 2, one half to search and one to judge, got {options.groups}"
        )
    return options, overrides


def costs(options: argparse.Namespace) -> ExitCode:
    """Print (and write) the cost table of the models that are known by name.

    Raises:
        UserError: a plan does not fit 10 steps, a package is missing, or the output cannot be written.
    """
    # advice about optional packages is none of this command's business
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        from densegrpo_fast.fidelity.costs import cost_records, cost_text

        records = cost_records(
            _plans(options), options.guidance or ["full", "cond_only"], options.decoder or ["preview"]
        )
    except ModuleNotFoundError as error:
        raise UserError(f"--cost needs {error.name}: pip install densegrpo-fast[train]", ExitCode.ENVIRONMENT) from None
    except ValueError as error:
        raise UserError(f"--plans: {error}", ExitCode.USAGE) from None
    print(cost_text(records))
    if options.json:
        from densegrpo_fast.fidelity.report import write_json
        from densegrpo_fast.runtime.provenance import provenance

        write_json(options.json, {"models": records, **provenance()})
    return ExitCode.OK


def fidelity(options: argparse.Namespace, overrides: list[str]) -> ExitCode:
    """Measure the plans, search for one if asked, and show and write the result.

    Raises:
        UserError: anything the user can act on, with its exit code.
    """
    subject, variants = _subject_and_variants(options, overrides)
    from densegrpo_fast.fidelity import report
    from densegrpo_fast.fidelity.measure import measure, reference
    from densegrpo_fast.fidelity.search import Thresholds
    from densegrpo_fast.fidelity.statistics import compare
    from densegrpo_fast.runtime.provenance import provenance

    sampling = {"group_size": options.group_size, "seed": options.seed}
    groups, searched = range(options.groups), None
    if options.search:
        groups = range(options.groups // 2, options.groups)
        thresholds = Thresholds(options.threshold_rewards, options.threshold_gains, options.threshold_worst)
        candidates, chosen = _searched(options, subject, variants, thresholds, range(groups.start))
        variants += [chosen.variant] if chosen and chosen.variant not in variants else []
        searched = report.search_record(candidates, chosen, thresholds)

    rewards = measure(subject, variants, groups, progress=partial(_progress, "measured", len(groups)), **sampling)
    exact = rewards[reference(subject.coefficients.num_steps)]
    records = {
        variant.name: report.plan_record(variant, compare(exact, rewards[variant]), subject) for variant in variants
    }
    settings = subject.settings | sampling | {"groups": options.groups, "groups_measured": len(groups)}
    settings |= {"trained_steps": subject.trained_steps, "kl": subject.kl, "noisy": list(subject.coefficients.noisy)}
    _show(settings, records, searched)
    if options.json:
        report.write_json(options.json, {"plans": records, "search": searched, "settings": settings, **provenance()})
    if options.plot:
        report.save_plot(options.plot, records, searched)
    return ExitCode.OK


def _subject_and_variants(options: argparse.Namespace, overrides: list[str]) -> tuple[Subject, list[Variant]]:
    """The subject and, without repeats, what to measure on it; options are checked before torch is imported."""
    config = None if options.analytic else _config(options, overrides)
    from densegrpo_fast.fidelity.measure import Variant
    from densegrpo_fast.fidelity.subject import analytic_subject, pipeline_subject

    make_plans = _plans(options)
    if config is None:
        subject = analytic_subject(options.groups)
        guidances, decoders = options.guidance or ["full"], options.decoder or ["full"]
    else:
        for make in make_plans:
            _made(make, config.sampler.num_steps)
        subject = pipeline_subject(
            config,
            options.adapter,
            options.groups,
            head=options.head,
            copy_dtype=options.copy_dtype,
            cache=options.cache,
        )
        guidances = options.guidance or [config.lookahead.guidance]
        decoders = options.decoder or [config.lookahead.decoder]
    if not set(decoders) <= set(subject.decoders):
        raise UserError("--decoder: this model has no preview decoder, expected full", ExitCode.USAGE)
    if not subject.guided:
        # without guidance there is nothing to drop after the first velocity
        guidances = ["full"]
    plans = [_made(make, subject.coefficients.num_steps) for make in make_plans]
    wanted = [
        Variant(plan, guidance, decoder)
        for plan in plans
        # without an evaluation every guidance is the same
        for guidance in (guidances if plan.evaluations else guidances[:1])
        for decoder in decoders
    ]
    if subject.head is not None:
        wanted += [replace(variant, head=True) for variant in wanted if variant.plan.paths == subject.head.config.paths]
        if not wanted[-1].head:
            raise UserError("--head: none of --plans is the one that it was made for", ExitCode.USAGE)
    if subject.copy is not None:
        wanted += [replace(variant, copy=True) for variant in wanted if variant.plan.evaluations]
    if subject.cache is not None:
        # with a copy, it is the copy that takes features over
        copied = subject.copy is not None
        wanted += [replace(v, cache=True) for v in wanted if v.plan.evaluations and v.copy == copied]
    if "preview" in decoders:
        ceiling = Variant(make_plan("exact", subject.coefficients.num_steps), "full", "preview")
        wanted = [ceiling, *wanted]
    return subject, list(dict.fromkeys(wanted))


def _config(options: argparse.Namespace, overrides: list[str]) -> Any:
    try:
        from densegrpo_fast.config_cli import load_config
        from densegrpo_fast.config_yaml import DEFAULT_PRESET
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is missing: pip install densegrpo-fast[train], or use --analytic", ExitCode.ENVIRONMENT
        ) from None
    config, flags = load_config(["--config", options.config or DEFAULT_PRESET, *overrides])
    if flags.resume or flags.dry_run:
        raise UserError("--resume and --dry-run are options of training", ExitCode.USAGE)
    return config


def _searched(
    options: argparse.Namespace,
    subject: Subject,
    variants: list[Variant],
    thresholds: Thresholds,
    groups: range,
) -> tuple[list[Candidate], Candidate | None]:
    from densegrpo_fast.fidelity.search import cheapest, search

    candidates = search(
        subject,
        groups,
        guidances=list(dict.fromkeys(variant.guidance for variant in variants)),
        decoders=list(dict.fromkeys(variant.decoder for variant in variants)),
        max_nodes=min(options.max_nodes, subject.coefficients.num_steps - 1),
        group_size=options.group_size,
        seed=options.seed,
        progress=partial(_progress, "searched", len(groups)),
    )
    return candidates, cheapest(candidates, thresholds)


def _show(settings: dict[str, Any], records: dict[str, Any], searched: dict[str, Any] | None) -> None:
    from densegrpo_fast.fidelity.report import ENOUGH, LEGEND, plan_table, step_table

    sampler = settings["sampler"]
    print(
        f"{settings['subject']}: {settings['groups_measured']} groups of {settings['group_size']}, "
        f"{sampler['num_steps']} steps, {sampler['dynamics']} at noise level {sampler['noise_level']}, "
        f"guidance {sampler['guidance_scale']:g}\n"
    )
    print(f"{plan_table(records)}\n\n{step_table(records)}\n\n{LEGEND}")
    remaining = min((record["remaining_gains"] for record in records.values()), default=1.0)
    advice = "" if remaining >= ENOUGH else f"; below {ENOUGH:.0%}, judge by a more finely graded reward"
    print(f"\n{remaining:.0%} of the groups' steps remain, in the others all exact gains are equal{advice}.")
    if searched is None:
        return
    wanted = ", ".join(f"{name} {value:g}" for name, value in searched["thresholds"].items())
    if searched["chosen"] is None:
        print(f"search: none of {len(searched['candidates'])} candidates reaches {wanted}; raise --max-nodes.")
        return
    inside, outside = searched["in_sample"], records[searched["chosen"]]
    print(f"search: {searched['chosen']} is the cheapest of {len(searched['candidates'])} candidates above {wanted}.")
    for label, found in (("in sample", inside), ("held out", outside)):
        print(
            f"  {label:10} rewards {found['spearman_rewards_mean']:.3f}, gains {found['spearman_gains_mean']:.3f}, "
            f"worst step {found['spearman_gains_worst_step']:.3f}"
        )


def _progress(what: str, total: int, done: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{what} {done} of {total} groups", end="\n" if done == total else "", file=sys.stderr, flush=True)


def _made(make: MakePlan, num_steps: int) -> Plan:
    try:
        return make(num_steps)
    except ValueError as error:
        raise UserError(f"--plans: {error}", ExitCode.USAGE) from None


def _plans(options: argparse.Namespace) -> list[MakePlan]:
    return options.plans or [_plan(text) for text in _DEFAULT_PLANS]


def _plan(text: str) -> MakePlan:
    """A plan as it is written on the command line: exact, exact_but_last, one_step, nodes:3,6 or n_step:2."""
    kind, colon, value = text.partition(":")
    numbers = [int(word) for word in value.split(",") if word.isascii() and word.isdecimal()]
    complete = len(numbers) == len(value.split(","))
    if kind == "nodes" and complete:
        return partial(make_plan, kind, points=numbers)
    if kind == "n_step" and complete and len(numbers) == 1 and numbers[0] >= 1:
        return partial(make_plan, kind, n=numbers[0])
    if kind in ("exact", "exact_but_last", "one_step") and not colon:
        return partial(make_plan, kind)
    raise argparse.ArgumentTypeError(
        f"expected exact, exact_but_last, one_step, nodes:3,6 or n_step:2 (with your numbers), got {text!r}"
    )


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


def _check_outputs(options: argparse.Namespace) -> None:
    for name in ("json", "plot"):
        path: Path | None = getattr(options, name)
        if path is not None and not path.resolve().parent.is_dir():
            raise UserError(f"--{name}: there is no directory {path.parent}", ExitCode.OUTPUT)


def _parser() -> argparse.ArgumentParser:
    summary, _, rest = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog="python -m densegrpo_fast.fidelity",
        description=summary,
        epilog=rest,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", help="preset or configuration file; default: embedded_dense")
    add("--adapter", type=Path, metavar="DIR", help="a run's adapter directory; default: the model as it comes")
    add("--head", type=Path, metavar="FILE", help="completion head to measure too, on the plan it was made for")
    add(
        "--copy-dtype",
        choices=("float32", "bfloat16", "float16"),
        help="measure every plan also on a copy of the model with the adapter merged, in this precision",
    )
    add(
        "--cache",
        metavar="SPEC",
        help="measure every plan also with features of the rollout: text, reuse:2-5, skip:0,6",
    )
    add("--analytic", action="store_true", help="a Gaussian-mixture flow with exact velocities instead of a pipeline")
    add("--cost", action="store_true", help="print costs for the embedded model, SD3.5-Medium and FLUX.1-dev, and stop")
    add(
        "--plans",
        nargs="+",
        type=_plan,
        metavar="PLAN",
        help=f"exact, exact_but_last, one_step, nodes:3,6, n_step:2; default: {' '.join(_DEFAULT_PLANS)}",
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
    add("--plot", type=Path, metavar="FILE.png", help="draw fidelity against cost with the Pareto front")
    add(
        "--search",
        action="store_true",
        help="find the cheapest node set above the thresholds on one half of the prompts; judge all plans on the other",
    )
    add("--max-nodes", type=partial(_integer, 0), default=3, help="largest set that is searched; default: 3")
    for name, default in (("rewards", 0.95), ("gains", 0.90), ("worst", 0.75)):
        add(f"--threshold-{name}", type=_correlation, default=default, help=f"correlation to reach; default: {default}")
    return parser


if __name__ == "__main__":
    sys.exit(main())
