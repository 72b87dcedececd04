"""The trainer as a library: a loop over `step`, ready-made parts, and an update streamed instead of replayed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast.common.errors import RewardError, UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import load_config, parse_arguments
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.training.trainer import Trainer

Policy = Callable[..., FlowModel]

SETTINGS = {
    "data.num_prompts": 2,
    "sampler.group_size": 3,
    "sampler.num_steps": 4,
    "sampler.dynamics": "flow_sde",
    "sampler.noise_level": 0.7,
    "sampler.micro_batch": 6,
    "window.schedule": "none",
    "window.size": "null",
    "objective.trained_steps": "all_but_last",
    "lookahead.plan": "exact",
    "lookahead.decoder": "full",
    "lookahead.monitor_every": 0,
    "optimizer.updates_per_iteration": 1,
    "ema.every": 0,
}


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.flatten(1).mean(1)


REWARD = RewardMixture({"brightness": (brightness, 1.0)})


def configured(**options: object) -> Config:
    given = [f"{key}={value}" for key, value in {**SETTINGS, **options}.items()]
    return parse_arguments(["--config=embedded_dense", *given])[0]


STREAMED = [
    {},
    {"sampler.guidance_scale": 3.0, "objective.clip_range": 0.2},
    {"sampler.guidance_scale": 3.0, "objective.guidance_gradient": "conditional", "objective.kl_coef": 0.5},
    {"sampler.micro_batch": 2, "objective.policy": "guard", "objective.clip_range": 2e-6},
    {"objective.trained_steps": 2, "objective.step_sampling": "importance", "objective.kl_coef": 0.5},
    {"credit.method": "value", "sampler.shared_noise": "true"},
    {"credit.method": "return_to_go", "credit.discount": 0, "window.schedule": "fixed", "window.size": 2},
    {"sampler.noise_level": "[0.7, 0, 0.5, 0.7]", "lookahead.decoder": "preview", "lookahead.copy_dtype": "float32"},
    {"lookahead.monitor_every": 1},
]


@pytest.mark.ci
@pytest.mark.parametrize("options", STREAMED, ids=lambda options: ",".join(options) or "plain")
def test_a_streamed_update_is_the_replayed_one(tiny_policy: Policy, options: dict[str, object]) -> None:
    # a chunk that every state's rows fill, so that completions of one state and of all have batches of one shape
    common = {"lookahead.chunk": 2, **options}
    trainers = [
        Trainer(configured(**common, **{"optimizer.update": update}), model=tiny_policy(spread=0.1), reward=REWARD)
        for update in ("replayed", "streamed")
    ]
    replayed, streamed = ([trainer.step(iteration) for iteration in range(2)] for trainer in trainers)
    for own, other in zip(streamed, replayed, strict=True):
        differing = {"nfe", "nfe_guided", "nfe_unguided", "flops", "time", "memory", "cpu_seconds"}
        same = {key for key in other if key.split("/")[0] not in differing}
        for key in same:
            assert own[key] == pytest.approx(other[key], rel=1e-5, abs=1e-6), key
        assert own["ratio_deviation"] <= 1e-6
        # the sampled steps' forwards are the update's, too: left are the reference policy's
        saved = other["nfe/update"] - own["nfe/update"]
        assert saved > 0 and own["nfe/rollout"] == other["nfe/rollout"]
    one, other = (trainer.model.trainable_parameters() for trainer in trainers)
    for name, parameter in one.items():
        assert parameter.grad is not None and other[name].grad is not None
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(other[name].grad, parameter.grad, rtol=1e-5, atol=1e-5 * scale)


@pytest.mark.ci
def test_where_memory_runs_out_a_streamed_update_is_replayed(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainers = [
        Trainer(configured(**{"optimizer.update": update}), model=tiny_policy(spread=0.1), reward=REWARD)
        for update in ("replayed", "streamed")
    ]
    replayed = trainers[0].step(0)
    own = trainers[1].learner.step_gradient
    calls = []

    def out_of_memory(*arguments: Any) -> Any:
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("the GPU is full")
        return own(*arguments)

    monkeypatch.setattr(trainers[1].learner, "step_gradient", out_of_memory)
    streamed = trainers[1].step(0)
    assert streamed["grad_norm"] == pytest.approx(replayed["grad_norm"], rel=1e-6)
    assert caplog.text.count("from here on every trained step's forward is replayed") == 1
    assert trainers[1].step(1)["nfe/update"] == trainers[0].step(1)["nfe/update"]
    assert caplog.text.count("is replayed") == 1


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"credit.method": "sparse"}, "credit.method sparse, which needs the rewards of all states first"),
        (
            {"credit.normalize": "joint"},
            "credit.method dense and credit.normalize joint, which needs the rewards of all",
        ),
        ({"credit.closeness": 1.0}, "credit.closeness, which needs the end of every trajectory first"),
        (
            {"lookahead.guidance": "reuse", "sampler.guidance_scale": 3.0},
            "lookahead.guidance reuse, which needs the whole rollout first",
        ),
        ({"lookahead.cache": "text:own"}, "lookahead.cache, which needs the whole rollout first"),
        ({"credit.smoothing": 1.0}, "credit.smoothing, which needs the rewards of all states first"),
        ({"optimizer.updates_per_iteration": 2, "sampler.micro_batch": 3}, "optimizer.updates_per_iteration 2"),
        ({"credit.method": "branch", "sampler.branches": 3, "sampler.micro_batch": 2}, "sampler.branches"),
    ],
)
def test_a_streamed_update_that_cannot_be_is_refused(options: dict[str, object], expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        configured(**options, **{"optimizer.update": "streamed"})
    assert f"optimizer.update: expected replayed with {expected}" in str(caught.value)


def measured(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what the machine decides, and without held-out scores."""
    others = ("time/", "memory/", "cpu_seconds", "eval/", "alarms")
    return {key: value for key, value in record.items() if not key.startswith(others)}


