"""Smoothed rewards along a trajectory: by hand, and what must hold for any rewards."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.config.cli import parse_arguments
from densegrpo_fast.credit.consistency import neighbour_correlation
from densegrpo_fast.credit.dense import reward_gains
from densegrpo_fast.credit.smoothing import smooth_rewards
from densegrpo_fast.flow.dynamics import C
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.rewards.base import RewardMixture, Scores
from densegrpo_fast.training.prompts import PromptBatch
from densegrpo_fast.training.rewarding import RewardBatch
from densegrpo_fast.training.trainer import Trainer

NAN = math.nan


def test_one_inner_state_by_hand() -> None:
    # equal steps, strength 1: minimise (V - 4)^2 + (V - 0)^2 + (1 - V)^2, so 3 V = 4 + 0 + 1
    found = smooth_rewards(torch.tensor([0.0, 4.0, 1.0]), torch.tensor([0.3, 0.3]), 1.0)
    assert found.tolist() == pytest.approx([0.0, 5 / 3, 1.0])
    # variances 1 and 3, mean 2: springs 2 and 2/3 times the strength .5, so V (1 + 1 + 1/3) = 4 + 1 * 0 + 1/3 * 1
    found = smooth_rewards(torch.tensor([0.0, 4.0, 1.0]), torch.tensor([1.0, math.sqrt(3)]), 0.5)
    assert found[1].item() == pytest.approx((4 + 1 / 3) / (2 + 1 / 3))


def test_two_inner_states_by_hand() -> None:
    # equal steps, strength 1, R = 0, a, b, 0: 3 V1 - V2 = a and 3 V2 - V1 = b, so 8 V1 = 3 a + b, 8 V2 = a + 3 b
    found = smooth_rewards(torch.tensor([0.0, 8.0, 16.0, 0.0]), torch.ones(3), 1.0)
    assert found.tolist() == pytest.approx([0.0, 5.0, 7.0, 0.0])


def test_much_smoothing_spreads_the_sum_by_injected_variance() -> None:
    # of variances 1, 4, 9 the shares of the sum 7 are 1/14, 4/14, 9/14
    found = smooth_rewards(torch.tensor([[1.0, 5.0, -3.0, 8.0]], dtype=torch.float64), torch.tensor([1.0, 2, 3]), 1e9)
    torch.testing.assert_close(found.diff(), torch.tensor([[0.5, 2.0, 4.5]], dtype=torch.float64), atol=1e-6, rtol=0)


def test_missing_states_stay_missing_and_hold_nothing() -> None:
    std = torch.tensor([1.0, 1.0, 2.0])
    inner = smooth_rewards(torch.tensor([0.0, NAN, 3.0, 1.0]), std, 1.0)
    assert inner.isnan().tolist() == [False, True, False, False]
    # without the missing state its two steps are one of the variance 1 + 1 (the mean over the steps stays at 2):
    # (V - 3)^2 + V^2 * 2/2 + (1 - V)^2 * 2/4
    assert inner[2].item() == pytest.approx((3 + 0.5) / 2.5)
    # a missing image: state 1 is held by its own reward and state 0 alone; a missing start likewise
    last = smooth_rewards(torch.tensor([0.0, 4.0, NAN]), torch.ones(2), 1.0)
    assert last[:2].tolist() == pytest.approx([0.0, 2.0]) and last[2].isnan()
    first = smooth_rewards(torch.tensor([NAN, 4.0, 0.0]), torch.ones(2), 1.0)
    assert first[0].isnan() and first[1:].tolist() == pytest.approx([2.0, 0.0])
    assert smooth_rewards(torch.full((2, 3), NAN), torch.ones(2), 1.0).isnan().all()


@settings(deadline=None, max_examples=60)
@given(
    data=st.data(), strength=st.floats(1e-3, 100), shift=st.floats(-5, 5), scale=st.floats(-3, 3), holes=st.booleans()
)
def test_invariants(data: st.DataObject, strength: float, shift: float, scale: float, holes: bool) -> None:
    steps = data.draw(st.integers(2, 8))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
    rewards = torch.randn(3, 4, steps + 1, generator=generator, dtype=torch.float64)
    std = 0.1 + torch.rand(steps, generator=generator, dtype=torch.float64)
    if holes:
        rewards[0, 0, data.draw(st.integers(1, steps - 1))] = NAN
    smooth = smooth_rewards(rewards, std, strength)
    # both ends, and with them the sum of the gains, are kept to the bit
    assert torch.equal(smooth[..., [0, -1]], rewards[..., [0, -1]])
    torch.testing.assert_close(
        reward_gains(smooth)[1:].sum(-1), reward_gains(rewards)[1:].sum(-1), rtol=1e-9, atol=1e-12
    )
    assert torch.equal(smooth.isnan(), rewards.isnan())
    # nothing leaves the range of what was measured
    high, low = rewards.nan_to_num(-99).amax(-1, keepdim=True), rewards.nan_to_num(99).amin(-1, keepdim=True)
    assert ((smooth <= high + 1e-9) & (smooth >= low - 1e-9) | smooth.isnan()).all()
    # linear in the rewards, and blind to the unit of the noise
    moved = smooth_rewards(scale * rewards + shift, 7 * std, strength)
    torch.testing.assert_close(moved, scale * smooth + shift, rtol=1e-7, atol=1e-9, equal_nan=True)
    # members do not see each other
    order = torch.randperm(4, generator=generator)
    torch.testing.assert_close(smooth_rewards(rewards[:, order], std, strength), smooth[:, order], equal_nan=True)
    torch.testing.assert_close(smooth_rewards(rewards[1:, :2], std, strength), smooth[1:, :2])


def test_nothing_to_do_is_the_same_tensor() -> None:
    rewards = torch.randn(2, 3, 4)
    assert smooth_rewards(rewards, torch.ones(3), 0.0) is rewards
    two = torch.randn(2, 3, 2)
    assert smooth_rewards(two, torch.ones(1), 5.0) is two


def test_smoothing_by_the_right_strength_finds_the_gains_best() -> None:
    """True gains of std c_k, errors of std .5 at inner states: the model's own strength beats none and too much."""
    std = torch.tensor([0.5, 1.0, 1.5, 1.0], dtype=torch.float64)
    true = torch.cat([torch.zeros(20000, 1, dtype=torch.float64), (torch.randn(20000, 4) * std).cumsum(-1)], -1)
    measured = true.clone()
    measured[:, 1:-1] += 0.8 * torch.randn(20000, 3)
    errors = {
        strength: (reward_gains(smooth_rewards(measured, std, strength)[None]) - reward_gains(true[None]))
        .square()
        .mean()
        for strength in (0.0, 0.8**2 / std.square().mean().item(), 20.0)
    }
    none, right, much = (value.item() for value in errors.values())
    assert right < 0.8 * none and right < 0.8 * much


