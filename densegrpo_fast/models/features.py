"""What one forward leaves behind for others: text keys and values, and residuals of blocks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from densegrpo_fast.models.cache_spec import CacheSpec

Rows = slice | Tensor
"""Rows of a node: a slice, or int64 indices [n] on the model's device."""


class Features:
    """Buffers for one forward of all rows; written in place, so their addresses never change.

    Attributes:
        shape: (image tokens N, text tokens L).
        text: [blocks, 2, rows, H, L, D/H] keys, normalised as the block does it, and values of the text stream; None
            if the spec keeps none.
        image_residual: [rows, N, D] what the reused blocks added to the image stream, or None.
        text_residual: [rows, L, D] the same of the text stream, or None.
        recorded: for each row whether it has been written since the last `forget`.

    Args:
        network: the transformer that will read them; gives dtype and device.
        spec: what to keep.
        rows: how many rows.
        image_tokens, text_tokens: N and L.
    """

    def __init__(self, network: Any, spec: CacheSpec, rows: int, image_tokens: int, text_tokens: int):
        count, width, heads = len(network.transformer_blocks), network.inner_dim, network.config.num_attention_heads
        blocks = spec.text_blocks(count)

        def buffer(wanted: bool, *shape: int) -> Tensor | None:
            return torch.empty(shape, dtype=network.dtype, device=network.device) if wanted else None

        self.shape = (image_tokens, text_tokens)
        self.text = buffer(bool(blocks), len(blocks), 2, rows, heads, text_tokens, width // heads)
        self.image_residual = buffer(bool(spec.reused), rows, image_tokens, width)
        self.text_residual = buffer(spec.keeps_text_residual(count), rows, text_tokens, width)
        self.recorded = [False] * rows

    def forget(self) -> None:
        """From now on nothing counts as recorded."""
        self.recorded = [False] * len(self.recorded)

    def has(self, rows: Rows) -> bool:
        """Whether these rows are recorded; for indices, which only the device knows: whether all rows are."""
        return all(self.recorded[rows] if isinstance(rows, slice) else self.recorded)

    def text_at(self, slot: int, rows: Rows) -> tuple[Tensor, Tensor]:
        """Keys and values [n, H, L, D/H] of the `slot`-th block with kept text."""
        if self.text is None:
            raise RuntimeError("feature cache: no text is kept")
        return take(self.text[slot, 0], rows), take(self.text[slot, 1], rows)

    def bytes(self) -> int:
        """Memory of the buffers."""
        buffers = (self.text, self.image_residual, self.text_residual)
        return sum(x.numel() * x.element_size() for x in buffers if x is not None)


def take(buffer: Tensor | None, rows: Rows) -> Tensor:
    """The rows of a buffer [rows, ...]; a view for a slice, a copy for indices."""
    if buffer is None:
        raise RuntimeError("feature cache: not among what its spec keeps")
    return buffer[rows] if isinstance(rows, slice) else buffer.index_select(0, rows)
