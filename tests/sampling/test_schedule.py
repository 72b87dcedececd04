from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from densegrpo_fast.flow.schedule import check_sigmas, dance_sigmas, flux_sigmas, sd3_sigmas, shift_sigmas, timesteps


@pytest.mark.parametrize("shift", [1.0, 1.7, 3.0, 6.0])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 6, 7, 10, 20, 28, 40, 50, 100, 1000])
def test_sd3_grid_is_diffusers_bit_for_bit(num_steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    assert torch.equal(sd3_sigmas(num_steps, shift), scheduler.sigmas)
    assert torch.equal(timesteps(sd3_sigmas(num_steps, shift))[:-1], scheduler.timesteps)


def test_sd3_grid_with_another_training_length() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, num_train_timesteps=250)
    scheduler.set_timesteps(8)
    assert torch.equal(sd3_sigmas(8, 3.0, num_train_timesteps=250), scheduler.sigmas)


def test_sd3_golden_values() -> None:
    expected = [
        1.0,
        0.960129,
        0.913349,
        0.857692,
        0.790368,
        0.707278,
        0.602151,
        0.464876,
        0.278049,
        0.008929,
        0,
    ]
    torch.testing.assert_close(sd3_sigmas(10), torch.tensor(expected), atol=5e-7, rtol=0)


@pytest.mark.parametrize("image_seq_len", [256, 1024, 4096])
@pytest.mark.parametrize("num_steps", [1, 4, 6, 16, 28, 50])
def test_flux_grid_is_diffusers_bit_for_bit(num_steps: int, image_seq_len: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    slope = (1.15 - 0.5) / (4096 - 256)
    mu = image_seq_len * slope + (0.5 - slope * 256)
    # The pipeline passes sigmas of 1 ... 1/T; `linspace` in float64, made float32 by the scheduler.
    step = (1 / num_steps - 1) / max(num_steps - 1, 1)
    grid = [1 + step * i for i in range(num_steps - 1)] + [1 / num_steps]
    scheduler.set_timesteps(sigmas=grid, mu=mu)
    assert torch.equal(flux_sigmas(num_steps, image_seq_len), scheduler.sigmas)


def test_flux_golden_values() -> None:
    # FLUX.1 at 512 px has 32*32 = 1024 image tokens, so mu = .5 + .65*768/3840 = .63.
    expected = torch.tensor([1.0, 0.903736, 0.789705, 0.652489, 0.484218, 0.273003, 0.0])
    torch.testing.assert_close(flux_sigmas(6, 1024), expected, atol=5e-7, rtol=0)


def test_dance_grid_by_hand() -> None:
    # Uniform 1, 3/4, 1/2, 1/4, 0 under 3t/(1+2t): 1, (9/4)/(5/2), (3/2)/2, (3/4)/(3/2), 0.
    torch.testing.assert_close(dance_sigmas(4, shift=3.0), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    assert torch.equal(dance_sigmas(5, shift=1.0), torch.linspace(1, 0, 6))


@settings(deadline=None, max_examples=30)
@given(num_steps=st.integers(1, 60), shift=st.floats(0.5, 12))
def test_sd3_grid_is_diffusers_bit_for_bit_for_any_shift(num_steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(num_steps)
    sigmas = sd3_sigmas(num_steps, shift)
    assert torch.equal(sigmas[1:], scheduler.sigmas[1:])
    # diffusers may miss 1 by a rounding; see `_with_exact_ends`.
    assert abs(scheduler.sigmas[0] - 1) < 2e-7


def test_the_first_sigma_is_exactly_one_for_awkward_shifts() -> None:
    # In float32, shift / (1 + (shift-1)) rounds to just above 1 for the first and just below for the second.
    for shift in (4.194572722980247, 2.678000278375096):
        assert sd3_sigmas(4, shift)[0] == 1
        assert dance_sigmas(4, shift)[0] == 1


@settings(deadline=None, max_examples=30)
@given(num_steps=st.integers(1, 200), shift=st.floats(0.5, 12), tokens=st.integers(1, 16384))
def test_every_grid_is_usable(num_steps: int, shift: float, tokens: int) -> None:
    for sigmas in (
        sd3_sigmas(num_steps, shift),
        flux_sigmas(num_steps, tokens),
        dance_sigmas(num_steps, shift),
    ):
        check_sigmas(sigmas)
        assert sigmas.dtype == torch.float32
        assert sigmas.shape == (num_steps + 1,)
        assert sigmas[0] == 1
        assert sigmas[-1] == 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sd3_sigmas(0), "num_steps must be an integer >= 1, got 0"),
        (lambda: sd3_sigmas(2.0), "num_steps must be an integer >= 1, got 2.0"),
        (lambda: sd3_sigmas(True), "num_steps must be an integer >= 1, got True"),
        (lambda: sd3_sigmas(10, shift=0), "shift must be finite and positive, got 0"),
        (lambda: sd3_sigmas(10, num_train_timesteps=0), "num_train_timesteps must be an integer >= 1"),
        (lambda: dance_sigmas(10, shift=float("nan")), "shift must be finite and positive, got nan"),
        (lambda: flux_sigmas(10, 0), "image_seq_len must be an integer >= 1"),
        (
            lambda: flux_sigmas(10, 64, base_seq_len=64, max_seq_len=64),
            "max_seq_len must exceed base_seq_len=64",
        ),
        (lambda: timesteps(torch.ones(2), 0), "num_train_timesteps must be an integer >= 1"),
        (lambda: check_sigmas(torch.ones(3, 2)), r"shape \[T\+1\] with T >= 1, got \[3, 2\]"),
        (lambda: check_sigmas(torch.tensor([1.0])), r"shape \[T\+1\] with T >= 1, got \[1\]"),
        (lambda: check_sigmas(torch.tensor([1.0, 0.5, 0.5])), "strictly decreasing"),
        (lambda: check_sigmas(torch.tensor([0.5, 0.5 - 1e-12], dtype=torch.float64)), "strictly decreasing"),
        (lambda: check_sigmas(torch.tensor([1.5, 0.0])), r"in \[0, 1\]"),
        (lambda: check_sigmas(torch.tensor([1.0, float("nan")])), "finite"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_an_integer_grid_is_refused() -> None:
    with pytest.raises(TypeError, match="floating point tensor, got torch.int64"):
        check_sigmas(torch.tensor([1, 0]))


def test_shift_by_hand() -> None:
    # 3 * 0.5 / (1 + 2 * 0.5) = 0.75; the ends stay.
    assert shift_sigmas(torch.tensor([1.0, 0.5, 0.0]), 3.0).tolist() == [1.0, 0.75, 0.0]
    with pytest.raises(ValueError, match="shift must be finite and positive, got 0"):
        shift_sigmas(torch.ones(1), 0)
