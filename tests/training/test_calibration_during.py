"""Recalibration during training: when, of which steps, on which samples, and that a stopped run goes on the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.flow.dynamics import C
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.run_files.metrics import read_metrics
from densegrpo_fast.training.costs import CostReport
from densegrpo_fast.training.meter import Meter, MeteredModel, MeteredReward
from densegrpo_fast.training.noise_levels import NoiseLevels
from densegrpo_fast.training.prompts import PromptSet
from densegrpo_fast.training.schedule import Schedule

OPTIONS = {
    "sampler.num_steps": 4,
    "sampler.dynamics": "flow_sde",
    "sampler.noise_level": 0.7,
    "window.schedule": "none",
    "window.size": "null",
    "calibration.every": 3,
    "calibration.samples": 16,
    "calibration.rounds": 4,
}


def configured(**options: object) -> Config:
    given = [f"{key}={value}" for key, value in (OPTIONS | options).items()]
    return parse_arguments(["--config=embedded_dense", *given])[0]


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.flatten(1).mean(1)


PROMPTS = PromptSet(("0", "12"), ({}, {}))


def levels(config: Config, model: Any) -> NoiseLevels:
    meter = Meter()
    reward = MeteredReward(RewardMixture({"brightness": (brightness, 1.0)}), meter)
    return NoiseLevels(config, MeteredModel(model, meter), reward, PROMPTS)


def calibrate(found: NoiseLevels, iteration: int) -> dict[str, float]:
    """A calibration's metrics with what it asked of the model."""
    assert isinstance(found.model, MeteredModel)
    meter = found.model.meter
    meter.reset()
    with meter("calibration"):
        metrics = found.calibrate(iteration)
    return metrics | CostReport(found.config, found.model, None, meter).metrics(4, 3, 16)


