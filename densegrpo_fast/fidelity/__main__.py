"""How far cheap lookaheads can be trusted, and what they cost: `python -m densegrpo_fast.fidelity`.

    python -m densegrpo_fast.fidelity                                   the embedded model, held-out prompts
    python -m densegrpo_fast.fidelity --plans nodes:3,6 n_step:2 --json fidelity.json --plot fidelity.png
    python -m densegrpo_fast.fidelity --search --groups 128             the cheapest plan above the thresholds
    python -m densegrpo_fast.fidelity --config embedded_tempflow        branches of one trunk, as that preset has them
    python -m densegrpo_fast.fidelity --analytic                        an exact flow; needs torch alone
    python -m densegrpo_fast.fidelity --cost                            costs for known models, without weights
    python -m densegrpo_fast.fidelity --cost --plans nodes:4,7 --head --copy-dtype bfloat16 --cache text reuse:6-18

The reference is the exact plan with full guidance and the full decoder. All plans complete the same trajectories, and
agreement is rank correlation inside each group, over the states 0..T-2 that have a completion of their own and their
gains. With a preset that has sampler.branches a group is the branches of one noise-free trunk, and agreement that of
their rewards in every step. What --search finds beyond node sets is a path for each state, which training takes as
lookahead.plan paths.
Options of the preset may be overridden as in training: `--sampler.num_steps 10`. Exit codes are in `exit_codes.py`.
Options are parsed before torch is imported.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

from densegrpo_fast.command_line import check_outputs, configuration
from densegrpo_fast.exit_codes import ExitCode, UserError, user_errors_exit
from densegrpo_fast.fidelity.options import MakePlan, parse, plans_of
from densegrpo_fast.sampling.plan import Plan, make_plan

if TYPE_CHECKING:
    from densegrpo_fast.fidelity.measure import Variant
    from densegrpo_fast.fidelity.search import Candidate, Thresholds
    from densegrpo_fast.fidelity.subject import Subject
    from densegrpo_fast.models.base import Decoder
    from densegrpo_fast.sampling.lookahead import Guidance


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    options, overrides = parse(sys.argv[1:] if arguments is None else arguments, __doc__)
    with user_errors_exit():
        check_outputs(options, "json", "plot")
        return int(costs(options) if options.cost else fidelity(options, overrides))


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
            plans_of(options),
            options.guidance or ["full", "cond_only"],
            options.decoder or ["preview"],
            head=options.head is not None,
            copies=list(dict.fromkeys(options.copy_dtype or ())),
            caches=list(dict.fromkeys(options.cache or ())),
        )
    except ModuleNotFoundError as error:
        raise UserError(f"--cost needs {error.name}: pip install densegrpo-fast[train]", ExitCode.ENVIRONMENT) from None
    except ValueError as error:
        raise UserError(f"--plans: {error}", ExitCode.USAGE) from None
    for spec in options.cache or ():
        if all(f"cache({spec})" in record["left_out"] for record in records.values()):
            raise UserError(f"--cache {spec}: fits none of {', '.join(records)}", ExitCode.USAGE)
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
    subject, ways, variants = _subject_and_variants(options, overrides)
    from densegrpo_fast.fidelity import report
    from densegrpo_fast.fidelity.measure import agreement_of, measure, reference
    from densegrpo_fast.fidelity.plot import save_plot
    from densegrpo_fast.fidelity.search import Thresholds
    from densegrpo_fast.fidelity.statistics import persistence
    from densegrpo_fast.runtime.provenance import provenance

    sampling = {"group_size": options.group_size, "seed": options.seed}
    thresholds = Thresholds(options.threshold_rewards, options.threshold_gains, options.threshold_worst)
    groups, searched = range(options.groups), None
    if options.search:
        groups = range(options.groups // 2, options.groups)
        candidates, chosen = _searched(options, subject, ways, thresholds, range(groups.start))
        variants += [chosen.variant] if chosen and chosen.variant not in variants else []
        searched = report.search_record(candidates, chosen, thresholds)

    rewards = measure(subject, variants, groups, progress=partial(_progress, "measured", len(groups)), **sampling)
    exact = rewards[reference(subject.coefficients.num_steps)]
    records = {
        variant.name: report.plan_record(
            variant, agreement_of(subject, exact, rewards[variant]), subject, options.group_size
        )
        for variant in variants
    }
    settings = subject.settings | sampling | {"groups": options.groups, "groups_measured": len(groups)}
    settings |= {"trained_steps": subject.trained_steps, "kl": subject.kl, "noisy": list(subject.coefficients.noisy)}
    kept = None if subject.branched else persistence(exact)
    _show(settings, records, searched, kept)
    if options.json:
        document = {"plans": records, "search": searched, "persistence": kept, "settings": settings}
        report.write_json(options.json, document | provenance())
    if options.plot:
        save_plot(options.plot, records, searched, asdict(thresholds))
    return ExitCode.OK


def _subject_and_variants(
    options: argparse.Namespace, overrides: list[str]
) -> tuple[Subject, tuple[list[Guidance], list[Decoder]], list[Variant]]:
    """The subject, guidances and decoders, and what to measure; options are checked before torch is imported."""
    config = None if options.analytic else _config(options, overrides)
    from densegrpo_fast.fidelity.measure import Variant, expanded
    from densegrpo_fast.fidelity.subject import analytic_subject, pipeline_subject

    make_plans = plans_of(options)
    if config is not None and config.sampler.branches is not None:
        if options.cache:
            problem = f"is for trajectories, and {config.preset} has sampler.branches; leave it out"
            raise UserError(f"--cache {problem}", ExitCode.USAGE)
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
            copy_dtypes=list(dict.fromkeys(options.copy_dtype or ())),
            vae_dtypes=list(dict.fromkeys(options.vae_dtype or ())),
            caches=list(dict.fromkeys(options.cache or ())),
        )
        guidances = options.guidance or [config.lookahead.guidance]
        decoders = options.decoder or [config.lookahead.decoder]
    if not set(decoders) <= set(subject.decoders):
        raise UserError("--decoder: this model has no preview decoder, expected full", ExitCode.USAGE)
    if subject.branched and "reuse" in guidances:
        raise UserError("--guidance: expected full or cond_only with sampler.branches, got reuse", ExitCode.USAGE)
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
    head = subject.head
    wanted = expanded(
        wanted,
        head=lambda plan: head is not None and plan.paths == head.config.paths,
        copies=subject.copies,
        caches=dict.fromkeys(spec for _, spec in subject.caches),
        vaes=subject.vaes,
    )
    if head is not None and not any(variant.head for variant in wanted):
        raise UserError("--head: none of --plans is the one that it was made for", ExitCode.USAGE)
    if "preview" in decoders:
        ceiling = Variant(make_plan("exact", subject.coefficients.num_steps), "full", "preview")
        wanted = [ceiling, *wanted]
    return subject, (list(dict.fromkeys(guidances)), list(dict.fromkeys(decoders))), list(dict.fromkeys(wanted))


def _config(options: argparse.Namespace, overrides: list[str]) -> Any:
    try:
        from densegrpo_fast.config.yaml_files import BASE_PRESET
    except ModuleNotFoundError as error:
        raise UserError(
            f"{error.name} is missing: pip install densegrpo-fast[train], or use --analytic", ExitCode.ENVIRONMENT
        ) from None
    return configuration(["--config", options.config or BASE_PRESET, *overrides])


def _searched(
    options: argparse.Namespace,
    subject: Subject,
    ways: tuple[list[Guidance], list[Decoder]],
    thresholds: Thresholds,
    groups: range,
) -> tuple[list[Candidate], Candidate | None]:
    from densegrpo_fast.fidelity.search import cheapest, search

    candidates = search(
        subject,
        groups,
        guidances=ways[0],
        decoders=ways[1],
        max_nodes=min(options.max_nodes, subject.coefficients.num_steps - 1),
        group_size=options.group_size,
        seed=options.seed,
        worst=thresholds.worst,
        progress=partial(_progress, "searched", len(groups)),
    )
    return candidates, cheapest(candidates, thresholds)


def _show(
    settings: dict[str, Any], records: dict[str, Any], searched: dict[str, Any] | None, kept: Sequence[float] | None
) -> None:
    from densegrpo_fast.fidelity.report import ENOUGH, LEGEND, plan_table, step_table

    sampler = settings["sampler"]
    print(
        f"{settings['subject']}: {settings['groups_measured']} groups of {settings['group_size']}"
        f"{' branches of one trunk' if settings.get('branched') else ''}, "
        f"{sampler['num_steps']} steps, {sampler['dynamics']} at noise level {sampler['noise_level']}, "
        f"guidance {sampler['guidance_scale']:g}\n"
    )
    print(f"{plan_table(records)}\n\n{step_table(records)}\n\n{LEGEND}")
    remaining = min((record["remaining_gains"] for record in records.values()), default=1.0)
    advice = "" if remaining >= ENOUGH else f"; below {ENOUGH:.0%}, judge by a more finely graded reward"
    print(f"\n{remaining:.0%} of the groups' steps remain, in the others all exact gains are equal{advice}.")
    if kept is not None:
        numbers = " ".join(f"{value:.2f}" for value in kept)
        print(f"exact rewards of neighbouring states correlate by {numbers}; below .5 a gain is noisier than a reward.")
    if searched is None:
        return
    wanted = ", ".join(f"{name} {value:g}" for name, value in searched["thresholds"].items())
    if searched["chosen"] is None:
        print(f"search: none of {len(searched['candidates'])} candidates reaches {wanted}; raise --max-nodes.")
        return
    inside, outside = searched["in_sample"], records[searched["chosen"]]
    print(
        f"search: {searched['chosen']} is the cheapest of {len(searched['candidates'])} candidates above {wanted}; "
        f"again by --plans {searched['chosen_plan']}"
    )
    for label, found in (("in sample", inside), ("held out", outside)):
        print(
            f"  {label:10} rewards {found['spearman_rewards_mean']:.3f}, gains {found['spearman_gains_mean']:.3f}, "
            f"worst step {found['spearman_gains_worst_step']:.3f}"
        )


def _progress(what: str, total: int, done: int) -> None:
    start, end = ("\r", "\n" if done == total else "") if sys.stderr.isatty() else ("", "\n")
    print(f"{start}{what} {done} of {total} groups", end=end, file=sys.stderr, flush=True)


def _made(make: MakePlan, num_steps: int) -> Plan:
    try:
        return make(num_steps)
    except ValueError as error:
        raise UserError(f"--plans: {error}", ExitCode.USAGE) from None


if __name__ == "__main__":
    sys.exit(main())
