"""`lookahead.plan auto`: what a short trial measured decides how a run's iterations are made cheap.

Every candidate of the trial (`trial.py`) that reaches `lookahead.fidelity` is priced by operations, with all steps
trained and with some of them drawn by their gradients, without a repeated forward where credit and memory allow that.
Chosen is, of what costs at most `lookahead.budget` if there is one, what has the least variance of the gradient times
operations: a given precision of the gradient by the fewest operations. If nothing costs so little, the cheapest. Exact
completions reach the fidelity by definition.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, isfinite, nan
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from densegrpo_fast.common.errors import CheckpointError, UsageError
from densegrpo_fast.common.files import write_json
from densegrpo_fast.config import Config
from densegrpo_fast.config.help import describe_errors
from densegrpo_fast.config.yaml_files import inline_yaml
from densegrpo_fast.embedded import EMBEDDED
from densegrpo_fast.fidelity.price import Price, draws, iteration_cost, price
from densegrpo_fast.fidelity.report import table
from densegrpo_fast.fidelity.search import Thresholds
from densegrpo_fast.fidelity.trial import Row, Trial
from densegrpo_fast.fidelity.variance import mean_square
from densegrpo_fast.fidelity.variants import Variant, reference
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.run_files.provenance import provenance
from densegrpo_fast.run_files.run_directory import AUTO_FILE, auto_record
from densegrpo_fast.training.memory import check, estimate_memory, free_bytes, readable
from densegrpo_fast.training.schedule import Schedule

COUNTS = 12
"""Numbers of drawn steps that are tried, at most."""


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why.

    Attributes:
        config: with what was chosen in the place of `lookahead.plan auto`.
        model: the policy that was measured, as it was, for the trainer.
        record: plain JSON data; its `options` are what was chosen, its `text` is for people.
    """

    config: Config
    model: FlowModel
    record: dict[str, Any]


@dataclass(frozen=True)
class Setup:
    """A candidate with some number of trained steps.

    Attributes:
        row: the candidate.
        reaches: whether it reaches the fidelity that is asked for.
        options: values of the options that `auto` chooses, by their dotted keys.
        drawn: steps that are drawn in an iteration; None = all are trained.
        price: of the iteration.
        variance: of the gradient, over that of all steps; NaN = not known.
    """

    row: Row
    reaches: bool
    options: dict[str, Any]
    drawn: int | None
    price: Price
    variance: float

    @property
    def cost(self) -> float:
        """Operations over those of a replayed iteration with one reward per picture."""
        return self.price.over_replayed_sparse

    @property
    def product(self) -> float:
        """Variance times operations."""
        return self.variance * self.cost

    def __str__(self) -> str:
        return f"{self.row.candidate.variant.name}, trained steps: {self.steps}"

    @property
    def steps(self) -> str:
        """Which steps are trained, for people."""
        return "all" if self.drawn is None else f"{self.drawn} drawn"


def resolve(config: Config, directory: Path, *, resume: bool) -> tuple[Config, FlowModel | None]:
    """The settings to train with in a run directory: chosen now and recorded there, or when the run began.

    Returns:
        The configuration, and its model if that is loaded already. Without `auto` the configuration is what it was.

    Raises:
        CheckpointError: the run to resume was begun without `auto`, or its record is broken; OutputError: the record
            cannot be written or read; UserError: as `choose`.
    """
    if config.lookahead.plan != "auto":
        return config, None
    if not resume:
        choice = choose(config)
        write_json(directory / AUTO_FILE, choice.record)
        return choice.config, choice.model
    record = auto_record(directory)
    if record is None:
        raise CheckpointError(
            f"--resume: {directory} has no {AUTO_FILE}, so its run was not begun with lookahead.plan auto; go on with "
            f"--resume={directory} and without that option"
        )
    return with_options(config, record["options"]), None


def rehearse(config: Config, small: Config) -> tuple[Config, FlowModel | None]:
    """The settings of a dry run: with `auto`, what the run would measure is printed, and tried at a tiny size.

    Args:
        config: the run's.
        small: `tiny_config` of it.

    Returns:
        As `resolve`, of the tiny run.

    Raises:
        UserError: as `choose`.
    """
    if config.lookahead.plan != "auto":
        return small, None
    keys = ("data.num_prompts", "sampler.group_size", "sampler.branches", "sampler.micro_batch")
    settings = config.model_dump()
    sizes = {key: settings[section][name] for key in keys for section, name in [key.split(".")]}
    sized = with_options(small, sizes | {"optimizer.updates_per_iteration": config.optimizer.updates_per_iteration})
    on = "" if config.model.path in EMBEDDED else ", counted on a tiny model"
    print(f"lookahead.plan auto: {trial_of(sized, tiny=True).outline()}{on}")
    choice = choose(small, tiny=True, groups=2, say=lambda text: None)
    print("lookahead.plan auto: tried on 2 groups of 2 samples, whose figures mean nothing")
    return choice.config, choice.model


