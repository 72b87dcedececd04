"""Every credit method with every policy loss through one training iteration of a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.config import Config
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.credit import registry
from densegrpo_fast.flow.dynamics import C
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.objective.guard import guard_table
from densegrpo_fast.objective.policy import Objective
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.run_files.metrics import read_metrics
from densegrpo_fast.sampling.rollout import Rollout
from densegrpo_fast.training.learner import Learner, LearnerOptions
from densegrpo_fast.training.prompts import PromptBatch
from densegrpo_fast.training.rewarding import RewardBatch
from densegrpo_fast.training.schedule import Schedule
from densegrpo_fast.training.trainer import Trainer

Policy = Callable[..., FlowModel]
Train = Callable[..., int]

SETTINGS = {
    "data.num_prompts": 2,
    "sampler.group_size": 3,
    "sampler.num_steps": 4,
    "sampler.micro_batch": 6,
    "sampler.dynamics": "flow_sde",
    "sampler.noise_level": 0.7,
    "window.schedule": "none",
    "window.size": "null",
    "lookahead.decoder": "full",
    "objective.clip_range": 0.5,
    "objective.trained_steps": "all_but_last",
    "optimizer.updates_per_iteration": 1,
    "optimizer.lr": 1e-3,
}


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    """Above 0, as VGPO wants it, and different for any two pictures."""
    return 1 + images.flatten(1).mean(1)


REWARD = RewardMixture({"brightness": (brightness, 1.0)})


def configured(method: str, **options: object) -> Config:
    plan = registry.find(method).plan or "exact"
    # three branches of one trunk per prompt
    branches = {"sampler.branches": 3, "sampler.micro_batch": 2} if registry.find(method).uses_branches else {}
    settings = {**SETTINGS, **branches, "credit.method": method, "lookahead.plan": plan, **options}
    return parse_arguments(["--config=embedded_dense", *(f"{key}={value}" for key, value in settings.items())])[0]


def experience(
    config: Config, model: FlowModel, iteration: int = 0, prompts: tuple[str, str] = ("a cat", "the moon")
) -> tuple[Rollout, RewardBatch, Tensor]:
    """A rollout with its rewards and its advantages [P, G, T]."""
    trainer = Trainer(config, model=model, reward=REWARD)
    batch = PromptBatch([prompt for prompt in prompts for _ in range(3)], [{}] * 6, 3)
    rollout = trainer.sample(batch, trainer.schedule.at(iteration), iteration)
    rewards = trainer.score(rollout, trainer.complete(rollout), batch)
    return rollout, rewards, trainer.credit(rollout, rewards).values


@pytest.mark.parametrize("policy", ["clip", "guard", "dppo"])
@pytest.mark.parametrize("method", registry.names())
def test_one_iteration(tiny_policy: Policy, method: str, policy: str) -> None:
    config, model = configured(method, **{"objective.policy": policy}), tiny_policy()
    trajectory, outcome, values = experience(config, model)
    assert (outcome.gains is not None) == config.uses_lookahead
    advantages, steps = values.flatten(0, 1), Schedule(config, model).trained_steps(0)
    assert list(advantages.shape) == [6, 4] and advantages.isfinite().all() and advantages[:, steps].any()

    options = LearnerOptions.of(config)
    learner = Learner(model, options)
    before = {name: parameter.detach().clone() for name, parameter in learner.parameters.items()}
    update = learner.update(trajectory, advantages, steps)
    # at ratio 1 the loss of a step is minus its weighted mean advantage, whatever the policy loss
    objective = Objective(options.objective, trajectory.coefficients, steps)
    weights = objective.weights
    if policy == "guard":
        weights = weights * guard_table(trajectory.coefficients, steps).weight
    expected = -(weights[steps] * advantages[:, steps]).mean().item()
    assert update["policy_loss"] == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert update["ratio_deviation"] <= 1e-6 and update["clip_fraction"] == update["skipped_updates"] == 0
    assert update["grad_norm"] > 0
    assert any(not torch.equal(before[name], parameter) for name, parameter in learner.parameters.items())


def test_closeness_is_added_in_full_at_first_and_hardly_at_the_end(tiny_policy: Policy) -> None:
    options = {"run.iterations": 4, "sampler.shared_noise": True}
    near = Trainer(configured("dense", **options, **{"credit.closeness": 2.0}), model=tiny_policy(), reward=REWARD)
    plain = Trainer(configured("dense", **options), model=near.model, reward=REWARD)
    rollout, rewards, values = experience(plain.config, near.model)
    added = [near.credit(rollout, rewards, iteration).values - values for iteration in (0, 3)]
    assert added[0].any() and not added[0].sum(1).abs().max() > 1e-4
    torch.testing.assert_close(added[1], added[0] / 4)


@pytest.mark.ci
@pytest.mark.parametrize("trained", ["all_but_last", 1])
def test_a_step_trained_alone_weighs_what_it_does_among_all(tiny_policy: Policy, trained: object) -> None:
    """Flash-GRPO trains one drawn step per iteration: its weight must not be 1 for being the only one."""
    drawn = {"window.schedule": "random", "window.size": 1, "window.first": 0}
    method = {**drawn, "objective.step_weight": "flash", "objective.trained_steps": trained}
    config, model = configured("sparse", **method), tiny_policy()
    weights = Schedule(config, model).step_weights()
    assert weights[:3].mean().item() == pytest.approx(1.0, rel=1e-5)
    # as the source has it: c = sqrt(|dt|) / std + std sqrt(|dt|) (1 - sigma) / (2 sigma), the weight (1/c) / mean(1/c)
    sigmas = model.sigmas(4).double()
    root, noise = sigmas.diff().abs().sqrt()[:3], Schedule(config, model).coefficients([0, 1, 2]).table[:3, C]
    std = noise.double() / root
    gain = root / std + std * root * (1 - sigmas[:3]) / (2 * sigmas[:3])
    torch.testing.assert_close(weights[:3].double(), (1 / gain) / (1 / gain).mean(), rtol=1e-4, atol=0)

    seen = set()
    for iteration in range(6):
        trajectory, outcome, values = experience(config, model, iteration)
        (step,) = Schedule(config, model).trained_steps(iteration)
        judged = values.flatten(0, 1)
        # advantages of a group add up to 0: ones in their place
        update = Learner(model, LearnerOptions.of(config)).update(
            trajectory, torch.ones_like(judged), [step], Schedule(config, model).step_weights()
        )
        assert update["policy_loss"] == pytest.approx(-weights[step].item(), rel=1e-4)
        seen.add(step)
    assert len(seen) > 1


@pytest.mark.parametrize("method", ["sparse", "coca", "turning_point"])
def test_a_window_is_all_that_is_judged(tiny_policy: Policy, method: str) -> None:
    window = {"window.schedule": "fixed", "window.size": 2, "window.first": 1}
    config, model = configured(method, **window), tiny_policy()
    trajectory, outcome, values = experience(config, model)
    assert trajectory.coefficients.noisy == (False, True, True, False)
    assert not values[..., [0, 3]].any() and values[..., 1:3].any()
    if outcome.lookahead_rewards is not None:
        # the completions that noise-free steps join are one: their gain is exactly 0
        assert outcome.gains is not None and not outcome.gains[..., [0, 3]].any()
    learner = Learner(model, LearnerOptions.of(config))
    assert learner.update(trajectory, values.flatten(0, 1), [1, 2])["grad_norm"] > 0


@pytest.mark.parametrize("window", [True, False])
def test_instant_rewards_of_vgpo(mixture_model: FlowModel, window: bool) -> None:
    """Those of the next latents in one step (Eq 9), but with a window the last noisy step's: the real image's own."""
    options = {"window.schedule": "fixed", "window.size": 2} if window else {}
    config, model = configured("vgpo", **options), mixture_model
    trajectory, outcome, values = experience(config, model, prompts=("01", "2"))

    def reward(clean: Tensor) -> Tensor:
        return brightness(model.decode(clean, "full"), [], []).view(2, 3)

    def projected(state: int) -> Tensor:
        sigma = trajectory.coefficients.sigmas[state]
        return reward(trajectory.latents[state] - sigma * trajectory.velocities[state])

    # noise in the steps 0 and 1 of 4, or in all: the rewards of the states that the steps lead to
    image = reward(trajectory.latents[4])
    expected = [projected(1), image, image, image] if window else [*map(projected, (1, 2, 3)), image]
    assert outcome.lookahead_rewards is not None
    torch.testing.assert_close(outcome.lookahead_rewards[..., 1:], torch.stack(expected, -1))
    if window:
        assert (projected(2) - image).abs().max() > 1e-3, "Eq 9 of step 1"


@pytest.mark.ci
@pytest.mark.parametrize("remainder", ["share", "dpm_solver", "both"])
@pytest.mark.parametrize("method", registry.names())
def test_other_steps_after_the_window_are_judged_or_refused(tiny_policy: Policy, method: str, remainder: str) -> None:
    window = {"sampler.num_steps": 7, "window.schedule": "progressive", "window.size": 2, "window.last": 3}
    window |= {"window.stride": 2, "window.every": 1}
    share = {"window.remainder_share": 0.8} if remainder != "dpm_solver" else {}
    solver = {"window.remainder": "dpm_solver"} if remainder != "share" else {}
    if registry.find(method).uses_branches:
        with pytest.raises(UserError, match=r"window\.remainder\w*: expected .* with sampler.branches") as caught:
            configured(method, **window, **share, **solver)
        assert exit_code_of(caught.value) == ExitCode.USAGE
        return
    config, model = configured(method, **window, **share, **solver), tiny_policy()
    learner, lengths = Learner(model, LearnerOptions.of(config)), []
    for iteration in range(2):
        trajectory, outcome, values = experience(config, model, iteration)
        steps, values = Schedule(config, model).trained_steps(iteration), values.flatten(0, 1)
        assert (
            values.shape[1] == trajectory.coefficients.num_steps and values[:, steps].any() and values.isfinite().all()
        )
        assert learner.update(trajectory, values, steps)["grad_norm"] > 0
        lengths.append(trajectory.coefficients.num_steps)
    # windows 0..1 and 2..3: of the 5 and 3 steps after them floor(6 * .8) - 1 and floor(4 * .8) - 1 are kept
    assert lengths == ([2 + 3, 4 + 2] if share else [7, 7])
    assert config.lengths() == sorted({*lengths}, reverse=True)


def test_one_noisy_step_of_a_shared_start_is_branching(tiny_policy: Policy) -> None:
    """Sampling of TempFlow-GRPO and Granular-GRPO: a group parts at one step, which alone its rewards tell of."""
    branching = {"sampler.shared_noise": "true", "window.schedule": "random", "window.size": 1}
    found = {}
    for method in ("sparse", "dense"):
        config, model = configured(method, **branching), tiny_policy()
        (step,) = Schedule(config, model).trained_steps(1)
        trajectory, outcome, values = experience(config, model, iteration=1)
        states = trajectory.latents.unflatten(1, (2, 3))
        # the same state up to rounding, which may depend on a row's place in the batch
        shared = states[: step + 1]
        torch.testing.assert_close(shared, shared[:, :, :1].expand_as(shared), rtol=0, atol=1e-5)
        assert not torch.equal(states[step + 1, :, 0], states[step + 1, :, 1])
        found[method] = values
        assert found[method].abs().sum((0, 1)).nonzero().flatten().tolist() == [step]
    # the completion of the common state is the same number for all, and drops out
    torch.testing.assert_close(found["dense"], found["sparse"], rtol=1e-3, atol=1e-4)


def test_two_updates_of_one_iteration_see_the_policy_move(tiny_policy: Policy) -> None:
    """Off the sampling policy the three losses differ: each one's metrics tell how."""
    found = {}
    for policy in ("clip", "guard", "dppo"):
        options = {"objective.policy": policy, "objective.dppo_threshold": 0, "optimizer.lr": 0.05}
        options |= {"objective.clip_range": 1e-4, "objective.guard_weight": "none"}
        config, model = configured("sparse", **options), tiny_policy()
        trajectory, outcome, values = experience(config, model)
        learner, judged = Learner(model, LearnerOptions.of(config)), values.flatten(0, 1)
        learner.update(trajectory, judged, [0, 1])
        found[policy] = learner.update(trajectory, judged, [0, 1])
    deviation = {policy: update["ratio_deviation"] for policy, update in found.items()}
    # the first update is of the same direction, but for Guard's evening of the steps
    assert deviation["clip"] == pytest.approx(deviation["dppo"], rel=1e-4)
    assert deviation["guard"] != pytest.approx(deviation["clip"], rel=1e-2)
    assert 0 < found["clip"]["clip_fraction"] and 0 < found["dppo"]["clip_fraction"] < 1
    # a clipped or dropped sample adds nothing further, so what is left differs
    assert len({update["policy_loss"] for update in found.values()}) == 3