def measured(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what the machine decides."""
    return {key: record[key] for key in record if not key.startswith(("time/", "memory/", "cpu_seconds"))}


def test_when() -> None:
    found = NoiseLevels(configured(), None, None, PROMPTS)  # type: ignore[arg-type]
    assert [iteration for iteration in range(8) if found.due(iteration)] == [0, 3, 6]
    assert found.metrics() == {f"noise_level/step_{step}": 0.7 for step in range(4)}
    never = NoiseLevels(configured(**{"calibration.every": 0}), None, None, PROMPTS)  # type: ignore[arg-type]
    assert not any(never.due(iteration) for iteration in range(8)) and never.metrics() == {}


def test_a_calibration_moves_the_levels_by_the_rule(mixture_model: Any) -> None:
    found = levels(configured(), mixture_model)
    before, decoded = len(mixture_model.calls), len(mixture_model.decoded)
    metrics = calibrate(found, 3)
    # two rounds at the lowest level, a first move of .16 up or down, and perhaps a second one; the result is a level
    # that was measured or come to
    assert found.levels != (0.7,) * 4 and all(0.1 <= level <= 1.0 for level in found.levels)
    assert metrics["calibration/rounds"] == 4 and 0 <= metrics["calibration/imbalance"] <= 1
    # closed form: 4 rounds of 16 samples, each 4 steps and 3 + 2 + 1 of the exact completions
    assert metrics["nfe/calibration"] == metrics["nfe_unguided/calibration"] == 4 * 16 * (4 + 6)
    # with the image a picture for each state
    assert metrics["decodes/full"] == metrics["pictures_scored"] == sum(mixture_model.decoded[decoded:]) == 4 * 16 * 5
    assert sum(rows for rows, _, _ in mixture_model.calls[before:]) == 4 * 16 * (4 + 6)


def test_samples_depend_on_the_iteration_alone(mixture_model: Any) -> None:
    one, two, other = (levels(configured(), mixture_model) for _ in range(3))
    found = [calibrate(one, 3), calibrate(two, 3), calibrate(other, 6)]
    assert found[0] == found[1] and one.levels == two.levels
    assert found[2] != found[0] or other.levels != one.levels
    # a second calibration starts from the first one's levels, and from a checkpoint's likewise
    three = levels(configured(), mixture_model)
    three.restore(json.loads(json.dumps(one.state())))
    calibrate(one, 6)
    calibrate(three, 6)
    assert one.levels == three.levels


def test_steps_are_drawn_by_the_levels_of_now(mixture_model: Any) -> None:
    """By other levels the sizes of the gradients are others; the loss of drawn steps stays that of all on average."""
    drawn = {"objective.trained_steps": 2, "objective.step_sampling": "importance", "calibration.every": 1}
    config = configured(**drawn)
    found, schedule = levels(config, mixture_model), Schedule(config, mixture_model)
    probabilities = {}
    for iteration in range(3):
        steps = schedule.at(iteration, found.levels)
        chances = 2 / (3 * steps.draw_weights[:3])
        probabilities[found.levels] = chances
        assert chances.sum().item() == pytest.approx(2, rel=1e-5) and len(steps.trained) == 2
        assert [steps.coefficients.table[step, C] > 0 for step in range(3)] == [True] * 3
        # as a schedule would that had these levels from the start
        other = Schedule(configured(**drawn, **{"sampler.noise_level": list(found.levels)}), mixture_model)
        assert torch.equal(other.at(iteration).draw_weights, steps.draw_weights)
        assert other.at(iteration).trained == steps.trained
        found.calibrate(iteration)
    assert len(probabilities) == 3 and len({tuple(chances.tolist()) for chances in probabilities.values()}) == 3


def test_only_steps_that_may_be_noisy_are_calibrated(mixture_model: Any) -> None:
    window = {"window.schedule": "fixed", "window.size": 2, "sampler.noise_level": "[0.7, 0.0, 0.7, 0.7]"}
    found = levels(configured(**window), mixture_model)
    metrics = calibrate(found, 0)
    # step 1 is an ODE step of the window, 2 and 3 lie outside
    assert found.levels[0] != 0.7 and found.levels[1:] == (0.0, 0.7, 0.7)
    # with noise in step 0 alone only its state is completed, by 3 evaluations
    assert metrics["nfe/calibration"] == metrics["calibration/rounds"] * 16 * (4 + 3)


def test_branches_are_calibrated_as_branches(mixture_model: Any) -> None:
    tree = {"sampler.branches": 4, "sampler.micro_batch": 12, "credit.method": "branch"}
    found = levels(configured(**tree), mixture_model)
    before, metrics = len(mixture_model.calls), calibrate(found, 0)
    # the last step is not trained, and so has no branches
    assert found.levels[3] == 0.7 and 0.7 not in found.levels[:3]
    # closed form: 4 steps of an ODE trajectory, and 3 + 2 + 1 of what the branches lead to
    assert metrics["nfe/calibration"] == metrics["calibration/rounds"] * 16 * (4 + 6)
    assert sum(rows for rows, _, _ in mixture_model.calls[before:]) == metrics["nfe/calibration"]
    assert configured(**tree, **{"objective.trained_steps": "[1, 3]"}).calibrated_steps() == [1, 3]


def test_a_checkpoint_of_another_sampler_is_refused() -> None:
    found = NoiseLevels(configured(), None, None, PROMPTS)  # type: ignore[arg-type]
    found.restore(None)
    assert found.levels == (0.7,) * 4
    with pytest.raises(UserError, match="noise levels for another number of steps"):
        found.restore([0.5] * 3)


def test_the_table_takes_the_levels(mixture_model: Any) -> None:
    schedule = Schedule(configured(), mixture_model)
    assert schedule.coefficients(range(4), [0.5, 0.6, 0.7, 0.8]).noise_level == (0.5, 0.6, 0.7, 0.8)
    assert schedule.coefficients(range(4)).noise_level == (0.7,) * 4


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"sampler.dynamics": "cps", "calibration.highest": 1.5}, "calibration.highest: expected at most 1 with"),
        ({"calibration.lowest": 0.9, "calibration.highest": 0.5}, "calibration.lowest: expected at most"),
        ({"calibration.samples": 7}, "calibration.samples"),
        ({"calibration.every": -1}, "calibration.every"),
    ],
)
def test_refused_options(options: dict[str, object], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        configured(**options)
    assert expected in str(caught.value)


@pytest.mark.ci
def test_a_run_recalibrates_and_goes_on_bit_for_bit(train: Any, tmp_path: Path) -> None:
    options = {"sampler.dynamics": "flow_sde", "sampler.num_steps": 2, "evaluation.every": 0}
    # the levels start above what a calibration may choose, so the first one changes them
    options |= {"calibration.every": 2, "calibration.samples": 8, "calibration.rounds": 4, "calibration.highest": 0.5}
    options |= {"sampler.micro_batch": 4, "optimizer.updates_per_iteration": 1}
    assert train(tmp_path / "whole", **options, **{"run.iterations": 4}) == 0
    # stopped right before the second calibration, and once more after it
    for iterations in (2, 3, 4):
        flags = ["--resume"] if iterations > 2 else []
        assert train(tmp_path / "parts", *flags, **options, **{"run.iterations": iterations}) == 0
    whole, parts = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    for one, other in zip(whole, parts, strict=True):
        assert measured(one) == measured(other)
    noise = [[record[f"noise_level/step_{step}"] for step in range(2)] for record in whole]
    assert noise[0] == noise[1] and noise[2] == noise[3]
    assert all(level <= 0.5 for levels in noise for level in levels)
    assert [("calibration/imbalance" in record, record["time/calibration"] > 0) for record in whole] == [
        (True, True),
        (False, False),
    ] * 2
    # the levels in use are what a trained step's table holds, so that replay and rollout agree
    assert all(record["first_ratio_deviation"] <= 1e-5 for record in whole)
    first, second = (next((tmp_path / name / "adapter").glob("*.safetensors")) for name in ("whole", "parts"))
    assert first.read_bytes() == second.read_bytes()
