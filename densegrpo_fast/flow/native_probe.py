"""The compiled CPU library's own random words and normals, for the tests of its generator."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from densegrpo_fast.flow.native import library


def philox4x32(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Random words.

    Args:
        counter: four words in [0, 2^32).
        key: two words in [0, 2^32).

    Returns:
        four words in [0, 2^32).

    Raises:
        RuntimeError: the library is missing.
    """
    out = (ctypes.c_uint32 * 4)()
    library().densegrpo_philox4x32((ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), out)
    return out[0], out[1], out[2], out[3]


def box_muller(radius_words: Tensor, turn_words: Tensor) -> tuple[Tensor, Tensor]:
    """Normals of given random words.

    Args:
        radius_words, turn_words: [N] int64, values in [0, 2^32).

    Returns:
        radius * cosine and radius * sine, each [N] float32.

    Raises:
        RuntimeError: the library is missing.
    """
    # The low halves of the words, as the bits of int32.
    words = [tensor.contiguous().view(torch.int32)[::2].contiguous() for tensor in (radius_words, turn_words)]
    cosine, sine = (torch.empty(len(radius_words)) for _ in range(2))
    pointers = [tensor.data_ptr() for tensor in (*words, cosine, sine)]
    library().densegrpo_box_muller(*pointers[:2], len(radius_words), *pointers[2:])
    return cosine, sine
