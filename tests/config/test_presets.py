"""The embedded presets: each does an iteration, and those of the methods differ in the method alone."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import densegrpo_fast
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.config.yaml_files import preset_names
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.flops import ATTENTION_TARGETS
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.training.schedule import Schedule
from densegrpo_fast.training.trainer import Trainer

EMBEDDED = [name for name in preset_names() if name.startswith("embedded_")]
METHODS = {
    "embedded_sparse": "2505.05470",
    "embedded_fast": "2505.05470",
    "embedded_flash": "2605.15980",
    "embedded_stepwise": "2603.28718",
    "embedded_value": "2601.20218",
    "embedded_return_to_go": "2601.20218",
    "embedded_mixture": "2602.04928",
    "embedded_turning_point": "2602.06422",
    "embedded_turning_point_free": "2602.06422",
    "embedded_vgpo": "2512.12387",
    "embedded_coca": "2505.19196",
    "embedded_guard": "2510.22319",
    "embedded_dppo": "2606.11025",
    "embedded_pcpo": "2509.25774",
    "embedded_mixgrpo": "2507.21802",
    "embedded_tempflow": "2508.04324",
    "embedded_g2rpo": "2510.01982",
    "embedded_calibrated": "2601.20218",
}
SMALL = {
    "data.num_prompts": 1,
    "sampler.micro_batch": 1,
    "lookahead.decoder": "full",
    "calibration.samples": 8,
    "calibration.rounds": 1,
}


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Above 0, and different for any two pictures."""
    return 1 + images.flatten(1).mean(1)


REWARD = RewardMixture({"brightness": (brightness, 1.0)})


def preset(name: str) -> Config:
    return parse_arguments(["--config", name])[0]


@pytest.mark.ci
@pytest.mark.parametrize("name", EMBEDDED)
def test_an_iteration(name: str, tiny_policy: Callable[..., FlowModel]) -> None:
    """What `train` does in an iteration, with a tiny model and eight samples."""
    config = parse_arguments(["--config", name, *(f"{key}={value}" for key, value in SMALL.items())])[0]
    model = tiny_policy()
    before = {name: parameter.detach().clone() for name, parameter in model.trainable_parameters().items()}
    update = Trainer(config, model=model, reward=REWARD).step(0)
    assert ("calibration/rounds" in update) == (name == "embedded_calibrated")
    assert any(not torch.equal(before[name], tensor) for name, tensor in model.trainable_parameters().items())
    assert update["grad_norm"] > 0 and update["skipped_updates"] == 0 and update["first_ratio_deviation"] <= 1e-5
    # with two updates the second one's ratios have left 1
    assert (update["ratio_deviation"] > update["first_ratio_deviation"]) == (config.optimizer.updates_per_iteration > 1)


@pytest.mark.parametrize("name", ["embedded_dense", "sd35_medium_pickscore"])
def test_the_adapter_is_on_the_projections_that_costs_are_counted_with(name: str) -> None:
    assert tuple(preset(name).lora.targets) == ATTENTION_TARGETS


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_preset_names_its_source(name: str) -> None:
    """The one paper, in the comment at its beginning."""
    lines = (Path(densegrpo_fast.__file__).parent / "configs" / f"{name}.yaml").read_text().splitlines()
    comment = " ".join(line for line in lines if line.startswith("#"))
    assert re.findall(r"arXiv (\d{4}\.\d{5})", comment) == [METHODS[name]]


def test_every_embedded_preset_is_a_method_or_a_base() -> None:
    bases = {"embedded_dense", "embedded_branched", "embedded_paper", "embedded_paper_fast", "embedded_paper_drawn"}
    bases |= {"embedded_words"}  # another model and task
    assert set(EMBEDDED) - set(METHODS) == bases


@pytest.mark.parametrize("name", METHODS)
def test_methods_can_be_compared(name: str) -> None:
    """Same start, prompts, rewards, evaluation and samples per iteration, as benches/learning/study.py pairs them."""
    dense, own = preset("embedded_dense"), preset(name)
    for section in ("model", "lora", "data", "reward", "evaluation", "ema"):
        assert getattr(own, section) == getattr(dense, section), section
    assert (own.sampler.group_size, own.sampler.guidance_scale) == (8, 1.0)
    assert own.run == dense.run and own.optimizer.lr == dense.optimizer.lr


