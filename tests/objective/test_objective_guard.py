"""GRPO-Guard: the ratio it leaves, its gradient, and the weights of the steps."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.flow.dynamics import LOG_PROB_CONST, LOG_PROB_SCALE, A, B, C, coefficients
from densegrpo_fast.flow.schedule import sd3_sigmas
from densegrpo_fast.objective.clip import ppo_clip_loss
from densegrpo_fast.objective.guard import GuardTable, guard_loss, guard_table

SIGMAS = torch.tensor([1.0, 0.9, 0.6, 0.25, 0.0])


class Case:
    """Rows of a rollout under an old velocity, and a new velocity that differs from it."""

    def __init__(self, seed=0, family="flow_sde", distance=0.3, batch=6):
        generator = torch.Generator().manual_seed(seed)
        draws = [torch.randn(batch, 3, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
        self.latents, self.old_velocity, self.noise, step = draws
        self.velocity = (self.old_velocity + distance * step).requires_grad_()
        self.coefficients = coefficients(SIGMAS, 0.7, family)
        self.step_index = torch.arange(batch) % 3
        self.rows = self.coefficients.table.double()[self.step_index][..., None, None].unbind(1)
        self.old_mean = self.mean(self.old_velocity)
        self.following = self.old_mean + self.rows[C] * self.noise
        self.advantages = torch.randn(batch, generator=generator, dtype=torch.float64)

    def mean(self, velocity):
        return self.rows[A] * self.latents + self.rows[B] * velocity

    def log_prob(self, velocity):
        square = (self.following - self.mean(velocity)).square().flatten(1).mean(1)
        return -self.rows[LOG_PROB_SCALE].flatten() * square + self.rows[LOG_PROB_CONST].flatten()

    def loss(self, kind="none", rows=slice(None), **options):
        options = {"clip_range": 10.0, "advantages": self.advantages} | options
        return guard_loss(
            self.log_prob(self.velocity)[rows],
            self.log_prob(self.old_velocity)[rows],
            options.pop("advantages")[rows],
            velocity=self.velocity[rows],
            old_velocity=self.old_velocity[rows],
            coefficients=self.coefficients,
            step_index=self.step_index[rows],
            guard=guard_table(self.coefficients, [0, 1, 2], kind),
            **options,
        )


def test_numbers_by_hand():
    # C = .5, B = -.5, one element; velocities 3 and 1, so the new mean lies at -.5 * (3 - 1) = -1 from the old one:
    # dmu = 1. Noise z = .4: next - old mean = .2, next - new mean = 1.2.
    # log ratio = -(1.44 - .04) / (2 * .25) = -2.8; centre = 1 / (2 * .25) = 2; (-2.8 + 2) * .5 = -.4 = -dmu z
    table = torch.tensor([[1.0, -0.5, 0.5, 0.5, 2.0, 0.0]])
    fixed = replace(coefficients(torch.tensor([1.0, 0.5]), 0.7, "precise"), table=table)
    loss, metrics = guard_loss(
        torch.tensor([-1.44 / 0.5]),
        torch.tensor([-0.04 / 0.5]),
        torch.tensor([-2.0]),
        velocity=torch.tensor([[3.0]]),
        old_velocity=torch.tensor([[1.0]]),
        coefficients=fixed,
        step_index=torch.tensor([0]),
        guard=GuardTable(table[:, C], torch.tensor([5.0])),
        clip_range=0.9,
    )
    # weight 5, -A * ratio = 2 exp(-.4), which the clip at .1 does not touch
    assert loss.item() == pytest.approx(5 * 2 * math.exp(-0.4), rel=1e-5)
    assert metrics["ratio_deviation"].item() == pytest.approx(1 - math.exp(-0.4), rel=1e-5)


@pytest.mark.parametrize("family", ["flow_sde", "dance", "precise", "wan"])
def test_the_log_ratio_is_minus_the_shift_of_the_mean_times_the_noise(family):
    case = Case(family=family)
    shift = case.old_mean - case.mean(case.velocity.detach())
    ratio = (-(shift * case.noise).flatten(1).mean(1)).exp()
    loss, _ = case.loss()
    torch.testing.assert_close(loss.detach(), (-case.advantages * ratio).mean(), rtol=1e-5, atol=1e-6)
    # and so is its gradient, away from the old policy: d(-dmu z)/dv = B z
    loss.backward()
    scale = (-case.advantages * ratio / 6)[:, None, None]
    torch.testing.assert_close(case.velocity.grad, scale * case.rows[B] * case.noise / 12, rtol=1e-5, atol=1e-7)


def test_on_policy_ratios_are_exactly_one_and_the_loss_is_ppos_up_to_the_scale():
    case = Case(distance=0.0)
    loss, metrics = case.loss()
    assert metrics["ratio_deviation"].item() == 0.0
    loss.backward()
    guarded = case.velocity.grad.clone()
    case.velocity.grad = None
    plain, _ = ppo_clip_loss(
        case.log_prob(case.velocity), case.log_prob(case.old_velocity), case.advantages, clip_range=10.0
    )
    plain.backward()
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(guarded, case.rows[C] * case.velocity.grad)


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 2**20))
def test_rows_do_not_touch_each_other_and_advantage_zero_adds_nothing(seed):
    case = Case(seed)
    whole = case.loss("paper", clip_range=0.05)[0]
    parts = [case.loss("paper", rows=slice(row, row + 1), clip_range=0.05)[0] for row in range(6)]
    torch.testing.assert_close(whole, torch.stack(parts).mean())
    case.advantages[2] = 0.0
    case.loss("paper", clip_range=0.05)[0].backward()
    assert case.velocity.grad[2].count_nonzero() == 0


def test_ratios_are_centred_where_plain_ones_fall_below_one():
    # the mean moves by half an injected standard deviation: plain log-ratios then average -.5^2 / 2 = -.125, guarded
    # ones 0, with a standard error of .5 / sqrt(300 * 12) = .008
    case = Case(seed=3, batch=300, distance=0.0)
    moved = case.old_velocity + 0.5 * case.rows[C] / case.rows[B]
    case.velocity = moved.requires_grad_()
    advantages = -torch.ones(300, dtype=torch.float64)
    plain, _ = ppo_clip_loss(
        case.log_prob(case.velocity), case.log_prob(case.old_velocity), advantages, clip_range=10.0
    )
    # a mean of 12 elements has variance .25 / 12, which a mean of exponentials adds half of
    assert plain.item() == pytest.approx(math.exp(-0.125 + 0.125 / 12), abs=0.03)
    assert case.loss(advantages=advantages)[0].item() == pytest.approx(1.0, abs=0.01)


def test_weights_by_hand():
    # |dt| = .1 .3 .35 .25
    weights = guard_table(coefficients(SIGMAS, 0.7, "flow_sde"), [0, 1, 2]).weight
    torch.testing.assert_close(weights, torch.tensor([10.0, 10 / 3, 1 / 0.35, 4.0]))
    # dance: bracket 1 + .49 (1 - sigma) / (2 sigma): sigma 1 -> 1; .9 -> 1 + .245/9; .6 -> 1 + .245 * 2/3; .25 -> 1.735
    weights = guard_table(coefficients(SIGMAS, 0.7, "dance"), [0, 1, 2]).weight
    brackets = torch.tensor([1.0, 1 + 0.245 / 9, 1 + 0.49 / 3, 1.735])
    torch.testing.assert_close(weights, brackets / torch.tensor([0.1, 0.3, 0.35, 0.25]))
    assert guard_table(coefficients(SIGMAS, 0.7, "dance"), [0], "none").weight.tolist() == [1.0] * 4


def test_weights_even_out_the_steps_on_sd3s_grid():
    # |B| = (1 + a^2/2) |dt| but for the first step, where it is |dt|: after weighting, gradients differ by 1.245
    # instead of the 26 times that unnormalised ratios show
    sampler = coefficients(sd3_sigmas(10), 0.7, "flow_sde")
    guard = guard_table(sampler, range(9))
    gain = (guard.weight * sampler.table[:, B].abs())[:9]
    torch.testing.assert_close(gain, torch.tensor([1.0] + [1.245] * 8), rtol=1e-4, atol=0)
    assert torch.equal(guard.log_ratio_scale, sampler.table[:, C])


@pytest.mark.parametrize("family", ["flow_sde", "dance", "precise", "wan"])
def test_jacobian_weights_even_out_any_sampler(family):
    sampler = coefficients(SIGMAS, 0.7, family)
    weights = guard_table(sampler, [0, 2], "jacobian").weight
    gain = weights * sampler.table[:, B].abs()
    torch.testing.assert_close(gain, gain[:1].expand(4))
    assert weights[[0, 2]].mean().item() == pytest.approx(1.0, rel=1e-6)


def test_a_further_weight_and_the_kl_term_are_passed_on():
    case = Case()
    plain = case.loss("paper")[0]
    doubled = case.loss("paper", weight=torch.full((6,), 2.0).double())[0]
    torch.testing.assert_close(doubled, 2 * plain)
    kl = torch.arange(6.0).double()
    torch.testing.assert_close(case.loss("paper", kl=kl, kl_coef=0.1)[0], plain + 0.25)


@pytest.mark.parametrize(
    ("family", "level", "steps", "weight", "message"),
    [
        ("cps", 0.7, [0], "none", "family 'cps' has none; use flow_sde"),
        ("ode", 0.0, [0], "none", "family 'ode' has none"),
        ("flow_sde", [0.7, 0.0, 0.7, 0.7], [0, 1], "paper", r"trained steps \[1\] inject no noise"),
        ("flow_sde", 0.7, [], "paper", "at least one trained step"),
        ("precise", 0.7, [0], "paper", "defined for flow_sde and dance, not 'precise'; use 'jacobian'"),
        ("flow_sde", 0.7, [0], "loud", "must be paper, jacobian or none, got 'loud'"),
    ],
)
def test_samplers_without_such_a_ratio_are_refused(family, level, steps, weight, message):
    with pytest.raises(ValueError, match=message):
        guard_table(coefficients(SIGMAS, level, family), steps, weight)


def test_a_kl_coefficient_without_kl_is_refused():
    with pytest.raises(ValueError, match=r"kl_coef 0\.1 needs kl"):
        Case().loss(kl_coef=0.1)