def test_neighbours_by_hand() -> None:
    # one group, gains (1, -1), (-1, 1), (0, 0): products -1 - 1, squares 2 and 2
    gains = torch.tensor([[[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]]])
    assert neighbour_correlation(gains) == pytest.approx(-1.0)
    # the middle step is correlated with neither end
    gains = torch.tensor([[[1.0, 1.0, 1.0], [1.0, -1.0, 1.0], [-1.0, 1.0, -1.0], [-1.0, -1.0, -1.0]]])
    assert neighbour_correlation(gains) == pytest.approx(0.0)
    # a missing gain takes its pairs out: (1, -1), (-1, 1) are left of the first pair, (2, 1), (-2, -1) of the second
    gains = torch.tensor([[[1.0, -1.0, NAN], [-1.0, 1.0, NAN], [NAN, 2.0, 1.0], [NAN, -2.0, -1.0]]])
    # centred means are 0: products -2 + 4, squares 2 + 8 and 2 + 2
    assert neighbour_correlation(gains) == pytest.approx(2 / math.sqrt(40))
    assert math.isnan(neighbour_correlation(torch.ones(1, 3, 2))) and math.isnan(
        neighbour_correlation(torch.ones(2, 3, 1))
    )
    with pytest.raises(ValueError, match=r"gains must be \[P, G, K\]"):
        neighbour_correlation(torch.ones(3, 2))


