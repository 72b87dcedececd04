"""Branches in a whole training iteration: what is judged, what is trained, what it costs, and going on with a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.doctor.loop import configured_loop, randomize_lora_
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling.branches import BranchedRollout
from densegrpo_fast.training.learner import Learner, LearnerOptions
from densegrpo_fast.training.lookahead import build_lookahead
from densegrpo_fast.training.prompts import PromptBatch
from densegrpo_fast.training.trainer import Trainer

Policy = Callable[..., FlowModel]
Train = Callable[..., int]

# 2 prompts x 2 trunks x 3 branches, 4 steps of which the first three branch
SETTINGS = {
    "data.num_prompts": 2,
    "sampler.group_size": 6,
    "sampler.branches": 3,
    "sampler.num_steps": 4,
    "sampler.micro_batch": 2,
    "sampler.dynamics": "flow_sde",
    "sampler.noise_level": 0.7,
    "window.schedule": "none",
    "window.size": "null",
    "lookahead.plan": "exact",
    "lookahead.decoder": "full",
    "credit.method": "branch",
}
ROWS = ["a cat"] * 6 + ["the moon"] * 6
REWARD = RewardMixture({"brightness": (lambda images, prompts, metadata: 1 + images.flatten(1).mean(1), 1.0)})


def configured(**options: object) -> Config:
    return parse_arguments([f"{key}={value}" for key, value in {**SETTINGS, **options}.items()])[0]


def sampled(config: Config, model: FlowModel) -> tuple[Trainer, PromptBatch, BranchedRollout]:
    trainer = Trainer(config, model=model, reward=REWARD)
    batch = PromptBatch(ROWS, [{}] * 12, 6)
    rollout = trainer.sample(batch, trainer.schedule.at(0), 0)
    assert isinstance(rollout, BranchedRollout)
    return trainer, batch, rollout


def test_branches_are_compared_within_their_trajectory(tiny_policy: Policy) -> None:
    config, model = configured(), tiny_policy()
    trainer, batch, tree = sampled(config, model)
    assert (tree.batch, tree.branches, tree.steps) == (4, 3, (0, 1, 2))
    outcome = trainer.score(tree, trainer.complete(tree), batch)
    # [P, G, T]: three judged steps, each trunk's branches around their own mean
    values = trainer.credit(tree, outcome).values.unflatten(1, (2, 3))
    assert values.shape == (2, 2, 3, 4) and not values[..., 3].any() and values[..., :3].all()
    torch.testing.assert_close(values.sum(2), torch.zeros(2, 2, 4), rtol=0, atol=1e-5)
    # the pictures of all branches of all steps
    assert outcome.rewards.shape == (2, 6 * 3) and outcome.scores.values.numel() == 36
    # a picture of the third branch of prompt 1's second trunk, scored by itself
    lookahead = build_lookahead(config, model)
    assert lookahead is not None
    image = model.decode(lookahead.complete(tree)[1, 11:12])
    expected = 1 + image.mean().item()
    assert outcome.rewards.unflatten(1, (6, 3))[1, 5, 1].item() == pytest.approx(expected, abs=1e-4)


def test_granular_rewards_are_of_both_completions_the_finest_last(tiny_policy: Policy) -> None:
    config, model = configured(**{"credit.method": "granular", "credit.granularities": "[1, 3]"}), tiny_policy()
    trainer, batch, tree = sampled(config, model)
    outcome = trainer.score(tree, trainer.complete(tree), batch)
    # by hand, for T = 4 and 3 branches: states 1, 2, 3 are evaluated, then a stride of 1 visits 2 + 1 + 0 later points,
    # a stride of 3 none
    assert trainer.meter.counts["lookahead"].forwards == 12 * (3 + 3)
    assert trainer.meter.counts["reward"].scored == trainer.meter.counts["reward"].full_decodes == 12 * 2 * 3
    assert outcome.scores.values.numel() == 2 * 36
    exact = Trainer(configured(), model=model, reward=REWARD)
    alone = exact.score(tree, exact.complete(tree), batch).rewards
    torch.testing.assert_close(alone, outcome.rewards, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kl_coef", [0.0, 0.1])
def test_a_state_is_trained_once_for_all_its_branches(tiny_policy: Policy, kl_coef: float) -> None:
    config, model = configured(**{"objective.kl_coef": kl_coef, "optimizer.lr": 1e-4}), tiny_policy(spread=0.05)
    _, _, tree = sampled(config, model)
    learner = Learner(model, LearnerOptions.of(config))
    judged = torch.randn(12, 4)
    update = learner.update(tree, judged, tree.steps)
    assert update["ratio_deviation"] <= 1e-6 and update["grad_norm"] > 0
    assert (update["kl"] > 0) == bool(kl_coef)
    # what the advantages asked for has come: the log-probabilities rose with them
    again = learner.update(tree, judged, tree.steps)
    assert again["policy_loss"] < update["policy_loss"]


def test_bad_branches_that_point_where_good_ones_do_can_be_held_back(tiny_policy: Policy) -> None:
    held = {"objective.negative_factor": 0.25, "objective.negative_threshold": 0.0}
    found = []
    for options in ({}, held):
        config, model = configured(**options), tiny_policy()
        _, _, tree = sampled(config, model)
        judged = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
        if not options:
            # the same by hand: of each state's branches, and by the cosines of what their steps added
            for step in tree.steps:
                mean = tree.latents[step] * tree.coefficients.table[step, 0]
                mean = mean + tree.velocities[step] * tree.coefficients.table[step, 1]
                noise = tree.next_latents(step, slice(0, 4)) - mean.repeat_interleave(3, dim=0)
                for first in range(0, 12, 3):
                    own, good = slice(first, first + 3), judged[first : first + 3, step] > 0
                    unit = noise[own].flatten(1) / noise[own].flatten(1).norm(dim=1, keepdim=True)
                    aligned = (unit @ unit[good].T).sum(1) > 0
                    judged[own, step] *= torch.where(aligned & ~good, 0.25, 1.0)
        learner = Learner(model, LearnerOptions.of(config))
        update = learner.update(tree, judged, tree.steps)
        assert ("held_back" in update) == bool(options)
        found.append((update, {name: value.detach().clone() for name, value in learner.parameters.items()}))
    (by_hand, expected), (held_back, parameters) = found
    assert 0 < held_back["held_back"] < 1
    for name in ("grad_norm", "policy_loss"):
        assert held_back[name] == pytest.approx(by_hand[name], rel=1e-4, abs=1e-7)
    for name, value in expected.items():
        torch.testing.assert_close(parameters[name], value, rtol=1e-5, atol=1e-8)


def test_the_ratio_check_knows_branches(tiny_policy: Policy) -> None:
    config, model = configured(**{"sampler.micro_batch": 1}), tiny_policy()
    randomize_lora_(model.network)
    loop = configured_loop(Trainer(config, model=model, reward=REWARD))
    assert loop.steps == (0, 1, 2) and max(loop.deviations()) <= 1e-6 and loop.unsteadiness() == 0


@pytest.mark.ci
def test_a_run_with_branches_and_its_continuation(train: Train, tmp_path: Path) -> None:
    # 2 prompts x 1 trunk x 2 branches; one of the steps 0 and 1, of 3, is drawn in each iteration
    branches = {"sampler.branches": 2, "sampler.micro_batch": 1, "credit.method": "granular", "evaluation.every": 0}
    assert train(tmp_path / "whole", **branches) == 0
    assert train(tmp_path / "parts", **branches, **{"run.iterations": 1}) == 0
    assert train(tmp_path / "parts", "--resume", **branches) == 0
    found = []
    for name in ("whole", "parts"):
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        measured = ("time/", "memory/", "cpu_seconds")
        found.append([{key: value for key, value in line.items() if not key.startswith(measured)} for line in lines])
    assert found[0] == found[1] and len(found[0]) == 3
    one, other = (
        load_file(tmp_path / name / "adapter/pytorch_lora_weights.safetensors") for name in ("whole", "parts")
    )
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    # By hand, per trunk: branching at step 0 takes 1 evaluation of the trunk, and 2 where its branches lead, and the
    # completions from state 1 one more each at stride 1, none at stride 2; at step 1 it is 2, and 2 and none at all.
    costs = {(line["nfe/rollout"], line["nfe/lookahead"], line["nfe/update"]) for line in found[0]}
    assert costs <= {(2, 8, 2), (4, 4, 2)}
    assert all(line["grad_norm"] > 0 and line["first_ratio_deviation"] < 1e-5 for line in found[0])


@pytest.mark.ci
def test_a_dry_run_with_branches(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"sampler.branches": 2, "sampler.micro_batch": 1, "credit.method": "branch"}
    assert train(tmp_path / "run", "--dry-run", **options, **{"optimizer.updates_per_iteration": 1}) == 0
    assert "one iteration of 2 samples" in capsys.readouterr().out
