"""Counter-based Gaussian noise: the value of an element depends on what it is for, never on when it was
drawn.

The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). Its
64-bit key is the run's seed; its 128-bit counter names the use:

    word 0  element // 4            index in row-major order within one sample
    word 1  step | stream << 16     denoising step and purpose
    word 2  sample index            p*G + g, global over all ranks
    word 3  iteration                   iteration of the training loop

Four output words r make four normals by Box-Muller. Words (0, 1) give elements 4k (cosine) and 4k+1 (sine),
words (2, 3) give 4k+2 and 4k+3:

    u = ((r_even >> 8) + 1) * 2^-24 in (0, 1],   turn = (r_odd >> 8) * 2^-24 in [0, 1)
    sqrt(-2 ln u) * cos(2 pi turn),              sqrt(-2 ln u) * sin(2 pi turn)

Noise is thus the same whatever the batch order, its split over devices, the world size or the hardware. This
file defines it (integers exactly, floats as float64 arithmetic rounded to float32); compiled implementations
agree with it to atol = rtol = 1e-6. Checkpoints store `LAYOUT_VERSION`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

LAYOUT_VERSION = 1

_WORD = 0xFFFFFFFF
_HALF = 0xFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


class Stream(IntEnum):
    """Purpose of a draw; streams never overlap. Values are part of the layout (16 bits)."""

    INITIAL = 0
    """Initial latents of a rollout."""
    STEP = 1
    """Noise of the SDE steps of a rollout."""
    EVALUATION = 2
    """Initial latents of held-out evaluation."""
    CALIBRATION = 3
    """Draws of noise-level calibration."""
    BRANCH0 = 256
    """Step noise of branch 0 of a tree rollout; branch k uses `branch_stream(k)`."""


def branch_stream(branch: int) -> int:
    """Stream of the step noise of one branch of a tree rollout.

    Args:
        branch: index of the branch, in [0, 65279].

    Returns:
        stream number in [256, 65535].

    Raises:
        ValueError: the index does not fit.
    """
    if not 0 <= branch <= _HALF - Stream.BRANCH0:
        raise ValueError(f"branch must be in [0, {_HALF - Stream.BRANCH0}], got {branch}")
    return Stream.BRANCH0 + branch


def gaussian(
    shape_per_sample: Sequence[int],
    *,
    seed: int | Tensor,
    sample_index: Tensor,
    step: int | Tensor,
    stream: int = Stream.INITIAL,
    iteration: int | Tensor = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Standard normal noise for the samples named by their global indices.

    Tensor arguments are never read on the host, so the function may run inside a CUDA graph.

    Args:
        shape_per_sample: shape of one sample, without the batch dimension; at most 2^34 elements.
        seed: run seed, in [0, 2^63), or an int64 tensor of one element.
        sample_index: global index of every row, [B] int64, in [0, 2^32).
        step: denoising step in [0, 2^16), or one per row, [B] int64.
        stream: purpose of the draw, a `Stream` or `branch_stream(k)`.
        iteration: iteration in [0, 2^32), or an int64 tensor of one element.
        device: where to draw; default: that of `sample_index`.

    Returns:
        [B, *shape_per_sample] float32.

    Raises:
        TypeError: `sample_index` or another tensor argument is not int64.
        ValueError: a shape or an integer is out of range.
    """
    if not isinstance(sample_index, Tensor) or sample_index.dtype != torch.int64:
        raise TypeError(f"sample_index must be an int64 tensor, got {getattr(sample_index, 'dtype', sample_index)}")
    if sample_index.ndim != 1:
        raise ValueError(f"sample_index must have shape [B], got {list(sample_index.shape)}")
    check_stream(stream)
    device = sample_index.device if device is None else torch.device(device)
    sample_index = sample_index.to(device)
    batch, elements = sample_index.numel(), math.prod(shape_per_sample)
    step = integer_tensor("step", step, 16, (1, batch), device)
    iteration = integer_tensor("iteration", iteration, 32, (1,), device)
    seed = integer_tensor("seed", seed, 63, (1,), device)

    quads = torch.arange((elements + 3) // 4, device=device)
    counter = (
        quads[None, :],
        (step | (int(stream) << 16))[:, None],
        (sample_index & _WORD)[:, None],
        (iteration & _WORD)[:, None],
    )
    words = philox4x32(counter, (seed & _WORD, (seed >> 32) & _WORD))
    normals = torch.stack([*_box_muller(words[0], words[1]), *_box_muller(words[2], words[3])], dim=-1)
    return normals.flatten(1)[:, :elements].reshape(batch, *shape_per_sample)


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 on int64 tensors that hold unsigned 32-bit words.

    Args:
        counter: four tensors with values in [0, 2^32), mutually broadcastable.
        key: two tensors with values in [0, 2^32), broadcastable against the counter.

    Returns:
        four int64 tensors of the broadcast shape, values in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(_MULTIPLIERS[0], c0)
        high1, low1 = _multiply(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD, (k1 + _KEY_INCREMENTS[1]) & _WORD
    return c0, c1, c2, c3


def integer_tensor(
    name: str, value: int | Tensor, bits: int, sizes: tuple[int, ...], device: torch.device | str
) -> Tensor:
    """Bring a counter word to an int64 tensor, without reading tensors on the host.

    Args:
        name: argument name for messages.
        value: integer in [0, 2^bits), or an int64 tensor whose number of elements is one of `sizes`.
        bits: width of the field.
        sizes: accepted numbers of elements.
        device: where the result lies.

    Returns:
        1-D int64 tensor.

    Raises:
        TypeError: a tensor of another dtype, or not an integer.
        ValueError: out of range, or a tensor of another size.
    """
    if isinstance(value, Tensor):
        if value.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, got {value.dtype}")
        if value.numel() not in sizes or value.ndim > 1:
            allowed = " or ".join(f"[{size}]" for size in sizes)
            raise ValueError(f"{name} must have shape {allowed}, got {list(value.shape)}")
        return value.reshape(-1).to(device)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int or an int64 tensor, got {type(value).__name__}")
    if not 0 <= value < 1 << bits:
        raise ValueError(f"{name} must be in [0, 2^{bits}), got {value}")
    return torch.full((1,), value, dtype=torch.int64, device=device)


def check_stream(stream: int) -> None:
    """Refuse a stream number that does not fit its 16 bits.

    Raises:
        ValueError: not in [0, 65535].
    """
    if not 0 <= stream <= _HALF:
        raise ValueError(f"stream must be in [0, {_HALF}], got {stream}")


def _multiply(constant: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """High and low word of a 32x32-bit product, by 16-bit halves so that no int64 intermediate overflows."""
    low = constant * (word & _HALF)
    high = constant * (word >> 16) + (low >> 16)
    return high >> 16, ((high & _HALF) << 16) | (low & _HALF)


def _box_muller(radius_word: Tensor, turn_word: Tensor) -> tuple[Tensor, Tensor]:
    radius = (((radius_word >> 8) + 1).double() * 2.0**-24).log_().mul_(-2).sqrt_()
    angle = (turn_word >> 8).double() * (2.0**-24 * 2 * math.pi)
    return (radius * angle.cos()).float(), (radius * angle.sin()).float()
