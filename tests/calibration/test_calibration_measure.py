"""Gains at given noise levels: common random numbers, streams of their own, and components known in closed form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from densegrpo_fast.common.errors import UserError
from densegrpo_fast.common.exit_codes import ExitCode, exit_code_of
from densegrpo_fast.credit.consistency import StepConsistency
from densegrpo_fast.flow.analytic import GaussianMixtureFlow
from densegrpo_fast.flow.dynamics import A, B, C, coefficients
from densegrpo_fast.models.analytic import AnalyticModel
from densegrpo_fast.models.base import FlowModel
from densegrpo_fast.rewards.base import RewardMixture
from densegrpo_fast.sampling.oom_backoff import OomBackoff
from densegrpo_fast.training.gain_meter import HELD_OUT_DRAW, GainMeter
from densegrpo_fast.training.meter import Meter, MeteredModel
from densegrpo_fast.training.prompts import PromptSet

T = 4
SMALL = (3, 1, 2)


def brightness(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
    return images.flatten(1).mean(1)


def meter(model: FlowModel, prompts: Sequence[str], reward: Any = brightness, **changes: Any) -> GainMeter:
    options: dict[str, Any] = {
        "model": model,
        "reward": RewardMixture({"test": (reward, 1.0)}),
        "sigmas": model.sigmas(T),
        "dynamics": "flow_sde",
        "prompts": PromptSet(tuple(prompts), ({},) * len(prompts)),
        "guidance_scale": 1.0,
        "rows": OomBackoff(8, "rows"),
        "seed": 3,
        "max_missing": 0.0,
        "count": 12,
        "windows": (range(T),),
    }
    return GainMeter(**options | changes)


@pytest.mark.ci
def test_the_same_draw_is_the_same_whatever_the_batches(mixture_model: FlowModel) -> None:
    prompts = ["0", "12", "01"]
    one = meter(mixture_model, prompts).gains([0.7] * T, 0)
    two = meter(mixture_model, prompts, rows=OomBackoff(5, "rows")).gains([0.7] * T, 0)
    assert one.shape == (12, T) and one.dtype == torch.float64
    torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6)
    other = meter(mixture_model, prompts).gains([0.7] * T, 1)
    assert not torch.isclose(one, other, atol=1e-4).any(0).all()


def test_a_calibration_goes_on_with_fewer_samples_at_a_time(
    mixture_model: FlowModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts, original = ["0", "12", "01"], type(mixture_model).velocity
    whole = meter(mixture_model, prompts).gains([0.7] * T, 0)

    def velocity(self: FlowModel, latents: Tensor, *rest: Any) -> Any:
        if len(latents) > 3:
            raise torch.OutOfMemoryError("too many")
        return original(self, latents, *rest)

    monkeypatch.setattr(type(mixture_model), "velocity", velocity)
    small = meter(mixture_model, prompts)
    told: list[int] = []
    torch.testing.assert_close(small.gains([0.7] * T, 0, told.append), whole, rtol=1e-5, atol=1e-6)
    assert small.rows.rows == 2 and told == [2] * 6


def test_levels_of_later_steps_change_no_earlier_gain(mixture_model: FlowModel) -> None:
    found = meter(mixture_model, ["0", "12"])
    low, high = found.gains([0.7, 0.7, 0.3, 0.7], 0), found.gains([0.7, 0.7, 0.6, 0.7], 0)
    torch.testing.assert_close(low[:, :2], high[:, :2], rtol=1e-6, atol=1e-7)
    assert (low[:, 2:] != high[:, 2:]).all(0).all()


def test_steps_without_noise_gain_nothing(mixture_model: FlowModel) -> None:
    gains = meter(mixture_model, ["0", "12"]).gains([0.7, 0.0, 0.5, 0.0], 0)
    assert (gains[:, [1, 3]] == 0).all() and (gains[:, [0, 2]] != 0).all()


def test_gains_vanish_with_the_noise(mixture_model: FlowModel) -> None:
    found = meter(mixture_model, ["0", "12"])
    strong, weak = (found.gains([level] * T, 0).abs().amax(0) for level in (0.7, 0.007))
    # a hundredth of the noise; an inexact completion would leave its own error
    assert (weak <= 0.05 * strong + 1e-6).all()


def test_prompts_go_on_from_draw_to_draw(mixture_model: FlowModel) -> None:
    seen: list[str] = []

    def watching(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        seen.extend(prompts[: len(prompts) // (T + 1)])
        return brightness(images, prompts, metadata)

    found = meter(mixture_model, ["0", "1", "2", "01", "02", "12"], watching, count=2)
    for draw in (0, HELD_OUT_DRAW, 1):
        found.gains([0.7] * T, draw)
    assert seen == ["0", "1", "2", "01", "02", "12"]


def test_too_many_missing_scores_end_it(mixture_model: FlowModel) -> None:
    def moody(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> list[float | None]:
        return [None if index == 0 else value for index, value in enumerate(brightness(images, [], []).tolist())]

    with pytest.raises(UserError, match="scores are missing") as caught:
        meter(mixture_model, ["0"], moody).gains([0.7] * T, 0)
    assert exit_code_of(caught.value) == ExitCode.REWARD
    gains = meter(mixture_model, ["0"], moody, max_missing=0.5).gains([0.7] * T, 0)
    # the first picture of each batch of 8 is the completion of its first row's first state
    assert gains.isnan().nonzero().tolist() == [[0, 0], [8, 0]]


def test_branches_leave_an_ode_trajectory(mixture_model: FlowModel) -> None:
    """The first step's gains are a trajectory's; those of later ones know nothing of the noise before them."""
    trajectories = meter(mixture_model, ["0", "12"])
    branched = replace(trajectories, branched=True)
    one, other = branched.gains([0.7, 0.5, 0.0, 0.7], 0), branched.gains([0.2, 0.5, 0.7, 0.7], 0)
    assert one.shape == (12, T) and not one[:, 2].any() and other[:, 2].all()
    torch.testing.assert_close(one[:, [1, 3]], other[:, [1, 3]], rtol=1e-5, atol=1e-6)
    whole = trajectories.gains([0.7, 0.5, 0.0, 0.7], 0)
    torch.testing.assert_close(one[:, 0], whole[:, 0], rtol=1e-5, atol=1e-6)
    assert (one[:, 1] != whole[:, 1]).all()


@pytest.mark.parametrize("branched", [False, True])
def test_forwards_in_closed_form(mixture_model: FlowModel, branched: bool) -> None:
    """T = 4 steps, and the completions after the noisy steps 0 and 2: 3 + 1 evaluations."""
    counted = Meter()
    meter(MeteredModel(mixture_model, counted), ["0", "12"], branched=branched).gains([0.7, 0.0, 0.5, 0.0], 0)
    assert sum(rows for rows, _, _ in mixture_model.calls) == counted.now.forwards == 12 * (4 + 3 + 1)


def test_samples_are_shared_out_among_windows(mixture_model: FlowModel) -> None:
    """Five of them: two have noise in steps 0 and 1, three in 1 and 2, as if the others did not exist."""
    found = meter(mixture_model, ["0", "12"], count=5, windows=(range(2), range(1, 3)))
    levels = [0.7, 0.5, 0.6, 0.4]
    gains = found.gains(levels, 0)
    noisy = torch.tensor([[True, True, False, False]] * 2 + [[False, True, True, False]] * 3)
    assert ((gains != 0) == noisy).all()
    # 3 + 2 evaluations complete the states before steps 0 and 1, 2 + 1 those before 1 and 2
    assert sum(rows for rows, _, _ in mixture_model.calls) == 2 * (4 + 3 + 2) + 3 * (4 + 2 + 1)
    alone = meter(mixture_model, ["0", "12"], count=5).gains([0.0, 0.5, 0.6, 0.0], 0)
    torch.testing.assert_close(gains[2:], alone[2:], rtol=1e-5, atol=1e-6)
    # of four states two have noise in a step of either window, and all in the one that both have
    told = replace(found, count=8).consistency(levels, 0, 2)
    assert told.states.tolist() == [2, 4, 2, 0] and not told.own_share[:3].isnan().any()


def linear_flow(branched: bool) -> tuple[StepConsistency, Tensor, Tensor, Tensor]:
    """What is measured on a linear flow, own and state variance in closed form, and the injected standard deviations.

    One Gaussian N(m, s^2) has the linear velocity g(sigma) (x - (1 - sigma) m) - m, so every map here is affine. A
    completion from state j multiplies x by a_j = prod_(i >= j) (1 + dt_i g_i). With a reward w . x_0, |w| = 1:

        own   = (a_(t+1) C_t)^2
        state = (a_(t+1) ((A_t - 1) + (B_t - dt_t) g_t))^2 Var(x_t)

    where Var(x_(t+1)) = (A_t + B_t g_t)^2 Var(x_t) + C_t^2, or (1 + dt_t g_t)^2 Var(x_t) without noise.
    """
    std, levels = 0.5, [0.7, 0.9, 0.5, 0.7]
    mean = torch.tensor([[0.2, -0.1, 0.3, 0.0, -0.2, 0.1]], dtype=torch.float64)
    model = AnalyticModel(GaussianMixtureFlow(mean, std), SMALL)
    weight = torch.nn.functional.normalize(torch.arange(1.0, 7.0), dim=0).double()

    def linear(images: Tensor, prompts: list[str], metadata: list[dict[str, Any]]) -> Tensor:
        return images.double().flatten(1).logit() @ weight

    found = meter(model, [""], linear, rows=OomBackoff(1024, "rows"), count=4096, branched=branched)
    result = found.consistency(levels, HELD_OUT_DRAW, 4)

    table = coefficients(model.sigmas(T), levels, "flow_sde")
    sigmas, rows = table.sigmas.double(), table.table.double()
    slope = (sigmas - (1 - sigmas) * std**2) / ((1 - sigmas) ** 2 * std**2 + sigmas**2)
    dt = sigmas.diff()
    onward = [math.prod((1 + dt[i] * slope[i]).item() for i in range(j, T)) for j in range(T + 1)]
    variance, own, state = 1.0, [], []
    for t in range(T):
        a, b, c, g = rows[t, A].item(), rows[t, B].item(), rows[t, C].item(), slope[t].item()
        own.append((onward[t + 1] * c) ** 2)
        state.append((onward[t + 1] * ((a - 1) + (b - dt[t].item()) * g)) ** 2 * variance)
        variance = (1 + dt[t].item() * g) ** 2 * variance if branched else (a + b * g) ** 2 * variance + c**2
    return result, torch.tensor(own, dtype=torch.float64), torch.tensor(state, dtype=torch.float64), rows[:, C]


@pytest.mark.parametrize("branched", [False, True])
def test_components_of_a_linear_flow_in_closed_form(branched: bool) -> None:
    result, own, state, noise = linear_flow(branched)
    # relative standard errors: own sqrt(2 / 3072) = 2.6%, state about 4.4% of (state + own / 4)
    torch.testing.assert_close(result.own, own, rtol=0.12, atol=0)
    assert ((result.state - state).abs() <= 0.2 * (state + own / 4)).all()
    torch.testing.assert_close(result.sensitivity, own.sqrt() / noise, rtol=0.06, atol=0)
    # affine in the noise: the opposite noise gives the opposite gain
    assert (result.mirror < -0.9).all()
    assert result.states.tolist() == [1024] * T


def test_branches_do_not_repeat_the_trajectory(mixture_model: FlowModel) -> None:
    found = replace(meter(mixture_model, ["0", "12"]), count=8)
    result = found.consistency([0.7, 0.0, 0.7, 0.7], 0, 2)
    assert (result.own[[0, 2, 3]] > 0).all() and result.own[1] == 0
    assert result.own_share[1].isnan() and result.states.tolist() == [4] * T
