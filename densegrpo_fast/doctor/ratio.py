"""The ratio check of a configuration: build its loop, diagnose it, and put the result into words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from densegrpo_fast.common.errors import UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.doctor.causes import BY_NAME
from densegrpo_fast.doctor.diagnosis import Diagnosis, Trial, default_tolerance, diagnose
from densegrpo_fast.doctor.loop import Loop, configured_loop, randomize_lora_
from densegrpo_fast.flow.dynamics import C


def examine(config: Config, tolerance: float | None, tiny: bool) -> dict[str, Any]:
    """Roll out, replay, and diagnose; the result as plain JSON data.

    Args:
        config: of the run.
        tolerance: allowed |ratio - 1|; None = `default_tolerance`.
        tiny: examine the loop of a dry run, where a tiny random model stands for one that is not in the package.

    Raises:
        UserError: the model cannot be loaded, or the configuration does not fit it.
    """
    from densegrpo_fast.rewards.base import RewardMixture
    from densegrpo_fast.training.models import tiny_config
    from densegrpo_fast.training.trainer import Trainer

    # no picture is scored here, so no reward is loaded
    nothing = RewardMixture({"nothing": (lambda images, prompts, metadata: [0.0] * len(images), 1.0)})
    trainer = Trainer(tiny_config(config) if tiny else config, tiny=tiny, reward=nothing)
    config, model = trainer.config, trainer.model
    randomize_lora_(model.network)
    loop = configured_loop(trainer)
    if not loop.steps:
        raise UsageError("objective.trained_steps: none of the steps is stochastic, so no ratio exists")
    clip_range = config.objective.clip_range
    diagnosis = diagnose(loop, default_tolerance(clip_range) if tolerance is None else tolerance)
    return record(diagnosis, loop, clip_range) | {"preset": config.preset, "model": type(model.network).__name__}


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


def text(found: dict[str, Any]) -> str:
    """The record as a person reads it."""
    lines = [f"{found['preset']}: importance ratio of the unchanged policy, clip_range {found['clip_range']:.1e}", ""]
    lines.append(f"{'step':>6}{'sigma':>8}{'noise std':>11}{'|ratio-1|':>11}{'of clip_range':>15}")
    for step in found["steps"]:
        lines.append(
            f"{step['step']:6}{step['sigma']:8.3f}{step['step_std']:11.4f}{step['ratio_deviation']:11.1e}"
            f"{step['share_of_clip_range']:15.1%}"
        )
    lines.append("")
    if found["status"] == "ok":
        return "\n".join([*lines, f"ok: it is 1, to {found['tolerance']:.1e} (tolerance)"])
    lines += [f"problem: it is not 1, to {found['tolerance']:.1e} (tolerance)", "", "what is left without a cause:"]
    guilty = [cause["name"] for cause in found["causes"]]
    lines += _trial_lines(found["without"], guilty if found["without_all"] is None else [])
    if found["without_all"] is not None:
        lines += _trial_lines({"all of them": found["without_all"]}, [])
    if found["without_all_but"]:
        lines += ["", "what is left without all but one:", *_trial_lines(found["without_all_but"], guilty)]
    return "\n".join([*lines, "", *_verdict(found)])


def _verdict(found: dict[str, Any]) -> list[str]:
    lines = []
    for cause in found["causes"]:
        lines += [f"cause: {cause['name']}: {cause['cause']}", f"   -> {cause['remedy']}"]
    if not found["causes"]:
        lines.append("cause: none of the causes. The two phases evaluate the network or the step in different ways.")
        if found["unsteadiness"]:
            lines.append(
                f"   two replays of one trajectory differ by {found['unsteadiness']:.1e} in log-probability: "
                "something in the forward is random or not deterministic"
            )
    if found["amplified_steps"]:
        steps, amplifier = ", ".join(map(str, found["amplified_steps"])), BY_NAME["tiny_std"]
        lines += [f"amplified at step {steps}: {amplifier.cause}", f"   -> {amplifier.remedy}"]
    return lines


def _trial_lines(trials: dict[str, dict[str, Any]], guilty: Sequence[str]) -> list[str]:
    lines = []
    for name, trial in trials.items():
        left = "-" if trial["ratio_deviation"] is None else f"{trial['ratio_deviation']:.1e}"
        note = f"  {trial['failure']}" if trial["failure"] else "  <- cause" if name in guilty else ""
        lines.append(f"  {name:14}{left:>9}{note}")
    return lines


def _trial(trial: Trial) -> dict[str, Any]:
    known = trial.deviation == trial.deviation
    return {"ratio_deviation": trial.deviation if known else None, "failure": trial.failure}
