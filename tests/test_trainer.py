"""The trainer as a library: a loop over `step`, ready-made parts, and an update streamed instead of replayed."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast.common.errors import RewardError, UsageError
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import load_config, parse_arguments
from densegrpo_fast.flow import ops
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.models.completion_head import CompletionHead, HeadConfig
from densegrpo_fast.objective.policy import Objective
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling.rollout import Trajectory, initial_noise
from densegrpo_fast.training.learner import StepScores
from densegrpo_fast.training.lookahead import build_plan
from densegrpo_fast.training.prompts import PromptBatch
from densegrpo_fast.training.rewarding import RewardBatch
from densegrpo_fast.training.schedule import IterationSteps
from densegrpo_fast.training.trainer import Experience, Trainer

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


class Streamed:
    """Each step is updated as soon as the states around it are scored, on the rollout's own graph.

    No forward is repeated, and the graphs of two steps exist at once. It serves credits that are local to a step.

    Attributes:
        events: what happened, in order.
    """

    def __init__(self) -> None:
        self.events: list[str] = []

    def run(self, trainer: Trainer, batch: PromptBatch, steps: IterationSteps, iteration: int) -> Experience:
        policy, learner, table = trainer.policy, trainer.learner, steps.coefficients
        index, count = torch.arange(len(batch.prompts)), table.num_steps
        noise = initial_noise(policy, index, seed=trainer.config.seed, iteration=iteration)
        scale, conditioning = trainer.config.sampler.guidance_scale, policy.encode(batch.prompts)
        latents, velocities = noise.new_zeros(count + 1, *noise.shape), noise.new_zeros(count, *noise.shape)
        latents[0], log_probs, every = noise, noise.new_zeros(count, len(noise)), slice(0, len(noise))
        rollout = Trajectory(latents, velocities, log_probs, table, conditioning, scale)
        objective = Objective(learner.options.objective, table, steps.trained, steps.weights)
        by_state = torch.full((len(noise) // batch.group_size, batch.group_size, count + 1), torch.nan)
        learner.begin_update()
        totals: dict[str, Tensor] = {}
        deviations, waiting, advantages = [], None, None
        for state in range(count + 1):
            graph = None
            if state < count:
                velocity = policy.velocity(latents[state].clone(), table.sigmas[state].expand(6), conditioning, scale)
                guided = velocity.combined()
                velocities[state] = guided.detach()
                words = {"seed": trainer.config.seed, "sample_index": index, "iteration": iteration}
                arrived, log_prob = ops.sde_step(latents[state], velocities[state], table.table, state, **words)
                latents[state + 1], log_probs[state] = arrived, log_prob
                graph = StepScores(
                    ops.sde_log_prob(latents[state].clone(), guided, arrived, table.table, state), guided
                )
                self.events.append(f"step {state}")
            here = replace(rollout, completed_states=(state,))
            rewards = trainer.score(here, trainer.complete(here), batch)
            assert rewards.lookahead_rewards is not None
            by_state[..., state] = rewards.lookahead_rewards[..., state]
            self.events.append(f"score {state}")
            if state - 1 in steps.trained:
                assert waiting is not None
                known = RewardBatch(rewards.rewards, by_state, None, rewards.scores)
                advantages = trainer.credit(rollout, known)
                values = advantages.values.flatten(0, 1)[:, state - 1]
                loss, metrics = learner.loss(rollout, values, objective, state - 1, every, waiting)
                learner.add_gradient(loss / len(steps.trained))
                deviations.append(metrics.pop("ratio_deviation"))
                for name, value in {"loss": loss.detach(), **metrics}.items():
                    totals[name] = totals.get(name, 0.0) + value / len(steps.trained)
                self.events.append(f"update {state - 1}")
            waiting = graph
        update = learner.apply_update(totals, deviations)
        update |= {"first_ratio_deviation": update["ratio_deviation"], "micro_batch": 6.0}
        assert advantages is not None
        return Experience(rollout, RewardBatch(rewards.rewards, by_state, None, rewards.scores), advantages, update)


@pytest.mark.parametrize("options", [{}, {"sampler.guidance_scale": 3.0, "objective.clip_range": 0.2}])
def test_a_streamed_update_has_the_replayed_one_s_gradient(tiny_policy: Policy, options: dict[str, object]) -> None:
    config, streamed = configured(**options), Streamed()
    trainers = [
        Trainer(config, model=tiny_policy(spread=0.1), reward=REWARD, strategy=strategy)
        for strategy in (None, streamed)
    ]
    replayed, own = (trainer.step(0) for trainer in trainers)
    one, other = (trainer.model.trainable_parameters() for trainer in trainers)
    assert own["ratio_deviation"] <= 1e-6
    for key in ("reward", "loss", "grad_norm", *(f"gain/step_{step}" for step in range(4))):
        assert own[key] == pytest.approx(replayed[key], rel=1e-5, abs=1e-7), key
    for name, parameter in one.items():
        assert parameter.grad is not None and other[name].grad is not None
        scale = parameter.grad.abs().max().item()
        torch.testing.assert_close(other[name].grad, parameter.grad, rtol=1e-5, atol=1e-5 * scale)
    # the sampled steps' forwards are the update's, too
    assert own["nfe/rollout"] == 0 and replayed["nfe/update"] > 0 and own["nfe/update"] == 0
    assert streamed.events[:5] == ["step 0", "score 0", "step 1", "score 1", "update 0"]


def measured(record: dict[str, Any]) -> dict[str, Any]:
    """A record without what the machine decides, and without held-out scores."""
    others = ("time/", "memory/", "cpu_seconds", "eval/", "alarms")
    return {key: value for key, value in record.items() if not key.startswith(others)}


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


def test_a_trainer_runs_once(train: Any, tmp_path: Path) -> None:
    assert train(tmp_path / "run", **{"run.iterations": 1}) == 0
    config = load_config(str(tmp_path / "run" / "config.yaml"), {"run.output_dir": tmp_path / "twice"})
    trainer = Trainer(config)
    trainer.step(0)
    with pytest.raises(UsageError, match="this trainer has trained already; make a new one"):
        trainer.run()


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


@pytest.mark.parametrize("limit", [None, 2])
def test_a_head_that_is_given_is_used_and_may_run_out_of_memory(tiny_policy: Policy, limit: int | None) -> None:
    config = configured(**{"lookahead.plan": "nodes", "lookahead.nodes": "[2]"})
    model = tiny_policy()
    paths = build_plan(config, 4).paths
    shape = HeadConfig(4, paths, model.latent_shape, 2, model.network.inner_dim, width=16)
    head = CompletionHead(shape)
    sizes, forward = [], head.forward

    def limited(hidden: Tensor, *rest: Tensor) -> Tensor:
        sizes.append(len(hidden))
        if limit is not None and len(hidden) > limit:
            raise torch.OutOfMemoryError("too many")
        return forward(hidden, *rest)

    head.forward = limited  # type: ignore[method-assign]
    record = Trainer(config, model=model, reward=REWARD, head=head).step(0)
    assert sizes and torch.isfinite(torch.tensor(record["reward"]))
    assert limit is None or (max(sizes) > limit and sizes[-1] <= limit)
    other = CompletionHead(replace(shape, paths=build_plan(configured(**{"lookahead.plan": "one_step"}), 4).paths))
    with pytest.raises(UsageError, match="was made for another plan"):
        Trainer(config, model=tiny_policy(), reward=REWARD, head=other)


def test_paths_of_each_state_pass_the_memory_check(train: Any, tmp_path: Path) -> None:
    paths = {"lookahead.plan": "paths", "lookahead.paths": "[[1],[2],[]]", "run.memory_check": "refuse"}
    assert train(tmp_path / "run", **paths, **{"run.iterations": 1}) == 0