def test_errors_alone_show_as_minus_a_half_and_true_gains_as_nothing() -> None:
    errors, gains = torch.randn(40, 200, 7), torch.randn(40, 200, 6)
    # standard error about 1 / sqrt(40 * 200 * 5) = .005
    assert neighbour_correlation(reward_gains(errors)) == pytest.approx(-0.5, abs=0.03)
    assert neighbour_correlation(gains + torch.randn(40, 1, 6)) == pytest.approx(0.0, abs=0.03)


@pytest.mark.parametrize(
    ("rewards", "std", "strength", "expected"),
    [
        (torch.zeros(2, 3), torch.ones(3), 1.0, r"rewards \[..., K\+1\] and step_std \[K\] must agree"),
        (torch.zeros(2, 3), torch.tensor([1.0, 0.0]), 1.0, "step_std must be positive"),
        (torch.zeros(2, 3), torch.ones(2), -1.0, "strength must be finite and at least 0, got -1.0"),
        (torch.zeros(2, 3), torch.ones(2), math.inf, "strength must be finite"),
    ],
)
def test_refused_arguments(rewards: Tensor, std: Tensor, strength: float, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        smooth_rewards(rewards, std, strength)


def test_smoothing_that_means_nothing_is_refused() -> None:
    for options, expected in (
        (["credit.method=sparse"], "credit.smoothing: expected 0 with credit.method sparse, which has no lookahead"),
        (["window.schedule=fixed", "window.size=1"], "credit.smoothing: expected 0 with one noisy step"),
        (["sampler.noise_level=[0.7,0,0,0,0,0]"], "credit.smoothing: expected 0 with one noisy step"),
        (  # the last step of cps injects nothing
            ["window.schedule=none", "window.size=null", "sampler.noise_level=[0,0.7,0,0,0,0.7]"],
            "credit.smoothing: expected 0 with one noisy step",
        ),
        (["credit.smoothing=-1"], "credit.smoothing"),
    ):
        own = [] if any("smoothing" in option for option in options) else ["credit.smoothing=0.5"]
        with pytest.raises(UserError) as caught:
            parse_arguments(["--config=embedded_dense", *own, *options])
        assert expected in str(caught.value)


def test_credit_sees_rewards_smoothed_by_the_injected_noise(mixture_model: FlowModel) -> None:
    options = [
        "window.schedule=none",
        "window.size=null",
        "sampler.num_steps=4",
        "sampler.guidance_scale=1",
        "sampler.micro_batch=12",
    ]
    options += ["data.num_prompts=2", "sampler.group_size=6"]
    options += ["sampler.noise_level=[0.7,0,0.4,0.7]", "sampler.dynamics=flow_sde"]
    config = parse_arguments(["--config=embedded_dense", "credit.smoothing=0.5", *options])[0]
    trainer = Trainer(config, model=mixture_model, reward=RewardMixture({"none": (lambda *_: [], 1.0)}))
    batch = PromptBatch(["0"] * 12, [{}] * 12, 6)
    rollout = trainer.sample(batch, trainer.schedule.at(0), 0)
    rewards = torch.randn(2, 6, 4)
    table = rollout.coefficients.table[[0, 2, 3], C]
    scores = Scores(torch.zeros(12), {})

    def credit(trainer: Trainer, different: Tensor) -> Tensor:
        # states 1 and 2 share a completion, as no noise is injected between them
        return trainer.credit(
            rollout, RewardBatch(torch.zeros(2, 6), different[..., [0, 1, 1, 2, 3]], None, scores)
        ).values

    unsmoothed, _ = parse_arguments(["--config=embedded_dense", *options])
    plain = Trainer(unsmoothed, model=mixture_model, reward=trainer.reward)
    found = credit(trainer, rewards)
    assert torch.equal(found, credit(plain, smooth_rewards(rewards, table, 0.5)))
    assert not torch.equal(found, credit(plain, rewards))
