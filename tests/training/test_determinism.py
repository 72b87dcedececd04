"""docs/determinism.md: what is the same to the bit, and what to rounding, within an iteration from the same weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast.config.cli import load_config
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.training.trainer import Trainer

Policy = Callable[..., FlowModel]
SETTINGS: dict[str, Any] = {
    "data.num_prompts": 2,
    "sampler.group_size": 4,
    "sampler.num_steps": 4,
    "sampler.dynamics": "flow_sde",
    "sampler.noise_level": 0.7,
    "sampler.micro_batch": 8,
    "window.schedule": "none",
    "window.size": None,
    "objective.trained_steps": 2,
    "objective.step_sampling": "importance",
    "lookahead.plan": "exact",
    "lookahead.decoder": "full",
    "lookahead.monitor_every": 0,
    "lookahead.chunk": 64,
    "optimizer.updates_per_iteration": 1,
    "ema.every": 0,
}


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.flatten(1).mean(1)


def iteration(policy: FlowModel, **options: Any) -> dict[str, Tensor]:
    """What an iteration draws, reaches, is rewarded with and learns."""
    trainer = Trainer(load_config("embedded_dense", SETTINGS | options), model=policy, reward=brightness)
    batch, steps = trainer.prompts.batch(3), trainer.schedule.at(3)
    done = trainer.strategy.run(trainer, batch, steps, 3)
    assert done.rewards.lookahead_rewards is not None
    found = {"noise": done.rollout.latents[0], "states": done.rollout.latents, "steps": torch.tensor(steps.trained)}
    found |= {"rewards": done.rewards.rewards, "gains": done.rewards.lookahead_rewards}
    parameters = trainer.model.trainable_parameters().items()
    return found | {f"gradient of {name}": p.grad.clone() for name, p in parameters if p.grad is not None}


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets torch's threads for the test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


BITWISE: list[dict[str, Any]] = [{}, {"reward.overlap": True}, {"reward.timeout": None}, {"run.iterations": 7}]
ROUNDING: list[dict[str, Any]] = [{"sampler.micro_batch": 2}, {"lookahead.chunk": 3}, {"lookahead.memory_gb": 1e-3}]


@pytest.mark.ci
def test_equal_to_the_bit_and_to_rounding(tiny_policy: Policy) -> None:
    reference = iteration(tiny_policy(spread=0.1))
    assert any(name.startswith("gradient") for name in reference)
    for options in BITWISE:
        found = iteration(tiny_policy(spread=0.1), **options)
        assert [
            name for name in reference if not torch.equal(found[name].nan_to_num(), reference[name].nan_to_num())
        ] == []
    for options in ROUNDING:
        alike(iteration(tiny_policy(spread=0.1), **options), reference)


@pytest.mark.ci
def test_threads_change_rounding_alone(tiny_policy: Policy, threads: Callable[[int], None]) -> None:
    threads(1)
    one = iteration(tiny_policy(spread=0.1))
    threads(2)
    alike(iteration(tiny_policy(spread=0.1)), one)


def alike(found: dict[str, Tensor], reference: dict[str, Tensor]) -> None:
    """What is drawn is equal, and the rest to the rounding of float32."""
    assert torch.equal(found["noise"], reference["noise"]) and torch.equal(found["steps"], reference["steps"])
    for name, values in reference.items():
        if name not in ("noise", "steps"):
            scale = values.nan_to_num().abs().max().item()
            # a gain is a small difference, by which its group is divided: the gradient has fewer digits
            digits = 2e-2 if name.startswith("gradient") else 1e-4
            torch.testing.assert_close(found[name], values, rtol=0, atol=digits * scale, equal_nan=True)


def test_the_page_names_tests_that_are_there() -> None:
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "determinism.md").read_text(encoding="utf-8")
    named = {word for word in page.split("`") if word.startswith("tests/")}
    assert named and all((root / name).exists() for name in named)
