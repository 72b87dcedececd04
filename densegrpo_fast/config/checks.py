"""What options of different groups say about each other, checked before anything is computed.

Every check returns what is wrong, beginning with the option's dotted key, or None. Nothing here imports torch; a credit
method, a policy loss or a step weight from outside of the package is an exception: its file is run.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from densegrpo_fast.common.plugins import is_outside
from densegrpo_fast.common.suggest import did_you_mean
from densegrpo_fast.credit import registry
from densegrpo_fast.objective.registry import POLICIES, STEP_WEIGHTS
from densegrpo_fast.rewards.registry import BUILT_IN, USE, resolve_alias
from densegrpo_fast.sampling.windows import remaining_steps

if TYPE_CHECKING:
    from densegrpo_fast.config.learning_sections import CreditOptions, ObjectiveOptions
    from densegrpo_fast.config.schema import Config

_GUARDED = {"paper": ("flow_sde", "dance")}
"""Dynamics for which a weight of GRPO-Guard is defined; for the others, all with a variance."""
_MOST_SAMPLES = 2**20
_NO_VARIANCE = ("cps",)
"""Dynamics whose log-probability leaves out the variance of the step."""


def reward_problem(
    terms: Iterable[str], observed: Iterable[str], options: Mapping[str, Mapping[str, Any]]
) -> str | None:
    """A reward that cannot exist, or options of one that is not named."""
    named = [("terms", name) for name in terms] + [("observed", name) for name in observed]
    for key, name in named:
        kind, _ = resolve_alias(name, options)
        if not isinstance(kind, str):
            return f"reward.options.{name}.{USE}: expected the name of a reward, got {kind!r}"
        if kind not in BUILT_IN and not is_outside(kind):
            where = f"reward.{key}" if kind == name else f"reward.options.{name}.{USE}"
            return (
                f'{where}: unknown reward "{kind}"{did_you_mean(kind, BUILT_IN)} '
                f"(known: {', '.join(BUILT_IN)}; your own: module:function or path.py:function; another name "
                f"for one of them: reward.options='{{{name}: {{{USE}: ...}}}}')"
            )
    names = [name for _, name in named]
    for name in options:
        if name not in names:
            hint = did_you_mean(name, names)
            return f'reward.options: there is no reward "{name}" in reward.terms or reward.observed{hint}'
    return None


def problem(config: Config) -> str | None:
    """The first thing that is wrong among the options of all groups."""
    for check in (_window, _trained_steps, _noise, _lookahead):
        if found := check(config):
            return f"{found} (sampler.num_steps is {config.sampler.num_steps})"
    others = (
        _credit,
        _objective,
        _remainder,
        _calibration,
        _branches,
        _plan_evaluates_something,
        _image_size,
        _full_training,
        _batches,
        _streamed,
        _early_stopping,
        _auto,
    )
    return next((found for check in others if (found := check(config))), None)


def _window(config: Config) -> str | None:
    size, first, steps = config.window.size, config.window.first, config.sampler.num_steps
    if size is None:
        return None
    last = steps - 2 if config.window.last is None else config.window.last
    if last > steps - 2:
        return f"window.last: expected at most {steps - 2}, got {last}"
    if first > last:
        return f"window.first: expected at most {last}, got {first}"
    if first + size - 1 > last:
        return f"window.size: expected a window that fits the steps {first}..{last}, got {size}"
    return None


def _trained_steps(config: Config) -> str | None:
    steps, trained = config.sampler.num_steps, config.objective.trained_steps
    if isinstance(trained, list):
        if not trained or sorted(set(trained)) != trained:
            return f"objective.trained_steps: expected increasing step indices, got {trained}"
        if trained[-1] > steps - 1:
            return f"objective.trained_steps: expected steps in 0..{steps - 1}, got {trained}"
        if config.window.size is not None:
            return f"objective.trained_steps: expected all_but_last or a number with a window, got {trained}"
    elif isinstance(trained, int) and trained > (most := config.window.size or steps - 1):
        return f"objective.trained_steps: expected at most {most} steps to draw, got {trained}"
    if config.objective.step_sampling != "uniform" and not isinstance(trained, int):
        return (
            f"objective.step_sampling: expected uniform where no number of steps is drawn, got trained_steps {trained}"
        )
    return None


def _noise(config: Config) -> str | None:
    """Every iteration needs a trained step that injects noise."""
    given, dynamics = config.sampler.noise_level, config.sampler.dynamics
    if isinstance(given, list) and len(given) != config.sampler.num_steps:
        return f"sampler.noise_level: expected one number per step, got {len(given)}"
    if dynamics == "cps" and max(config.noise_levels) > 1:
        return f"sampler.noise_level: expected at most 1 with dynamics cps, got {max(config.noise_levels)}"
    trained = config.objective.trained_steps
    for candidates in [trained] if isinstance(trained, list) else config.windows():
        if noisy := config.noisy_among(candidates):
            deterministic = len(candidates) - len(noisy)
            if config.objective.step_sampling == "importance" and isinstance(trained, int) and trained > len(noisy):
                return (
                    f"objective.trained_steps: expected at most the {len(noisy)} steps of {candidates[0]}.."
                    f"{candidates[-1]} that inject noise, got {trained}"
                )
            if config.objective.step_sampling == "uniform" and isinstance(trained, int) and trained <= deterministic:
                return (
                    f"objective.trained_steps: expected at least {deterministic + 1} to draw where "
                    f"{deterministic} of the steps {candidates[0]}..{candidates[-1]} inject no noise, got {trained}"
                )
        elif any(config.noise_levels[step] for step in candidates):
            return (
                "objective.trained_steps: expected a step that injects noise, which the last one of dynamics "
                f"{dynamics} does not, got {trained}"
            )
        else:
            where = "" if config.window.size is None else f" of the window {candidates[0]}..{candidates[-1]}"
            return f"sampler.noise_level: expected noise in at least one trained step{where}, got 0 in all of them"
    return None


def _lookahead(config: Config) -> str | None:
    steps, lookahead = config.sampler.num_steps, config.lookahead
    if config.model.compile is not None and lookahead.cache is not None:
        hides = "expected null with model.compile, which hides the network's blocks"
        return f"lookahead.cache: {hides}, got {lookahead.cache}"
    if lookahead.nodes and lookahead.nodes[-1] > steps - 1:
        return f"lookahead.nodes: expected steps in 1..{steps - 1}, got {lookahead.nodes}"
    if lookahead.n is not None and lookahead.n > steps:
        return f"lookahead.n: expected 1..{steps}, got {lookahead.n}"
    if lookahead.paths and len(lookahead.paths) != steps:
        return f"lookahead.paths: expected a list for each of the {steps} states, got {len(lookahead.paths)}"
    for state, path in enumerate(lookahead.paths):
        if sorted({*path}) != path or not {*path} <= {*range(state + 1, steps)}:
            within = f"increasing steps in {state + 1}..{steps - 1}" if state < steps - 1 else "[]"
            return f"lookahead.paths[{state}]: expected {within}, got {path}"
    return None


def _credit(config: Config) -> str | None:
    credit, lookahead = config.credit, config.lookahead
    try:
        method = registry.find(credit.method)
    except ValueError as error:
        return f"credit.method: {error}"
    smoothing = credit.smoothing
    if smoothing and not method.uses_lookahead:
        return (
            f"credit.smoothing: expected 0 with credit.method {credit.method}, which has no lookahead, got {smoothing}"
        )
    if smoothing and all(len(config.noisy_among(window)) < 2 for window in config.schedule().reached()):
        return f"credit.smoothing: expected 0 with one noisy step, between whose ends no state lies, got {smoothing}"
    if found := _arguments(credit, "credit", method.options, f"method {credit.method}"):
        return found
    if method.plan is not None:
        defined = f"{method.plan}, by which the rewards of credit.method {credit.method} are defined"
        if lookahead.plan != method.plan:
            return f"lookahead.plan: expected {defined}, got {lookahead.plan}"
    if "window" in method.options:
        for steps in config.lengths():
            if steps % credit.window:
                left = "" if steps == config.sampler.num_steps else " that window.remainder_share leaves"
                return f"credit.window: expected a divisor of the {steps} steps{left}, got {credit.window}"
    if "terminal_coef" in method.options and credit.terminal_coef + credit.dense_coef == 0:
        return "credit.terminal_coef, credit.dense_coef: expected one above 0, got 0 and 0"
    return None


def _arguments(section: CreditOptions | ObjectiveOptions, group: str, takes: Iterable[str], whose: str) -> str | None:
    """Of the `arguments` of a group: there must be those that `takes` names and the group lacks, and no others."""
    arguments = section.arguments
    own, key = set(type(section).model_fields), f"{group}.arguments"
    wanted = [option for option in takes if option not in own]
    for name in arguments:
        if name in own:
            return f"{key}: {name} is an option of its own, {group}.{name}"
        if name not in wanted:
            hint = did_you_mean(name, wanted) or f"; it takes {', '.join(wanted) if wanted else 'none'}"
            return f'{key}: {whose} has no argument "{name}"{hint}'
    if lacking := [option for option in wanted if option not in arguments]:
        return f"{key}: {whose} needs {', '.join(lacking)}"
    return None


def _objective(config: Config) -> str | None:
    objective, dynamics = config.objective, config.sampler.dynamics
    try:
        key = "policy"
        policy = POLICIES.find(objective.policy)
        key = "step_weight"
        weighting = STEP_WEIGHTS.find(objective.step_weight)
    except ValueError as error:
        return f"objective.{key}: {error}"
    takes = dict.fromkeys((*policy.options, *weighting.options))
    whose = f"policy {objective.policy} with step_weight {objective.step_weight}"
    if found := _arguments(objective, "objective", takes, whose):
        return found
    if policy.variance and dynamics in _NO_VARIANCE:
        able = " or ".join(name for name in POLICIES.names() if not POLICIES.find(name).variance)
        return (
            f"objective.policy: {objective.policy} needs a log-probability with a variance, sampler.dynamics "
            f"{dynamics} has none; expected {able} with it"
        )
    defined = _GUARDED.get(objective.guard_weight, (dynamics,))
    if "guard_weight" in takes and dynamics not in defined:
        return (
            f"objective.guard_weight: {objective.guard_weight} is defined for sampler.dynamics "
            f"{' and '.join(defined)}, expected jacobian or none with {dynamics}"
        )
    if policy.noise and (deterministic := config.deterministic_steps()):
        needs = f"{objective.policy} needs noise in every trained step"
        return f"objective.policy: {needs}, {dynamics} injects none in {deterministic}"
    return None


def _remainder(config: Config) -> str | None:
    """The steps after the window."""
    window, lookahead = config.window, config.lookahead
    if window.size is None:
        for name, plain in (("remainder", "euler"), ("remainder_share", 1)):
            if (given := getattr(window, name)) != plain:
                return f"window.{name}: expected {plain} without windows, after which no step would come, got {given}"
        return None
    if window.remainder == "dpm_solver":
        left = max(
            remaining_steps(config.sampler.num_steps - reached.stop, window.remainder_share)
            for reached in config.windows()
        )
        if left < 3:
            return (
                "window.remainder: the first and the last step of dpm_solver are Euler's, so it wants at least 3 steps "
                f"after a window, got {left}"
            )
    if window.remainder_share < 1 and config.uses_lookahead:
        whole = "with window.remainder_share below 1, which leaves out grid points, got"
        if lookahead.plan in ("nodes", "paths"):
            return f"lookahead.plan: expected exact, exact_but_last, n_step or one_step {whole} {lookahead.plan}"
        if lookahead.cache is not None:
            return f"lookahead.cache: expected null {whole} {lookahead.cache}"
    return None


def _calibration(config: Config) -> str | None:
    options = config.calibration
    if options.every and config.sampler.dynamics == "cps" and options.highest > 1:
        return f"calibration.highest: expected at most 1 with sampler.dynamics cps, got {options.highest}"
    return None


def _branches(config: Config) -> str | None:
    """A branch is one noisy step from a noise-free trajectory: what is defined on whole trajectories is refused."""
    branches, method = config.sampler.branches, registry.find(config.credit.method)
    if branches is None:
        if method.uses_branches:
            return f"sampler.branches: credit.method {config.credit.method} compares branches of one state, got null"
        if (factor := config.objective.negative_factor) != 1:
            return f"objective.negative_factor: expected 1 without sampler.branches, got {factor}"
        return None
    if not method.uses_branches:
        able = " or ".join(name for name in registry.names() if registry.find(name).uses_branches)
        return (
            f"credit.method: expected {able} with sampler.branches, got {config.credit.method}, which judges "
            "trajectories (--config embedded_dense, or sampler.branches null)"
        )
    if config.sampler.group_size % branches:
        return f"sampler.branches: expected a divisor of sampler.group_size {config.sampler.group_size}, got {branches}"
    for group, name, plain, expected in (
        (config.sampler, "sampler.shared_noise", False, "false"),
        (config.credit, "credit.closeness", 0, "0"),
        (config.window, "window.remainder", "euler", "euler"),
        (config.window, "window.remainder_share", 1, "1"),
        (config.lookahead, "lookahead.cache", None, "null"),
    ):
        if (given := getattr(group, name.partition(".")[2])) != plain:
            return f"{name}: expected {expected} with sampler.branches, got {given}"
    if config.lookahead.guidance == "reuse":
        return "lookahead.guidance: expected full or cond_only with sampler.branches, got reuse"
    if deterministic := config.deterministic_steps():
        return f"sampler.branches: branches need noise in every trained step, there is none in {deterministic}"
    if "granularities" in method.options and config.credit.granularities[-1] >= config.sampler.num_steps:
        return (
            f"credit.granularities: expected at most {config.sampler.num_steps - 1} (sampler.num_steps is "
            f"{config.sampler.num_steps}), got {config.credit.granularities}"
        )
    return None


def _plan_evaluates_something(config: Config) -> str | None:
    """Nodes or paths of which none lies ahead of a state that an iteration completes are one_step by another name.

    That is let pass from state T-2 on, where exact_but_last evaluates nothing either, and for some of several windows
    only: the same plan must then serve another one.
    """
    plan, steps = config.lookahead.plan, config.sampler.num_steps
    if plan not in ("nodes", "paths") or not (config.uses_lookahead or config.uses_branches):
        return None
    given = config.lookahead.nodes if plan == "nodes" else config.lookahead.paths
    completed = _completed_states(config)
    used = any(_evaluations(config, state) for states in completed for state in states)
    for states in completed:
        first = states[0]
        if any(_evaluations(config, state) for state in states) or (used and first >= steps - 2):
            continue
        if first >= steps - 1:
            return f"lookahead.plan: expected one_step where no state before {first} is completed, got {plan} {given}"
        expected = f"a step of {first + 1}..{steps - 1} among them"
        if plan == "paths":
            expected = f"a step in the path of a state that is completed ({', '.join(map(str, states))})"
        return (
            f"lookahead.{plan}: expected {expected}, got {given}: in an iteration whose first completed state is "
            f"{first} the plan would be one_step (or say so: lookahead.plan one_step)"
        )
    return None


def _evaluations(config: Config, state: int) -> int:
    """Steps of the plan that lie ahead of a state; the image is state T."""
    options = config.lookahead
    if options.plan == "paths":
        return len(options.paths[state]) if state < config.sampler.num_steps else 0
    return sum(step_index > state for step_index in options.nodes)


def _completed_states(config: Config) -> list[Sequence[int]]:
    """The states that an iteration completes, increasing, for every choice of noisy steps that it may have.

    With trajectories these are the ones that a noisy step leaves, with branches those that a trained step leads to. Of
    random choices that begin alike only one is named that evaluates least.
    """
    levels, trained = config.noise_levels, config.objective.trained_steps
    if not config.uses_branches:
        noisy = ([step for step in window if levels[step]] for window in config.schedule().reached())
        return [steps for steps in noisy if steps]
    if isinstance(trained, list):
        return [[step + 1 for step in trained]]
    choices: list[Sequence[int]] = []
    for window in config.windows():
        states = [step + 1 for step in window]
        count = trained if isinstance(trained, int) else len(states)
        for place in range(len(states) - count + 1):
            later = sorted(states[place + 1 :], key=lambda state: _evaluations(config, state))
            choices.append([states[place], *sorted(later[: count - 1])])
    return choices


def _image_size(config: Config) -> str | None:
    height, width = config.model.height, config.model.width
    if bool(height) != bool(width):
        return f"model.height, model.width: expected both 0 or both set, got {height} and {width}"
    return None


def _full_training(config: Config) -> str | None:
    if config.model.train != "full":
        return None
    for key, given in (("lora.start", config.lora.start), ("lookahead.copy_dtype", config.lookahead.copy_dtype)):
        if given is not None:
            return f"{key}: expected null with model.train full, where there is no adapter, got {given}"
    if config.lookahead.plan == "auto":
        return "lookahead.plan: auto measures plans for an adapter; expected another one with model.train full"
    return None


def _streamed(config: Config) -> str | None:
    """A streamed update needs each step's advantages as soon as the states around it are scored."""
    if config.optimizer.update != "streamed":
        return None
    why = None
    if config.credit.smoothing:
        why = "credit.smoothing, which needs the rewards of all states first"
    elif config.credit.closeness:
        why = "credit.closeness, which needs the end of every trajectory first"
    elif config.credit_scope == "whole":
        why = f"credit.method {config.credit.method}"
        why += f" and credit.normalize {config.credit.normalize}" if config.credit.normalize == "joint" else ""
        why += ", which needs the rewards of all states first"
    elif config.lookahead.guidance == "reuse" and config.sampler.guidance_scale != 1:
        why = "lookahead.guidance reuse, which needs the whole rollout first"
    elif config.lookahead.cache is not None:
        why = "lookahead.cache, which needs the whole rollout first"
    elif config.sampler.branches is not None:
        why = "sampler.branches"
    elif config.optimizer.updates_per_iteration > 1:
        why = f"optimizer.updates_per_iteration {config.optimizer.updates_per_iteration}"
    return None if why is None else f"optimizer.update: expected replayed with {why}"