def choose(
    config: Config, *, tiny: bool = False, groups: int | None = None, say: Callable[[str], object] = print
) -> Choice:
    """Measure and choose.

    Args:
        config: with `lookahead.plan auto`.
        tiny, groups: as for `Trial`.
        say: is told what is measured, and then the record's text.

    Raises:
        UserError: the model, a reward or a prompt file cannot be loaded or does not fit.
    """
    trial, thresholds = trial_of(config, tiny=tiny, groups=groups), Thresholds(*config.lookahead.fidelity)
    started = time.perf_counter()
    say(f"lookahead.plan auto: {trial.outline()}")
    rows = trial.compare(thresholds)
    setups, notes = setups_of(trial, rows, thresholds)
    chosen, reason = best(setups, config.lookahead.budget, thresholds)
    seconds, iterations = time.perf_counter() - started, trial.iterations(trial.groups, trial.promising)
    text = "\n".join(
        [
            f"lookahead.plan auto: measured {trial.groups} groups of {trial.size} samples in {seconds:.0f} s, by as "
            f"many operations as {iterations:.1f} iterations with one reward per picture",
            candidate_table([setup for setup in setups if setup.drawn is None]),
            steps_table([setup for setup in setups if setup.row == chosen.row]),
            *(f"note: {note}" for note in (*trial.notes, *notes)),
            f"chosen: {reason}",
            *changes(config, chosen.options),
        ]
    )
    say(text)
    record = {
        "options": chosen.options,
        "reason": reason,
        "budget": config.lookahead.budget,
        "fidelity": asdict(thresholds),
        "measured": {"groups": trial.groups, "group_size": trial.size, "seed": config.seed},
        "cost": {"iterations": iterations, "seconds": seconds},
        "forms": [plain(setup) for setup in setups],
        "inner_products_within": trial.products.tolist(),
        "text": text,
    }
    choice = Choice(with_options(config, chosen.options), trial.model, record | provenance())
    # the trial's copy and reward
    del trial, rows, setups, chosen
    gc.collect()
    return choice


def trial_of(config: Config, *, tiny: bool = False, groups: int | None = None) -> Trial:
    """The measurement for a configuration, not yet begun."""
    drawn = isinstance(config.objective.trained_steps, int)
    trained = "all_but_last" if drawn else config.objective.trained_steps
    exact = options_of(reference(config.sampler.num_steps)) | {"objective.trained_steps": trained}
    return Trial(with_options(config, exact), tiny=tiny, groups=groups)


def with_options(config: Config, options: Mapping[str, Any]) -> Config:
    """The configuration with other values of some options, by their dotted keys.

    Raises:
        UsageError: there is none of that name, or they do not fit the others.
    """
    settings = config.model_dump()
    for key, value in options.items():
        section, _, name = key.partition(".")
        settings[section] = {**settings.get(section, {}), name: value}
    try:
        return Config.model_validate(settings)
    except ValidationError as error:
        raise UsageError("; ".join(describe_errors(error))) from None


def options_of(variant: Variant) -> dict[str, Any]:
    """A lookahead as options, all steps trained and updates replayed."""
    kind = variant.plan.name.partition("{")[0]
    return {
        "lookahead.plan": kind,
        "lookahead.nodes": variant.plan.nodes() if kind == "nodes" else [],
        "lookahead.n": None,
        "lookahead.paths": [],
        "lookahead.guidance": variant.guidance,
        "lookahead.copy_dtype": variant.copy,
        "lookahead.decoder": variant.decoder,
        "objective.step_sampling": "uniform",
        "optimizer.update": "replayed",
    }


