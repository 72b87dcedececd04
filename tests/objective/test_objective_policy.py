"""The objective of a training step: which loss, weight and KL term the settings make."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast.common.errors import PluginError
from densegrpo_fast.flow.dynamics import LOG_PROB_CONST, LOG_PROB_SCALE, A, B, C, StepCoefficients, coefficients
from densegrpo_fast.objective.clip import ppo_clip_loss
from densegrpo_fast.objective.kl import KlScale, gaussian_kl
from densegrpo_fast.objective.pairs import Loss, Pairs
from densegrpo_fast.objective.policy import Objective, ObjectiveSettings
from densegrpo_fast.objective.registry import POLICIES, STEP_WEIGHTS, PolicyLoss, StepWeighting

SIGMAS = torch.tensor([1.0, 0.9, 0.6, 0.25, 0.0])
SAMPLER = coefficients(SIGMAS, 0.7, "flow_sde")
SETTINGS = ObjectiveSettings(
    policy="clip",
    clip_range=0.2,
    guard_weight="paper",
    dppo_threshold=1e-5,
    step_weight="none",
    kl_coef=0.0,
    kl_scale="flow_grpo",
)


class Rows:
    """Samples at one step of a rollout under an old velocity, and a new velocity that differs from it; float64."""

    def __init__(self, step: int = 1, distance: float = 0.3, sampler: StepCoefficients = SAMPLER, batch: int = 6):
        generator = torch.Generator().manual_seed(step)
        draws = [torch.randn(batch, 3, 4, generator=generator, dtype=torch.float64) for _ in range(4)]
        self.latents, self.old_velocity, self.noise, move = draws
        self.velocity = (self.old_velocity + distance * move).requires_grad_()
        self.step, self.row = step, sampler.table[step].double()
        self.following = self.mean(self.old_velocity) + self.row[C] * self.noise
        self.advantages = torch.randn(batch, generator=generator, dtype=torch.float64)

    def mean(self, velocity: Tensor) -> Tensor:
        return self.row[A] * self.latents + self.row[B] * velocity

    def log_prob(self, velocity: Tensor) -> Tensor:
        square = (self.following - self.mean(velocity)).square().flatten(1).mean(1)
        return -self.row[LOG_PROB_SCALE] * square + self.row[LOG_PROB_CONST]

    def kl(self, reference: Tensor, scale: KlScale) -> Tensor:
        index = torch.full((len(reference),), self.step)
        return gaussian_kl(self.velocity, reference, SAMPLER.table, index, scale=scale)

    def loss(self, objective: Objective, kl: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        return objective.loss(
            self.step,
            log_prob=self.log_prob(self.velocity),
            old_log_prob=self.log_prob(self.old_velocity),
            advantages=self.advantages,
            velocity=self.velocity,
            old_velocity=self.old_velocity,
            kl=kl,
        )


def objective(*, sampler: StepCoefficients = SAMPLER, steps: tuple[int, ...] = (0, 1, 2), **changes: Any) -> Objective:
    return Objective(replace(SETTINGS, **changes), sampler, steps)


def test_clip_is_ppos_loss() -> None:
    rows = Rows(distance=3.0)
    loss, metrics = rows.loss(objective())
    plain, expected = ppo_clip_loss(
        rows.log_prob(rows.velocity), rows.log_prob(rows.old_velocity), rows.advantages, clip_range=0.2
    )
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(metrics, expected)
    assert metrics["clip_fraction"] > 0


def test_guard_trains_on_centred_ratios_with_the_gradient_through_the_centre() -> None:
    rows = Rows()
    loss, metrics = rows.loss(objective(policy="guard", clip_range=0.9))
    shift = rows.mean(rows.old_velocity) - rows.mean(rows.velocity.detach())
    ratio = (-(shift * rows.noise).flatten(1).mean(1)).exp()
    # 1/|dt| of the step .9 -> .6
    torch.testing.assert_close(loss.detach(), (-rows.advantages * ratio).mean() / 0.3, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(metrics["ratio_deviation"], (ratio - 1).abs().max(), rtol=1e-5, atol=1e-6)
    loss.backward()
    # d(-dmu z)/dv = B z, over 12 elements; without the centre's gradient the noise would not be all there is
    scale = (-rows.advantages * ratio / 6 / 0.3)[:, None, None]
    assert rows.velocity.grad is not None
    torch.testing.assert_close(rows.velocity.grad, scale * rows.row[B] * rows.noise / 12, rtol=1e-5, atol=1e-7)


def test_dppo_drops_the_samples_that_stray_further_and_no_others() -> None:
    rows = Rows(distance=0.4)
    # the true divergence of the two Gaussians: the means' squared distance over 2 C^2
    shift = rows.mean(rows.velocity.detach()) - rows.mean(rows.old_velocity)
    divergence = (shift.square() / (2 * rows.row[C] ** 2)).flatten(1).mean(1)
    threshold = divergence.sort().values[2].item() * 0.999  # four of six have strayed as far
    ratio = (rows.log_prob(rows.velocity.detach()) - rows.log_prob(rows.old_velocity)).exp()
    dropped = (divergence >= threshold) & ((ratio - 1) * rows.advantages > 0)
    assert 0 < dropped.sum() < 4, "the case must tell the two conditions apart"
    loss, metrics = rows.loss(objective(policy="dppo", dppo_threshold=threshold, clip_range=1e-9))
    torch.testing.assert_close(loss.detach(), (-rows.advantages * ratio * ~dropped).mean(), rtol=1e-5, atol=1e-6)
    assert metrics["clip_fraction"].item() == pytest.approx(dropped.double().mean().item())
    high = (dropped & (rows.advantages > 0)).double().mean().item()
    assert metrics["clip_ratio/high_mean"].item() == pytest.approx(high)
    assert metrics["clip_ratio/region_mean"].item() == pytest.approx(metrics["clip_fraction"].item())
    loss.backward()
    assert rows.velocity.grad is not None
    untouched = rows.velocity.grad.flatten(1).count_nonzero(1) == 0
    assert torch.equal(untouched, dropped)


@pytest.mark.parametrize("policy", ["clip", "guard", "dppo"])
@pytest.mark.parametrize("kind", ["noise_aware", "flash", "proportionate"])
def test_step_weights_multiply_every_policys_loss(policy: str, kind: str) -> None:
    rows, settings = Rows(step=2), {"policy": policy, "clip_range": 0.9, "dppo_threshold": 1e3}
    plain = rows.loss(objective(**settings))[0]
    weighted = rows.loss(objective(**settings, step_weight=kind))[0]
    # |B|/C is the gain of a Gaussian log-probability
    gain, dt = SAMPLER.table[:3, B].abs() / SAMPLER.table[:3, C], SIGMAS.diff().abs()[:3]
    raw = {"noise_aware": SAMPLER.table[:3, C], "flash": 1 / gain, "proportionate": dt / gain}[kind]
    torch.testing.assert_close(weighted, plain * (raw / raw.mean())[2].double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("policy", ["clip", "guard", "dppo"])
@pytest.mark.parametrize("scale", ["paper", "flow_grpo"])
def test_the_kl_term_in_both_scales(policy: str, scale: str) -> None:
    rows = Rows(distance=0.0)
    reference = rows.old_velocity + 0.5
    settings = {"policy": policy, "kl_scale": scale}
    held, metrics = rows.loss(objective(**settings, kl_coef=0.1), rows.kl(reference, scale))
    free, _ = rows.loss(objective(**settings))
    # step .9 -> .6: std = .7 sqrt(9) = 2.1, B = -(1 + 4.41 * .1 / 1.8) * .3 = -.3735; the means differ by .18675.
    # code: .18675^2 / (2 * 4.41) = .0039541; paper: over the injected variance 4.41 * .3, so 1 / .3 times that
    expected = 0.0039541 / (0.3 if scale == "paper" else 1.0)
    assert metrics["kl"].item() == pytest.approx(expected, rel=1e-4)
    assert (held - free).item() == pytest.approx(0.1 * expected, rel=1e-4)


@pytest.mark.parametrize("policy", ["clip", "guard", "dppo"])
def test_on_policy_ratios_are_one(policy: str) -> None:
    rows = Rows(distance=0.0)
    loss, metrics = rows.loss(objective(policy=policy, guard_weight="none"))
    assert metrics["ratio_deviation"].item() == metrics["clip_fraction"].item() == 0.0
    torch.testing.assert_close(loss.detach(), -rows.advantages.mean())


def test_every_policy_reports_the_same_metrics() -> None:
    clip, guard, dppo = (Rows(distance=3.0).loss(objective(policy=name))[1] for name in ("clip", "guard", "dppo"))
    assert clip.keys() == guard.keys() == dppo.keys()
    # Guard's own ratios are what its clip bounds: with a narrow one, each is outside, driven there or back
    narrow = Rows(distance=3.0).loss(objective(policy="guard", clip_range=1e-6))[1]
    assert narrow["clip_fraction"].item() == 1.0 and 0 < narrow["clip_ratio/region_mean"].item() < 1


def shifted(coefficients: StepCoefficients, steps: tuple[int, ...], *, margin: float, clip_range: float) -> Loss:
    """-A (log r - margin), scaled by how many steps are trained; says nothing of its metrics."""

    def loss(pairs: Pairs) -> tuple[Tensor, dict[str, Tensor]]:
        rise = pairs.log_prob - pairs.old_log_prob - margin
        return len(steps) * (-pairs.weight * pairs.advantages * rise).mean(), {"seen": torch.tensor(clip_range)}

    return loss


def later(coefficients: StepCoefficients, *, power: int) -> Tensor:
    return (1 - coefficients.sigmas[:-1].double()) ** power


@pytest.fixture
def outside(registries: None) -> None:
    """A policy loss and a weighting from outside of the package, registered for one test."""
    POLICIES.register("shifted", PolicyLoss(shifted, options=("margin", "clip_range")))
    STEP_WEIGHTS.register("later", StepWeighting(later, options=("power",)))


@pytest.mark.usefixtures("outside")
def test_a_policy_and_a_weighting_from_outside_are_one_registration_each() -> None:
    rows, given = Rows(), {"policy": "shifted", "step_weight": "later", "arguments": {"margin": 0.5, "power": 2}}
    made = objective(**given, kl_coef=0.1)
    # (1 - sigma)^2 = 0 .01 .16 .5625, over the mean of the first three, .17 / 3
    expected = torch.tensor([0.0, 0.01, 0.16, 0.5625]) * 3 / 0.17
    torch.testing.assert_close(made.weights, expected)
    rise = rows.log_prob(rows.velocity) - rows.log_prob(rows.old_velocity)
    kl = rows.kl(rows.old_velocity + 0.5, "paper")
    loss, metrics = rows.loss(made, kl)
    plain = (-(0.01 * 3 / 0.17) * rows.advantages * (rise - 0.5) * 3).mean()
    # the term that it does not know of is added
    torch.testing.assert_close(loss, plain + 0.1 * kl.mean(), rtol=1e-5, atol=1e-7)
    # and so are the metrics of the plain ratio, which clip would have
    _, known = rows.loss(objective(clip_range=0.999999), kl)
    assert metrics.keys() == known.keys() | {"seen"} and metrics["seen"].item() == pytest.approx(0.2)
    for name in ("kl", "approx_kl", "ratio_deviation"):
        torch.testing.assert_close(metrics[name], known[name], rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(metrics["policy_loss"], plain.detach(), rtol=1e-5, atol=1e-7)
    assert not metrics["clip_fraction"] and not metrics["clip_ratio/region_mean"]
    with pytest.raises(ValueError, match="policy shifted needs the options margin"):
        objective(policy="shifted")
    with pytest.raises(ValueError, match="step weight later needs the options power"):
        objective(step_weight="later")


@pytest.mark.usefixtures("outside")
def test_what_a_function_from_outside_returns_is_checked() -> None:
    POLICIES.register("rows", PolicyLoss(lambda coefficients, steps: lambda pairs: (pairs.log_prob, {})))
    with pytest.raises(PluginError, match=r"policy rows: expected a loss without dimensions, got shape \[6\]"):
        Rows().loss(objective(policy="rows"))
    STEP_WEIGHTS.register("short", StepWeighting(lambda coefficients: torch.ones(3)))
    with pytest.raises(PluginError, match=r"short must return a tensor of 4 finite weights of at least 0, got shape"):
        objective(step_weight="short")
    for name in ("clip", "a:b"):
        with pytest.raises(ValueError, match=f"must be new and without a colon, got '{name}'"):
            POLICIES.register(name, PolicyLoss(shifted))


def test_a_step_without_noise_teaches_nothing() -> None:
    sampler = coefficients(SIGMAS, [0.7, 0.0, 0.7, 0.7], "flow_sde")
    for kind in ("noise_aware", "flash", "proportionate"):
        assert objective(sampler=sampler, steps=(1,), step_weight=kind).weights.tolist()[1] == 0.0
    rows = Rows(sampler=sampler)
    still = torch.zeros(6, dtype=torch.float64)
    loss, _ = objective(sampler=sampler, policy="dppo", dppo_threshold=0.0, kl_coef=1.0).loss(
        1,
        log_prob=still.clone().requires_grad_(),
        old_log_prob=still,
        advantages=rows.advantages,
        velocity=rows.velocity,
        old_velocity=rows.old_velocity,
        kl=gaussian_kl(rows.velocity, rows.old_velocity, sampler.table, torch.ones(6, dtype=torch.int64)),
    )
    loss.backward()
    assert math.isfinite(loss.item()) and rows.velocity.grad is not None and not rows.velocity.grad.any()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown policy 'ppo' \(known: clip, guard, dppo"):
        objective(policy="ppo")
    with pytest.raises(ValueError, match="family 'cps' has none"):
        objective(policy="guard", sampler=coefficients(SIGMAS, 0.7, "cps"))
    with pytest.raises(ValueError, match=r"trained steps \[3\] inject no noise"):
        objective(policy="guard", guard_weight="none", steps=(3,), sampler=coefficients(SIGMAS, 0.7, "precise"))
    for policy in ("clip", "guard", "dppo"):
        with pytest.raises(ValueError, match=r"kl_coef 0\.1 needs kl, got None"):
            Rows().loss(objective(policy=policy, kl_coef=0.1))
