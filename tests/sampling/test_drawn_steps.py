"""An iteration that trains some of its steps completes no state that nothing is trained on."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.flops import embedded
from densegrpo_fast.models.memory import ModelMemory
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling.dedup import CompletionDedup
from densegrpo_fast.training.memory import estimate
from densegrpo_fast.training.schedule import Schedule
from densegrpo_fast.training.trainer import Experience, Trainer

Policy = Callable[..., FlowModel]

STEPS, SAMPLES = 6, 8
SETTINGS = {
    "data.num_prompts": 2,
    "sampler.group_size": 4,
    "sampler.num_steps": STEPS,
    "sampler.dynamics": "flow_sde",
    "sampler.noise_level": 0.7,
    "sampler.guidance_scale": 3.0,
    "sampler.micro_batch": SAMPLES,
    "window.schedule": "none",
    "window.size": "null",
    "objective.trained_steps": 2,
    "lookahead.plan": "exact",
    "lookahead.decoder": "full",
    "lookahead.monitor_every": 0,
    # a state is a batch of its own: what a forward rounds may depend on how many rows it has
    "lookahead.chunk": SAMPLES,
    "optimizer.updates_per_iteration": 1,
    "reward.max_missing": 0.0,
    "ema.every": 0,
}

WINDOW = {"window.schedule": "fixed", "window.size": 4, "window.first": 1}


def configured(**options: object) -> Config:
    given = [f"{key}={value}" for key, value in {**SETTINGS, **options}.items()]
    return parse_arguments(["--config=embedded_dense", *given])[0]


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.flatten(1).mean(1)


def trainer_of(config: Config, model: FlowModel) -> Trainer:
    return Trainer(config, model=model, reward=RewardMixture({"brightness": (brightness, 1.0)}))


def iteration(trainer: Trainer, number: int) -> tuple[Experience, dict[str, Tensor]]:
    """What an iteration has sampled and learned from, and its gradient."""
    batch, steps = trainer.prompts.batch(number), trainer.schedule.at(number)
    experience = trainer.strategy.run(trainer, batch, steps, number)
    gradients = {name: p.grad.clone() for name, p in trainer.model.trainable_parameters().items() if p.grad is not None}
    return experience, gradients


@pytest.mark.ci
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"objective.trained_steps": "[0, 2, 5]", "lookahead.decoder": "preview", "reward.overlap": "true"},
        {
            "credit.method": "value",
            "sampler.noise_level": "[0.7, 0.7, 0, 0.7, 0, 0.7]",
            "objective.trained_steps": "[1, 3]",
        },
        {"credit.method": "return_to_go", "credit.discount": 0, "credit.std": "global"},
        {**WINDOW, "sampler.shared_noise": "true", "lookahead.chunk": 1},
    ],
    ids=["drawn", "listed", "value", "return_to_go", "window"],
)
def test_advantages_and_gradient_are_those_of_all_states_completed(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    config = configured(**options)
    assert config.credit_scope == "local"
    some, everything = (trainer_of(config, tiny_policy(spread=0.1)) for _ in range(2))
    every = [CompletionDedup(some.schedule.at(number).coefficients.noisy).states for number in range(2)]
    for number in range(2):
        drawn, gradient = iteration(some, number)
        with monkeypatch.context() as patched:
            patched.setattr(everything.schedule, "completed_states", lambda *_, all=every[number]: tuple(all))
            whole, expected = iteration(everything, number)
        steps = some.schedule.at(number)
        trained = [step for step in steps.trained if steps.coefficients.noisy[step]]
        assert trained and whole.advantages.values[..., trained].abs().sum() > 0
        assert torch.equal(drawn.advantages.values[..., trained], whole.advantages.values[..., trained])
        assert drawn.advantages.values.isfinite().all()
        assert expected and all(torch.equal(gradient[name], values) for name, values in expected.items())
        assert torch.equal(drawn.rewards.rewards, whole.rewards.rewards)
        # what was asked for is there, and nothing else: neither 0 nor a missing score
        found, known = drawn.rewards.lookahead_rewards, whole.rewards.lookahead_rewards
        assert found is not None and known is not None and len(steps.completed) < len(every[number])
        representatives = CompletionDedup(steps.coefficients.noisy).shared_with
        asked = torch.tensor([state in steps.completed for state in representatives])
        assert torch.equal(found[..., asked], known[..., asked]) and found[..., ~asked].isnan().all()
        assert drawn.rewards.scores.missing_share == 0
        assert some.meter.counts["lookahead"].forwards < everything.meter.counts["lookahead"].forwards
        assert some.meter.counts["reward"].scored < everything.meter.counts["reward"].scored


def test_forwards_pictures_and_metrics_by_hand(tiny_policy: Policy) -> None:
    """Steps 1 and 4 of six: states 1, 2, 4 and 5 by 4 + 3 + 1 + 0 guided evaluations, and the image."""
    trainer = trainer_of(
        configured(**{"objective.trained_steps": "[1, 4]", "lookahead.monitor_every": 1}), tiny_policy()
    )
    record = trainer.step(0)
    assert record["nfe_guided/lookahead"] == SAMPLES * 8
    assert {key for key in record if key.startswith("gain/")} == {"gain/step_1", "gain/step_4", "gain/step_5"}
    assert "gain_correlation" in record and record["reward_missing"] == 0
    # the monitor completes one prompt's samples, at the same states
    assert record["nfe_guided/monitor"] == 4 * 8 and record["monitor/spearman_gains"] == pytest.approx(1)
    assert record["decodes/full"] == record["pictures_scored"] == (SAMPLES + 4) * 5
    apart = trainer_of(configured(**{"objective.trained_steps": "[1, 3]"}), tiny_policy()).step(0)
    assert {key for key in apart if key.startswith("gain/")} == {f"gain/step_{step}" for step in (1, 2, 3)}


@pytest.mark.parametrize(
    "options",
    [
        {"credit.normalize": "joint"},
        {"credit.smoothing": 1.0},
        {"credit.method": "return_to_go", "credit.discount": 0.5},
        {"credit.method": "turning_point"},
        {"credit.method": "mixture"},
        {"objective.trained_steps": "all_but_last"},
    ],
)
def test_a_whole_credit_has_all_states(mixture_model: FlowModel, options: dict[str, object]) -> None:
    assert Schedule(configured(**options), mixture_model).at(0).completed == tuple(range(STEPS + 1))


@pytest.mark.ci
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(noisy=st.lists(st.booleans(), min_size=STEPS, max_size=STEPS), trained=st.sets(st.integers(0, STEPS - 1)))
def test_the_completed_states_are_enough_and_no_more(
    mixture_model: FlowModel, noisy: list[bool], trained: set[int]
) -> None:
    schedule = Schedule(configured(), mixture_model)
    completed = schedule.completed_states(tuple(noisy), sorted(trained))
    dedup = CompletionDedup(tuple(noisy), completed=completed)
    # each has a completion of its own
    assert list(completed) == dedup.states == dedup.representatives
    known = dedup.every_state(torch.arange(len(completed), dtype=torch.float32)).isfinite().tolist()
    assert known[-1] and all(known[step] and known[step + 1] for step in trained if noisy[step])
    assert len(completed) <= 2 * sum(noisy[step] for step in trained) + 1


def test_branches_and_sparse_rewards_say_what_they_complete(tiny_policy: Policy) -> None:
    branches = {"credit.method": "branch", "sampler.branches": 2, "sampler.micro_batch": 4}
    for options in (branches, {**branches, "objective.trained_steps": "[1, 4]"}, {"credit.method": "sparse"}):
        trainer = trainer_of(configured(**options), tiny_policy())
        steps = trainer.schedule.at(0)
        assert trainer.sample(trainer.prompts.batch(0), steps, 0).completed == steps.completed
    assert steps.completed == (STEPS,)


@pytest.mark.ci
def test_the_estimate_counts_the_states_that_are_completed() -> None:
    memory = ModelMemory(embedded(), dtype=torch.float32)
    one = {"lookahead.chunk": 1, "lookahead.decoder": "full", "reward.overlap": "false"}

    def phases(trained: object) -> dict[str, int]:
        return dict(estimate(configured(**one, **{"objective.trained_steps": trained}), memory).phases)

    latents, picture = 4 * math.prod(embedded().latent_shape), memory.picture
    whole = phases("all_but_last")
    for trained, states in (("[1, 4]", 4), ("[1, 2, 3]", 4), (2, 4), (5, 6), ("[5]", 1)):
        found = phases(trained)
        assert whole["lookahead"] - found["lookahead"] == (6 - states) * SAMPLES * 4 * latents
        assert whole["pictures"] - found["pictures"] == (6 - states) * SAMPLES * 2 * picture
