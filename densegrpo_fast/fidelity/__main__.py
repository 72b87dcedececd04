"""How far cheap lookaheads can be trusted, and what they cost: `python -m densegrpo_fast.fidelity`.

    python -m densegrpo_fast.fidelity                                   the embedded model, held-out prompts
    python -m densegrpo_fast.fidelity --plans nodes:2,4 n_step:2 --json fidelity.json --plot fidelity.png
    python -m densegrpo_fast.fidelity --search --groups 128             the cheapest plan above the thresholds
    python -m densegrpo_fast.fidelity --config embedded_tempflow        branches of one trajectory, as in that preset
    python -m densegrpo_fast.fidelity --analytic                        an exact flow; needs torch alone
    python -m densegrpo_fast.fidelity --cost                            costs for known models, without weights
    python -m densegrpo_fast.fidelity --cost --config embedded_paper_drawn    what an iteration of these settings costs
    python -m densegrpo_fast.fidelity --cost --plans nodes:4,7 --copy-dtype bfloat16 --cache text:own

Without --plans the configuration's own lookahead is measured, with its copy and cache, and a few plans beside it.
The reference is the exact plan with full guidance and the full decoder, in the precision and way of model.vae_dtype and
model.vae_decode. All plans complete the same trajectories, and agreement is rank correlation inside each group, over
the states 0..T-2 that have a completion of their own and their gains. With a preset that has sampler.branches a group
is the branches of one noise-free trajectory, and agreement that of their rewards in every step that leads to a state up
to T-2; the steps after it are shown and not counted. All of it is measured with the same noisy steps, so a
configuration that draws or moves them is refused. What --search finds beyond node sets is a path for each state, which
training takes as lookahead.plan paths; it searches with every decoder and guidance that the other
options name.
Options of the preset may be overridden as in training: `--sampler.num_steps 10`. Exit codes are in `exit_codes.py`.
Options are parsed before torch is imported.
"""

from __future__ import annotations

import os
import signal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `user_errors_exit`: a Ctrl-C during imports is no traceback

import argparse
import io
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from densegrpo_fast.common.command_line import check_outputs, refuse_processes
from densegrpo_fast.common.errors import SetupError, UsageError
from densegrpo_fast.common.exit_codes import ExitCode, user_errors_exit
from densegrpo_fast.common.files import write_json
from densegrpo_fast.common.progress import PhaseProgress, announce
from densegrpo_fast.fidelity.options import parse, plans_of