@pytest.mark.ci
def test_a_run_with_a_method_from_a_file(train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import replace\n"
        "from densegrpo_fast.credit.dense import dense_advantages\n"
        "from densegrpo_fast.credit.registry import CreditMethod\n"
        "def scaled(lookahead_rewards, *, factor, **spread):\n"
        "    found = dense_advantages(lookahead_rewards, **spread)\n"
        "    return replace(found, values=factor * found.values)\n"
        "SCALED = CreditMethod(scaled, needs=('lookahead_rewards',), options=('factor',))\n"
    )
    named = {"credit.method": f"{path}:SCALED", "run.iterations": 1, "evaluation.every": 0}
    assert train(tmp_path / "run", **named, **{"credit.arguments": "{factor: 0}"}) == 0
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    # all advantages times 0: it was this method that was asked
    assert record["grad_norm"] == 0 and record["nfe/lookahead"] > 0 and "gain/step_0" in record
    assert train(tmp_path / "other", **named) == 2
    assert "credit.arguments: method" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.ci
def test_a_run_with_a_policy_and_step_weights_from_a_file(
    train: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from densegrpo_fast.objective.registry import PolicyLoss, StepWeighting\n"
        "def hinge(coefficients, steps, *, margin):\n"
        "    def loss(pairs):\n"
        "        rise = pairs.log_prob - pairs.old_log_prob\n"
        "        losses = (margin * pairs.advantages.abs() - pairs.advantages * rise).relu()\n"
        "        seen = {'hinge': losses.detach().mean(), 'square': pairs.weight.square().mean()}\n"
        "        return (pairs.weight * losses).mean(), seen\n"
        "    return loss\n"
        "HINGE = PolicyLoss(hinge, options=('margin',))\n"
        "FIRST = StepWeighting(lambda coefficients: (coefficients.sigmas[:-1] == 1).float())\n"
    )
    named = {"objective.policy": f"{path}:HINGE", "objective.step_weight": f"{path}:FIRST", "objective.kl_coef": 0.01}
    short = {"run.iterations": 2, "evaluation.every": 0, "objective.trained_steps": "[0, 1]"}
    short |= {"optimizer.updates_per_iteration": 1}
    assert train(tmp_path / "run", **named, **short, **{"objective.arguments": "{margin: 0.25}"}) == 0
    first, second = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert first["ratio_deviation"] <= 1e-6 and first["kl"] == 0 and first["grad_norm"] > 0
    # the first of two trained steps, which starts at sigma 1, has all the weight: 2, so that their mean is 1
    assert first["square"] == pytest.approx((2**2 + 0) / 2)
    # at ratio 1 the loss of a pair is margin |A|; two samples of a group have the advantages 1 and -1, or both 0
    assert 0 < first["hinge"] <= 0.25 * 1.0001 and first["policy_loss"] > 0 and second["kl"] > 0
    assert train(tmp_path / "other", **named) == 2
    assert "objective.arguments: policy" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.ci
def test_completions_that_define_a_method_are_not_guarded(train: Train, tmp_path: Path) -> None:
    vgpo = {"credit.method": "vgpo", "lookahead.plan": "one_step", "lookahead.monitor_every": 1}
    assert train(tmp_path / "run", **vgpo, **{"run.iterations": 1, "evaluation.every": 0}) == 0
    (record,) = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert "monitor/spearman_gains" not in record and record["nfe/lookahead"] == 0