def test_only_stepwise_normalises_over_all_steps_together() -> None:
    """DenseGRPO (Eq 10), TP-GRPO, VGPO and Euphonium compare the samples of a group at each step by itself."""
    joint = [name for name in preset_names() if preset(name).credit.normalize == "joint"]
    assert joint == ["embedded_stepwise"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("embedded_stepwise", {"credit.method": "dense", "credit.normalize": "joint", "lookahead.n": 5}),
        ("embedded_value", {"credit.method": "value"}),
        ("embedded_return_to_go", {"credit.method": "return_to_go", "credit.discount": 1.0}),
        ("embedded_mixture", {"credit.method": "mixture", "credit.terminal_coef": 1.0, "credit.dense_coef": 1.0}),
        ("embedded_turning_point", {"credit.method": "turning_point", "credit.consistent": True}),
        ("embedded_turning_point_free", {"credit.method": "turning_point", "credit.consistent": False}),
        ("embedded_vgpo", {"credit.method": "vgpo", "lookahead.plan": "one_step"}),
        ("embedded_coca", {"credit.method": "coca"}),
        ("embedded_guard", {"credit.method": "sparse", "objective.policy": "guard", "objective.guard_weight": "paper"}),
        ("embedded_dppo", {"credit.method": "sparse", "objective.policy": "dppo", "objective.dppo_threshold": 1e-5}),
        ("embedded_pcpo", {"credit.method": "sparse", "objective.step_weight": "proportionate"}),
        ("embedded_tempflow", {"credit.method": "branch", "objective.step_weight": "noise_aware"}),
        ("embedded_g2rpo", {"credit.method": "granular", "credit.granularities": [1, 2], "lookahead.plan": "exact"}),
        ("embedded_fast", {"credit.method": "sparse", "window.schedule": "random", "window.size": 2}),
        (
            "embedded_flash",
            {
                "credit.method": "sparse",
                "window.schedule": "random",
                "window.size": 1,
                "objective.step_weight": "flash",
            },
        ),
        (
            "embedded_mixgrpo",
            {"credit.method": "sparse", "window.schedule": "progressive", "window.remainder": "dpm_solver"},
        ),
        ("embedded_calibrated", {"credit.method": "dense", "calibration.every": 50, "sampler.dynamics": "flow_sde"}),
    ],
)
def test_what_a_preset_takes_over(name: str, expected: dict[str, Any]) -> None:
    settings = preset(name).model_dump()
    found = {key: settings[key.partition(".")[0]][key.partition(".")[2]] for key in expected}
    assert found == expected


@pytest.mark.parametrize("base", ["embedded_paper", "sd35_medium_pickscore"])
def test_the_fast_engine_is_the_base_with_branches_and_cheaper_exact_completions(base: str) -> None:
    plain, fast = preset(base), preset(f"{base}_fast")
    changed = {
        (section, key)
        for section, own in fast.model_dump(exclude={"preset", "seed"}).items()
        for key, value in own.items()
        if value != getattr(getattr(plain, section), key)
    }
    rows = {("sampler", "micro_batch"), ("sampler", "group_size"), ("data", "num_prompts")}
    assert changed - rows == {
        ("model", "vae_dtype"),
        ("sampler", "branches"),
        ("lookahead", "plan"),
        ("lookahead", "copy_dtype"),
        ("credit", "method"),
    }
    # as many samples in an iteration, and all of a prompt's from one trajectory
    samples = [one.data.num_prompts * one.sampler.group_size for one in (plain, fast)]
    assert samples[0] == samples[1] and fast.sampler.branches == fast.sampler.group_size
    assert (fast.lookahead.plan, fast.lookahead.guidance, fast.lookahead.decoder) == ("exact_but_last", "full", "full")
    assert fast.credit.method == "branch" and fast.model.vae_dtype == "bfloat16"
    # a copy as precise as the policy: the large one is in bfloat16 on a GPU
    assert fast.lookahead.copy_dtype == ("bfloat16" if fast.model.dtype == "auto" else fast.model.dtype)


def test_flash_draws_one_step_for_all_samples_of_an_iteration(mixture_model: FlowModel) -> None:
    schedule = Schedule(preset("embedded_flash"), mixture_model)
    drawn = [list(schedule.noisy_steps(iteration)) for iteration in range(40)]
    assert all(len(steps) == 1 for steps in drawn)
    # any but the last of six
    assert {steps[0] for steps in drawn} == set(range(5))
    assert all(schedule.trained_steps(iteration) == drawn[iteration] for iteration in range(40))
