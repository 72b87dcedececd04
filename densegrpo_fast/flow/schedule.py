"""Sigma grids: the noise levels at which a sampler visits a flow model, from 1 (noise) down to 0 (data).

Every function returns `num_steps + 1` float32 values on the CPU. They reproduce the hosts bit for bit,
because a log-probability is only comparable between two programs that step over the very same grid.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def sd3_sigmas(num_steps: int, shift: float = 3.0, num_train_timesteps: int = 1000) -> Tensor:
    """Grid of diffusers' `FlowMatchEulerDiscreteScheduler(shift=shift).set_timesteps(num_steps)`.

    The scheduler spaces its steps down to its own smallest sigma, which it has already shifted once, and then
    shifts the result again. The last step before 0 is therefore tiny (sigma .0089 for shift 3): one model
    evaluation of almost no effect, which lookahead plans may leave out.

    Args:
        num_steps: denoising steps T, at least 1.
        shift: resolution shift of SD3 (Esser et al. 2024, equation 23), positive; 1 leaves the grid uniform.
        num_train_timesteps: length of the discrete training schedule, at least 1.

    Returns:
        sigmas, [T+1] float32, strictly decreasing from 1 to 0.

    Raises:
        ValueError: an argument is out of range.
    """
    _check_count("num_steps", num_steps)
    _check_positive("shift", shift)
    _check_count("num_train_timesteps", num_train_timesteps)
    # The scheduler builds its training grid in float32 and the sampling grid in float64; so do we.
    ends = shift_sigmas(torch.tensor([num_train_timesteps, 1.0]) / num_train_timesteps, shift)
    start, stop = (end * num_train_timesteps for end in ends.tolist())
    grid = torch.tensor(_linspace(start, stop, num_steps), dtype=torch.float64) / num_train_timesteps
    return _with_exact_ends(shift_sigmas(grid, shift))


def flux_sigmas(
    num_steps: int,
    image_seq_len: int,
    base_seq_len: int = 256,
    max_seq_len: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> Tensor:
    """Grid of diffusers' `FluxPipeline`: sigmas 1 ... 1/T under a shift that grows with the image.

    Args:
        num_steps: denoising steps T, at least 1.
        image_seq_len: image tokens of one sample, (height/16)*(width/16) for FLUX.1.
        base_seq_len: token count at which the log-shift is `base_shift`.
        max_seq_len: token count at which the log-shift is `max_shift`; larger than `base_seq_len`.
        base_shift: log-shift at `base_seq_len`.
        max_shift: log-shift at `max_seq_len`.

    Returns:
        sigmas, [T+1] float32, strictly decreasing from 1 to 0.

    Raises:
        ValueError: an argument is out of range.
    """
    _check_count("num_steps", num_steps)
    _check_count("image_seq_len", image_seq_len)
    if max_seq_len <= base_seq_len:
        raise ValueError(f"max_seq_len must exceed base_seq_len={base_seq_len}, got {max_seq_len}")
    slope = (max_shift - base_shift) / (max_seq_len - base_seq_len)
    exp_mu = math.exp(image_seq_len * slope + (base_shift - slope * base_seq_len))
    grid = torch.tensor(_linspace(1.0, 1 / num_steps, num_steps), dtype=torch.float32)
    # A Python scalar divided by a tensor is a reciprocal and a product in torch: one rounding too many.
    return _with_exact_ends(torch.full_like(grid, exp_mu) / (exp_mu + (1 / grid - 1)))


def dance_sigmas(num_steps: int, shift: float = 3.0) -> Tensor:
    """Grid of DanceGRPO (Xue et al. 2025) and its descendants: a uniform grid, shifted once.

    Args:
        num_steps: denoising steps T, at least 1.
        shift: positive; 1 leaves the grid uniform.

    Returns:
        sigmas, [T+1] float32, strictly decreasing from 1 to 0.

    Raises:
        ValueError: an argument is out of range.
    """
    _check_count("num_steps", num_steps)
    _check_positive("shift", shift)
    return _with_exact_ends(shift_sigmas(torch.linspace(1, 0, num_steps + 1)[:-1], shift))


def shift_sigmas(sigmas: Tensor, shift: float) -> Tensor:
    """Move noise levels towards 1: shift * sigma / (1 + (shift - 1) * sigma) (Esser et al. 2024, equation 23).

    Args:
        sigmas: noise levels in [0, 1], any shape, floating.
        shift: positive; 1 changes nothing.

    Returns:
        shifted noise levels, same shape and dtype.

    Raises:
        ValueError: `shift` is out of range.
    """
    _check_positive("shift", shift)
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def timesteps(sigmas: Tensor, num_train_timesteps: int = 1000) -> Tensor:
    """Conditioning value that SD3 and its relatives expect for a sigma.

    Args:
        sigmas: noise levels in [0, 1], any shape, float32.
        num_train_timesteps: length of the discrete training schedule.

    Returns:
        `num_train_timesteps * sigmas`, same shape and dtype.

    Raises:
        ValueError: `num_train_timesteps` is below 1.
    """
    _check_count("num_train_timesteps", num_train_timesteps)
    return sigmas * num_train_timesteps


def check_sigmas(sigmas: Tensor) -> None:
    """Refuse anything that is not a usable grid.

    Args:
        sigmas: candidate grid; expected [T+1] with T >= 1, floating, finite, in [0, 1], strictly decreasing.

    Raises:
        TypeError: not a floating point tensor.
        ValueError: wrong shape or values.
    """
    if not isinstance(sigmas, Tensor) or not sigmas.is_floating_point():
        raise TypeError(
            f"sigmas must be a floating point tensor, got {getattr(sigmas, 'dtype', type(sigmas).__name__)}"
        )
    if sigmas.ndim != 1 or sigmas.numel() < 2:
        raise ValueError(f"sigmas must have shape [T+1] with T >= 1, got {list(sigmas.shape)}")
    # In float32, as the steps will see them: values that are distinct in float64 may coincide.
    values = sigmas.to(torch.float32).tolist()
    if not all(math.isfinite(s) and 0 <= s <= 1 for s in values):
        raise ValueError(f"sigmas must be finite and in [0, 1], got {values}")
    if not all(after < before for before, after in zip(values, values[1:], strict=False)):
        raise ValueError(f"sigmas must be strictly decreasing, got {values}")


def _linspace(start: float, stop: float, count: int) -> list[float]:
    """Equally spaced float64 values, rounded as NumPy does; `torch.linspace` differs in the last bit."""
    if count == 1:
        return [start]
    step = (stop - start) / (count - 1)
    return [*(index * step + start for index in range(count - 1)), stop]


def _with_exact_ends(grid: Tensor) -> Tensor:
    # A shift leaves 1 where it is, but for some shifts float32 rounds it to 1 + 1e-7 or 1 - 6e-8. flow_sde
    # divides by 1 - sigma unless sigma is 1, so this one rounding of the hosts is not reproduced.
    return torch.cat([torch.ones(1), grid[1:].to(torch.float32), torch.zeros(1)])


def _check_count(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1, got {value!r}")


def _check_positive(name: str, value: float) -> None:
    if not math.isfinite(value) or value <= 0:
        raise ValueError(f"{name} must be finite and positive, got {value!r}")
