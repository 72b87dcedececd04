"""The learner: direction and size of an update, what it does with bad numbers, and its complete state."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.flow.dynamics import C, coefficients
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.sampling.replay import replay
from densegrpo_fast.sampling.rollout import Trajectory, initial_noise, rollout
from densegrpo_fast.training.learner import Learner, LearnerOptions

T, B = 3, 4
Policy = Callable[..., FlowModel]
Options = Callable[..., LearnerOptions]


def sampled(model: FlowModel, guidance_scale: float = 1.0) -> Trajectory:
    index = torch.arange(B)
    return rollout(
        model,
        initial_noise(model, index, seed=0, iteration=0),
        model.encode(["a cat", "a cat", "the moon", "the moon"]),
        coefficients(model.sigmas(T), 0.7, "flow_sde"),
        sample_index=index,
        seed=0,
        iteration=0,
        guidance_scale=guidance_scale,
    )


def advantages(*rows: float) -> Tensor:
    return torch.tensor(rows)[:, None].repeat(1, T)


def values(learner: Learner) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in learner.parameters.items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("guidance_scale", "policy"), [(1.0, "clip"), (3.0, "clip"), (1.0, "guard"), (3.0, "guard"), (1.0, "dppo")]
)
def test_good_steps_become_likelier_and_bad_ones_less_likely(
    tiny_policy: Policy, guidance_scale: float, policy: str, learner_options: Options
) -> None:
    model = tiny_policy()
    trajectory = sampled(model, guidance_scale)
    learner = Learner(model, learner_options(policy=policy))
    judged = torch.zeros(B, T)
    judged[:, 0] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    before = learner.update(trajectory, judged, steps=[0])
    with torch.no_grad():
        change = replay(model, trajectory, 0, slice(0, B))[0] - trajectory.log_probs[0]
    assert (change * judged[:, 0] > 0).all()
    after = learner.update(trajectory, judged, steps=[0])
    assert after["loss"] < before["loss"]
    # on the first update every ratio is 1, so the loss is minus the mean advantage and nothing is clipped
    assert before["loss"] == pytest.approx(0.0, abs=1e-6)
    assert before["ratio_deviation"] <= 1e-6
    assert before["clip_fraction"] == 0.0
    assert before["grad_norm"] > 0


def test_only_the_named_steps_are_trained(tiny_policy: Policy, learner_options: Options) -> None:
    model = tiny_policy()
    trajectory = sampled(model)
    judged = advantages(1.0, -1.0, 0.0, 0.0)
    judged[:, 1] = 0.0
    learner = Learner(model, learner_options())
    start = values(learner)
    assert learner.update(trajectory, judged, steps=[1])["grad_norm"] == 0.0
    assert same(values(learner), start)
    assert learner.update(trajectory, judged, steps=[0, 1])["grad_norm"] > 0.0


def test_metrics_by_hand(tiny_policy: Policy, learner_options: Options) -> None:
    model = tiny_policy()
    trajectory = sampled(model, guidance_scale=2.0)
    metrics = Learner(model, learner_options(kl_coef=0.1, lr=2e-3, warmup=4)).update(
        trajectory, advantages(1.0, 2.0, 3.0, 4.0), steps=[0, 1]
    )
    # ratio 1: the loss is -mean(advantages) = -2.5; a fresh adapter is its own reference
    assert metrics["loss"] == pytest.approx(-2.5, abs=1e-5)
    assert metrics["policy_loss"] == pytest.approx(-2.5, abs=1e-5)
    assert metrics["kl"] == 0.0
    # the first of four warm-up updates
    assert metrics["lr"] == pytest.approx(5e-4)
    assert metrics["skipped_updates"] == 0.0


def test_draw_weights_multiply_a_step_s_whole_gradient(tiny_policy: Policy, learner_options: Options) -> None:
    def gradient(steps: list[int], draw_weights: Tensor | None) -> Tensor:
        learner = Learner(model, learner_options(kl_coef=5.0, max_grad_norm=1e9))
        learner.begin_update()
        learner.optimizer.step = lambda: None  # type: ignore[method-assign]
        learner.update(trajectory, judged, steps=steps, weights=torch.ones(T), draw_weights=draw_weights)
        return torch.cat([parameter.grad.flatten() for parameter in learner.parameters.values()])

    model = tiny_policy(spread=0.3)
    trajectory, judged = sampled(model), advantages(1.0, -0.5, 0.3, 2.0)
    weights = torch.ones(T)
    weights[:2] = torch.tensor([3.0, 0.5])
    expected = (3.0 * gradient([0], None) + 0.5 * gradient([1], None)) / 2
    torch.testing.assert_close(gradient([0, 1], weights), expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_the_kl_term_pulls_towards_the_reference(tiny_policy: Policy, learner_options: Options) -> None:
    model = tiny_policy(spread=0.3)
    learner = Learner(model, learner_options(kl_coef=1.0, lr=1e-2))
    trajectory = sampled(model)
    history = [learner.update(trajectory, advantages(0.0, 0.0, 0.0, 0.0), steps=[0, 1])["kl"] for _ in range(4)]
    assert history[0] > 0
    assert history == sorted(history, reverse=True)


@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_micro_batches_add_up_to_one_gradient(
    tiny_policy: Policy, guidance_scale: float, learner_options: Options
) -> None:
    trajectory = sampled(tiny_policy(spread=0.1), guidance_scale)

    def first_moment(micro_batch: int) -> dict[str, Tensor]:
        # after one step AdamW's first moment is 0.1 times the gradient
        learner = Learner(tiny_policy(spread=0.1), learner_options(micro_batch=micro_batch))
        learner.update(trajectory, advantages(1.0, -0.5, 0.3, 2.0), steps=[0, 1])
        return {n: t for n, t in learner.tensors()["optimizer"].items() if n.endswith("exp_avg")}

    whole = first_moment(B)
    scale = max(moment.abs().max().item() for moment in whole.values())
    for micro_batch in (1, 2):
        for name, moment in first_moment(micro_batch).items():
            torch.testing.assert_close(moment, whole[name], rtol=1e-4, atol=1e-4 * scale)


def test_steps_are_weighted(tiny_policy: Policy, learner_options: Options) -> None:
    # Only step 0 of the trained steps 0 and 1 has an advantage (1), so at ratio 1 the loss is -w_0 / 2, where
    # noise_aware's w_0 is C_0 over the mean of C_0 and C_1.
    model = tiny_policy()
    trajectory, judged = sampled(model), torch.zeros(B, T)
    judged[:, 0] = 1.0
    learner = Learner(model, learner_options(step_weight="noise_aware"))
    first, second = trajectory.coefficients.table[:2, C].tolist()
    loss = learner.update(trajectory, judged, steps=[0, 1])["loss"]
    assert loss == pytest.approx(-first / (first + second), rel=1e-5)


def test_gradients_are_clipped_to_their_norm(tiny_policy: Policy, learner_options: Options) -> None:
    model = tiny_policy()
    trajectory = sampled(model)
    learner = Learner(model, learner_options(max_grad_norm=1e-3))
    metrics = learner.update(trajectory, advantages(1.0, -1.0, 1.0, -1.0), steps=[0])
    assert metrics["grad_norm"] > 1e-3
    moments = [t for name, t in learner.tensors()["optimizer"].items() if name.endswith("exp_avg")]
    norm = torch.stack([moment.square().sum() for moment in moments]).sum().sqrt().item()
    # torch divides by the norm plus 1e-6
    assert norm == pytest.approx(0.1 * 1e-3, rel=5e-3)


def test_an_iteration_may_take_several_updates(tiny_policy: Policy, learner_options: Options) -> None:
    model = tiny_policy()
    trajectory = sampled(model)
    learner = Learner(model, learner_options(micro_batch=1, updates_per_iteration=2))
    metrics = learner.update(trajectory, advantages(1.0, -1.0, 1.0, -1.0), steps=[0, 1])
    assert learner.updates == 2
    # the second update sees a policy that the first has moved
    assert metrics["ratio_deviation"] > 1e-6
    with pytest.raises(ValueError, match="must divide the 4 micro-batches of an iteration, got 3"):
        Learner(model, learner_options(micro_batch=1, updates_per_iteration=3)).update(
            trajectory, advantages(1.0, -1.0, 1.0, -1.0), steps=[0]
        )


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_loss_is_skipped_and_counted(tiny_policy: Policy, bad: float, learner_options: Options) -> None:
    model = tiny_policy()
    learner = Learner(model, learner_options())
    trajectory = sampled(model)
    start = values(learner)
    metrics = learner.update(trajectory, advantages(bad, 0.0, 0.0, 0.0), steps=[0, 1])
    assert metrics["skipped_updates"] == 1.0
    assert same(values(learner), start)
    counters = {"updates": 0, "bad_steps": 1, "bad_in_a_row": 1, "ema_steps": 0}
    assert learner.state() == counters | {"micro_batch": B}
    # a good one in between starts the count again
    learner.update(trajectory, advantages(1.0, -1.0, 0.0, 0.0), steps=[0, 1])
    counters = {"updates": 1, "bad_steps": 1, "bad_in_a_row": 0, "ema_steps": 1}
    assert learner.state() == counters | {"micro_batch": B}
    assert not same(values(learner), start)


def test_a_bad_gradient_of_a_good_loss_is_skipped(tiny_policy: Policy, learner_options: Options) -> None:
    model = tiny_policy()
    learner = Learner(model, learner_options())
    trajectory = sampled(model)
    start = values(learner)
    parameter = next(p for name, p in learner.parameters.items() if "lora_B" in name)
    handle = parameter.register_hook(lambda gradient: gradient * float("inf"))
    metrics = learner.update(trajectory, advantages(1.0, -1.0, 0.0, 0.0), steps=[0])
    assert metrics["skipped_updates"] == 1.0
    assert same(values(learner), start)
    handle.remove()
    assert learner.update(trajectory, advantages(1.0, -1.0, 0.0, 0.0), steps=[0])["skipped_updates"] == 0.0


def test_too_many_bad_steps_in_a_row_stop_the_run(tiny_policy: Policy, learner_options: Options) -> None:
    model = tiny_policy()
    learner = Learner(model, learner_options())
    trajectory, bad = sampled(model), advantages(float("nan"), 0.0, 0.0, 0.0)
    learner.update(trajectory, advantages(1.0, -1.0, 0.0, 0.0), steps=[0])
    before = values(learner)
    learner.update(trajectory, bad, steps=[0])
    with pytest.raises(UserError, match="not finite 2 times in a row") as caught:
        learner.update(trajectory, bad, steps=[0])
    assert exit_code_of(caught.value) == ExitCode.NON_FINITE == 6
    assert same(values(learner), before)


def test_only_the_bad_part_of_an_iteration_is_skipped(tiny_policy: Policy, learner_options: Options) -> None:
    model = tiny_policy()
    learner = Learner(model, learner_options(micro_batch=2, updates_per_iteration=2))
    metrics = learner.update(sampled(model), advantages(1.0, -1.0, float("nan"), 0.0), steps=[0])
    assert metrics["skipped_updates"] == 1.0
    assert learner.updates == 1


@pytest.mark.parametrize("ema_every", [0, 1, 2])
def test_a_restored_learner_goes_on_to_the_bit(tiny_policy: Policy, ema_every: int, learner_options: Options) -> None:
    options = learner_options(kl_coef=0.1, ema_every=ema_every, weight_decay=0.01, warmup=5)
    judged = advantages(1.0, -1.0, 0.5, -0.5)
    model = tiny_policy()
    trajectory = sampled(model)
    learner = Learner(model, options)
    for _ in range(3):
        learner.update(trajectory, judged, steps=[0, 1])
    saved = {group: {n: t.detach().clone() for n, t in members.items()} for group, members in learner.tensors().items()}
    state = copy.deepcopy(learner.state())

    other = Learner(tiny_policy(spread=0.2), options)
    other.restore(saved, state)
    assert other.state() == state
    assert all(same(other.tensors()[group], members) for group, members in learner.tensors().items())
    results = [each.update(trajectory, judged, steps=[0, 1]) for each in (learner, other)]
    assert results[0] == results[1]
    assert all(same(other.tensors()[group], members) for group, members in learner.tensors().items())


def test_the_adapter_of_another_model_is_refused(tiny_policy: Policy, learner_options: Options) -> None:
    learner = Learner(tiny_policy(rank=2), learner_options())
    other = Learner(tiny_policy(rank=3), learner_options())
    with pytest.raises(UserError, match="of another model") as caught:
        other.restore(learner.tensors(), learner.state())
    assert exit_code_of(caught.value) == ExitCode.CHECKPOINT


def test_the_running_average_by_hand(tiny_policy: Policy, learner_options: Options) -> None:
    # The first average is the first result (there is no past worth keeping); the second keeps (1+1)/(10+1) of it.
    model = tiny_policy()
    learner = Learner(model, learner_options())
    trajectory, judged = sampled(model), advantages(1.0, -1.0, 0.0, 0.0)
    learner.update(trajectory, judged, steps=[0])
    first = values(learner)
    learner.update(trajectory, judged, steps=[0])
    second = values(learner)
    with learner.averaged():
        for name, average in values(learner).items():
            expected = second[name] + 2 / 11 * (first[name] - second[name])
            torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-8)
        assert not same(values(learner), second)
    assert same(values(learner), second)


def test_the_weights_come_back_even_after_an_error(tiny_policy: Policy, learner_options: Options) -> None:
    model = tiny_policy()
    learner = Learner(model, learner_options())
    trajectory, judged = sampled(model), advantages(1.0, -1.0, 0.0, 0.0)
    for _ in range(2):
        learner.update(trajectory, judged, steps=[0])
    current = values(learner)
    with pytest.raises(RuntimeError, match="inside"), learner.averaged():
        raise RuntimeError("inside")
    assert same(values(learner), current)


def test_without_an_average_the_weights_stay(tiny_policy: Policy, learner_options: Options) -> None:
    learner = Learner(tiny_policy(spread=0.1), learner_options(ema_every=0))
    current = values(learner)
    with learner.averaged():
        assert same(values(learner), current)
    assert "ema" not in learner.tensors()