def setups_of(trial: Trial, rows: Sequence[Row], thresholds: Thresholds) -> tuple[list[Setup], list[str]]:
    """Every candidate with all steps trained, and those that reach the fidelity with every number of drawn steps.

    Returns:
        These, and what was left out and why.
    """
    target, trained, notes = trial.target, trial.config.objective.trained_steps, []
    assert target.flops is not None
    unit, count = target.flops, len(trial.steps)
    whole = mean_square(trial.products, draws(trial.schedule), trial.steps)
    exact = next(row for row in rows if row.candidate.variant == trial.reference)
    if not isfinite(exact.candidate.agreement.spearman_gains_mean):
        notes.append("inside every group the exact gains are all alike, so that no plan can be compared with them")
    if not whole > 0:
        notes.append("the gradients of these groups are 0, so that no steps are drawn")
    if repeats := _repeats(trial):
        notes.append(f"every trained step's forward is repeated: {repeats}")
    counts: list[int | None] = [None]
    if whole > 0 and not isinstance(trained, list):
        counts += sorted({1 + i * (count - 1) // COUNTS for i in range(COUNTS)} & {*range(1, count)})
    setups = []
    for drawn in counts:
        steps: dict[str, Any] = {"objective.trained_steps": trained}
        if drawn is not None:
            steps = {"objective.trained_steps": drawn, "objective.step_sampling": "importance"}
        try:
            schedule = Schedule(with_options(trial.config, steps), trial.model)
        except UsageError:
            continue  # too few steps with noise and a weight to draw so many
        sets = draws(schedule)
        variance = mean_square(trial.products, sets, trial.steps) / whole if whole > 0 else nan
        for row in rows:
            variant = row.candidate.variant
            reaches = variant == trial.reference or row.reaches(thresholds)
            if drawn is not None and not reaches:
                continue
            options = options_of(variant) | steps
            if not repeats and not (variant.guidance == "reuse" and target.guided):
                options["optimizer.update"] = "streamed"
            config = with_options(trial.config, options)
            cost = iteration_cost(config, schedule, guided=target.guided, drawn=sets)
            ahead = target.cheap_flops.get((variant.copy, variant.cache), unit.forward)
            own = price(cost, config, unit, ahead, guided=target.guided)
            setups.append(Setup(row, reaches, options, drawn, own, variance))
    return setups, notes


def _repeats(trial: Trial) -> str | None:
    """Why an update must be replayed; None = it can be streamed."""
    try:
        config = with_options(trial.config, {"optimizer.update": "streamed"})
    except UsageError as error:
        return str(error)
    needed, free = estimate_memory(config, trial.model, None, trial.trainer.reward), free_bytes(trial.model.device)
    if check(needed, free, str(trial.model.device)) is None:
        return None
    return f"the graphs of two steps take about {readable(needed.state['graphs'])}, which do not fit"


def best(setups: Sequence[Setup], budget: float | None, thresholds: Thresholds) -> tuple[Setup, str]:
    """The setup to train with, and why.

    Args:
        budget: what its iteration may cost, in replayed sparse ones; None = anything.
        thresholds: that the setups were compared with.
    """
    able = [setup for setup in setups if setup.reaches]
    within = [setup for setup in able if budget is None or setup.cost <= budget]
    known = all(isfinite(setup.variance) for setup in able)

    def order(setup: Setup) -> tuple[float, float]:
        gains = setup.row.candidate.agreement.spearman_gains_mean
        return setup.product if within and known else setup.cost, -gains if isfinite(gains) else 0.0

    chosen = min(within or able, key=order)
    reaching = ", ".join(f"{name} {value:g}" for name, value in asdict(thresholds).items())
    what = "variance x iteration" if known else "cost"
    if within:
        limit = "" if budget is None else f" and costs at most the budget of {budget:g}"
        least = chosen.product if known else chosen.cost
        reason = f"{chosen}. Of what reaches the fidelity ({reaching}){limit}, it has the least {what}, {least:.2f}."
    else:
        reason = (
            f"{chosen}. Nothing that reaches the fidelity ({reaching}) costs at most the budget of {budget:g}; this "
            f"reaches it at the lowest cost, {chosen.cost:.2f}."
        )
    dearer = min(able, key=lambda setup: setup.product)
    if known and dearer.product < chosen.product:
        allowing = ceil(100 * dearer.cost) / 100
        reason += f" A budget of {allowing:g} would allow {dearer}, whose {what} is {dearer.product:.2f}."
    return chosen, reason


def candidate_table(setups: Sequence[Setup]) -> str:
    """The candidates with all steps trained, dearest first."""
    lines = []
    for setup in sorted(setups, key=lambda setup: -setup.cost):
        found = setup.row.candidate.agreement
        correlations = (found.spearman_rewards_mean, found.spearman_gains_mean, found.spearman_gains_worst_step)
        figures = (f"{value:.3f}" if isfinite(value) else "-" for value in correlations)
        reaches = "yes" if setup.reaches else "no"
        name = setup.row.candidate.variant.name
        lines.append([name, str(setup.row.groups), f"{setup.cost:.2f}", *figures, reaches])
    return table(["plan/guidance/decoder", "groups", "iteration", "rewards", "gains", "worst", "reaches"], lines)


def steps_table(setups: Sequence[Setup]) -> str:
    """A candidate with every number of trained steps."""
    return table(
        ["trained steps", "update", "iteration", "over streamed sparse", "variance", "variance x iteration"],
        [
            [
                setup.steps,
                setup.options["optimizer.update"],
                f"{setup.cost:.2f}",
                f"{setup.price.over_streamed_sparse:.2f}",
                *(f"{value:.2f}" if isfinite(value) else "-" for value in (setup.variance, setup.product)),
            ]
            for setup in setups
        ],
    )


def changes(config: Config, options: Mapping[str, Any]) -> list[str]:
    """A line for every option, with its value before where that was another."""
    settings, lines = config.model_dump(mode="json"), []
    for key, value in options.items():
        section, _, name = key.partition(".")
        before = settings[section][name]
        was = "" if before == value else f"  (was {inline_yaml(before)})"
        lines.append(f"  {key}: {inline_yaml(value)}{was}")
    return lines


def plain(setup: Setup) -> dict[str, Any]:
    """A setup as plain JSON data."""
    candidate = setup.row.candidate
    return {
        "candidate": candidate.variant.name,
        "groups": setup.row.groups,
        "trained_steps": setup.drawn or "all",
        "update": setup.options["optimizer.update"],
        "reaches": setup.reaches,
        **asdict(setup.price),
        "variance_over_all_steps": setup.variance if isfinite(setup.variance) else None,
        "agreement": asdict(candidate.agreement),
    }