@pytest.mark.ci
def test_a_loop_over_steps_is_what_a_run_does(train: Any, tmp_path: Path) -> None:
    assert train(tmp_path / "run") == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    config = load_config(str(tmp_path / "run" / "config.yaml"), {"run.output_dir": str(tmp_path / "again")})
    trainer = Trainer(config)
    steps = [trainer.step(iteration) for iteration in range(len(lines))]
    assert [measured(json.loads(json.dumps(record))) for record in steps] == [measured(line) for line in lines]
    # and the run as a library call writes what the command writes
    result = Trainer(config).run()
    assert (result.iterations, result.signal) == (len(lines), None) and "adapter:" in str(result.summary)
    again = [json.loads(line) for line in (tmp_path / "again" / "metrics.jsonl").read_text().splitlines()]
    assert [measured(line) for line in again] == [measured(line) for line in lines]


def test_wrong_use_of_the_library_is_refused_in_words() -> None:
    with pytest.raises(UsageError, match="expected a configuration, as load_config"):
        Trainer("embedded_dense")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="overrides: expected a mapping"):
        load_config("embedded_dense", ["run.iterations=3"])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match='"run" is a section; give its options by dotted keys'):
        load_config("embedded_dense", {"run": {"iterations": 3}})
    with pytest.raises(UsageError, match='unknown option "run.iteration"; did you mean "run.iterations"'):
        load_config("embedded_dense", {"run.iteration": 3})
    with pytest.raises(UsageError, match="run.iterations: expected an integer"):
        load_config("embedded_dense", {"run.iterations": "three"})


def test_a_reward_that_is_only_observed_is_named_as_such(tiny_policy: Policy) -> None:
    def failing(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        raise ValueError("cannot read this prompt")

    config = configured(**{"evaluation.num_prompts": 2, "evaluation.samples_per_prompt": 1})
    mixture = RewardMixture({"brightness": (brightness, 1.0), "strict": (failing, 0.0)})
    trainer = Trainer(config, model=tiny_policy(), reward=mixture)
    with pytest.raises(RewardError, match="'strict' raised ValueError.*leave it out of reward.observed"):
        trainer.evaluate()


@pytest.mark.ci
def test_a_trainer_runs_once(train: Any, tmp_path: Path) -> None:
    assert train(tmp_path / "run", **{"run.iterations": 1}) == 0
    config = load_config(str(tmp_path / "run" / "config.yaml"), {"run.output_dir": tmp_path / "twice"})
    trainer = Trainer(config)
    trainer.step(0)
    with pytest.raises(UsageError, match="this trainer has trained already; make a new one"):
        trainer.run()


@pytest.mark.ci
def test_a_run_outside_of_the_main_thread(train: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert train(tmp_path / "run", **{"run.iterations": 1}) == 0
    config = load_config(tmp_path / "run" / "config.yaml", {"run.output_dir": tmp_path / "thread"})
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.WARNING):
        result = pool.submit(Trainer(config).run).result()
    assert result.iterations == 1 and "not in the main thread" in caplog.text


def test_parts_that_are_given_are_looked_at(tiny_policy: Policy, mixture_model: Any) -> None:
    # a plain function is a reward
    record = Trainer(configured(), model=tiny_policy(), reward=brightness).step(0)
    assert record["rewards/reward/mean"] == pytest.approx(record["reward"])
    mixture_model.trainable_parameters = dict
    with pytest.raises(UsageError, match="has no adapter"):
        Trainer(configured(**{"sampler.guidance_scale": 1}), model=mixture_model, reward=REWARD)


@pytest.mark.ci
def test_paths_of_each_state_pass_the_memory_check(train: Any, tmp_path: Path) -> None:
    paths = {"lookahead.plan": "paths", "lookahead.paths": "[[1],[2],[]]", "run.memory_check": "refuse"}
    assert train(tmp_path / "run", **paths, **{"run.iterations": 1}) == 0
