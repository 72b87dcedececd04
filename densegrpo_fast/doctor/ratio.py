"""The ratio check of a configuration: measure its loop, find out why its ratio is off, and put the result into words.

Causes are switched off one at a time, and, where no single one restores the ratio, all but one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.doctor.causes import AMPLIFIER, BY_NAME, CAUSES, Cause, tiny_steps
from densegrpo_fast.doctor.loop import Loop, configured_loop, randomize_lora_
from densegrpo_fast.flow.dynamics import C
from densegrpo_fast.models.base import network_class
from densegrpo_fast.training.models import tiny_config
from densegrpo_fast.training.policy_samples import policy_alone

RESOLUTION = 1e-6
"""Smallest |ratio - 1| that counts: a few units in the last place of a float32 log-probability."""

CLIP_SHARE = 0.01
"""Share of the clip range below which |ratio - 1| does no harm."""


@dataclass(frozen=True)
class Trial:
    """What was left of the deviation with some causes switched off.

    Attributes:
        deviation: largest |ratio - 1| over samples and steps; NaN if it could not be tried.
        failure: why it could not be tried; else empty.
    """

    deviation: float
    failure: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """The ratio of an unchanged policy, and what is to blame if it is not 1.

    Attributes:
        deviations: largest |ratio - 1| of each replayed step, as the loop is.
        tolerance: what is allowed of it.
        alone: what was left with one cause switched off, by its name; empty if nothing was wrong.
        together: what was left with all causes switched off; None if that was not needed.
        all_but: with all but one switched off, by that one's name; empty if that was not needed.
        unsteady: largest difference between the log-probabilities of two replays; 0 if nothing was wrong.
        causes: names of the causes found.
        amplified: steps that inject so little noise that they show differences which otherwise would not count.
    """

    deviations: tuple[float, ...]
    tolerance: float
    alone: dict[str, Trial] = field(default_factory=dict)
    together: Trial | None = None
    all_but: dict[str, Trial] = field(default_factory=dict)
    unsteady: float = 0.0
    causes: tuple[str, ...] = ()
    amplified: tuple[int, ...] = ()

    @property
    def sound(self) -> bool:
        """Whether the ratio is 1 to the tolerance, in every step."""
        return within(self.deviations, self.tolerance)


def default_tolerance(clip_range: float) -> float:
    """Largest harmless |ratio - 1|: 1% of the clip range, but not less than float32 can tell."""
    return max(CLIP_SHARE * clip_range, RESOLUTION)


def within(deviations: Sequence[float], tolerance: float) -> bool:
    """Whether all are at most the tolerance; NaN is not."""
    return all(deviation <= tolerance for deviation in deviations)


def diagnose(loop: Loop, tolerance: float) -> Diagnosis:
    """Measure the loop, and where its ratio is off find the causes without which it is not.

    A candidate is a cause if switching it off alone restores the ratio. If none does, but all together do, the
    causes are those which spoil it again when they alone are left on. If not even that restores it, none is named.
    """
    deviations = loop.deviations()
    if within(deviations, tolerance):
        return Diagnosis(deviations, tolerance)
    candidates = [cause for cause in CAUSES if cause.applies(loop)]
    alone = {cause.name: _without(loop, [cause]) for cause in candidates}
    causes = tuple(name for name, trial in alone.items() if trial.deviation <= tolerance)
    together, all_but = None, {}
    if not causes:
        usable = [cause for cause in candidates if not alone[cause.name].failure]
        together = _without(loop, usable)
        if together.deviation <= tolerance:
            all_but = {one.name: _without(loop, [other for other in usable if other is not one]) for one in usable}
            causes = tuple(name for name, trial in all_but.items() if not trial.deviation <= tolerance)
    amplified: tuple[int, ...] = ()
    if AMPLIFIER.applies(loop):
        alone[AMPLIFIER.name] = _without(loop, [AMPLIFIER])
        if alone[AMPLIFIER.name].deviation <= tolerance:
            amplified = tiny_steps(loop)
    return Diagnosis(deviations, tolerance, alone, together, all_but, loop.unsteadiness(), causes, amplified)


def examine(config: Config, tolerance: float | None, tiny: bool) -> dict[str, Any]:
    """Roll out, replay, and diagnose; the result as plain JSON data.

    Args:
        config: of the run.
        tolerance: allowed |ratio - 1|; None = `default_tolerance`.
        tiny: examine the loop of a dry run, where a tiny random model stands for one that is not in the package.

    Raises:
        UserError: the model cannot be loaded, or the configuration does not fit it.
    """
    trainer = policy_alone(tiny_config(config) if tiny else config, tiny=tiny)
    config, model = trainer.config, trainer.model
    randomize_lora_(model.network)
    loop = configured_loop(trainer)
    if not loop.steps:
        raise UsageError("objective.trained_steps: none of the steps is stochastic, so no ratio exists")
    clip_range = config.objective.clip_range
    diagnosis = diagnose(loop, default_tolerance(clip_range) if tolerance is None else tolerance)
    return record(diagnosis, loop, clip_range) | {
        "preset": config.preset,
        "model": network_class(model.network).__name__,
    }


def record(diagnosis: Diagnosis, loop: Loop, clip_range: float) -> dict[str, Any]:
    """A diagnosis as plain JSON data: status, deviation of every step, trials, causes and remedies."""
    table, sigmas = loop.coefficients.table, loop.coefficients.sigmas
    steps = [
        {
            "step": step,
            "sigma": sigmas[step].item(),
            "step_std": table[step, C].item(),
            "ratio_deviation": deviation,
            "share_of_clip_range": deviation / clip_range,
        }
        for step, deviation in zip(loop.steps, diagnosis.deviations, strict=True)
    ]
    return {
        "status": "ok" if diagnosis.sound else "problem",
        "clip_range": clip_range,
        "tolerance": diagnosis.tolerance,
        "steps": steps,
        "without": {name: _trial(trial) for name, trial in diagnosis.alone.items()},
        "without_all": None if diagnosis.together is None else _trial(diagnosis.together),
        "without_all_but": {name: _trial(trial) for name, trial in diagnosis.all_but.items()},
        "unsteadiness": diagnosis.unsteady,
        "causes": [
            {"name": name, "cause": BY_NAME[name].cause, "remedy": BY_NAME[name].remedy} for name in diagnosis.causes
        ],
        "amplified_steps": list(diagnosis.amplified),
    }


def text(result: dict[str, Any]) -> str:
    """The record as a person reads it."""
    lines = [f"{result['preset']}: importance ratio of the unchanged policy, clip_range {result['clip_range']:.1e}", ""]
    lines.append(f"{'step':>6}{'sigma':>8}{'noise std':>11}{'|ratio-1|':>11}{'of clip_range':>15}")
    for step in result["steps"]:
        lines.append(
            f"{step['step']:6}{step['sigma']:8.3f}{step['step_std']:11.4f}{step['ratio_deviation']:11.1e}"
            f"{step['share_of_clip_range']:15.1%}"
        )
    lines.append("")
    if result["status"] == "ok":
        return "\n".join([*lines, f"ok: it is 1, to {result['tolerance']:.1e} (tolerance)"])
    lines += [f"problem: it is not 1, to {result['tolerance']:.1e} (tolerance)", "", "what is left without a cause:"]
    named = [cause["name"] for cause in result["causes"]]
    lines += _trial_lines(result["without"], named if result["without_all"] is None else [])
    if result["without_all"] is not None:
        lines += _trial_lines({"all of them": result["without_all"]}, [])
    if result["without_all_but"]:
        lines += ["", "what is left without all but one:", *_trial_lines(result["without_all_but"], named)]
    return "\n".join([*lines, "", *_conclusion(result)])


def _without(loop: Loop, causes: Sequence[Cause]) -> Trial:
    """The largest deviation with some causes switched off."""
    try:
        with ExitStack() as stack:
            for cause in causes:
                loop = stack.enter_context(cause.ablation(loop))
            deviations = loop.deviations()
    except RuntimeError as error:
        # out of memory, for one: unfused attention needs much
        return Trial(float("nan"), str(error).splitlines()[0])
    # a NaN anywhere is not to get lost in a maximum
    return Trial(max(deviations) if within(deviations, float("inf")) else float("nan"))


def _conclusion(result: dict[str, Any]) -> list[str]:
    lines = []
    for cause in result["causes"]:
        lines += [f"cause: {cause['name']}: {cause['cause']}", f"   -> {cause['remedy']}"]
    if not result["causes"]:
        lines.append("cause: none of the causes. The two phases evaluate the network or the step in different ways.")
        if result["unsteadiness"]:
            lines.append(
                f"   two replays of one trajectory differ by {result['unsteadiness']:.1e} in log-probability: "
                "something in the forward is random or not deterministic"
            )
    if result["amplified_steps"]:
        steps, amplifier = ", ".join(map(str, result["amplified_steps"])), BY_NAME["tiny_std"]
        lines += [f"amplified at step {steps}: {amplifier.cause}", f"   -> {amplifier.remedy}"]
    return lines


def _trial_lines(trials: dict[str, dict[str, Any]], named: Sequence[str]) -> list[str]:
    lines = []
    for name, trial in trials.items():
        left = "-" if trial["ratio_deviation"] is None else f"{trial['ratio_deviation']:.1e}"
        note = f"  {trial['failure']}" if trial["failure"] else "  <- cause" if name in named else ""
        lines.append(f"  {name:14}{left:>9}{note}")
    return lines


def _trial(trial: Trial) -> dict[str, Any]:
    known = trial.deviation == trial.deviation
    return {"ratio_deviation": trial.deviation if known else None, "failure": trial.failure}
