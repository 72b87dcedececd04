"""Variance components of reward gains: by hand, unbiased, and blind to what they must not see."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.credit.consistency import step_consistency


def test_components_by_hand() -> None:
    # two states, two branches, one step: gains (1, 3) and (5, 9)
    # variances over branches 2 and 8: own = 5.  Means 2 and 7: variance 12.5, state = 12.5 - 5/2 = 10.
    found = step_consistency(torch.tensor([[[1.0], [3.0]], [[5.0], [9.0]]]), torch.tensor([0.5]))
    assert found.own.item() == 5.0 and found.state.item() == 10.0
    assert found.own_share.item() == pytest.approx(1 / 3)
    assert found.mean.item() == 4.5 and found.states.item() == 2
    assert found.sensitivity.item() == pytest.approx(math.sqrt(5) / 0.5)
    assert found.own.dtype == torch.float64


def test_components_are_unbiased() -> None:
    own, state = 0.3, 0.7
    centres = math.sqrt(state) * torch.randn(20000, 1, 2, dtype=torch.float64)
    gains = centres + math.sqrt(own) * torch.randn(20000, 3, 2, dtype=torch.float64) - 1.5
    found = step_consistency(gains, torch.ones(2))
    # standard errors: own * sqrt(2 / 40000) = .002, state about (state + own/3) * sqrt(2 / 20000) = .008
    torch.testing.assert_close(found.own, torch.full((2,), own, dtype=torch.float64), atol=0.01, rtol=0)
    torch.testing.assert_close(found.state, torch.full((2,), state, dtype=torch.float64), atol=0.04, rtol=0)
    torch.testing.assert_close(found.mean, torch.full((2,), -1.5, dtype=torch.float64), atol=0.03, rtol=0)


def test_the_opposite_noise_by_hand() -> None:
    # variances over branches 2 and 8 with the noise, 8 and 0 with its opposite: own 5 + 4 = 9.  Squared differences
    # (9, 9) and (1, 9), means 9 and 5, their mean 7: 1 - 7 / 9.
    gains, mirrored = torch.tensor([[[1.0], [3.0]], [[5.0], [9.0]]]), torch.tensor([[[4.0], [0.0]], [[6.0], [6.0]]])
    found = step_consistency(gains, torch.ones(1), mirrored)
    assert found.mirror.item() == pytest.approx(1 - 7 / 9)
    assert found.own.item() == 5.0
    assert step_consistency(gains, torch.ones(1)).mirror.isnan()
    with pytest.raises(ValueError, match=r"mirrored must have the shape of gains, \[2, 2, 1\]"):
        step_consistency(gains, torch.ones(1), mirrored[:1])


def test_what_the_opposite_noise_tells() -> None:
    """A line, a parabola, noise without slope, and the sum of a line and such noise of the same variance."""
    noise, luck, other = torch.randn(3, 4000, 4, dtype=torch.float64)
    start = torch.randn(4000, 1, dtype=torch.float64)
    with_noise = torch.stack([start + 2 * noise, start - noise**2, start + luck, start + noise + luck], -1)
    with_opposite = torch.stack([start - 2 * noise, start - noise**2, start + other, start - noise + other], -1)
    mirror = step_consistency(with_noise, torch.ones(4), with_opposite).mirror
    torch.testing.assert_close(mirror, torch.tensor([-1.0, 1.0, 0.0, -0.5]).double(), atol=0.05, rtol=0)


def test_the_ends_of_the_share() -> None:
    branch_only = torch.tensor([[-1.0, 1.0], [-1.0, 1.0], [1.0, -1.0]])[..., None]
    state_only = torch.tensor([[2.0, 2.0], [5.0, 5.0], [0.0, 0.0]])[..., None]
    assert step_consistency(branch_only, torch.ones(1)).own_share.item() == 1.0
    assert step_consistency(state_only, torch.ones(1)).own_share.item() == 0.0


def test_a_step_without_noise_tells_nothing() -> None:
    gains = torch.zeros(3, 2, 2)
    gains[:, 0, 0] = 1.0
    found = step_consistency(gains, torch.tensor([0.3, 0.0]))
    assert found.own[1] == 0 and found.own_share[1].isnan() and found.sensitivity[1].isnan()
    assert found.own_share[0] == 1.0


def test_missing_gains_leave_their_state_out() -> None:
    gains = torch.randn(5, 3, 2)
    holed = gains.clone()
    holed[1, 2, 0] = torch.nan
    found, whole = step_consistency(holed, torch.ones(2)), step_consistency(gains, torch.ones(2))
    without = step_consistency(gains[[0, 2, 3, 4]], torch.ones(2))
    for name in ("mean", "own", "state", "own_share", "sensitivity"):
        torch.testing.assert_close(getattr(found, name)[0], getattr(without, name)[0])
        torch.testing.assert_close(getattr(found, name)[1], getattr(whole, name)[1])
    assert found.states.tolist() == [4, 5]
    holed[1:, 2, 0] = torch.nan
    assert step_consistency(holed, torch.ones(2)).own[0].isnan()


@settings(deadline=None, max_examples=30)
@given(scale=st.floats(0.1, 10), shift=st.floats(-5, 5), seed=st.integers(0, 99))
def test_units_and_order(scale: float, shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    gains, std = torch.randn(6, 3, 2, generator=generator, dtype=torch.float64), torch.tensor([0.2, 0.4])
    plain = step_consistency(gains, std)
    moved = step_consistency(scale * gains.flip(0).flip(1) + shift, std)
    torch.testing.assert_close(moved.own, scale**2 * plain.own)
    torch.testing.assert_close(moved.state, scale**2 * plain.state)
    torch.testing.assert_close(moved.own_share, plain.own_share)
    torch.testing.assert_close(moved.sensitivity, scale * plain.sensitivity)


@pytest.mark.parametrize("shape", [(1, 2, 3), (2, 1, 3), (4, 3)])
def test_refused_shapes(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="gains must be"):
        step_consistency(torch.zeros(shape), torch.ones(3))


@pytest.mark.parametrize("step_std", [[1.0, 1.0], [1.0, -1.0, 1.0], [1.0, math.nan, 1.0]])
def test_refused_deviations(step_std: list[float]) -> None:
    with pytest.raises(ValueError, match="step_std"):
        step_consistency(torch.zeros(2, 2, 3), torch.tensor(step_std))