if TYPE_CHECKING:
    from densegrpo_fast.config import Config
    from densegrpo_fast.training.distributed import World


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line entry; returns the exit code."""
    options, overrides = parse(sys.argv[1:] if arguments is None else arguments, __doc__)
    with user_errors_exit():
        for option in ("analytic", "cost", "search"):
            if getattr(options, option):
                refuse_processes(f"fidelity --{option}")
        check_outputs(options, "json", "plot")
        announce("counting costs: loading torch" if options.cost else "measuring lookaheads: loading torch")
        if options.cost and (options.config or overrides):
            return int(own_cost(options, overrides))
        if options.cost:
            return int(costs(options))
        if options.analytic:
            return int(fidelity(options, None, None))
        config = _config(options, overrides)
        from densegrpo_fast.training.processes import joined

        with joined(config) as world:
            return int(fidelity(options, config, world))


def own_cost(options: argparse.Namespace, overrides: list[str]) -> ExitCode:
    """Print (and write) what an iteration of a configuration costs.

    Raises:
        UserError: the configuration is wrong, or its model's sizes are not known.
    """
    config = _config(options, overrides)
    # advice about optional packages is none of this command's business
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from densegrpo_fast.fidelity.costs import own_record, own_text
    from densegrpo_fast.run_files.provenance import provenance

    record = own_record(config)
    print(own_text(record))
    if options.json:
        write_json(options.json, record | provenance())
    return ExitCode.OK


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
            copies=list(dict.fromkeys(options.copy_dtype or ())),
            caches=list(dict.fromkeys(options.cache or ())),
        )
    except ModuleNotFoundError as error:
        raise SetupError(f"--cost needs {error.name}: pip install densegrpo-fast[train]") from None
    except ValueError as error:
        raise UsageError(f"--plans: {error}") from None
    print(cost_text(records))
    if options.json:
        from densegrpo_fast.run_files.provenance import provenance

        write_json(options.json, {"models": records, **provenance()})
    return ExitCode.OK


def fidelity(options: argparse.Namespace, config: Config | None, world: World | None) -> ExitCode:
    """Measure the plans, search for one if asked, and show and write the result.

    Args:
        options: the parsed command line.
        config: of the model; None = the analytic flow.
        world: the processes that share the groups; None = this one alone.

    Raises:
        UserError: anything the user can act on, with its exit code.
    """
    from densegrpo_fast.fidelity import report
    from densegrpo_fast.fidelity.measure import agreement_of, measure
    from densegrpo_fast.fidelity.plot import save_plot
    from densegrpo_fast.fidelity.search import Thresholds, cheapest, longest_path, search
    from densegrpo_fast.fidelity.variants import choose, reference
    from densegrpo_fast.run_files.provenance import provenance
    from densegrpo_fast.training.agreement import persistence

    target, variants, configured, ways = choose(options, config)
    sampling = {"group_size": options.group_size, "seed": options.seed}
    thresholds = Thresholds(options.threshold_rewards, options.threshold_gains, options.threshold_worst)
    groups, searched = range(options.groups), None
    if options.search:
        groups, half = range(options.groups // 2, options.groups), range(options.groups // 2)
        longest = longest_path(target)
        max_nodes = min(options.max_nodes, longest)
        with PhaseProgress("searching", len(half), "groups") as progress:
            candidates = search(
                target,
                half,
                ways=ways,
                named=[make(target.coefficients.num_steps) for make in plans_of(options)],
                max_nodes=max_nodes,
                worst=thresholds.worst,
                progress=progress.at,
                **sampling,
            )
        chosen = cheapest(candidates, thresholds)
        variants += [chosen.variant] if chosen and chosen.variant not in variants else []
        searched = report.search_record(candidates, chosen, thresholds, max_nodes=max_nodes, longest_path=longest)

    shared, stream = 1 if world is None else world.size, None if world is None or world.main else io.StringIO()
    with PhaseProgress("measuring", -(-len(groups) // shared), "groups", stream) as progress:
        rewards = measure(target, variants, groups, progress=progress.at, world=world, **sampling)
    if world is not None and not world.main:
        return ExitCode.OK
    exact = rewards[reference(target.coefficients.num_steps)]
    records = {
        variant.name: report.plan_record(
            variant, agreement_of(target, exact, rewards[variant]), target, options.group_size
        )
        for variant in variants
    }
    settings = target.settings | sampling | {"groups": options.groups, "groups_measured": len(groups)}
    settings |= {"trained_steps": target.trained_steps, "kl": target.kl, "noisy": list(target.coefficients.noisy)}
    settings["lookahead"] = [variant.name for variant in configured]
    correlations = None if target.branched else persistence(exact)
    print(report.summary(settings, records, searched, correlations))
    if options.json:
        document = {"plans": records, "search": searched, "persistence": correlations, "settings": settings}
        write_json(options.json, document | provenance())
    if options.plot:
        save_plot(options.plot, records, searched, asdict(thresholds))
    return ExitCode.OK


def _config(options: argparse.Namespace, overrides: list[str]) -> Config:
    try:
        from densegrpo_fast.config.cli import configuration
    except ModuleNotFoundError as error:
        raise SetupError(f"{error.name} is missing: pip install densegrpo-fast[train], or use --analytic") from None
    named = [] if options.config is None else ["--config", options.config]
    return configuration([*named, *overrides])


if __name__ == "__main__":
    sys.exit(main())