def _early_stopping(config: Config) -> str | None:
    run = config.run
    if run.early_stopping_patience and not config.evaluation.every:
        return f"run.early_stopping_patience: expected 0 without evaluation.every, got {run.early_stopping_patience}"
    if run.max_kl is not None and not config.objective.kl_coef:
        return f"run.max_kl: expected null with objective.kl_coef 0, where no kl is computed, got {run.max_kl}"
    return None


def _auto(config: Config) -> str | None:
    """Plans are compared on one set of trajectories or branches, which must stand for those of every iteration."""
    if config.lookahead.plan != "auto":
        return None
    if not (config.uses_lookahead or config.uses_branches):
        methods = {name: registry.find(name) for name in registry.names()}
        able = [name for name, method in methods.items() if method.uses_lookahead and method.plan is None]
        return (
            f"lookahead.plan: auto chooses how states are completed, credit.method {config.credit.method} completes "
            f"none; expected another plan with it, or a method with a lookahead, such as {', '.join(able)}"
        )
    if config.window.size is not None and len(windows := config.schedule().reached()) > 1:
        return (
            "window.schedule: expected fixed or none with lookahead.plan auto, which compares plans in one window, "
            f"got {config.window.schedule} with {len(windows)} windows"
        )
    if (share := config.window.remainder_share) != 1:
        return f"window.remainder_share: expected 1 with lookahead.plan auto, got {share}"
    if config.lookahead.cache is not None:
        return f"lookahead.cache: expected null with lookahead.plan auto, got {config.lookahead.cache}"
    return None


def _batches(config: Config) -> str | None:
    """An iteration must split into micro-batches, and these into updates."""
    samples, rows = config.data.num_prompts * config.sampler.group_size, config.sampler.micro_batch
    kind, product = "samples", "data.num_prompts x sampler.group_size"
    if samples > _MOST_SAMPLES:
        return f"data.num_prompts: expected at most {_MOST_SAMPLES} {kind} of an iteration ({product}), got {samples}"
    if config.sampler.branches is not None:
        samples //= config.sampler.branches
        kind, product = "trajectories", f"{product} / sampler.branches"
    if samples % rows:
        fitting = next(count for count in range(min(rows, samples), 0, -1) if samples % count == 0)
        return (
            f"sampler.micro_batch: expected a divisor of the {samples} {kind} of an iteration ({product}), such as "
            f"{fitting}, got {rows}"
        )
    if (samples // rows) % (updates := config.optimizer.updates_per_iteration):
        return (
            f"optimizer.updates_per_iteration: expected a divisor of the {samples // rows} micro-batches of an "
            f"iteration, got {updates}"
        )
    return None
